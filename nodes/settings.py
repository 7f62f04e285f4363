"""Small optional nodes for the training node. Their defaults and limits are those of the engine's dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..core.io.files import fingerprint
from ..core.lora.adapter import KINDS
from ..core.lora.loraid import UNITS, Loraid, allocate
from ..core.modules.attention import BACKENDS
from ..core.shapes import VideoSize
from ..core.training import chart
from ..core.training.job import (
    BASE_PRECISIONS,
    FILE_PRECISIONS,
    MEMORY_MODES,
    MemorySettings,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TimestepSettings,
    WatchSettings,
)
from ..core.training.loss import WEIGHTINGS
from ..core.training.optimizers import OPTIMIZERS
from ..core.training.schedules import SCHEDULES
from ..core.training.timesteps import DENSITIES, SAMPLINGS, WHOLE, squares
from . import handles, paths
from .progress import say

CATEGORY = "VideoLoRA/training"
_NOTHING = "nothing"


def _defaults(cls: type) -> dict[str, Any]:
    return {entry.name: entry.default for entry in fields(cls)}


def _checked(cls: type, check: Callable[[Any], None] = lambda made: None, **values: Any) -> bool | str:
    """The dataclass's own checks and one more, before anything runs. Linked inputs arrive as None and are checked when
    they run."""
    try:
        check(cls(**{name: value for name, value in values.items() if value is not None}))
    except (ValueError, TypeError) as error:
        return str(error)
    return True


class SelectLORAID(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(Loraid)
        return io.Schema(
            node_id="VideoLoRASelectLORAID",
            display_name="Select LORAID",
            category=CATEGORY,
            description="Gives the LoRA a share of the model that no other LORAID touches, and shows which. LoRAs of different "
            "LORAIDs (with the same unit settings) can be loaded and merged together without overwriting each other.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model to be trained."),
                io.Int.Input("loraid", default=1, min=1, max=100000, tooltip="The number, from 1: one per character or idea."),
                io.Int.Input("units_per_id", default=default["units_per_id"], min=1, max=1000,
                             tooltip="How many units a LORAID owns. More learn more, fewer give room for more LORAIDs: with "
                             "slots or rows 12, 3, 2, 1 give 20, 80, 120, 240 LORAIDs."),
                io.Combo.Input("unit", options=list(UNITS), default=default["unit"],
                               tooltip="slot: one of 240 equal groups of matrices; block: a transformer block; matrix: one "
                               "weight matrix; row: one of 240 bands of rows through every matrix, so that each LORAID has "
                               "the same size and reaches all depths. Never mix units in LoRAs that are used together."),
            ],
            outputs=[
                handles.LoraidType.Output("selected", display_name="loraid"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, loraid, units_per_id, unit) -> bool | str:
        return _checked(Loraid, number=loraid, units_per_id=units_per_id, unit=unit)

    @classmethod
    def execute(cls, dit: handles.DiTFile, loraid: int, units_per_id: int, unit: str) -> io.NodeOutput:
        selected = Loraid(number=loraid, unit=unit, units_per_id=units_per_id)
        report = allocate(dit.matrices, selected).report()
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(selected, report)


class NetworkSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(NetworkSettings)
        probability = {"min": 0.0, "max": 0.99, "step": 0.05, "round": 0.001, "optional": True, "advanced": True}
        return io.Schema(
            node_id="VideoLoRANetworkSettings",
            display_name="Network Settings",
            category=CATEGORY,
            description="Kind and size of the LoRA, and what of the model it is put on.",
            inputs=[
                io.Int.Input("rank", default=default["rank"], min=1, max=1024,
                             tooltip="Rank: 16 for a character, 32 to 64 for styles and large data sets; 4 to 16 with loha. File size "
                             "grows with it."),
                io.Float.Input("alpha", default=default["alpha"], min=0.01, max=4096, step=0.5, round=0.01,
                               tooltip="The LoRA is scaled by alpha / rank. Equal to the rank is a good start; when you change "
                               "it, change the learning rate too."),
                io.Combo.Input("kind", options=list(KINDS), default=default["kind"], optional=True,
                               tooltip="lora: the usual kind, and the quickest. loha reaches the square of its rank; lokr is the "
                               "smallest file. Both suit styles."),
                io.Combo.Input("start_from", options=[_NOTHING, *paths.model_files("loras")], default=_NOTHING, optional=True,
                               tooltip="A LoRA to go on training from, of any trainer, of the same kind and rank and on the same "
                               "matrices."),
                io.Float.Input("dropout", default=default["dropout"], **probability,
                               tooltip="Drops single activations of the LoRA while training. 0.1 helps against learning the clips by "
                               "heart."),
                io.Float.Input("rank_dropout", default=default["rank_dropout"], **probability,
                               tooltip="Drops whole ranks for a sample. Stronger than dropout."),
                io.Float.Input("module_dropout", default=default["module_dropout"], **probability,
                               tooltip="Leaves out the LoRA of a whole matrix for a batch. The strongest of the three."),
                io.Float.Input("max_norm", default=default["max_norm"], min=0.0, max=1000.0, step=0.1, round=0.001, optional=True,
                               advanced=True, tooltip="Keeps the change to each matrix from growing beyond this norm. 1 or so keeps "
                               "several LoRAs usable together. 0 switches it off."),
                io.Float.Input("loraplus_lr_ratio", default=default["loraplus_lr_ratio"], min=0.01, max=1000.0, step=1.0, round=0.01,
                               optional=True, advanced=True,
                               tooltip="LoRA+: how many times faster the up matrices learn. 4 to 16 learn quicker; 1 switches it off."),
                io.Int.Input("factor", default=default["factor"], min=-1, max=1024, optional=True, advanced=True,
                             tooltip="Of lokr: the size of its first matrix. Smaller trains more parameters; -1 makes the smallest "
                             "file."),
                io.String.Input("include", default="", multiline=True, optional=True, advanced=True,
                                tooltip="Train only matrices whose whole name matches one of these regular expressions, one in a "
                                "line, such as .*self_attn.* Empty: all."),
                io.String.Input("exclude", default="", multiline=True, optional=True, advanced=True,
                                tooltip="Do not train matrices whose whole name matches one of these, such as .*ffn.*"),
                io.Boolean.Input("modulation", default=default["modulation"], optional=True, advanced=True,
                                 tooltip="For HunyuanVideo 1.5 without a LORAID: also train what makes shifts, scales and gates of "
                                 "the time, as other trainers do. The file is a third larger."),
            ],
            outputs=[handles.Network.Output("network", display_name="network")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, start_from: str | None = None, **settings) -> bool | str:
        return _checked(NetworkSettings, **_with_patterns(settings))

    @classmethod
    def fingerprint_inputs(cls, start_from: str = _NOTHING, **_) -> list:
        return paths.model_state("loras", start_from)

    @classmethod
    def execute(cls, start_from: str = _NOTHING, **settings: Any) -> io.NodeOutput:
        values = _with_patterns(settings)
        if start_from != _NOTHING:
            path = paths.model_path("loras", start_from)
            values |= {"start_from": str(path), "start_fingerprint": fingerprint(path)}
        return io.NodeOutput(NetworkSettings(**values))


def _with_patterns(settings: dict[str, Any]) -> dict[str, Any]:
    """The widgets' values with the lines of `include` and `exclude` as patterns."""
    patterns = {name: settings[name] for name in ("include", "exclude") if settings.get(name) is not None}
    lines = {name: tuple(line.strip() for line in text.splitlines() if line.strip()) for name, text in patterns.items()}
    return {**settings, **lines}


class OptimizerSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(OptimizerSettings)
        return io.Schema(
            node_id="VideoLoRAOptimizerSettings",
            display_name="Optimizer Settings",
            category=CATEGORY,
            description="The optimizer, its learning rate and how that goes.",
            inputs=[
                io.Float.Input("learning_rate", default=default["learning_rate"], min=1e-7, max=10.0, step=1e-6, round=1e-7,
                               tooltip="2e-4 is a good start for a character; lower it when the loss jumps or pictures burn. lion "
                               "wants a fifth of it, prodigy 1."),
                io.Float.Input("weight_decay", default=default["weight_decay"], min=0.0, max=0.99, step=0.001, round=0.0001,
                               tooltip="Pulls the LoRA towards zero. Rarely needs a change."),
                io.Int.Input("warmup_steps", default=default["warmup_steps"], min=0, max=100000,
                             tooltip="The learning rate rises over this many steps. A few dozen help with high rates."),
                io.Int.Input("gradient_accumulation", default=default["gradient_accumulation"], min=1, max=256,
                             tooltip="Batches per step: as a larger batch, without its memory."),
                io.Float.Input("max_grad_norm", default=default["max_grad_norm"], min=0.0, max=100.0, step=0.1, round=0.001,
                               tooltip="Longer gradients are cut to this length. 0 switches it off."),
                io.Combo.Input("optimizer", options=list(OPTIMIZERS), default=default["optimizer"], optional=True,
                               tooltip="adamw always works. adamw8bit and adafactor take less memory, lion half of it; prodigy finds "
                               "the learning rate itself; adamw_schedulefree needs no schedule. Some need a package: "
                               + ", ".join(f"{name} {kind.package}" for name, kind in OPTIMIZERS.items() if kind.package) + "."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=default["schedule"], optional=True,
                               tooltip="How the learning rate goes after the warm-up. cosine is a good choice for a training that will "
                               "not be made longer."),
                io.Float.Input("min_lr_ratio", default=default["min_lr_ratio"], min=0.0, max=1.0, step=0.01, round=0.001,
                               optional=True, advanced=True,
                               tooltip="What the learning rate falls to, as a share of the full one. Not for constant."),
                io.Int.Input("decay_steps", default=default["decay_steps"], min=0, max=1000000, optional=True, advanced=True,
                             tooltip="Of warmup_stable_decay: over how many last steps the learning rate falls."),
                io.Int.Input("cycles", default=default["cycles"], min=1, max=1000, optional=True, advanced=True,
                             tooltip="Of cosine_with_restarts: how often it falls."),
                io.Float.Input("power", default=default["power"], min=0.01, max=100.0, step=0.1, round=0.01, optional=True,
                               advanced=True, tooltip="Of polynomial: 1 falls in a line, 2 quickly at first."),
                io.String.Input("arguments", default=default["arguments"], optional=True, advanced=True,
                                tooltip="More for the optimizer, as name=value: betas=[0.9,0.99] d_coef=2. A wrong name is answered "
                                "with those that it takes."),
            ],
            outputs=[handles.Optimizer.Output("optimizer_settings", display_name="optimizer")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **settings) -> bool | str:
        return _checked(OptimizerSettings, check=lambda made: made.kind.check_installed(), **settings)

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(OptimizerSettings(**settings))


class TimestepSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(TimestepSettings)
        samplings = "; ".join(f"{name}: {sampling.title}" for name, sampling in SAMPLINGS.items())
        return io.Schema(
            node_id="VideoLoRATimestepSettings",
            display_name="Timestep Settings",
            category=CATEGORY,
            description="Which noise levels are trained; Show Timesteps draws them. Without this node: what is recommended for the "
            "model, which is 'shift' sampling with a flow shift of its own, and 'flux_shift' for HunyuanVideo 1.5.",
            inputs=[
                io.Float.Input("shift", default=default["shift"], min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Flow shift: higher trains composition and motion more, lower trains detail more. 0: what is "
                               "recommended for the model."),
                io.Float.Input("sigmoid_scale", default=default["sigmoid_scale"], min=0.1, max=100.0, step=0.1, round=0.01,
                               tooltip="Spread of the samplings around the middle. Rarely needs a change."),
                io.Combo.Input("sampling", options=list(SAMPLINGS), default=default["sampling"], tooltip=f"{samplings}."),
                io.Int.Input("min_timestep", default=default["min_timestep"], min=0, max=999, optional=True,
                             tooltip="The lowest timestep to train, of 0 (clean) to 1000 (noise). Raise it to train no details."),
                io.Int.Input("max_timestep", default=default["max_timestep"], min=1, max=1000, optional=True,
                             tooltip="The highest timestep to train. Lower it to leave composition and motion alone."),
                io.Boolean.Input("preserve_distribution_shape", default=default["preserve_distribution_shape"], optional=True,
                                 advanced=True, tooltip="Cuts the range out of the distribution, as one expert of two wants it; else all "
                                 "of the distribution is pressed into the range."),
                io.Int.Input("buckets", default=default["buckets"], min=0, max=1000, optional=True, advanced=True,
                             tooltip="Spreads so many draws in a row evenly over the distribution. 8 to 32 steady the loss with few "
                             "clips. 0 switches it off."),
                io.Combo.Input("weighting", options=list(WEIGHTINGS), default=default["weighting"], optional=True, advanced=True,
                               tooltip="What a timestep counts in the loss. none: all alike; cosmap: the middle a little more; "
                               "sigma_sqrt: the lowest far more."),
                io.Combo.Input("density", options=list(DENSITIES), default=default["density"], optional=True, advanced=True,
                               tooltip="Of 'sigma' sampling: how often each of its 1000 timesteps is drawn."),
                io.Float.Input("logit_mean", default=default["logit_mean"], min=-10.0, max=10.0, step=0.1, round=0.01, optional=True,
                               advanced=True, tooltip="Centre of 'logsnr' and of density 'logit_normal'."),
                io.Float.Input("logit_std", default=default["logit_std"], min=0.1, max=10.0, step=0.1, round=0.01, optional=True,
                               advanced=True, tooltip="Spread of 'logsnr' and of density 'logit_normal'."),
                io.Float.Input("mode_scale", default=default["mode_scale"], min=-1.0, max=1.75, step=0.01, round=0.01, optional=True,
                               advanced=True, tooltip="Of density 'mode': above 0 more of the middle, below 0 more of the ends."),
            ],
            outputs=[handles.Timesteps.Output("timesteps", display_name="timesteps")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **settings) -> bool | str:
        return _checked(TimestepSettings, **settings)

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(TimestepSettings(**settings))


class ShowTimesteps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAShowTimesteps",
            display_name="Show Timesteps",
            category=CATEGORY,
            description="Draws which noise levels timestep settings train, and how much each counts, before hours go into it.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model to be trained: it has a recommended flow shift."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16,
                             tooltip="Of the clips, for flux_shift, qwen_shift and qinglong samplings, which depend on it."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Of the clips, as their width."),
                handles.Timesteps.Input("timesteps", optional=True,
                                        tooltip="The settings. Without them: what training does without them."),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, width: int, height: int, timesteps: TimestepSettings | None = None) -> io.NodeOutput:  # fmt: skip
        latent = dit.family.latent
        size = squares(latent.latents(VideoSize(1, height, width)))
        settings = timesteps or TimestepSettings(sampling=dit.variant.training_sampling)
        levels = settings.levels(dit.variant) if dit.low is None else WHOLE
        picture, report = chart.show(settings, dit.variant.training_shift, size, f"{width}x{height}", levels)
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(_image(picture), report)


def _image(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) in 0..1, as ComfyUI's IMAGE."""
    return torch.from_numpy(np.asarray(picture).copy()).float().div(255)[None]


class MemorySettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(MemorySettings)
        return io.Schema(
            node_id="VideoLoRAMemorySettings",
            display_name="Memory Settings",
            category=CATEGORY,
            description="What to trade for memory.",
            inputs=[
                io.Boolean.Input("gradient_checkpointing", default=default["gradient_checkpointing"],
                                 tooltip="Computes activations twice instead of keeping them: a third slower, a fraction of the "
                                 "memory. Switch it off only when there is memory to spare."),
                io.Combo.Input("precision", options=list(BASE_PRECISIONS), default=default["precision"],
                               tooltip="Precision of the frozen model. auto: fp8 where the checkpoint is, else bfloat16 (float32 on "
                               "the CPU); with mode auto fp8_scaled when nothing else fits. fp8_scaled halves the model's memory "
                               "and is more exact than fp8."),
                io.Combo.Input("mode", options=list(MEMORY_MODES), default=default["mode"], optional=True,
                               tooltip="auto: chooses checkpointing, offloading and block swap itself, the fastest that fits. "
                               "manual: they are as set here."),
                io.Boolean.Input("offload_checkpoints", default=default["offload_checkpoints"], optional=True,
                                 tooltip="What checkpointing keeps waits in the computer's memory. Costs little time; for long or "
                                 "large videos."),
                io.Int.Input("block_swap", default=default["block_swap"], min=0, max=100, optional=True,
                             tooltip="So many blocks of the model stay in the computer's memory and visit the card two at a time. "
                             "More need less of the card; up to all of them."),
                io.Boolean.Input("shard", default=default["shard"], optional=True, advanced=True,
                                 tooltip="GPUs that train together divide the model among them, for one that fits none of them. "
                                 "Slower than each holding all of it."),
                io.Combo.Input("attention", options=list(BACKENDS), default=default["attention"], optional=True,
                               tooltip="How attention is computed. sdpa is always there; flash, flash3 and xformers need their "
                               "packages; sage cannot train."),
                io.Boolean.Input("compile", default=default["compile"], optional=True,
                                 tooltip="Compiles the blocks: minutes at the start, then often 10 to 20 percent faster."),
            ],
            outputs=[handles.Memory.Output("memory", display_name="memory")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, gradient_checkpointing, precision, mode="auto", offload_checkpoints=False, block_swap=0, shard=False,
        attention="sdpa", compile=False,
    ) -> bool | str:  # fmt: skip
        return _checked(
            MemorySettings, gradient_checkpointing=gradient_checkpointing, precision=precision, mode=mode,
            offload_checkpoints=offload_checkpoints, block_swap=block_swap, shard=shard, attention=attention,
            compile=compile,
        )  # fmt: skip

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(MemorySettings(**settings))


class SaveSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(SaveSettings)
        return io.Schema(
            node_id="VideoLoRASaveSettings",
            display_name="Save Settings",
            category=CATEGORY,
            description="When LoRA files are written on the way, besides the one at the end.",
            inputs=[
                io.Int.Input("every_steps", default=default["every_steps"], min=0, max=1000000,
                             tooltip="A LoRA file every so many steps. 0: only at the end."),
                io.Int.Input("every_epochs", default=default["every_epochs"], min=0, max=100000,
                             tooltip="A LoRA file every so many passes through the data. 0: only at the end."),
                io.Int.Input("keep", default=default["keep"], min=0, max=10000,
                             tooltip="Keep only so many of these files. 0: keep all."),
                io.Combo.Input("precision", options=list(FILE_PRECISIONS), default=default["precision"],
                               tooltip="Precision of the files. float32 doubles their size and is rarely worth it."),
                io.Int.Input("keep_states", default=default["keep_states"], min=1, max=100, optional=True, advanced=True,
                             tooltip="How many states to go on from are kept. With 2 a damaged one costs a little time, not the "
                             "training."),
            ],
            outputs=[handles.SaveType.Output("save", display_name="save")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **settings) -> bool | str:
        return _checked(SaveSettings, **settings)

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(SaveSettings(**settings))


class WatchSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(WatchSettings)
        return io.Schema(
            node_id="VideoLoRAWatchSettings",
            display_name="Watch Settings",
            category=CATEGORY,
            description="How a training is watched: validation with clips that are not trained, TensorBoard, and when to give up.",
            inputs=[
                io.Float.Input("validation_share", default=default["validation_share"], min=0.0, max=0.5, step=0.05, round=0.001,
                               tooltip="Share of the clips that is held out and never trained. Their loss shows when the LoRA begins "
                               "to learn the others by heart. 0.1 is good with 20 clips or more; 0 switches it off."),
                io.Int.Input("validation_every_steps", default=default["validation_every_steps"], min=1, max=100000,
                             tooltip="How often the held-out clips are looked at. Each of them costs four forward passes."),
                io.Int.Input("skipped_in_a_row", default=default["skipped_in_a_row"], min=1, max=10000, optional=True,
                             advanced=True, tooltip="Steps whose loss is not finite are skipped; after so many in a row the training "
                             "ends with an error."),
                io.Boolean.Input("tensorboard", default=default["tensorboard"], optional=True,
                                 tooltip="Also write files for TensorBoard into the run's folder. Needs the package tensorboard."),
            ],
            outputs=[handles.Watch.Output("watch", display_name="watch")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **settings) -> bool | str:
        return _checked(WatchSettings, check=lambda made: made.check_installed(), **settings)

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(WatchSettings(**settings))
