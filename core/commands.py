"""The LoRA workbench from a shell: the functions behind the nodes, for files anywhere."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from . import interference
from .devices import best_device
from .io.files import written_once
from .lora.blend import METHODS as BLENDS
from .lora.blend import Blend
from .lora.combine import METHODS as COMBINATIONS
from .lora.combine import Combination
from .lora.ema import Profile
from .lora.files import DIALECTS
from .lora.inspection import picture, report
from .lora.merge import merge, unmerge
from .lora.stack import StackEntry, entries_of
from .lora.workbench import (
    OpenedModel,
    average,
    blend_compatibly,
    blend_loras,
    convert,
    extract,
    inspect_loras,
    read_stack,
    resize_lora,
)

Command = Callable[[argparse.Namespace], str]


def run(words: Sequence[str]) -> int:
    """Run a command, print its report. Returns the process's exit code."""
    arguments = _parser().parse_args(words, argparse.Namespace(words=words))
    try:
        print(arguments.command(arguments))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=description, description=description)
        made.set_defaults(command=command)
        return made

    one = add("merge", _merge, "write a checkpoint with LoRAs merged into it")
    _add_stack(one)
    one.add_argument("--combine", choices=COMBINATIONS, default="sum", help="how LoRAs that overlap become one")
    one.add_argument(
        "--density", type=float, default=Combination.density, help="share of elements that ties and dare keep"
    )
    one.add_argument("--seed", type=int, default=0, help="of what dare drops")
    _add_output(one)
    one = add("unmerge", _unmerge, "take LoRAs out of a merged checkpoint again")
    _add_stack(one)
    one.add_argument("--base", type=Path, help="the checkpoint it was made of: the original bytes come back")
    _add_output(one)
    one = add("convert", _convert, "write a LoRA in another dialect")
    _add_lora(one)
    one.add_argument("--to", choices=DIALECTS, default="comfyui", help="the dialect")
    _add_output(one)
    one = add("resize", _resize, "write a LoRA in a lower rank")
    _add_lora(one)
    one.add_argument("--rank", type=int, required=True)
    _add_output(one)
    one = add("extract", _extract, "write what a checkpoint has learnt over another as a LoRA")
    one.add_argument("--dit", type=Path, required=True, help="the checkpoint before")
    one.add_argument("--tuned", type=Path, required=True, help="the checkpoint after")
    one.add_argument("--rank", type=int, default=32)
    _add_output(one)
    one = add("ema", _ema, "average the LoRAs of a training (post-hoc EMA)")
    one.add_argument("lora", type=Path, nargs="+", help="one file: all of its training; several: these")
    one.add_argument(
        "--sigma-rel", "--sigma_rel", type=float, default=Profile.sigma_rel, help="relative width; 0 uses --beta"
    )
    one.add_argument("--beta", type=float, default=Profile.beta)
    one.add_argument("--beta2", type=float, help="what beta changes to (default: the same)")
    _add_output(one)
    one = add("blend", _blend, "blend LoRAs that hold the same matrices")
    one.add_argument("--dit", type=Path, help="the model they are for (not with --compatible)")
    _add_loras(one)
    one.add_argument("--method", choices=BLENDS, default="average")
    one.add_argument("--strength", type=float, default=Blend.strength)
    one.add_argument("--threshold", type=float, default=Blend.threshold)
    one.add_argument(
        "--compatible",
        action="store_true",
        help="the formulas of the first LORAID script, alphas and absent tensors too",
    )
    one.add_argument("--output", type=Path, nargs="+", action="extend", required=True, help="a file for each LoRA")
    one = add("inspect", _inspect, "say what LoRAs touch, where they overlap, and which LORAIDs are free")
    _add_model(one)
    _add_loras(one)
    _add_patterns(one)
    one.add_argument("--picture", type=Path, help="a PNG of the maps")
    one = add("interference", _interference, "measure how much finished trainings disturb each other")
    one.add_argument(
        "runs", type=Path, nargs="+", help="run folders of trainings of one model, each with a validation share"
    )
    one.add_argument(
        "--plain", type=Path, nargs="+", default=[], help="run folders of plain LoRAs on the same data, to compare with"
    )
    one.add_argument("--device", default="", help="cuda, cpu, ...")
    one.add_argument(
        "--output", type=Path, default=Path("interference.md"), help="the report; its picture is written beside it"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dit", type=Path, required=True, help="the model's checkpoint")
    parser.add_argument("--variant", default="auto", help="which release, where the file cannot tell")


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--include", nargs="*", action="extend", default=[], help="patterns on whole names of matrices")
    parser.add_argument("--exclude", nargs="*", action="extend", default=[])


def _add_stack(parser: argparse.ArgumentParser) -> None:
    """Lists may be given at once or by repeating the option."""
    _add_model(parser)
    _add_loras(parser)
    parser.add_argument("--multiplier", "--lora_multiplier", type=float, nargs="*", action="extend", default=[],
                        help="in the order of --loraid, or of the files; 1.0 where none is given, 0 switches off")  # fmt: skip
    parser.add_argument(
        "--loraid",
        "--LORAID",
        type=int,
        nargs="*",
        action="extend",
        default=[],
        help="LORAIDs; files are found by what they say",
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="use them although they change the same parameters"
    )
    _add_patterns(parser)


def _add_loras(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", "--lora_weight", type=_paths, nargs="+", action="extend", required=True, help="LoRA files"
    )


def _paths(words: str) -> list[Path]:
    """One file, or several with commas between them."""
    return [Path(words)] if Path(words).exists() else [Path(word) for word in words.split(",")]


def _loras(arguments: argparse.Namespace) -> list[Path]:
    return [path for paths in arguments.lora for path in paths]


def _add_lora(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("lora", type=Path)
    _add_patterns(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, help="the file to write; one that is there already is never replaced"
    )


def _model(arguments: argparse.Namespace) -> OpenedModel:
    return OpenedModel.open(arguments.dit, arguments.variant)


def _entries(arguments: argparse.Namespace) -> list[StackEntry]:
    return entries_of(_loras(arguments), arguments.multiplier, arguments.loraid, arguments.include, arguments.exclude)


def _entry(arguments: argparse.Namespace) -> StackEntry:
    return StackEntry(arguments.lora, include=tuple(arguments.include), exclude=tuple(arguments.exclude))


def _written(arguments: argparse.Namespace, make: Callable[[Path], object]) -> str:
    """A file that is there already is never replaced."""
    return written_once([arguments.output], lambda targets: str(make(targets[0])))


def _merge(arguments: argparse.Namespace) -> str:
    model = _model(arguments)
    stack = read_stack(model, _entries(arguments), arguments.allow_overlap or arguments.combine != "sum")
    how = Combination(method=arguments.combine, density=arguments.density, seed=arguments.seed)
    if not stack:
        raise ValueError("there is nothing to merge: every multiplier is 0.")
    _written(arguments, lambda target: _finish(merge(model.path, target, model.prefix, model.part, stack, how)))
    return f"merged {', '.join(lora.entry.path.name for lora in stack)}: {arguments.output}"


def _unmerge(arguments: argparse.Namespace) -> str:
    model = _model(arguments)
    stack = read_stack(model, _entries(arguments), allow_overlap=True)
    base = OpenedModel.open(arguments.base, arguments.variant) if arguments.base else None
    origin = base and (base.path, base.prefix, base.part)
    _written(arguments, lambda target: _finish(unmerge(model.path, target, model.prefix, model.part, stack, origin)))
    how = "as the base has it" if base else "subtracted, up to rounding"
    return f"took out {', '.join(lora.entry.path.name for lora in stack)}, {how}: {arguments.output}"


def _finish(steps: Iterator[tuple[int, int]]) -> object:
    """All steps, with a line for each tenth; what the generator returns."""
    shown = 0
    with closing(steps):
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                return end.value
            if total and done * 10 // total > shown:
                shown = done * 10 // total
                print(f"{10 * shown} %", flush=True)


def _convert(arguments: argparse.Namespace) -> str:
    return _written(arguments, lambda target: convert(_model(arguments), _entry(arguments), target, arguments.to))


def _resize(arguments: argparse.Namespace) -> str:
    return _written(arguments, lambda target: resize_lora(_model(arguments), _entry(arguments), target, arguments.rank))


def _extract(arguments: argparse.Namespace) -> str:
    models = (OpenedModel.open(path) for path in (arguments.dit, arguments.tuned))
    return _written(arguments, lambda target: _finish(extract(*models, target, arguments.rank)))


def _ema(arguments: argparse.Namespace) -> str:
    beta2 = arguments.beta if arguments.beta2 is None else arguments.beta2
    profile = Profile(sigma_rel=arguments.sigma_rel, beta=arguments.beta, beta2=beta2)
    return _written(arguments, lambda target: average(arguments.lora, target, profile))


def _blend(arguments: argparse.Namespace) -> str:
    how = Blend(method=arguments.method, strength=arguments.strength, threshold=arguments.threshold)
    loras = _loras(arguments)
    if len(arguments.output) != len(loras):
        raise ValueError(f"{len(loras)} LoRAs are blended into {len(arguments.output)} files: give an output for each.")
    if arguments.compatible:
        return written_once(arguments.output, lambda targets: blend_compatibly(loras, targets, how))
    if arguments.dit is None:
        raise ValueError("--dit is missing: the model that the LoRAs are for.")
    model = OpenedModel.open(arguments.dit)
    return written_once(arguments.output, lambda targets: blend_loras(model, loras, targets, how))


def _inspect(arguments: argparse.Namespace) -> str:
    chosen = tuple(arguments.include), tuple(arguments.exclude)
    found = inspect_loras(_model(arguments), [StackEntry(path, 1.0, 0, *chosen) for path in _loras(arguments)])
    if arguments.picture:
        picture(found).save(arguments.picture)
    return report(found)


def _interference(arguments: argparse.Namespace) -> str:
    groups = [("these", arguments.runs)] + ([("plain", arguments.plain)] if arguments.plain else [])
    device = torch.device(arguments.device) if arguments.device else best_device()
    return interference.report(groups, arguments.output, device, f"python core {shlex.join(arguments.words)}")
