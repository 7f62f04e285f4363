"""What LoRA files hold of one matrix, in float32: the factors of its whole delta, with zero rows where nothing is trained.

Each kind says which rows it touches, adds its delta to a band of rows, and makes the adapter for its rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .adapter import Adapter, LoHa, LoKr, LoRA
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

    @abstractmethod
    def add_to(self, band: Tensor, first: int, multiplier: float) -> None:
        """Add multiplier * delta to rows `first` and on of the matrix, which `band` (rows, columns) holds."""

    @abstractmethod
    def adapter(self, rows: Rows, multiplier: float = 1.0) -> Adapter:
        """An adapter for these rows of the delta."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The factors by their roles, see `files.py`."""

    def to(self, dtype: torch.dtype) -> Factors:
        """Rounded to the precision of a file."""
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

    def add_to(self, band: Tensor, first: int, multiplier: float) -> None:
        band.addmm_(self.up[first : first + len(band)], self.down, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoRA:
        return LoRA(self.down, self.up[slice(*rows)], self.scale * multiplier, rows)

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

    def add_to(self, band: Tensor, first: int, multiplier: float) -> None:
        rows = slice(first, first + len(band))
        delta = (self.w1_a[rows] @ self.w1_b).mul_(self.w2_a[rows] @ self.w2_b)
        band.add_(delta, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoHa:
        w1_a, w2_a = self.w1_a[slice(*rows)], self.w2_a[slice(*rows)]
        return LoHa(w1_a, self.w1_b, w2_a, self.w2_b, self.scale * multiplier, rows)

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

    def add_to(self, band: Tensor, first: int, multiplier: float) -> None:
        group = len(self.w2_a)
        begin, end = first // group, -(-(first + len(band)) // group)
        delta = torch.kron(self.w1[begin:end], self.w2)[first - begin * group :][: len(band)]
        band.add_(delta, alpha=self.scale * multiplier)

    def adapter(self, rows: Rows, multiplier: float = 1.0) -> LoKr:
        first, last = (row // len(self.w2_a) for row in rows)
        return LoKr(self.w1[first:last], self.w2_a, self.w2_b, self.scale * multiplier, rows)

    def tensors(self) -> dict[str, Tensor]:
        if self.w2_b is None:
            return {"lokr_w1": self.w1, "lokr_w2": self.w2_a}
        return {"lokr_w1": self.w1, "lokr_w2_a": self.w2_a, "lokr_w2_b": self.w2_b}


_OF: Mapping[type[Adapter], type[Factors]] = {LoRA: LoRAFactors, LoHa: LoHaFactors, LoKr: LoKrFactors}


@torch.no_grad()
def factors_of(adapter: Adapter, outputs: int, alpha: float) -> Factors:
    """What a file holds of a trained adapter on a matrix with so many rows: a copy, on the CPU."""
    return _OF[type(adapter)].of(copy.deepcopy(adapter).cpu().requires_grad_(False), outputs, alpha)
