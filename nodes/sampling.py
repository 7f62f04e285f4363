"""Sampling: from a prompt to latents. What enters and leaves is ComfyUI's own type wherever it has one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import latent_preview
import torch
from comfy import latent_formats
from comfy_api.latest import io
from PIL import Image

from ..core.family import GUIDANCE, Family, States, Variant
from ..core.lora.inventory import blocks_of
from ..core.modules.attention import BACKENDS
from ..core.sampling.guidance import CFG_SKIP_MODES, SKIP_LAYER_MODES, SkipLayers
from ..core.sampling.sample import sample
from ..core.sampling.schedule import Schedule
from ..core.sampling.solvers import SOLVERS
from ..core.shapes import VideoSize
from ..core.training.prompts import Prompt, parse_lines
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
        return io.NodeOutput([[cross_attn, {**options, handles.PROMPT: prompt}]])


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAPromptList",
            display_name="Prompt List",
            category=CATEGORY,
            description="Several prompts in one go: whatever is linked to the outputs is done once for each of them.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, for what its authors recommend where a line says nothing."),
                io.String.Input("prompts", multiline=True, tooltip="A prompt in each line. Options may follow it: --w 832 --h 480 "
                                "--f 81 --s 30 --d 7 (seed) --l 5 (guidance) --fs 5 (flow shift) --g 6 (embedded guidance) --n what is not to be seen."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="Of lines that name none."),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt", is_output_list=True),
                io.String.Output("negative", display_name="negative prompt", is_output_list=True),
                io.Int.Output("each_seed", display_name="seed", is_output_list=True),
                io.Int.Output("width", display_name="width", is_output_list=True),
                io.Int.Output("height", display_name="height", is_output_list=True),
                io.Int.Output("frames", display_name="frames", is_output_list=True),
                io.Int.Output("steps", display_name="steps", is_output_list=True),
                io.Float.Output("guidance", display_name="guidance", is_output_list=True),
                io.Float.Output("shift", display_name="flow shift", is_output_list=True),
                io.Float.Output("embedded_guidance", display_name="embedded guidance", is_output_list=True),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompts: str | None) -> bool | str:
        try:
            return prompts is None or bool(parse_lines(prompts)) or "there is no prompt: write one in each line."
        except ValueError as error:
            return str(error)

    @classmethod
    def execute(cls, dit: handles.DiTFile, prompts: str, seed: int) -> io.NodeOutput:
        variant = dit.variant
        default = Prompt(
            prompt="", negative_prompt=variant.negative_prompt, width=variant.size.width, height=variant.size.height,
            frame_count=variant.size.frames, seed=seed, sample_steps=variant.steps, cfg_scale=variant.guidance,
            guidance_scale=0.0,
        )  # fmt: skip
        lines = [prompt.filled(default) for prompt in parse_lines(prompts)]
        lines = [replace(line, discrete_flow_shift=line.shift_for(variant)) for line in lines]
        return io.NodeOutput(*(
            [getattr(line, name) for line in lines]
            for name in ("prompt", "negative_prompt", "seed", "width", "height", "frame_count", "sample_steps", "cfg_scale",
                         "discrete_flow_shift", "guidance_scale")
        ))  # fmt: skip


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
                               "authors recommend (5 for Wan 2.1, 7 for HunyuanVideo and 17 below 20 steps)."),
                io.Combo.Input("solver", options=list(SOLVERS), default="euler", tooltip="How a step is computed. unipc is what Wan's authors use."),
                io.Latent.Input("latent", optional=True, tooltip="The video to be sampled, where the recommended flow shift depends on "
                                "its size (Wan 2.1 image-to-video: 3 at 832x480)."),
            ],
            outputs=[
                handles.ScheduleType.Output("schedule", display_name="schedule"),
                io.Sigmas.Output("sigmas", display_name="sigmas"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, steps: int, shift: float, solver: str, latent=None) -> io.NodeOutput:
        size = dit.family.latent.pixels(VideoSize(*latent["samples"].shape[2:])) if latent else dit.variant.size
        schedule = schedule_for(dit.variant, size, steps, shift, solver)
        say(f"flow shift {schedule.shift:g}, sigmas " + " ".join(f"{s:.3f}" for s in schedule.sigmas.tolist()),
            cls.hidden.unique_id)  # fmt: skip
        return io.NodeOutput(schedule, schedule.sigmas)


def schedule_for(variant: Variant, size: VideoSize, steps: int, shift: float, solver: str) -> Schedule:
    """A schedule for videos of this size in pixels; flow shift 0 is what is recommended for them."""
    return Schedule(steps=steps, shift=shift or variant.shift_for(size.width, size.height, steps), solver=solver)


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
        planned = replace(schedule, cfg_skip=mode, cfg_ratio=ratio)
        say(planned.plan, cls.hidden.unique_id)
        return io.NodeOutput(planned, planned.plan)


class SkipLayerGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = SkipLayers(layers=(0,))
        return io.Schema(
            node_id="VideoLoRASkipLayerGuidance",
            display_name="Skip Layer Guidance",
            category=CATEGORY,
            description="Also leads away from what the model makes without some of its blocks, in a part of the steps; often steadier "
            "motion and anatomy. Works where guidance does.",
            inputs=[
                handles.ScheduleType.Input("schedule", tooltip="From Flow Schedule or CFG Skip."),
                io.String.Input("layers", default="9,10", tooltip="Numbers of the blocks to leave out, from 0. One or two in the "
                                "middle of the model are a start: 9,10."),
                io.Combo.Input("mode", options=list(SKIP_LAYER_MODES), default=default.mode,
                               tooltip="uncond: the pass with the negative prompt is made without them and costs nothing more. "
                               "original: a third pass."),
                io.Float.Input("scale", default=default.scale, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How strongly to lead away, in mode original; 3 is usual."),
                io.Float.Input("start", default=default.start, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="From this share of the steps on."),
                io.Float.Input("end", default=default.end, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="Up to this share of the steps; 0.3 leaves the details alone."),
            ],
            outputs=[handles.ScheduleType.Output("planned", display_name="schedule")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, layers: str | None, mode, start, end) -> bool | str:
        if None in (layers, start, end):
            return True
        try:
            SkipLayers(layers=_numbers(layers), start=start, end=end)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, schedule: Schedule, layers: str, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(replace(schedule, skip_layers=SkipLayers(layers=_numbers(layers), **settings)))


def _numbers(text: str) -> tuple[int, ...]:
    """'9, 10' -> (9, 10)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"layers are '{text}': give numbers with commas, as in 9,10.")
    return tuple(map(int, parts))


class SamplingMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = handles.Running()
        precisions = [*handles.PRECISIONS, *handles.FP8_PRECISIONS, handles.FAST_FP8]
        return io.Schema(
            node_id="VideoLoRASamplingMemory",
            display_name="Sampling Memory and Speed",
            category=CATEGORY,
            description="How the model is held and run when it samples. Training has Memory Settings of its own.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, or both experts."),
                io.Combo.Input("precision", options=precisions, default="auto",
                               tooltip="auto: fp8 where the file is, else bfloat16 (float32 on the CPU). fp8_scaled halves the "
                               "memory and is more exact than fp8; fp8_fast also multiplies in fp8, on RTX 40 cards and newer."),
                io.Int.Input("block_swap", default=default.block_swap, min=0, max=100,
                             tooltip="So many blocks of the model stay in the computer's memory and visit the card two at a time."),
                io.Combo.Input("attention", options=list(BACKENDS), default=default.attention,
                               tooltip="How attention is computed. sdpa is always there; the others need their packages. sage is "
                               "the fastest and a little less exact."),
                io.Boolean.Input("compile", default=default.compile,
                                 tooltip="Compiles the blocks: a minute at the first step, then often 10 to 20 percent faster."),
                io.Boolean.Input("batch_guidance", default=default.batch_guidance, optional=True, advanced=True,
                                 tooltip="Makes the passes with and without the prompt as one batch, where guidance is not 1: somewhat "
                                 "faster for small videos, more memory."),
            ],
            outputs=[handles.DiT.Output("set_up", display_name="dit")],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, precision: str, **running: Any) -> io.NodeOutput:
        return io.NodeOutput(dit.run_as(precision, handles.Running(**running)))


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
                io.Latent.Input("latent", tooltip="The size of the video, from Empty Video Latent; or a video, from Encode Video "
                                "or any VAE Encode, and a strength below 1."),
                handles.ScheduleType.Input("schedule", tooltip="From Flow Schedule or CFG Skip."),
                io.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How strongly to follow the prompt. 1 switches guidance off and halves the time; 0 uses "
                               "what the model's authors recommend (5 for Wan 2.1, 1 for HunyuanVideo, 6 for SkyReels V1)."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="The same seed gives the same video; the same noise as ComfyUI's own samplers."),
                io.Float.Input("low_guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True, advanced=True,
                               tooltip="Of the low-noise expert of Wan 2.2. 0: as guidance."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, optional=True,
                               tooltip="For video to video: how much is made anew. 1 takes nothing of the latent but its size, 0 "
                               "gives it back; 0.5 to 0.8 keep the composition."),
                io.Float.Input("embedded_guidance", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True,
                               tooltip="Guidance that HunyuanVideo and SkyReels V1 are told, which costs no time. 0: what the "
                               "conditioning says (Flux Guidance), else what the authors recommend (6, and 1 for SkyReels V1)."),
            ],
            outputs=[io.Latent.Output("sampled", display_name="latent")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, positive, latent, schedule: Schedule, guidance: float, seed: int,
                negative=None, low_guidance: float = 0.0, strength: float = 1.0, embedded_guidance: float = 0.0) -> io.NodeOutput:  # fmt: skip
        family, samples = dit.family, latent["samples"]
        start = family.latent.to_model(samples.float())
        if "noise_mask" in latent:
            raise ValueError(
                "the latent has a noise mask, and only whole videos are sampled: take Set Latent Noise Mask away."
            )
        told, away = (
            conditioning and _states(dit, conditioning, start, embedded_guidance)
            for conditioning in (positive, negative)
        )
        if low_guidance and dit.low is None:
            raise ValueError("low_guidance is for a pair of experts, and this is one model: set it to 0.")
        scales = {one.variant.expert: guidance or one.variant.guidance for one in dit.experts}
        scales |= {"low": low_guidance} if low_guidance else {}
        _check_skip_layers(schedule, dit, away is not None and set(scales.values()) != {1.0})
        device, total = mm.get_torch_device(), int(schedule.steps * strength)
        progress, preview = Progress(cls.hidden.unique_id, total), _previewer(family, device)
        reached = start
        with dit.at_work(start, scales) as model:
            scale = model.guidance_at if dit.low else scales[dit.variant.expert]
            steps = sample(model, family, start, told, away, schedule, scale, seed, device, strength,
                           dit.running.batch_guidance)  # fmt: skip
            with closing(steps):
                for done, (latents, denoised) in enumerate(steps, start=1):
                    progress.update(done, total, picture=preview(denoised) if done < total else None)
                    reached = latents
        sampled_with = {
            "prompt": _prompt(positive), "negative_prompt": _prompt(negative), "seed": seed, "strength": strength,
            "guidance": " / ".join(f"{value:g}" for value in scales.values()),
            "embedded_guidance": f"{float(told[GUIDANCE]):g}" if GUIDANCE in told else "", "steps": schedule.steps,
            "flow_shift": schedule.shift, "solver": schedule.solver, "plan": schedule.plan,
            "model": " / ".join(one.path.name for one in dit.experts),
            "loras": ", ".join(f"{lora.path.name} x {lora.multiplier:g}" for one in dit.experts for lora in one.loras),
            "size": " x ".join(map(str, family.latent.pixels(VideoSize(*samples.shape[2:]))[::-1])),
        }  # fmt: skip
        return io.NodeOutput({
            **latent, "samples": family.latent.from_model(reached).to(samples.device),
            handles.SAMPLED_WITH: {name: str(value) for name, value in sampled_with.items() if value not in ("", None)},
        })  # fmt: skip


