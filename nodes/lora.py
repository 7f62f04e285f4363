"""LoRAs after training: choose several, apply them, merge them into a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from comfy_api.latest import io

from ..core.io.files import written_once
from ..core.lora.combine import METHODS, Combination
from ..core.lora.merge import is_merged, merge, unmerge
from ..core.lora.patterns import check_patterns
from ..core.lora.stack import StackEntry, report
from ..core.weights import shards
from . import handles, paths
from .progress import Progress, say

CATEGORY = "VideoLoRA/lora"


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadLoRA",
            display_name="Load Video LoRA",
            category=CATEGORY,
            description="Adds a LoRA to a stack. Chain several of these to use several LoRAs together.",
            inputs=[
                io.Float.Input("multiplier", default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001,
                               tooltip="Strength. 0 switches the LoRA off completely."),
                io.Int.Input("loraid", default=0, min=0, max=100000,
                             tooltip="The LORAID this file must be of, as a check. 0: whatever it is."),
                io.Combo.Input("lora", options=paths.model_files("loras"),
                               tooltip="A file in ComfyUI's models/loras or output/loras."),
                handles.Stack.Input("loras", optional=True, tooltip="The stack so far."),
                io.String.Input("include", default="", multiline=True, optional=True, advanced=True,
                                tooltip="Regular expressions on whole names of matrices, one a line, such as .*cross_attn.*: only what one of "
                                "them matches is used. Empty: everything."),
                io.String.Input("exclude", default="", multiline=True, optional=True, advanced=True,
                                tooltip="As include, for matrices that are not to be used."),
            ],
            outputs=[handles.Stack.Output("stack", display_name="loras")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_) -> list:
        return paths.model_state("loras", lora)

    @classmethod
    def validate_inputs(cls, include: str | None = "", exclude: str | None = "") -> bool | str:
        try:
            check_patterns(*_lines(include or ""), *_lines(exclude or ""))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, multiplier: float, loraid: int, lora: str, loras: tuple[StackEntry, ...] = (), include: str = "",
                exclude: str = "") -> io.NodeOutput:  # fmt: skip
        path = paths.model_path("loras", lora)
        return io.NodeOutput((*loras, StackEntry(path, multiplier, loraid, _lines(include), _lines(exclude))))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class ApplyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAApplyLoRA",
            display_name="Apply LoRAs",
            category=CATEGORY,
            description="Applies a stack of LoRAs to the model, for sampling or merging. Checks that every file belongs to the "
            "model, is the LORAID that was asked for, and touches nothing that another one touches.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model."),
                handles.Stack.Input("loras", tooltip="From Load Video LoRA or Train Video LoRA."),
                io.Boolean.Input("allow_overlap", default=False,
                                 tooltip="Use LoRAs together although they change the same parameters."),
            ],
            outputs=[handles.DiT.Output("applied", display_name="dit"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, dit: handles.DiTFile, loras: tuple[StackEntry, ...], allow_overlap: bool) -> io.NodeOutput:
        applied = dit.with_loras(loras, allow_overlap)
        parts = []
        for expert in applied.experts:
            stack = expert.load_stack()
            title = f"{expert.variant.title}:\n" if applied.low else ""
            parts.append(title + report(stack, switched_off=len(expert.loras) - len(stack)))
        text = "\n".join(parts)
        say(text, cls.hidden.unique_id)
        return io.NodeOutput(applied, text)


class MergeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Combination()
        return io.Schema(
            node_id="VideoLoRAMergeLoRA",
            display_name="Merge LoRAs into Checkpoint",
            category=CATEGORY,
            description="Writes the model with the LoRAs applied to it as a checkpoint of its own, in ComfyUI's "
            "output/diffusion_models. It is streamed: it needs disk space, but hardly any memory.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model, from Apply LoRAs."),
                io.String.Input("name", default="merged", tooltip="Name of the new checkpoint; may hold a folder."),
                io.Combo.Input(
                    "combine",
                    options=list(METHODS),
                    default=default.method,
                    optional=True,
                    advanced=True,
                    tooltip="For LoRAs that overlap: sum adds them; ties (trims, elects signs) and dare (drops at random) make "
                    "them disturb each other less. Where one LoRA is alone it makes no difference.",
                ),
                io.Float.Input(
                    "density",
                    default=default.density,
                    min=0.01,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Share of each LoRA that ties (0.2 to 0.5) and dare (0.3 to 0.7) keep.",
                ),
                io.Int.Input(
                    "seed",
                    default=default.seed,
                    min=0,
                    max=0xFFFFFFFF,
                    optional=True,
                    advanced=True,
                    tooltip="Of what dare drops.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("diffusion_models", name)

    @classmethod
    def execute(cls, dit: handles.DiTFile, name: str, combine: str = Combination.method, density: float = Combination.density,
                seed: int = Combination.seed) -> io.NodeOutput:  # fmt: skip
        how = Combination(method=combine, density=density, seed=seed)
        if dit.low:
            raise ValueError("two experts are merged one at a time: link Load Video DiT with each of them.")
        stack = dit.load_stack()
        if not stack:
            raise ValueError(
                "there is nothing to merge: link a model from Apply LoRAs, with a multiplier other than 0."
            )
        target = paths.output_file("diffusion_models", name)
        if not is_merged(dit.path, target, dit.prefix, dit.part, stack, how):
            if target.exists():
                raise ValueError(
                    f"{target} exists already and is something else. Choose another name, or delete it first."
                )
            _check_space(dit.path, target)
            _show(merge(dit.path, target, dit.prefix, dit.part, stack, how), cls.hidden.unique_id)
        text = f"{target}\n{report(stack)}"
        say(text, cls.hidden.unique_id)
        return io.NodeOutput(str(target), ui={"videolora_merge": [{"path": str(target), "text": text}]})


def _show(steps: Iterator[tuple[int, int]], node_id: str | None) -> None:
    progress = Progress(node_id)
    with closing(steps):
        for done, total in steps:
            progress.update(done, total)


class UnmergeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAUnmergeLoRA",
            display_name="Unmerge LoRAs from Checkpoint",
            category=CATEGORY,
            description="Takes LoRAs out of a checkpoint that was made by Merge LoRAs into Checkpoint; others that are merged in stay.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The merged model, from Load Video DiT."),
                handles.Stack.Input("loras", tooltip="The LoRAs to take out, with the multipliers they were merged with."),
                io.String.Input("name", default="unmerged", tooltip="Name of the new checkpoint; may hold a folder."),
                handles.DiT.Input("base", optional=True,
                                  tooltip="The model that was merged into: its own bytes come back. Without it the LoRAs are subtracted, "
                                  "which leaves the rounding of the merge."),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("diffusion_models", name)

    @classmethod
    def execute(cls, dit: handles.DiTFile, loras: tuple[StackEntry, ...], name: str,
                base: handles.DiTFile | None = None) -> io.NodeOutput:  # fmt: skip
        stack = dit.with_loras(loras, True).load_stack()
        target = paths.output_file("diffusion_models", name)
        _check_space(dit.path, target)
        origin = base and (base.path, base.prefix, base.part)

        def make(targets: Sequence[Path]) -> str:
            _show(unmerge(dit.path, targets[0], dit.prefix, dit.part, stack, origin), cls.hidden.unique_id)
            return f"{targets[0]}\n{report(stack)}"

        text = written_once([target], make)
        say(text, cls.hidden.unique_id)
        return io.NodeOutput(str(target), ui={"videolora_merge": [{"path": str(target), "text": text}]})


def _check_space(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(target.parent).free, sum(path.stat().st_size for path in shards(source))
    if free < needed:
        raise ValueError(f"{target.parent} has {free / 2**30:.1f} GiB free and the merged checkpoint needs "
                         f"{needed / 2**30:.1f} GiB.")  # fmt: skip
