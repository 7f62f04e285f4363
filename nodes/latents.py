"""Latents: from a size or a video, to files and back, and to frames. What enters and leaves is ComfyUI's own type."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..core.data.media import UnreadableMedia, probe, read_windows
from ..core.data.windows import Window
from ..core.io import latents as latent_files
from ..core.sampling.sample import decode
from ..core.shapes import VideoSize
from . import handles, paths
from .progress import Progress, say

CATEGORY = "VideoLoRA/sampling"


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAEmptyLatent",
            display_name="Empty Video Latent",
            category=CATEGORY,
            description="Size and length of the video to be sampled.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, which decides what sizes are possible."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height in pixels."),
                io.Int.Input(
                    "frames", default=81, min=1, max=1001, step=4, tooltip="Number of frames, 4n+1. 1 makes a picture."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos at once."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent")],
        )

    @classmethod
    def validate_inputs(cls, width, height, frames) -> bool | str:
        return handles.checked_size(width, height, frames)

    @classmethod
    def execute(cls, dit: handles.DiTFile, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        size = dit.family.latent.latents(VideoSize(frames, height, width))
        samples = torch.zeros(batch_size, dit.family.latent.channels, *size, device=mm.intermediate_device())
        return io.NodeOutput({"samples": samples})


class EncodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAEncodeVideo",
            display_name="Encode Video",
            category=CATEGORY,
            description="Encodes the frames of a video to latents, for video to video: the sampler's strength says how much of it "
            "stays.",
            inputs=[
                handles.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Image.Input("frames", tooltip="The frames, in order, from Load Video Frames or Get Video Components. Frames at the end "
                               "that make no whole latent frame (4n+1) are left out; sides are cut to a multiple of 16."),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae: handles.VAEFile, frames: torch.Tensor) -> io.NodeOutput:
        spec = vae.family.latent
        size = spec.largest_within(VideoSize(*frames.shape[:3]))
        left, top = (frames.shape[2] - size.width) // 2, (frames.shape[1] - size.height) // 2
        kept = frames[: size.frames, top : top + size.height, left : left + size.width, :3]
        if kept.shape[:3] != frames.shape[:3]:
            say(f"{size.frames} of {len(frames)} frames, cut to {size.width} x {size.height}", cls.hidden.unique_id)
        model = vae.load(size)
        video = kept.movedim(-1, 0).unsqueeze(0).to(mm.get_torch_device(), vae.dtype).mul_(2).sub_(1)  # (1, 3, F, H, W)
        return io.NodeOutput({"samples": model.encode(video).float().to(mm.intermediate_device())})


class LoadFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadFrames",
            display_name="Load Video Frames",
            category=CATEGORY,
            description="The frames of a video, or of a folder of images, as the model wants them: at its frame rate, resized to "
            "cover the size and cropped to its middle.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, which decides the frame rate."),
                io.Combo.Input("source", options=paths.clips(), upload=io.UploadType.video,
                               tooltip="A video in ComfyUI's input folder, or a folder of images below it, which are frames in "
                               "the order of their names."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height in pixels."),
                io.Int.Input("frames", default=81, min=1, max=1001, step=4,
                             tooltip="Number of frames, 4n+1. Of a shorter clip all are taken that make whole latent frames."),
                io.Int.Input("start", default=0, min=0, max=1_000_000, optional=True, advanced=True,
                             tooltip="The first frame, counted at the model's frame rate."),
            ],
            outputs=[io.Image.Output("images", display_name="frames")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, source, width, height, frames) -> bool | str:
        try:
            if source is not None and not paths.data_path(source).exists():
                return f"'{source}' is not in ComfyUI's input folder."
        except ValueError as error:
            return str(error)
        return handles.checked_size(width, height, frames)

    @classmethod
    def fingerprint_inputs(cls, source: str = "", **_) -> list:
        return paths.clip_state(source)

    @classmethod
    def execute(
        cls, dit: handles.DiTFile, source: str, width: int, height: int, frames: int, start: int = 0
    ) -> io.NodeOutput:
        path, family = paths.data_path(source), dit.family
        try:
            there = probe(path, family.fps).frames - start
            if there < 1:
                raise ValueError(f"'{source}' has {there + start} frames at {family.fps} per second: start below that.")
            count = family.latent.frames_at_most(min(frames, there))
            ((_, images),) = read_windows(path, [Window(start, count)], (width, height), family.fps)
        except UnreadableMedia as error:
            raise ValueError(f"'{source}': {error}.") from error
        if count < frames:
            say(f"{count} frames: the clip is no longer", cls.hidden.unique_id)
        return io.NodeOutput(torch.from_numpy(images).float().div_(255))  # (F, H, W, 3)


class SaveLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRASaveLatents",
            display_name="Save Video Latents",
            category=CATEGORY,
            description="Keeps latents in ComfyUI's output/latents, to be decoded later, with what they were sampled from: prompt, "
            "seed, size and settings. ComfyUI's own Load Latent opens the file too.",
            inputs=[
                io.Latent.Input("latent", tooltip="From Sample Video, or any latent."),
                io.String.Input("name", default="video", tooltip="Name of the file; a number is added. May hold a folder."),
            ],
            outputs=[
                io.Latent.Output("saved", display_name="latent"),
                io.String.Output("path", display_name="path"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("latents", name)

    @classmethod
    def execute(cls, latent, name: str) -> io.NodeOutput:
        path = latent_files.save_numbered(
            paths.output_file("latents", name).with_suffix(""), latent["samples"], latent.get(handles.SAMPLED_WITH, {})
        )
        say(str(path), cls.hidden.unique_id)
        return io.NodeOutput(latent, str(path), ui={"latents": [paths.shown(path)]})


class LoadLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadLatents",
            display_name="Load Video Latents",
            category=CATEGORY,
            description="Opens latents that were saved, to decode them or to sample on. What they were sampled from is shown under "
            "the node.",
            inputs=[
                io.Combo.Input("file", options=paths.latent_files(),
                               tooltip="A file in ComfyUI's output/latents, or a .latent file in its input folder."),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent"),
                io.String.Output("sampled_with", display_name="sampled with"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        try:
            return file is None or bool(paths.latent_path(file))
        except ValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> list:
        path = paths.latent_path(file)
        return [str(path), path.stat().st_mtime_ns]

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        samples, sampled_with = latent_files.load(paths.latent_path(file))
        text = "\n".join(f"{name}: {value}" for name, value in sampled_with.items())
        say(text, cls.hidden.unique_id)
        return io.NodeOutput(
            {"samples": samples.to(mm.intermediate_device()), handles.SAMPLED_WITH: sampled_with}, text
        )


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADecode",
            display_name="Decode Video",
            category=CATEGORY,
            description="Decodes latents to frames, a few at a time, for Create Video and Save Video.",
            inputs=[
                handles.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Latent.Input("latent", tooltip="From Sample Video, or any latent of this model."),
                io.Int.Input(
                    "trim_tail_frames",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Leave out so many frames at the end: 3 where an end image was added to a model that was not "
                    "made for it.",
                ),
            ],
            outputs=[io.Image.Output("frames", display_name="frames")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae: handles.VAEFile, latent, trim_tail_frames: int = 0) -> io.NodeOutput:
        family, samples = vae.family, latent["samples"]
        family.latent.check_latents(samples)
        pixels = family.latent.pixels(VideoSize(*samples.shape[2:]))
        if trim_tail_frames >= pixels.frames:
            raise ValueError(f"{trim_tail_frames} of {pixels.frames} frames are to be left out: leave some.")
        images = torch.empty(len(samples) * pixels.frames, pixels.height, pixels.width, 3)
        progress = Progress(cls.hidden.unique_id, len(images))
        model = vae.load(pixels)
        for index, one in enumerate(samples.to(mm.get_torch_device()).split(1)):
            for first, frames in decode(model, family, one):
                begin = index * pixels.frames + first
                images[begin : begin + len(frames)] = frames
                progress.update(begin + len(frames), len(images))
        kept = images.unflatten(0, (len(samples), pixels.frames))[:, : pixels.frames - trim_tail_frames]
        return io.NodeOutput(kept.flatten(0, 1))
