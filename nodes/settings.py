"""Small optional nodes for the training node. Their defaults and limits are those of the engine's dataclasses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..core.lora.loraid import UNITS, Loraid, allocate
from ..core.modules.attention import BACKENDS
from ..core.training.job import (
    BASE_PRECISIONS,
    FILE_PRECISIONS,
    MEMORY_MODES,
    MemorySettings,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TimestepSettings,
)
from ..core.training.timesteps import SAMPLINGS
from . import handles
from .progress import say

CATEGORY = "VideoLoRA/training"


def _defaults(cls: type) -> dict[str, Any]:
    return {entry.name: entry.default for entry in fields(cls)}


def _checked(cls: type, **values: Any) -> bool | str:
    """The dataclass's own checks, before anything runs. Linked inputs arrive as None and are checked when they run."""
    try:
        cls(**{name: value for name, value in values.items() if value is not None})
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
        return io.Schema(
            node_id="VideoLoRANetworkSettings",
            display_name="Network Settings",
            category=CATEGORY,
            description="Size of the LoRA.",
            inputs=[
                io.Int.Input("rank", default=default["rank"], min=1, max=1024,
                             tooltip="Rank: 16 for a character, 32 to 64 for styles and large data sets. File size grows with it."),
                io.Float.Input("alpha", default=default["alpha"], min=0.01, max=4096, step=0.5, round=0.01,
                               tooltip="The LoRA is scaled by alpha / rank. Equal to the rank is a good start; when you change "
                               "it, change the learning rate too."),
            ],
            outputs=[handles.Network.Output("network", display_name="network")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, rank, alpha) -> bool | str:
        return _checked(NetworkSettings, rank=rank, alpha=alpha)

    @classmethod
    def execute(cls, rank: int, alpha: float) -> io.NodeOutput:
        return io.NodeOutput(NetworkSettings(rank=rank, alpha=alpha))


class OptimizerSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(OptimizerSettings)
        return io.Schema(
            node_id="VideoLoRAOptimizerSettings",
            display_name="Optimizer Settings",
            category=CATEGORY,
            description="AdamW and its learning rate.",
            inputs=[
                io.Float.Input("learning_rate", default=default["learning_rate"], min=1e-7, max=1.0, step=1e-6, round=1e-7,
                               tooltip="2e-4 is a good start for a character; lower it when the loss jumps or pictures burn."),
                io.Float.Input("weight_decay", default=default["weight_decay"], min=0.0, max=0.99, step=0.001, round=0.0001,
                               tooltip="Pulls the LoRA towards zero. Rarely needs a change."),
                io.Int.Input("warmup_steps", default=default["warmup_steps"], min=0, max=100000,
                             tooltip="The learning rate rises over this many steps. A few dozen help with high rates."),
                io.Int.Input("gradient_accumulation", default=default["gradient_accumulation"], min=1, max=256,
                             tooltip="Batches per step: as a larger batch, without its memory."),
                io.Float.Input("max_grad_norm", default=default["max_grad_norm"], min=0.0, max=100.0, step=0.1, round=0.001,
                               tooltip="Longer gradients are cut to this length. 0 switches it off."),
            ],
            outputs=[handles.Optimizer.Output("optimizer", display_name="optimizer")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, learning_rate, weight_decay, warmup_steps, gradient_accumulation, max_grad_norm
    ) -> bool | str:
        return _checked(
            OptimizerSettings, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps,
            gradient_accumulation=gradient_accumulation, max_grad_norm=max_grad_norm,
        )  # fmt: skip

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(OptimizerSettings(**settings))


class TimestepSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = _defaults(TimestepSettings)
        return io.Schema(
            node_id="VideoLoRATimestepSettings",
            display_name="Timestep Settings",
            category=CATEGORY,
            description="Which noise levels are trained. Without this node the model's recommended flow shift is used.",
            inputs=[
                io.Float.Input("shift", default=default["shift"], min=0.1, max=100.0, step=0.1, round=0.01,
                               tooltip="Flow shift, for 'shift' sampling: higher trains composition and motion more, lower trains "
                               "detail more. 3 is a good start for Wan 2.1."),
                io.Float.Input("sigmoid_scale", default=default["sigmoid_scale"], min=0.1, max=100.0, step=0.1, round=0.01,
                               tooltip="Spread of 'sigmoid' and 'shift' sampling. Rarely needs a change."),
                io.Combo.Input("sampling", options=list(SAMPLINGS), default=default["sampling"],
                               tooltip="shift: as the sampler sees it; sigmoid: mostly the middle; uniform: all alike."),
            ],
            outputs=[handles.Timesteps.Output("timesteps", display_name="timesteps")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, shift, sigmoid_scale, sampling) -> bool | str:
        return _checked(TimestepSettings, shift=shift, sigmoid_scale=sigmoid_scale, sampling=sampling)

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(TimestepSettings(**settings))


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
        cls, gradient_checkpointing, precision, mode="auto", offload_checkpoints=False, block_swap=0, attention="sdpa",
        compile=False,
    ) -> bool | str:  # fmt: skip
        return _checked(
            MemorySettings, gradient_checkpointing=gradient_checkpointing, precision=precision, mode=mode,
            offload_checkpoints=offload_checkpoints, block_swap=block_swap, attention=attention, compile=compile,
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
            ],
            outputs=[handles.SaveType.Output("save", display_name="save")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, every_steps, every_epochs, keep, precision) -> bool | str:
        return _checked(
            SaveSettings, every_steps=every_steps, every_epochs=every_epochs, keep=keep, precision=precision
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(SaveSettings(**settings))