def _check_skip_layers(schedule: Schedule, dit: handles.DiTFile, guides: bool) -> None:
    """Raise ValueError when skip-layer guidance is asked for and cannot work."""
    if schedule.skip_layers is None:
        return
    blocks = len(blocks_of(dit.matrices))
    if max(schedule.skip_layers.layers) >= blocks:
        raise ValueError(
            f"layer {max(schedule.skip_layers.layers)} is to be left out, and this model has layers 0 to {blocks - 1}."
        )
    if not guides:
        raise ValueError(
            "skip-layer guidance works with guidance only: link a negative prompt and set guidance above 1."
        )


def _previewer(family: Family, device: torch.device) -> Callable[[torch.Tensor], Image.Image | None]:
    """What shows latents in model space while they are sampled, by the method that is set in ComfyUI."""
    previewer = latent_preview.get_previewer(device, getattr(latent_formats, family.comfyui_latents)())
    return (lambda _: None) if previewer is None else lambda x: previewer.decode_latent_to_preview_image("JPEG", x)[1]


def _prompt(conditioning) -> str:
    return conditioning[0][1].get(handles.PROMPT, "") if conditioning else ""


def _states(dit: handles.DiTFile, conditioning, latents: torch.Tensor, embedded_guidance: float) -> States:
    """What the model is told, checked: it must be able to take all of it with these latents."""
    if len(conditioning) != 1:
        raise ValueError(f"the conditioning has {len(conditioning)} parts; one prompt at a time can be sampled.")
    cross_attn, options = conditioning[0]
    width = dit.part.text_width
    if cross_attn.shape[-1] != width:
        raise ValueError(f"the conditioning has width {cross_attn.shape[-1]} and {dit.variant.title} takes {width}: it was "
                         "made by the text encoder of another model.")  # fmt: skip
    states = dit.family.from_comfyui(
        cross_attn, {name: value for name, value in options.items() if name != handles.PROMPT}
    )
    chosen = dit.variant.guidance_states(embedded_guidance)
    states = {**states, **chosen} if embedded_guidance else {**chosen, **states}
    shapes = {name: value.shape for name, value in states.items()}
    dit.family.check_states(dit.part.config, dit.variant.images, shapes, VideoSize(*latents.shape[2:]))
    return states
