"""Sampling: from a prompt to latents to pictures. What enters and leaves is ComfyUI's own type wherever it has one."""

from __future__ import annotations

from contextlib import closing

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..core.families import check_size
from ..core.family import States
from ..core.sampling.guidance import CFG_SKIP_MODES
from ..core.sampling.sample import decode, sample
from ..core.sampling.schedule import Schedule
from ..core.sampling.solvers import SOLVERS
from ..core.shapes import VideoSize
from . import handles
from .progress import Progress, say

CATEGORY = "VideoLoRA/sampling"


class EncodeText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAEncodeText",
            display_name="Encode Prompt",
            category=CATEGORY,
            description="Turns a prompt into conditioning, for our sampler and for ComfyUI's own.",
            inputs=[
                handles.TextEncoderType.Input("text_encoder", tooltip="The text encoder of the model."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What is to be seen (or, for the "
                                "negative input of the sampler, what is not)."),
            ],
            outputs=[io.Conditioning.Output("conditioning", display_name="conditioning")],
        )  # fmt: skip

    @classmethod
    def execute(cls, text_encoder: handles.TextEncoderFile, prompt: str) -> io.NodeOutput:
        (states,) = text_encoder.load().encode([prompt])
        cross_attn, options = text_encoder.family.to_comfyui(states)
        return io.NodeOutput([[cross_attn, options]])


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
        if None in (width, height, frames):
            return True
        try:
            check_size(VideoSize(frames, height, width))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, dit: handles.DiTFile, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        size = dit.family.latent.latents(VideoSize(frames, height, width))
        samples = torch.zeros(batch_size, dit.family.latent.channels, *size, device=mm.intermediate_device())
        return io.NodeOutput({"samples": samples})


class FlowSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAFlowSchedule",
            display_name="Flow Schedule",
            category=CATEGORY,
            description="Number of steps, flow shift and solver.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, for its recommended flow shift."),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="More steps, more detail and time: 20 to 50."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Flow shift: higher spends more steps on composition and motion. 0 uses what the model's "
                               "authors recommend (5 for Wan 2.1)."),
                io.Combo.Input("solver", options=list(SOLVERS), default="euler", tooltip="How a step is computed."),
            ],
            outputs=[
                handles.ScheduleType.Output("schedule", display_name="schedule"),
                io.Sigmas.Output("sigmas", display_name="sigmas"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, steps: int, shift: float, solver: str) -> io.NodeOutput:
        schedule = Schedule(steps=steps, shift=shift or dit.variant.sampling_shift, solver=solver)
        say(f"flow shift {schedule.shift:g}, sigmas " + " ".join(f"{s:.3f}" for s in schedule.sigmas.tolist()),
            cls.hidden.unique_id)  # fmt: skip
        return io.NodeOutput(schedule, schedule.sigmas)


class CFGSkip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRACFGSkip",
            display_name="CFG Skip",
            category=CATEGORY,
            description="Leaves guidance out of some steps, which makes them twice as fast. The plan is shown under the node: a "
            "letter per step, A with guidance, S without.",
            inputs=[
                handles.ScheduleType.Input("schedule", tooltip="From Flow Schedule."),
                io.Float.Input("ratio", default=0.5, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="Share of the steps that keep guidance. 0.3 to 0.5 with 'late' or 'early_late' is a start."),
                io.Combo.Input("mode", options=list(CFG_SKIP_MODES), default="late",
                               tooltip="Which steps skip it: early, late, the middle, both ends (early_late), every other one "
                               "(alternate), or none."),
            ],
            outputs=[
                handles.ScheduleType.Output("planned", display_name="schedule"),
                io.String.Output("plan", display_name="plan"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, schedule: Schedule, ratio: float, mode: str) -> io.NodeOutput:
        planned = Schedule(
            steps=schedule.steps, shift=schedule.shift, solver=schedule.solver, cfg_skip=mode, cfg_ratio=ratio
        )
        say(planned.plan, cls.hidden.unique_id)
        return io.NodeOutput(planned, planned.plan)


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRASample",
            display_name="Sample Video",
            category=CATEGORY,
            description="Samples latents with the model and the LoRAs applied to it.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, from its loader or from Apply LoRAs."),
                io.Conditioning.Input("positive", tooltip="What is to be seen; from Encode Prompt or ComfyUI's own encoder."),
                io.Conditioning.Input("negative", optional=True, tooltip="What is not to be seen. Not linked: no guidance."),
                io.Latent.Input("latent", tooltip="The size of the video; from Empty Video Latent."),
                handles.ScheduleType.Input("schedule", tooltip="From Flow Schedule or CFG Skip."),
                io.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How strongly to follow the prompt. 1 switches guidance off and halves the time; 0 uses "
                               "what the model's authors recommend (5 for Wan 2.1)."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="The same seed gives the same video; the same noise as ComfyUI's own samplers."),
                io.Float.Input("low_guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True, advanced=True,
                               tooltip="Of the low-noise expert of Wan 2.2. 0: as guidance."),
            ],
            outputs=[io.Latent.Output("sampled", display_name="latent")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, positive, latent, schedule: Schedule, guidance: float, seed: int,
                negative=None, low_guidance: float = 0.0) -> io.NodeOutput:  # fmt: skip
        family, samples = dit.family, latent["samples"]
        start = family.latent.to_model(samples.float())
        if "noise_mask" in latent or samples.any():
            raise ValueError(
                "the latent is not empty: only sampling from noise is possible so far. Link Empty Video Latent."
            )
        told, away = (conditioning and _states(dit, conditioning, start) for conditioning in (positive, negative))
        if low_guidance and dit.low is None:
            raise ValueError("low_guidance is for a pair of experts, and this is one model: set it to 0.")
        scales = {one.variant.expert: guidance or one.variant.guidance for one in dit.experts}
        scales |= {"low": low_guidance} if low_guidance else {}
        progress = Progress(cls.hidden.unique_id, schedule.steps)
        with dit.at_work(start, scales) as model:
            scale = model.guidance_at if dit.low else scales[dit.variant.expert]
            steps = sample(model, family, start, told, away, schedule, scale, seed, mm.get_torch_device())
            with closing(steps):
                for done, reached in enumerate(steps, start=1):
                    progress.update(done, schedule.steps)
                    sampled = reached
        return io.NodeOutput({**latent, "samples": family.latent.from_model(sampled).to(samples.device)})


def _states(dit: handles.DiTFile, conditioning, latents: torch.Tensor) -> States:
    """What the model is told, checked: it must be able to take all of it with these latents."""
    if len(conditioning) != 1:
        raise ValueError(f"the conditioning has {len(conditioning)} parts; one prompt at a time can be sampled.")
    cross_attn, options = conditioning[0]
    width = dit.part.text_width
    if cross_attn.shape[-1] != width:
        raise ValueError(f"the conditioning has width {cross_attn.shape[-1]} and {dit.variant.title} takes {width}: it was "
                         "made by the text encoder of another model.")  # fmt: skip
    states = dit.family.from_comfyui(cross_attn, options)
    shapes = {name: value.shape for name, value in states.items()}
    dit.family.check_states(dit.part.config, shapes, VideoSize(*latents.shape[2:]))
    return states


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
