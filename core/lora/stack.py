"""Several LoRAs on one model: which file is which LORAID, what each one touches, and whether they collide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from ..family import Family, Variant
from ..io import safetensors
from . import files, loraid
from .adapter import LoRA, Several
from .files import LoRAFile
from .inventory import Matrix


@dataclass(frozen=True)
class StackEntry:
    """A LoRA file to be used with a multiplier. `number` is the LORAID it must be of (0 = whatever it is); `include` and
    `exclude` are patterns on whole names of the matrices to use of it."""

    path: Path
    multiplier: float = 1.0
    number: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedLoRA:
    entry: StackEntry
    file: LoRAFile
    number: int | None


def entries_of(
    paths: Sequence[Path],
    multipliers: Sequence[float] = (),
    numbers: Sequence[int] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[StackEntry]:
    """A stack from lists. Multipliers that are not given are 1.0. With LORAID `numbers` files are found for them by what
    their metadata say, and multipliers are in the order of the numbers; without, in that of the files.

    Raises ValueError for a number without a file, a file without a number, and more multipliers than there are.
    """
    if numbers:
        paths = _in_order_of(list(dict.fromkeys(numbers)), paths)
    if len(multipliers) > len(paths):
        raise ValueError(f"{len(multipliers)} multipliers are given for {len(paths)} LoRAs: give one for each.")
    padded = [*multipliers, *[1.0] * (len(paths) - len(multipliers))]
    asked = list(dict.fromkeys(numbers)) or [0] * len(paths)
    return [
        StackEntry(path, multiplier, number, tuple(include), tuple(exclude))
        for path, multiplier, number in zip(paths, padded, asked, strict=True)
    ]


def _in_order_of(numbers: Sequence[int], paths: Sequence[Path]) -> list[Path]:
    found: dict[int, Path] = {}
    for path in paths:
        declared = loraid.from_metadata(safetensors.read_header(path).metadata)
        if declared is None or declared.number not in numbers:
            has = "has no LORAID" if declared is None else f"is LORAID {declared.number}"
            raise ValueError(f"{path.name} {has}, and LORAID {', '.join(map(str, numbers))} are asked for.")
        if declared.number in found:
            raise ValueError(
                f"{path.name} and {found[declared.number].name} are both LORAID {declared.number}: give one."
            )
        found[declared.number] = path
    missing = [str(number) for number in numbers if number not in found]
    if missing:
        raise ValueError(f"no file is given for LORAID {', '.join(missing)}.")
    return [found[number] for number in numbers]


class Collision(ValueError):
    """Two LoRAs touch the same parameters."""


def load_stack(
    entries: Sequence[StackEntry], family: Family, variant: Variant, matrices: Sequence[Matrix], *, allow_overlap: bool
) -> list[LoadedLoRA]:
    """Read and check the LoRAs of a stack. One with multiplier 0 is switched off: it is left out.

    Raises ValueError for a file that does not fit the model or the requested LORAID, and Collision when two LoRAs touch
    the same parameters and `allow_overlap` is not set. Plain LoRAs (no LORAID) may overlap each other, as everywhere.
    """
    loaded = []
    for entry in entries:
        if entry.multiplier == 0:
            continue
        file = files.read(entry.path, matrices, variant.title, family.lora_names, entry.include, entry.exclude)
        try:
            _check_expert(file, variant)
            loaded.append(LoadedLoRA(entry, file, _checked_loraid(entry, file, family, matrices)))
        except ValueError as error:
            raise ValueError(f"{entry.path.name}: {error}") from error
    if not allow_overlap:
        for one, other in combinations(loaded, 2):
            if one.number is not None or other.number is not None:
                _check_disjoint(one, other)
    return loaded


def _check_expert(file: LoRAFile, variant: Variant) -> None:
    made_for = file.metadata.get("ss_loraid_expert", "both")
    if variant.expert and made_for not in ("both", variant.expert):
        raise ValueError(
            f"it was trained for the {made_for}-noise expert, and this is {variant.title}. Apply it to the other one."
        )


def _checked_loraid(entry: StackEntry, file: LoRAFile, family: Family, matrices: Sequence[Matrix]) -> int | None:
    declared = loraid.from_metadata(file.metadata)
    if entry.number and (declared is None or declared.number != entry.number):
        has = "has no LORAID" if declared is None else f"is LORAID {declared.number}"
        raise ValueError(f"LORAID {entry.number} was asked for, but the file {has}.")
    if declared is None:
        return None
    if file.metadata.get("ss_loraid_digest") is None:
        return declared.number  # an older file: its tensors say what it touches
    made_for = file.metadata.get("ss_loraid_family")
    allocation = loraid.allocate(matrices, declared)
    if made_for != family.name or allocation.digest != file.metadata["ss_loraid_digest"]:
        raise ValueError(
            f"its LORAID {declared.number} was given out for a model of another size or family ('{made_for}'). Use it with that model."
        )
    for name, factors in file.factors.items():
        start, stop = factors.touched
        own_start, own_stop = allocation.rows.get(name, (0, 0))
        if start < stop and not (own_start <= start and stop <= own_stop):
            raise ValueError(
                f"it changes '{name}' rows {start} to {stop - 1}, which LORAID {declared.number} does not own: the file was changed after training. Train it again."
            )
    return declared.number


def _check_disjoint(one: LoadedLoRA, other: LoadedLoRA) -> None:
    shared = []
    for name in one.file.factors.keys() & other.file.factors.keys():
        (a, b), (c, d) = one.file.factors[name].touched, other.file.factors[name].touched
        if max(a, c) < min(b, d):
            shared.append(f"{name} rows {max(a, c)} to {min(b, d) - 1}")
    if shared:
        names = f"{_titled(one)} and {_titled(other)}"
        raise Collision(
            f"{names} change the same parameters in {len(shared)} matrices ({', '.join(sorted(shared)[:3])}"
            f"{', ...' if len(shared) > 3 else ''}). Use LoRAs of different LORAIDs with the same unit settings, "
            "or allow overlap."
        )


def _titled(lora: LoadedLoRA) -> str:
    number = "no LORAID" if lora.number is None else f"LORAID {lora.number}"
    return f"{lora.entry.path.name} ({number})"


def adapters(stack: Sequence[LoadedLoRA], device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The stack as adapters, to be attached to the model."""
    found: dict[str, list[torch.nn.Module]] = {}
    for lora in stack:
        for name, factors in lora.file.factors.items():
            if factors.touched != (0, 0):
                adapter = factors.adapter(factors.touched, lora.entry.multiplier).to(device, dtype)
                found.setdefault(name, []).append(adapter.requires_grad_(False))
    return {name: _one(parts) for name, parts in found.items()}


