"""What LoRA files hold of one matrix: the factors of its whole delta, with zero rows where nothing is trained; in float32, or
in the 16 bits a LoRA is stored in, which are computed with in float32.

Each kind says which rows it touches, adds its delta to a band of rows, makes the adapter for its rows, and can be cut to
rows, placed among rows of a larger matrix and written as a LoRA: all exactly.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from .adapter import Adapter, DoRA, LoHa, LoKr, LoRA, column_pairs, dora_gain, row_pairs
from .loraid import Rows


class Factors(ABC):
    """The factors of one matrix's delta; `alpha` / `rank` is their scale."""

    kind: ClassVar[str]
    alpha: float

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @property
    @abstractmethod
    def products(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs of factors that are multiplied as matrices."""

    @cached_property
    @abstractmethod
    def touched(self) -> Rows:
        """The output rows [start, stop) outside of which the delta is zero: what it really changes."""

    def measured(self, weights: Callable[[], Iterable[tuple[int, Tensor]]]) -> Factors:
        """What `add_to` is called of; `weights` gives all bands of the model's matrix, (first row, float32), should the
        delta of one depend on the others."""
        return self

    @abstractmethod
    def add_to(self, band: Tensor, first: int, multiplier: float, weight: Tensor | None = None) -> None:
        """Add multiplier * delta to rows `first` and on of the matrix, which `band` (rows, columns) holds. `weight` is what
        the model has there: the delta of a DoRA depends on it."""

    @abstractmethod
    def adapter(self, rows: Rows, multiplier: float = 1.0) -> nn.Module:
        """An adapter for these rows of the delta."""

    @abstractmethod
    def cut(self, rows: Rows) -> Factors:
        """The delta of these rows alone, as that of a smaller matrix."""

    @abstractmethod
    def placed(self, start: int, length: int) -> Factors:
        """The delta from row `start` on of a matrix with `length` rows, zero elsewhere."""

    @abstractmethod
    def as_lora(self) -> LoRAFactors:
        """The same delta as a product of two matrices, in as high a rank as that takes."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The factors by their roles, see `files.py`."""

    def to(self, dtype: torch.dtype) -> Factors:
        """In the precision of a file, or in that of computing."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return type(self)(**{name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in values.items()})


def _hull(nonzero: Tensor) -> Rows:
    """The smallest [start, stop) that holds all true entries."""
    rows = nonzero.nonzero()
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def _placed(part: Tensor, start: int, length: int) -> Tensor:
    """`part` from row `start` on, among `length` rows that are zero otherwise: any loader can read that."""
    whole = part.new_zeros(length, part.shape[1])
    whole[start : start + len(part)] = part
    return whole


@dataclass(frozen=True)
class LoRAFactors(Factors):
    """delta = alpha / rank * up @ down."""

    kind = "lora"
    down: Tensor
    up: Tensor
    alpha: float

    @classmethod
    def of(cls, adapter: LoRA, outputs: int, alpha: float) -> LoRAFactors:
        return cls(adapter.down, _placed(adapter.up, adapter.rows[0], outputs), alpha)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.up, self.down)]

    @cached_property
    def touched(self) -> Rows:
        return _hull(self.up.ne(0).any(dim=1))

    def add_to(self, band: Tensor, first: int, multiplier: float, weight: Tensor | None = None) -> None:
        up, down = self.up[first : first + len(band)].float(), self.down.float()
        band.addmm_(up, down, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoRA:
        return LoRA(self.down, self.up[slice(*rows)], self.scale * multiplier, rows)

    def cut(self, rows: Rows) -> LoRAFactors:
        """Ranks that these rows do not use are left out."""
        up = self.up[slice(*rows)]
        used = up.ne(0).any(dim=0)
        if not used.any() or used.all():
            return LoRAFactors(self.down, up, self.alpha)
        return LoRAFactors(self.down[used], up[:, used], self.alpha * int(used.sum()) / self.rank)

    def placed(self, start: int, length: int) -> LoRAFactors:
        return LoRAFactors(self.down, _placed(self.up, start, length), self.alpha)

    def as_lora(self) -> LoRAFactors:
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}


@dataclass(frozen=True)
class LoHaFactors(Factors):
    """delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)."""

    kind = "loha"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float

    @classmethod
    def of(cls, adapter: LoHa, outputs: int, alpha: float) -> LoHaFactors:
        w1_a, w2_a = (_placed(part, adapter.rows[0], outputs) for part in (adapter.w1_a, adapter.w2_a))
        return cls(w1_a, adapter.w1_b, w2_a, adapter.w2_b, alpha)

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.w1_a, self.w1_b), (self.w2_a, self.w2_b), (self.w1_a, self.w2_b), (self.w2_a, self.w1_b)]

    @cached_property
    def touched(self) -> Rows:
        return _hull(self.w1_a.ne(0).any(dim=1) & self.w2_a.ne(0).any(dim=1))

    def add_to(self, band: Tensor, first: int, multiplier: float, weight: Tensor | None = None) -> None:
        rows = slice(first, first + len(band))
        delta = (self.w1_a[rows] @ self.w1_b).mul_(self.w2_a[rows] @ self.w2_b)
        band.add_(delta, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoHa:
        w1_a, w2_a = self.w1_a[slice(*rows)], self.w2_a[slice(*rows)]
        return LoHa(w1_a, self.w1_b, w2_a, self.w2_b, self.scale * multiplier, rows)

    def cut(self, rows: Rows) -> LoHaFactors:
        part = slice(*rows)
        return LoHaFactors(self.w1_a[part], self.w1_b, self.w2_a[part], self.w2_b, self.alpha)

    def placed(self, start: int, length: int) -> LoHaFactors:
        w1_a, w2_a = (_placed(part, start, length) for part in (self.w1_a, self.w2_a))
        return LoHaFactors(w1_a, self.w1_b, w2_a, self.w2_b, self.alpha)

    def as_lora(self) -> LoRAFactors:
        """Of the square of the rank (see `adapter.py`)."""
        up, down = column_pairs(self.w1_a, self.w2_a), row_pairs(self.w1_b, self.w2_b)
        return LoRAFactors(down, up, self.scale * len(down))

    def tensors(self) -> dict[str, Tensor]:
        return {"hada_w1_a": self.w1_a, "hada_w1_b": self.w1_b, "hada_w2_a": self.w2_a, "hada_w2_b": self.w2_b}


@dataclass(frozen=True)
class LoKrFactors(Factors):
    """delta = scale * w1 (x) w2, w2 = w2_a @ w2_b with alpha / rank as scale, or w2_a alone with scale 1."""

    kind = "lokr"
    w1: Tensor
    w2_a: Tensor
    w2_b: Tensor | None
    alpha: float

    @classmethod
    def of(cls, adapter: LoKr, outputs: int, alpha: float) -> LoKrFactors:
        group = adapter.w2_a.shape[0]
        w1 = _placed(adapter.w1, adapter.rows[0] // group, outputs // group)
        return cls(w1, adapter.w2_a, None if adapter.is_full else adapter.w2_b, alpha)

    @property
    def rank(self) -> int:
        return min(self.w2_a.shape) if self.w2_b is None else self.w2_b.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.w2_b is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        columns = (self.w2_a if self.w2_b is None else self.w2_b).shape[1]
        return self.w1.shape[0] * self.w2_a.shape[0], self.w1.shape[1] * columns

    @property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        return [] if self.w2_b is None else [(self.w2_a, self.w2_b)]

    @property
    def w2(self) -> Tensor:
        return self.w2_a if self.w2_b is None else self.w2_a @ self.w2_b

    @cached_property
    def touched(self) -> Rows:
        start, stop = _hull(self.w1.ne(0).any(dim=1)) if self.w2.any() else (0, 0)
        return start * len(self.w2_a), stop * len(self.w2_a)

    def add_to(self, band: Tensor, first: int, multiplier: float, weight: Tensor | None = None) -> None:
        group = len(self.w2_a)
        begin, end = first // group, -(-(first + len(band)) // group)
        delta = torch.kron(self.w1[begin:end], self.w2)[first - begin * group :][: len(band)]
        band.add_(delta, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoKr:
        first, last = (row // len(self.w2_a) for row in rows)
        return LoKr(self.w1[first:last], self.w2_a, self.w2_b, self.scale * multiplier, rows)

    def cut(self, rows: Rows) -> Factors:
        group = len(self.w2_a)
        if rows[0] % group or rows[1] % group:
            return self.as_lora().cut(rows)
        return LoKrFactors(self.w1[rows[0] // group : rows[1] // group], self.w2_a, self.w2_b, self.alpha)

    def placed(self, start: int, length: int) -> Factors:
        group = len(self.w2_a)
        if start % group or length % group:
            return self.as_lora().placed(start, length)
        w1 = _placed(self.w1, start // group, length // group)
        return LoKrFactors(w1, self.w2_a, self.w2_b, self.alpha)

    def as_lora(self) -> LoRAFactors:
        """w1 (x) (a b) = (w1 (x) a) (1 (x) b)."""
        inner = torch.eye(self.w2_a.shape[1]) if self.w2_b is None else self.w2_b
        down = torch.kron(torch.eye(self.w1.shape[1]), inner)
        return LoRAFactors(down, torch.kron(self.w1, self.w2_a), self.scale * len(down))

    def tensors(self) -> dict[str, Tensor]:
        if self.w2_b is None:
            return {"lokr_w1": self.w1, "lokr_w2": self.w2_a}
        return {"lokr_w1": self.w1, "lokr_w2_a": self.w2_a, "lokr_w2_b": self.w2_b}


@dataclass(frozen=True)
class DoRAFactors(Factors):
    """A DoRA (arXiv 2402.09353): with delta of `inner`, each row of W + delta is given the length `magnitude` (rows, 1), or
    each column that of (1, columns). A multiplier leads from W on a straight line to that.

    Over columns, which LyCORIS and OneTrainer write unless told otherwise, that is what ComfyUI's loader computes. Over rows
    (PEFT, and LyCORIS and OneTrainer on demand) it is what these trained; ComfyUI 0.30 divides by the length of W's rows
    there, not by that of W + delta's, and shows another strength than was trained.
    """

    kind = "dora"
    inner: Factors
    magnitude: Tensor
    lengths: Tensor | None = None  # (1, columns) of the columns of W + delta, where they have been measured

    @property
    def over_columns(self) -> bool:
        return self.magnitude.shape[1] > 1

    @property
    def alpha(self) -> float:
        return self.inner.alpha

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def products(self) -> list[tuple[Tensor, Tensor]]:
        return self.inner.products

    @cached_property
    def touched(self) -> Rows:
        """All rows: even where delta is zero the length may be another one."""
        return 0, self.shape[0]

    def measured(self, weights: Callable[[], Iterable[tuple[int, Tensor]]]) -> DoRAFactors:
        if not self.over_columns:
            return self
        squares = sum(self._changed(first, weight).square_().sum(0, keepdim=True) for first, weight in weights())
        return replace(self, lengths=squares.sqrt())

    def _changed(self, first: int, weight: Tensor) -> Tensor:
        changed = weight.float().clone()
        self.inner.add_to(changed, first, 1.0)
        return changed

    def add_to(self, band: Tensor, first: int, multiplier: float, weight: Tensor | None = None) -> None:
        changed = self._changed(first, weight)
        if self.over_columns:
            gain = dora_gain(self.magnitude, self.lengths)
        else:
            gain = dora_gain(self.magnitude[first : first + len(band)], changed.norm(dim=1, keepdim=True))
        band.add_(changed.mul_(gain).sub_(weight), alpha=multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> DoRA:
        """Of all rows: a DoRA touches no fewer."""
        return DoRA(self.inner.adapter(rows), self.magnitude, multiplier)

    def cut(self, rows: Rows) -> DoRAFactors:
        if self.over_columns:
            raise ValueError("a DoRA over columns cannot be divided: their length is that of all rows together.")
        return DoRAFactors(self.inner.cut(rows), self.magnitude[slice(*rows)])

    def placed(self, start: int, length: int) -> Factors:
        raise ValueError(
            "a DoRA of some rows of a fused matrix cannot be applied: the length of the others is unknown."
        )

    def as_lora(self) -> LoRAFactors:
        raise ValueError(
            "a DoRA is no sum of the weight and a delta of its own: merge it, and extract a LoRA from that."
        )

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "dora_scale": self.magnitude}

    def to(self, dtype: torch.dtype) -> DoRAFactors:
        return DoRAFactors(self.inner.to(dtype), self.magnitude.to(dtype))


def summed(parts: Sequence[Factors]) -> Factors:
    """The sum of deltas of one matrix; of one kind with the same alpha / rank, and of few ranks, where they allow it."""
    if len(parts) == 1:
        return parts[0]
    loras = [part.as_lora() for part in parts]
    scales = {lora.scale for lora in loras}
    same = all(lora.down.shape == loras[0].down.shape and torch.equal(lora.down, loras[0].down) for lora in loras)
    if same and len(scales) == 1 and _apart(loras):  # rows of one matrix that was divided
        return LoRAFactors(loras[0].down, sum(lora.up for lora in loras), loras[0].alpha)
    down = torch.cat([lora.down for lora in loras])
    if len(scales) == 1:
        return LoRAFactors(down, torch.cat([lora.up for lora in loras], dim=1), scales.pop() * len(down))
    return LoRAFactors(down, torch.cat([lora.up * lora.scale for lora in loras], dim=1), float(len(down)))


def _apart(loras: Sequence[LoRAFactors]) -> bool:
    touched = sorted(lora.touched for lora in loras)
    return all(one[1] <= other[0] for one, other in pairwise(touched))


_OF: Mapping[type[Adapter], type[Factors]] = {LoRA: LoRAFactors, LoHa: LoHaFactors, LoKr: LoKrFactors}


@torch.no_grad()
def factors_of(adapter: Adapter, outputs: int, alpha: float) -> Factors:
    """What a file holds of a trained adapter on a matrix with so many rows: a copy, on the CPU."""
    return _OF[type(adapter)].of(copy.deepcopy(adapter).cpu().requires_grad_(False), outputs, alpha)
