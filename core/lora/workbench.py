"""What nodes and commands do with LoRA files: each takes a model to read them by, writes files, and returns a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..checks import require
from ..families import FAMILIES, open_part, variant_of
from ..family import Family, Part, Variant
from . import blend, ema, files, resize
from .files import LoRAFile
from .inspection import Inspection, inspect
from .inventory import Matrix, inventory
from .stack import LoadedLoRA, StackEntry, load_stack


class Model(Protocol):
    """A checkpoint of a transformer that LoRAs are for; none of its weights need be read."""

    path: Path
    part: Part
    prefix: str
    variant: Variant
    matrices: Sequence[Matrix]

    @property
    def family(self) -> Family: ...


@dataclass(frozen=True)
class OpenedModel:
    """A Model by its file."""

    path: Path
    part: Part
    prefix: str
    variant: Variant
    matrices: tuple[Matrix, ...]

    @classmethod
    def open(cls, path: Path, variant: str = "auto") -> OpenedModel:
        """Check the file. `variant` is as `variant_of` takes it."""
        checkpoint, part = open_part(path, "dit")
        matrices = inventory(FAMILIES[part.family], checkpoint.shapes(part.keymap))
        return cls(path, part, checkpoint.prefix, variant_of(path, part, variant), tuple(matrices))

    @property
    def family(self) -> Family:
        return FAMILIES[self.part.family]


def read(model: Model, entry: StackEntry) -> LoRAFile:
    """A LoRA for this model, or what the entry's patterns choose of it."""
    return files.read(
        entry.path, model.matrices, model.variant.title, model.family.lora_names, entry.include, entry.exclude
    )


def read_stack(model: Model, entries: Sequence[StackEntry], allow_overlap: bool) -> list[LoadedLoRA]:
    return load_stack(entries, model.family, model.variant, model.matrices, allow_overlap=allow_overlap)


def convert(model: Model, entry: StackEntry, target: Path, dialect: str) -> str:
    """Write the LoRA in another dialect, in the dtype it is stored in."""
    file = read(model, entry)
    factors = {name: one.to(file.dtype) for name, one in file.factors.items()}
    files.save(target, factors, file.metadata, dialect, model.family.lora_names)
    return f"{entry.path.name}: {file.report()}\nwritten as {files.DIALECTS[dialect].title}, {len(factors)} matrices: {target}"


def resize_lora(model: Model, entry: StackEntry, target: Path, rank: int) -> str:
    """Write the LoRA in a rank of at most `rank`."""
    file = read(model, entry)
    made = list(resize.resized(file, rank))
    factors = {name: one.to(file.dtype) for name, one in resize.factors_of(made).items()}
    files.save(target, factors, resize.metadata_of(file.metadata, factors), names=model.family.lora_names)
    return f"{entry.path.name}: {file.report()}\nrank {rank}: {resize.report(made)}: {target}"


def extract(base: Model, tuned: Model, target: Path, rank: int) -> Iterator[tuple[int, int]]:
    """Write what `tuned` has learnt over `base` as a LoRA; yields (matrices done, matrices in all), returns a report."""
    require(base.family.name == tuned.family.name, f"{tuned.path.name} is {tuned.part.title} and {base.path.name} is "
            f"{base.part.title}: a LoRA can be extracted from two of one family.")  # fmt: skip
    opened, other = open_part(base.path, "dit"), open_part(tuned.path, "dit")
    made = []
    for one in resize.extracted(*opened, *other, base.matrices, rank):
        made.append(one)
        yield len(made), len(base.matrices)
    factors = {name: one.to(torch.bfloat16) for name, one in resize.factors_of(made).items()}
    require(bool(factors), f"{tuned.path.name} has the same matrices as {base.path.name}: there is nothing to extract.")
    metadata = {
        "ss_base_model_version": base.family.name,
        "ss_sd_model_name": base.path.name,
        "videolora_extracted": tuned.path.name,
    }
    files.save(target, factors, resize.metadata_of(metadata, factors), names=base.family.lora_names)
    left = resize.other_differences(*opened, *other, base.matrices)
    lost = f"\n{len(left)} other parameters differ, which a LoRA cannot hold: {', '.join(left[:3])}" if left else ""
    return f"rank {rank}: {resize.report(made)}: {target}{lost}"


def average(paths: Sequence[Path], target: Path, profile: ema.Profile) -> str:
    """Post-hoc EMA of these files; of one file, of its whole training."""
    chosen = ema.siblings(paths[0]) if len(paths) == 1 else list(paths)
    return f"{ema.average(ema.ordered(chosen), target, profile)}\n{target}"


def blend_loras(model: Model, paths: Sequence[Path], targets: Sequence[Path], how: blend.Blend) -> str:
    """Write each LoRA blended with the others to the target in its place."""
    loras = [read(model, StackEntry(path)) for path in paths]
    lines = []
    for lora, factors, target in zip(loras, blend.blended(loras, how), targets, strict=True):
        changed = sum(factors[name] is not lora.factors[name] for name in factors)
        blend.save(lora, factors, target)
        lines.append(f"{lora.path.name}: {changed} of {len(factors)} matrices blended: {target}")
    return "\n".join(lines)


def blend_compatibly(paths: Sequence[Path], targets: Sequence[Path], how: blend.Blend) -> str:
    """As the original script: see `blend.py` for what that does to disjoint files."""
    for (tensors, metadata), target in zip(blend.blended_compatibly(paths, how), targets, strict=True):
        files.write(target, tensors, metadata)
    return "\n".join(f"{path.name}: {target}" for path, target in zip(paths, targets, strict=True))


def inspect_loras(model: Model, entries: Sequence[StackEntry]) -> Inspection:
    return inspect([read(model, entry) for entry in entries], model.matrices)
