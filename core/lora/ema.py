"""Post-hoc EMA (arXiv 2312.02696): an average over the LoRAs that one training saved on its way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checks import require
from ..io import safetensors
from . import files

LARGEST_SIGMA_REL = 12**-0.5  # of a profile that grows with the training: at gamma = 0 it is even
# The numbers that trainers put behind a run's name: -000010, -step00000500, _epoch_005, ...
_NUMBERED = re.compile(r"(.+?)(?:-(\d{6})|[-_](?:step|epoch|e|s)[-_]?(\d+))$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How later files count more than earlier ones: `sigma_rel`, the width of the average in that of the training; or, where
    that is 0, a decay `beta` that changes evenly to `beta2`."""

    sigma_rel: float = 0.2
    beta: float = 0.95
    beta2: float = 0.95

    def __post_init__(self) -> None:
        require(0 <= self.sigma_rel < LARGEST_SIGMA_REL,
                f"sigma_rel is {self.sigma_rel}: use 0.05 to 0.28 (it must be below {LARGEST_SIGMA_REL:.4f}), or 0 to use beta.")  # fmt: skip
        for name in ("beta", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}: use 0.9 to 0.99, less than 1.")

    def decays(self, count: int) -> list[float]:
        """The share that the average of files 0..j-1 keeps when file j comes in, for j = 1..count-1."""
        if self.sigma_rel:
            power = gamma(self.sigma_rel) + 1
            return [(1 - 1 / j) ** power for j in range(1, count)]
        span = max(count - 2, 1)
        return [
            self.beta + (self.beta2 - self.beta) * (j - 1) / span if count > 2 else self.beta for j in range(1, count)
        ]

    def weights(self, count: int) -> list[float]:
        """What each file counts in the end; they add up to 1. With sigma_rel the first counts nothing."""
        weights = [1.0]
        for decay in self.decays(count):
            weights = [*(weight * decay for weight in weights), 1 - decay]
        return weights


def gamma(sigma_rel: float) -> float:
    """The power of the profile t^gamma with this relative width: the real root of equation 123 of the paper's appendix."""
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def siblings(path: Path) -> list[Path]:
    """All LoRAs of the training that `path` belongs to, by their names: numbered ones and the last one without a number."""
    series = _series(path)
    return sorted(other for other in path.parent.glob("*.safetensors") if _series(other) == series)


def _series(path: Path) -> str:
    match = _NUMBERED.fullmatch(path.stem)
    return match[1] if match else path.stem


def ordered(paths: Sequence[Path]) -> list[Path]:
    """By the step or epoch in the metadata, or by the number in the name; the one without any is the last.

    A last file that is the same as the last numbered one counts once. Raises ValueError when there is no order to be found.
    """
    metadata = {path: safetensors.read_header(path).metadata for path in paths}
    for key in ("ss_steps", "ss_epoch"):
        if all(metadata[path].get(key, "").isdigit() for path in paths):
            numbers = {path: int(metadata[path][key]) for path in paths}
            if len(set(numbers.values())) == len(paths) or key == "ss_steps":
                break
    else:
        numbers = {path: _number(path) for path in paths}
    found: dict[float, Path] = {}
    for path in sorted(paths, key=lambda path: (numbers[path], path.name)):
        other = found.setdefault(numbers[path], path)
        if other is not path and not _same(other, path):
            raise ValueError(f"{other.name} and {path.name} are of the same step and differ: leave one of them out.")
    return list(found.values())


def _number(path: Path) -> float:
    match = _NUMBERED.fullmatch(path.stem)
    return float(match[2] or match[3]) if match else float("inf")


def _same(one: Path, other: Path) -> bool:
    a, b = (safetensors.load(path)[0] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def average(paths: Sequence[Path], target: Path, profile: Profile) -> str:
    """Write the average of these files, in their order, to `target`; a report of what each counted.

    Factors are averaged, not deltas, as the method has it. The metadata are the last file's, its LORAID among them. Raises
    ValueError when the files are not of one training.
    """
    require(len(paths) >= 2, f"an average takes two LoRAs or more, {', '.join(path.name for path in paths) or 'none'} was found: choose a file of a training "
            "that saved several.")  # fmt: skip
    tensors, metadata = _loaded(paths[0])
    mean = {name: value.float() for name, value in tensors.items()}
    dtypes = {name: value.dtype for name, value in tensors.items()}
    loraid = metadata.get("ss_loraid")
    for path, decay in zip(paths[1:], profile.decays(len(paths)), strict=True):
        tensors, metadata = _loaded(path)
        _check_alike(paths[0], mean, path, tensors)
        require(metadata.get("ss_loraid") == loraid, f"{path.name} is LORAID {metadata.get('ss_loraid')} and {paths[0].name} is LORAID {loraid}: they are not of "
                "one training.")  # fmt: skip
        for name, value in tensors.items():
            if not name.endswith(".alpha"):
                mean[name].mul_(decay).add_(value.float(), alpha=1 - decay)
    averaged = {name: value.to(dtypes[name]) for name, value in mean.items()}
    files.write(target, averaged, {**metadata, "videolora_ema": ", ".join(path.name for path in paths)})
    counted = zip(paths, profile.weights(len(paths)), strict=True)
    return "\n".join(f"{path.name}: {weight:.1%}" for path, weight in counted)


def _loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = safetensors.load(path)
    for name, value in tensors.items():
        require(
            bool(value.float().isfinite().all()),
            f"{path.name}: '{name}' holds values that are not finite: leave this file out.",
        )
    return tensors, metadata


def _check_alike(first: Path, expected: Mapping[str, Tensor], path: Path, found: Mapping[str, Tensor]) -> None:
    for name in expected.keys() ^ found.keys():
        raise ValueError(
            f"{(path if name in expected else first).name} has no '{name}': it is not of the same training."
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{path.name}: '{name}' is {tuple(value.shape)} and in {first.name} {tuple(expected[name].shape)}: it is not "
                             "of the same training.")  # fmt: skip
        if name.endswith(".alpha") and not torch.allclose(value.float(), expected[name]):
            raise ValueError(
                f"{path.name}: '{name}' is {float(value):g} and in {first.name} {float(expected[name]):g}: alphas must be equal."
            )
