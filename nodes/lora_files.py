"""The LoRA workbench: convert, resize, extract, average, blend, inspect. New files go to output/loras."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io

from ..core.io.files import written_once
from ..core.lora import blend, ema, inspection, workbench
from ..core.lora.files import DIALECTS
from ..core.lora.stack import StackEntry
from . import handles, paths
from .lora import CATEGORY
from .progress import Progress, say

_NAME = (
    "Name of the new file in ComfyUI's output/loras; may hold a folder. A file that is there already is never replaced."
)
_OUTPUTS = [handles.Stack.Output("stack", display_name="loras"), io.String.Output("report", display_name="report")]
_DIT = handles.DiT.Input("dit", tooltip="The model that the LoRA is for: names and sizes are checked against it.")


def _lora_input() -> io.Combo.Input:
    return io.Combo.Input("lora", options=paths.model_files("loras"),
                          tooltip="A file in ComfyUI's models/loras or output/loras, in any dialect.")  # fmt: skip


class _FileNode(io.ComfyNode):
    """What nodes that read one LoRA and write another share."""

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("loras", name)

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **_) -> list:
        return paths.model_state("loras", lora)

    @classmethod
    def _done(cls, name: str, make: Callable[[Path], str]) -> io.NodeOutput:
        target = paths.output_file("loras", name)
        text = written_once([target], lambda targets: make(targets[0]))
        say(text, cls.hidden.unique_id)
        return io.NodeOutput((StackEntry(target),), text)


class ConvertLoRA(_FileNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAConvertLoRA",
            display_name="Convert LoRA",
            category=CATEGORY,
            description="Writes a LoRA in the names of another tool. The deltas stay what they are: alpha is kept exactly.",
            inputs=[
                _DIT,
                _lora_input(),
                io.Combo.Input("dialect", options=list(DIALECTS), default="comfyui",
                               tooltip="; ".join(f"{name}: {form.title}" for name, form in DIALECTS.items())
                               + ". diffusers reads alpha from version 0.34 on. LoHa, LoKr and DoRA have a form in training and "
                               "comfyui only."),
                io.String.Input("name", default="converted", tooltip=_NAME),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, lora: str, dialect: str, name: str) -> io.NodeOutput:
        entry = StackEntry(paths.model_path("loras", lora))
        return cls._done(name, lambda target: workbench.convert(dit, entry, target, dialect))


class ResizeLoRA(_FileNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAResizeLoRA",
            display_name="Resize LoRA",
            category=CATEGORY,
            description="Writes a LoRA in a lower rank, the nearest one there is, and says what is lost. LoHa and LoKr become a LoRA.",
            inputs=[
                _DIT,
                _lora_input(),
                io.Int.Input("rank", default=16, min=1, max=4096,
                             tooltip="Rank at most; a matrix of a lower one stays as it is. Halve it for half the file."),
                io.String.Input("name", default="resized", tooltip=_NAME),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, lora: str, rank: int, name: str) -> io.NodeOutput:
        entry = StackEntry(paths.model_path("loras", lora))
        return cls._done(name, lambda target: workbench.resize_lora(dit, entry, target, rank))


class ExtractLoRA(_FileNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAExtractLoRA",
            display_name="Extract LoRA",
            category=CATEGORY,
            description="Writes what a fine-tuned checkpoint has learnt over another one as a LoRA, and says what is lost.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model before it was tuned."),
                handles.DiT.Input("tuned", tooltip="The model after."),
                io.Int.Input("rank", default=32, min=1, max=4096,
                             tooltip="Rank of the LoRA: more keeps more of the difference, and makes a larger file."),
                io.String.Input("name", default="extracted", tooltip=_NAME),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, tuned: handles.DiTFile, rank: int, name: str) -> io.NodeOutput:
        progress = Progress(cls.hidden.unique_id)

        def make(target: Path) -> str:
            with closing(workbench.extract(dit, tuned, target, rank)) as steps:
                while True:
                    try:
                        progress.update(*next(steps))
                    except StopIteration as end:
                        return end.value

        return cls._done(name, make)


class PostHocEMA(_FileNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = ema.Profile()
        return io.Schema(
            node_id="VideoLoRAPostHocEMA",
            display_name="Post-hoc EMA",
            category=CATEGORY,
            description="Averages the LoRAs that one training saved on its way (Save Settings), the later ones counting more: often "
            "better than the last alone. The LORAID is kept.",
            inputs=[
                _lora_input(),
                io.Float.Input("sigma_rel", default=default.sigma_rel, min=0.0, max=0.288, step=0.01, round=0.0001,
                               tooltip="Width of the average in that of the training: 0.05 little more than the last file, 0.28 "
                               "nearly all alike. 0 uses beta."),
                io.String.Input("name", default="averaged", tooltip=_NAME),
                io.Float.Input("beta", default=default.beta, min=0.0, max=0.9999, step=0.01, round=0.0001, advanced=True, optional=True,
                               tooltip="With sigma_rel 0: what is kept of the average when the next file comes in."),
                io.Float.Input("beta2", default=default.beta2, min=0.0, max=0.9999, step=0.01, round=0.0001, advanced=True, optional=True,
                               tooltip="With sigma_rel 0: what beta changes to, evenly, up to the last file."),
                handles.Stack.Input("loras", optional=True, tooltip="These files instead of those of the chosen file's training."),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora: str = "", **_) -> list:
        return paths.model_state("loras", lora, ema.siblings)

    @classmethod
    def execute(cls, lora: str, sigma_rel: float, name: str, beta: float = ema.Profile.beta, beta2: float = ema.Profile.beta2,
                loras: tuple[StackEntry, ...] = ()) -> io.NodeOutput:  # fmt: skip
        chosen = [entry.path for entry in loras] or [paths.model_path("loras", lora)]
        profile = ema.Profile(sigma_rel=sigma_rel, beta=beta, beta2=beta2)
        return cls._done(name, lambda target: workbench.average(chosen, target, profile))


class BlendLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = blend.Blend()
        return io.Schema(
            node_id="VideoLoRABlendLoRA",
            display_name="Blend LoRAs",
            category=CATEGORY,
            description="Each LoRA takes over some of the others in the matrices they share, and is written as a file of its own. "
            "LORAIDs of one unit setting share none: it then says so, and changes nothing.",
            inputs=[
                _DIT,
                handles.Stack.Input("loras", tooltip="Two LoRAs or more, from Load Video LoRA."),
                io.Combo.Input("method", options=list(blend.METHODS), default=default.method,
                               tooltip="average: towards the mean of the others; thresholded: only what is near to it; democratic: more or "
                               "less by kind of module."),
                io.Float.Input("strength", default=default.strength, min=0.0, max=1.0, step=0.05, round=0.001,
                               tooltip="How much is taken over: 0 nothing, 1 all (of an average)."),
                io.String.Input("name", default="blended",
                                tooltip="What the new files' names begin with, before the names of the old ones; in output/loras."),
                io.Float.Input("threshold", default=default.threshold, min=0.0, max=10.0, step=0.01, round=0.001, advanced=True, optional=True,
                               tooltip="Of thresholded: what is further from the others than this stays."),
                io.Boolean.Input("compatible", default=False, advanced=True, optional=True,
                                 tooltip="Computes what the first script for LORAID files did, alphas and missing matrices too. It destroys "
                                 "disjoint LoRAs: only to reproduce old results."),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("loras", name)

    @classmethod
    def execute(cls, dit: handles.DiTFile, loras: tuple[StackEntry, ...], method: str, strength: float, name: str,
                threshold: float = blend.Blend.threshold, compatible: bool = False) -> io.NodeOutput:  # fmt: skip
        how = blend.Blend(method=method, strength=strength, threshold=threshold)
        sources = [entry.path for entry in loras]
        targets = [paths.output_file("loras", f"{name}_{path.stem}") for path in sources]
        if compatible:
            text = written_once(targets, lambda made: workbench.blend_compatibly(sources, made, how))
        else:
            text = written_once(targets, lambda made: workbench.blend_loras(dit, sources, made, how))
        say(text, cls.hidden.unique_id)
        made = (StackEntry(target, entry.multiplier) for target, entry in zip(targets, loras, strict=True))
        return io.NodeOutput(tuple(made), text)


class InspectLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAInspectLoRA",
            display_name="Inspect LoRAs",
            category=CATEGORY,
            description="Shows what each LoRA is and which modules it changes, where LoRAs overlap and how much they are alike there, and "
            "which LORAIDs are free. Nothing is loaded but the LoRAs.",
            inputs=[
                _DIT,
                handles.Stack.Input("loras", tooltip="One LoRA or several, from Load Video LoRA."),
            ],
            outputs=[io.Image.Output("picture", display_name="map"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dit: handles.DiTFile, loras: tuple[StackEntry, ...]) -> io.NodeOutput:
        found = workbench.inspect_loras(dit, loras)
        text = inspection.report(found)
        say(text, cls.hidden.unique_id)
        picture = torch.from_numpy(np.asarray(inspection.picture(found)).copy()).float().div(255)[None]
        return io.NodeOutput(picture, text)
