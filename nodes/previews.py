"""Settings of previews: prompts that are sampled while training. Their texts are encoded here, before it starts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.data import cache_files
from ..core.data.media import UnreadableMedia, read_image
from ..core.io.files import digest
from ..core.sampling.solvers import SOLVERS
from ..core.shapes import VideoSize
from ..core.training.prompts import Preview, PreviewSettings, Prompt, encode_prompts, parse_lines, read_prompts
from . import handles, paths
from .images import encoded

CATEGORY = "VideoLoRA/training"
_MOST_PROMPTS = 32


class PreviewSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PreviewSettings()
        return io.Schema(
            node_id="VideoLoRAPreviewSettings",
            display_name="Preview Settings",
            category=CATEGORY,
            description="Samples videos or pictures while training, to see what the LoRA has learnt. They appear under the training "
            "node and in the run's folder.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model to be trained, for what its authors recommend."),
                handles.TextEncoderType.Input("text_encoder", tooltip="Encodes the prompts, before the training starts."),
                handles.Vae.Input("vae", optional=True,
                                  tooltip="Decodes the previews. Not linked: only latents are kept, for ComfyUI's Load Latent."),
                io.String.Input("prompts", default="", multiline=True,
                                tooltip="A prompt in each line. Options may follow it: --w 832 --h 480 --f 81 --s 30 --d 7 (seed) "
                                "--l 5 (guidance) --fs 5 (flow shift) --n what is not to be seen --i start.png."),
                io.Int.Input("every_steps", default=100, min=0, max=1000000, tooltip="Previews every so many steps. 0: not."),
                io.Int.Input("every_epochs", default=default.every_epochs, min=0, max=100000,
                             tooltip="Previews every so many passes through the data. 0: not."),
                io.Boolean.Input("at_start", default=default.at_start, tooltip="Also before the first step, to compare with."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height in pixels."),
                io.Int.Input("frames", default=17, min=1, max=1001, step=4,
                             tooltip="Number of frames, 4n+1. 1 makes a picture, which is much quicker."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps. 20 are enough for a look."),
                io.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="1 switches guidance off and halves the time; 0 uses what the model's authors recommend."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Flow shift. 0 uses what the model's authors recommend."),
                io.Int.Input("seed", default=42, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="The same in all previews, so that they compare."),
                io.String.Input("negative_prompt", default="", multiline=True, optional=True, advanced=True,
                                tooltip="What is not to be seen. Empty: what the model's authors recommend."),
                io.String.Input("file", default="", optional=True, advanced=True,
                                tooltip="A file of more prompts (.txt, .toml or .json), below ComfyUI's input folder or a data set "
                                "folder."),
                io.Combo.Input("solver", options=list(SOLVERS), default="euler", optional=True,
                               tooltip="As in Flow Schedule: with the same solver, steps and seed the sampling nodes give the same."),
                io.Image.Input("start_image", optional=True, tooltip="What the previews of an image-to-video model begin with."),
                io.Image.Input("end_image", optional=True, tooltip="What those of a first-last-frame model end with."),
                handles.VisionEncoderType.Input("clip_vision", optional=True, tooltip="For Wan 2.1 and HunyuanVideo 1.5 image-to-video."),
            ],
            outputs=[handles.Previews.Output("previews", display_name="previews")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompts: str | None, file: str | None = "") -> bool | str:
        try:
            parse_lines(prompts or "")
            if file:
                paths.data_path(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, prompts: str = "", file: str = "", **_) -> list:
        given = parse_lines(prompts or "") + (read_prompts(paths.data_path(file)) if file else [])
        named = [name for one in given for name in (one.image_path, one.end_image_path) if name]
        files = [paths.data_path(name) for name in filter(None, [file, *named])]
        return [[str(path), path.stat().st_mtime_ns] for path in files if path.exists()]

    @classmethod
    def execute(cls, dit: handles.DiTFile, text_encoder: handles.TextEncoderFile, prompts: str, every_steps: int,
                every_epochs: int, at_start: bool, vae: handles.VAEFile | None = None, file: str = "", solver: str = "euler",
                start_image=None, end_image=None, clip_vision: handles.VisionEncoderFile | None = None, **defaults: Any) -> io.NodeOutput:  # fmt: skip
        for part in (text_encoder, vae):
            if part is not None:
                handles.check_family(dit, part)
        given = parse_lines(prompts) + (read_prompts(paths.data_path(file)) if file else [])
        if not 0 < len(given) <= _MOST_PROMPTS:
            raise ValueError(f"there are {len(given)} prompts for previews: give 1 to {_MOST_PROMPTS}.")
        filled = [prompt.filled(_defaults(dit, **defaults)) for prompt in given]
        previews = tuple(
            _with_images(one, dit, vae, _image(prompt, prompt.image_path, start_image),
                         _image(prompt, prompt.end_image_path, end_image), clip_vision)
            for prompt, one in zip(filled, _previews(filled, dit, text_encoder, solver), strict=True)
        )  # fmt: skip
        return io.NodeOutput(PreviewSettings(
            prompts=previews, every_steps=every_steps, every_epochs=every_epochs, at_start=at_start,
            vae=str(vae.path) if vae else "", tile_frames=vae.tile_frames if vae else 0,
            tile_size=vae.tile_size if vae else 0,
        ))  # fmt: skip


def _defaults(dit: handles.DiTFile, *, width: int, height: int, frames: int, steps: int, guidance: float, shift: float,
              seed: int, negative_prompt: str = "") -> Prompt:  # fmt: skip
    """What a prompt that does not choose is sampled with."""
    variant = dit.variant
    return Prompt(
        prompt="", negative_prompt=negative_prompt or variant.negative_prompt, width=width, height=height,
        frame_count=frames, seed=seed, sample_steps=steps, cfg_scale=guidance or variant.guidance,
        discrete_flow_shift=shift,
    )  # fmt: skip


def _previews(prompts: list[Prompt], dit: handles.DiTFile, encoder: handles.TextEncoderFile,
              solver: str) -> tuple[Preview, ...]:  # fmt: skip
    """The prompts checked, and with their texts encoded."""
    for one in prompts:
        try:
            dit.family.latent.check(VideoSize(one.frame_count, one.height, one.width))
            dit.variant.guidance_states(one.guidance_scale or 0.0)
        except ValueError as error:
            raise ValueError(f"preview '{one.prompt[:40]}': {error}") from error
    texts = [text for one in prompts for text in (one.prompt, *_negative(one))]
    states = encode_prompts(texts, paths.prompts_folder(), dit.family, encoder.identity, encoder.load)
    return tuple(
        Preview(
            prompt=one.prompt, states=states[one.prompt], negative_states="".join(states[text] for text in _negative(one)),
            width=one.width, height=one.height, frames=one.frame_count, seed=one.seed, steps=one.sample_steps,
            guidance=one.cfg_scale, shift=one.shift_for(dit.variant), solver=solver,
            embedded_guidance=one.guidance_scale or 0.0,
        )
        for one in prompts
    )  # fmt: skip


def _image(prompt: Prompt, name: str | None, otherwise: Tensor | None) -> Tensor | None:
    """The image that a prompt names, below ComfyUI's input folder or a data set folder, as IMAGE (1, H, W, 3) in 0..1."""
    if not name:
        return otherwise
    try:
        frames = read_image(paths.data_path(name), (prompt.width, prompt.height))
    except (UnreadableMedia, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    return torch.from_numpy(frames).float() / 255


def _with_images(preview: Preview, dit: handles.DiTFile, vae: handles.VAEFile | None, start_image, end_image,
                 clip_vision: handles.VisionEncoderFile | None) -> Preview:  # fmt: skip
    """The preview with what an image-to-video model is told of its images in a file; as it is without a model or images
    that need it."""
    if start_image is None and end_image is None and not dit.variant.images:
        return preview
    if start_image is None or vae is None:
        raise ValueError(f"previews of {dit.variant.title} begin with an image: link a start image and the VAE.")
    size = VideoSize(preview.frames, preview.height, preview.width)
    pictures = [
        None if one is None else hashlib.sha256(one.cpu().numpy().tobytes()).hexdigest()
        for one in (start_image, end_image)
    ]
    name = digest([size, vae.identity, clip_vision and clip_vision.identity, pictures])
    path = paths.prompts_folder() / f"{name}.safetensors"
    if not cache_files.is_current(path, name):
        told = encoded(dit, vae, size, start_image, end_image, clip_vision)
        shapes = {key: value.shape for key, value in told.items()}
        dit.family.check_states(dit.part.config, dit.variant.images, shapes, dit.family.latent.latents(size))
        cache_files.save_text(path, told, "", dit.family, name)
    return replace(preview, images=str(path))


def _negative(prompt: Prompt) -> list[str]:
    """The text to guide away from; at guidance 1 there is none."""
    return [] if prompt.cfg_scale == 1 else [prompt.negative_prompt]