def _one(parts: list[torch.nn.Module]) -> torch.nn.Module:
    """One adapter for several on a matrix; LoRAs of the same rows become one of all their ranks, which goes over the output
    once."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, LoRA) and part.rows == parts[0].rows for part in parts):
        down, up = torch.cat([part.down for part in parts]), torch.cat([part.scale * part.up for part in parts], dim=1)
        return LoRA(down, up, 1.0, parts[0].rows).requires_grad_(False)
    return Several(parts)


def report(stack: Sequence[LoadedLoRA], switched_off: int = 0) -> str:
    """A line per LoRA: what it matched, and whether they are disjoint."""
    lines = []
    for lora in stack:
        lines.append(
            f"{_titled(lora)} x {lora.entry.multiplier:g}: {len(lora.file.factors)} matrices, {lora.file.report()}"
        )
    if switched_off:
        lines.append(f"{switched_off} switched off by multiplier 0")
    if len(stack) > 1:
        lines.append(
            "no parameter is touched twice" if _disjoint(stack) else "some parameters are touched more than once"
        )
    return "\n".join(lines)


def _disjoint(stack: Sequence[LoadedLoRA]) -> bool:
    try:
        for one, other in combinations(stack, 2):
            _check_disjoint(one, other)
    except Collision:
        return False
    return True
