"""Blending LoRAs that hold the same matrices: each takes over some of the others, and remains a file of its own.

    w   a factor of the file at hand      m   the mean of the others' same factor      a   strength, 0..1

    average       (1 - a) w + a m
    thresholded   as average, but elements that are further than `threshold` from m stay
    democratic    by kind of module: text attention takes over a, or half of the strongest of the others where that is much
                  stronger than itself; other attention takes over 0.5 a, feed-forward layers 0.7 a

Only matrices of which two files or more change the same rows are blended, and alpha / rank goes into `up` first, so that factors of one size are
compared. LORAIDs of one unit setting share nothing: there is nothing to blend, and the files would stop being disjoint.

`compatible` computes what the script of the first LORAID files computed: alpha is blended like any tensor, and what a file
does not hold counts as zero. On disjoint files that destroys both; it is there to reproduce results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checks import require
from ..io import safetensors
from . import files
from .factors import Factors, LoRAFactors
from .files import LoRAFile

METHODS = ("average", "thresholded", "democratic")
_TEXT, _SPATIAL, _FEATURES = ("cross_attn", "txt_attn"), ("self_attn", "img_attn"), ("ffn", "mlp")


@dataclass(frozen=True, kw_only=True)
class Blend:
    """How LoRAs are blended."""

    method: str = "average"
    strength: float = 0.5
    threshold: float = 0.1

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"blend method '{self.method}' is unknown: use one of {', '.join(METHODS)}.")
        require(0 <= self.strength <= 1, f"blend strength is {self.strength}: use 0 (nothing changes) to 1.")
        require(self.threshold >= 0, f"blend threshold is {self.threshold}: use 0 or more.")

    def __call__(self, name: str, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """`own` blended with the same tensor of the other files; `name` decides what kind of module it is of."""
        if self.method == "democratic":
            return _democratic(name, own, others, self.strength)
        blended = own.lerp(_mean(others), self.strength)
        if self.method == "average":
            return blended
        return torch.where((own - _mean(others)).abs() > self.threshold, own, blended)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def _democratic(name: str, own: Tensor, others: Sequence[Tensor], strength: float) -> Tensor:
    if any(word in name for word in _TEXT):
        return _text(own, others, strength)
    if any(word in name for word in _SPATIAL):
        return own.lerp(_mean(others), 0.5 * strength) if strength >= 0.2 else own
    if any(word in name for word in _FEATURES):
        return own.lerp(_mean(others), 0.7 * strength) if strength >= 0.1 else own
    return own


def _text(own: Tensor, others: Sequence[Tensor], strength: float) -> Tensor:
    if strength < 0.1:
        return own
    norm, norms = float(own.norm()), [float(other.norm()) for other in others]
    if max(norms) > 1.5 * norm:
        return own.lerp(others[norms.index(max(norms))], min(2 * strength, 0.5))
    return own.lerp(_mean(others), strength)


def blended(loras: Sequence[LoRAFile], how: Blend) -> list[dict[str, Factors]]:
    """The factors of each file after blending; all are blended with what the others were before.

    Raises ValueError when the files share no parameter, or have it in different kinds or ranks.
    """
    require(len(loras) >= 2, "blending takes two LoRAs or more.")
    shared = {name: indices for name in dict.fromkeys(name for lora in loras for name in lora.factors)
              if (indices := _holders(loras, name))}  # fmt: skip
    if not shared:
        names = " and ".join(_titled(lora) for lora in loras)
        raise ValueError(
            f"{names} share no parameter, so there is nothing to blend: each can be used together with the others as it is. Blending "
            "would give each of them parameters of the others, and they would not be disjoint any more."
        )
    results = [dict(lora.factors) for lora in loras]
    for name, indices in shared.items():
        scaled = {index: _scaled(loras[index], name) for index in indices}
        if len({(part.up.shape, part.down.shape) for part in scaled.values()}) > 1:
            ranks = ", ".join(f"{loras[index].path.name} rank {part.rank}" for index, part in scaled.items())
            raise ValueError(f"'{name}' cannot be blended: {ranks}. Resize them to one rank first.")
        for index, own in scaled.items():
            others = [part for other, part in scaled.items() if other != index]
            results[index][name] = replace(own, **{
                role: how(name, getattr(own, role), [getattr(other, role) for other in others]) for role in ("down", "up")
            })  # fmt: skip
    return results


def _holders(loras: Sequence[LoRAFile], name: str) -> list[int]:
    """The files that have rows of this matrix in common with another one."""
    touched = {index: lora.factors[name].touched for index, lora in enumerate(loras) if name in lora.factors}
    return [
        index
        for index, (a, b) in touched.items()
        if any(max(a, c) < min(b, d) for other, (c, d) in touched.items() if other != index)
    ]


def _titled(lora: LoRAFile) -> str:
    number = lora.metadata.get("ss_loraid")
    return f"{lora.path.name} (LORAID {number})" if number else lora.path.name


def _scaled(lora: LoRAFile, name: str) -> LoRAFactors:
    factors = lora.factors[name]
    if not isinstance(factors, LoRAFactors):
        raise ValueError(
            f"{lora.path.name}: '{name}' is a {factors.kind}; only LoRAs can be blended. Resize it to a LoRA first."
        )
    whole = factors.to(torch.float32)
    return LoRAFactors(whole.down, whole.up * whole.scale, float(whole.rank))


def save(lora: LoRAFile, factors: Mapping[str, Factors], target: Path) -> None:
    """Write a blended file in the dtype of the one it was made of. Its LORAID is kept if it still owns what is changed."""
    rows = {name: one.touched for name, one in lora.factors.items()}
    kept = all(rows[name][0] <= one.touched[0] and one.touched[1] <= rows[name][1] for name, one in factors.items())
    metadata = {key: value for key, value in lora.metadata.items() if kept or not key.startswith("ss_loraid")}
    files.save(target, {name: one.to(lora.dtype) for name, one in factors.items()}, metadata, names=lora.names)


def blended_compatibly(paths: Sequence[Path], how: Blend) -> list[tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of each file after the original formulas: key by key, alphas too, absent tensors as zeros."""
    loaded = [safetensors.load(path) for path in paths]
    shapes = {name: value for tensors, _ in reversed(loaded) for name, value in tensors.items()}
    whole = [
        {name: tensors.get(name, torch.zeros_like(like)).float() for name, like in shapes.items()}
        for tensors, _ in loaded
    ]
    results = []
    for index, (_, metadata) in enumerate(loaded):
        rest = [tensors for other, tensors in enumerate(whole) if other != index]
        made = {name: how(name, own, [other[name] for other in rest]) for name, own in whole[index].items()}
        if how.method == "thresholded" and how.strength < 0.1:
            made = whole[index]
        results.append(({name: value.to(shapes[name].dtype) for name, value in made.items()}, metadata))
    return results
