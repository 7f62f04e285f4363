"""Trainable low-rank adapters on the output rows of frozen matrices, y = W x + scale * delta x.

    LoRA    delta = up down                                          arXiv 2106.09685
    LoHa    delta = (w1_a w1_b) * (w2_a w2_b), element by element    arXiv 2108.06098
    LoKr    delta = w1 (x) w2, Kronecker's product, w2 = w2_a w2_b   arXiv 2212.10650
    DoRA    W + delta with rows, or columns, of given lengths; applied, not trained   arXiv 2402.09353

None of them makes delta itself: each leads x through a few rank activations, which are all that autograd keeps, and the
scale is applied where they are expanded and added to y in one pass. Legend: N inputs, M output rows, R rank.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.layers import Linear
from ..modules.quantized import frozen_linear, restored
from .loraid import Rows


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Probabilities: of each rank activation of each token, of a rank for a whole sample, and of the whole adapter."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __bool__(self) -> bool:
        return max(self.neuron, self.rank, self.module) > 0

    def __call__(self, hidden: Tensor, seed: int) -> tuple[Tensor, float]:
        """hidden (B, ..., R) with dropped activations, the rest scaled up, and 0.0 or 1.0 for the adapter as a whole.

        It follows from `seed` alone: a block that is computed again in the backward pass drops the same.
        """
        rng = torch.Generator(hidden.device).manual_seed(seed)
        if self.rank:
            each_sample = (hidden.shape[0], *[1] * (hidden.ndim - 2), hidden.shape[-1])
            hidden = hidden * _mask(hidden, each_sample, self.rank, rng)
        if self.neuron:
            hidden = hidden * _mask(hidden, hidden.shape, self.neuron, rng)
        return hidden, float(random.Random(seed).random() >= self.module)


def _mask(like: Tensor, shape: tuple[int, ...], probability: float, rng: torch.Generator) -> Tensor:
    kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - probability, generator=rng)
    return kept.div_(1 - probability)


class Size(NamedTuple):
    """How large an adapter is. `factor` bounds the rows and columns of LoKr's w1 (-1: as near to square as they divide)."""

    rank: int
    alpha: float
    factor: int = -1

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nn.Module, ABC):
    """An adapter on the output rows [start, stop) of one matrix.

    Its parameters are in float32 when trained, and cast to the dtype of the activations. `seed` decides what dropout
    drops; whoever trains sets it before each forward pass (see `reseed`).
    """

    def __init__(self, scale: float, rows: Rows, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scale, self.rows = scale, rows
        self.dropout = Dropout()
        self.seed = 0
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    @classmethod
    @abstractmethod
    def untrained(cls, shape: tuple[int, int], rows: Rows, size: Size, rng: torch.Generator) -> Adapter:
        """A fresh adapter that adds nothing yet, for rows of a matrix of `shape` (outputs, inputs)."""

    @abstractmethod
    def reduced(self, x: Tensor) -> Tensor:
        """The rank activations (B, ..., R) of x (B, ..., N)."""

    @abstractmethod
    def expansion(self, dtype: torch.dtype) -> Tensor:
        """The matrix (M, R), or (M / k, R) for k groups of rank activations, that leads from them to the output rows."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The Frobenius norm of scale * delta, a scalar."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y = W x with the adapter's share added; y must be the linear layer's fresh output, it may be written to."""
        hidden, scale = self.reduced(x), self.scale
        if self.dropout and self.training:
            hidden, kept = self.dropout(hidden, self.seed)
            scale *= kept
        return _added(y, hidden, self.expansion(x.dtype), scale, self.rows)

    @torch.no_grad()
    def limit_norm(self, most: float) -> None:
        """Shrink all factors alike where the norm of the delta is above `most`."""
        factors = list(self.parameters())
        shrink = (most / self.norm().clamp(min=most)) ** (1 / len(factors))  # the delta is a product of all factors
        for factor in factors:
            factor.mul_(shrink)


def _added(y: Tensor, hidden: Tensor, expansion: Tensor, scale: float, rows: Rows) -> Tensor:
    """y with scale * hidden expansion^T added to its columns [start, stop)."""
    start, stop = rows
    hidden, flat = hidden.flatten(0, -2), y.flatten(0, -2)
    if stop - start == flat.shape[1]:  # out of place: the gradient of a view that was written to is copied whole
        return torch.addmm(y.reshape(-1, len(expansion)), hidden, expansion.t(), alpha=scale).view_as(y)
    share = flat[:, start:stop]
    if len(hidden) == len(share):
        share.addmm_(hidden, expansion.t(), alpha=scale)
    else:
        share.add_(F.linear(hidden, expansion).view_as(share), alpha=scale)
    return y


def _norm_of_product(up: Tensor, down: Tensor) -> Tensor:
    """The Frobenius norm of up (M, R) @ down (R, N), by matrices of R x R."""
    return ((up.t() @ up) * (down @ down.t())).sum().clamp(min=0).sqrt()


class LoRA(Adapter):
    """down (R, N), up (M, R)."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, rows: Rows) -> None:
        super().__init__(scale, rows, {"down": down, "up": up})

    @classmethod
    def untrained(cls, shape: tuple[int, int], rows: Rows, size: Size, rng: torch.Generator) -> LoRA:
        """`up` is zero."""
        up = torch.zeros(_length(rows), size.rank)
        return cls(_kaiming((size.rank, shape[1]), rng), up, size.scale, rows)

    def reduced(self, x: Tensor) -> Tensor:
        return F.linear(x, self.down.to(x.dtype))

    def expansion(self, dtype: torch.dtype) -> Tensor:
        return self.up.to(dtype)

    def norm(self) -> Tensor:
        return self.scale * _norm_of_product(self.up, self.down)


class LoHa(Adapter):
    """w1_a, w2_a (M, R), w1_b, w2_b (R, N).

    Two matrices of rank R, multiplied element by element, are one of rank R * R: its factors hold the products of all
    pairs of columns, or rows. So it is computed as a LoRA, and delta is never made.
    """

    def __init__(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float, rows: Rows) -> None:
        super().__init__(scale, rows, {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b})

    @classmethod
    def untrained(cls, shape: tuple[int, int], rows: Rows, size: Size, rng: torch.Generator) -> LoHa:
        """`w2_a` is zero."""
        w1_a = 0.1 * torch.randn(_length(rows), size.rank, generator=rng)
        w1_b, w2_b = (torch.randn(size.rank, shape[1], generator=rng) for _ in range(2))
        return cls(w1_a, w1_b, torch.zeros_like(w1_a), w2_b, size.scale, rows)

    def reduced(self, x: Tensor) -> Tensor:
        return F.linear(x, row_pairs(self.w1_b.to(x.dtype), self.w2_b.to(x.dtype)))

    def expansion(self, dtype: torch.dtype) -> Tensor:
        return column_pairs(self.w1_a.to(dtype), self.w2_a.to(dtype))

    def norm(self) -> Tensor:
        up, down = column_pairs(self.w1_a, self.w2_a), row_pairs(self.w1_b, self.w2_b)
        return self.scale * _norm_of_product(up, down)


def row_pairs(one: Tensor, other: Tensor) -> Tensor:
    """(R, N), (R, N) -> (R * R, N): products of all pairs of rows."""
    return (one[:, None] * other[None]).flatten(0, 1)


def column_pairs(one: Tensor, other: Tensor) -> Tensor:
    """(M, R), (M, R) -> (M, R * R): products of all pairs of columns."""
    return (one[:, :, None] * other[:, None]).flatten(1)


class LoKr(Adapter):
    """w1 (k, j) and w2 (M / k, N / j), which is w2_a (M / k, R) @ w2_b (R, N / j), or one full matrix w2_a (w2_b None)."""

    def __init__(self, w1: Tensor, w2_a: Tensor, w2_b: Tensor | None, scale: float, rows: Rows) -> None:
        super().__init__(scale, rows, {"w1": w1, "w2_a": w2_a} | ({} if w2_b is None else {"w2_b": w2_b}))
        self.is_full = w2_b is None

    @classmethod
    def untrained(cls, shape: tuple[int, int], rows: Rows, size: Size, rng: torch.Generator) -> LoKr:
        """`w2_b` is zero. Where rank R would not make w2 smaller it is one full matrix, zero, with a scale of 1."""
        k, j = row_groups(shape[0], rows, size.factor), _groups(shape[1], size.factor)
        w1, w2_shape = _kaiming((k, j), rng), (_length(rows) // k, shape[1] // j)
        if 2 * size.rank >= max(w2_shape):
            return cls(w1, torch.zeros(w2_shape), None, 1.0, rows)
        w2_a, w2_b = _kaiming((w2_shape[0], size.rank), rng), torch.zeros(size.rank, w2_shape[1])
        return cls(w1, w2_a, w2_b, size.scale, rows)

    def reduced(self, x: Tensor) -> Tensor:
        hidden = x.unflatten(-1, (self.w1.shape[1], -1))  # (B, ..., j, N / j)
        if not self.is_full:
            hidden = F.linear(hidden, self.w2_b.to(x.dtype))  # (B, ..., j, R)
        return F.linear(hidden.transpose(-1, -2), self.w1.to(x.dtype)).transpose(-1, -2)  # (B, ..., k, R)

    def expansion(self, dtype: torch.dtype) -> Tensor:
        return self.w2_a.to(dtype)

    def norm(self) -> Tensor:
        w2 = self.w2_a.norm() if self.is_full else _norm_of_product(self.w2_a, self.w2_b)
        return self.scale * self.w1.norm() * w2


def _groups(size: int, factor: int) -> int:
    """The largest divisor of `size` up to its square root and, unless that is -1, `factor`."""
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return max(divisor for divisor in range(1, most + 1) if size % divisor == 0)


def row_groups(outputs: int, rows: Rows, factor: int) -> int:
    """Into how many groups LoKr divides the rows of a share, so that groups of that size also tile what is around it.

    As many as `_groups` would where they can, else the fewest that tile.
    """
    common, length = math.gcd(outputs, *rows), _length(rows)  # gcd(n, 0) = n
    counts = [length // size for size in range(1, common + 1) if common % size == 0]
    wanted = _groups(length, factor)
    return max((count for count in counts if count <= wanted), default=min(counts))


def _length(rows: Rows) -> int:
    return rows[1] - rows[0]


def _kaiming(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Uniform in +-1 / sqrt(columns): Kaiming's with a = sqrt 5."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


class DoRA(nn.Module):
    """y = (1 - m) W x + m g (W + delta) x, g the row's `magnitude` (M, 1) over the length of that row of W + delta; with a
    magnitude (1, N) y = (1 - m) W x + m (W + delta) (g x), g those of the columns.

    W is that of the layer it is attached to, all of whose rows the inner adapter is for.
    """

    def __init__(self, inner: Adapter, magnitude: Tensor, multiplier: float) -> None:
        super().__init__()
        self.inner, self.multiplier = inner, multiplier
        self.register_buffer("magnitude", magnitude)
        self.linear: tuple[Linear, ...] = ()  # a layer in a tuple is no part of this module: it would hold itself

    @torch.no_grad()
    def attach(self, linear: Linear) -> None:
        self.linear = (linear,)
        weight = restored(linear.weight, linear.weight_scale, torch.float32).to(self.magnitude.device)
        changed = self.inner(torch.eye(weight.shape[1], device=weight.device), weight.t().contiguous()).t()
        self.over_columns = len(self.magnitude) == 1
        self.gain = dora_gain(self.magnitude, changed.norm(dim=int(not self.over_columns), keepdim=True)).flatten()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        plain = self._frozen(x)  # not y: others may have added to it
        if self.over_columns:
            scaled = x * self.gain.to(x.dtype)
            changed = self.inner(scaled, self._frozen(scaled))
        else:
            changed = self.inner(x, plain.clone()) * self.gain.to(x.dtype)
        return y + self.multiplier * (changed - plain)

    def _frozen(self, x: Tensor) -> Tensor:
        (linear,) = self.linear
        return frozen_linear(x, linear.weight, linear.weight_scale, None)


def dora_gain(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """What rows or columns of these lengths are multiplied by to be as long as `magnitude`; one of zeros stays zero."""
    return magnitude / (lengths + torch.finfo(torch.float32).eps)


class Several(nn.Module):
    """More than one adapter on the same matrix."""

    def __init__(self, adapters: list[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for adapter in self.adapters:
            y = adapter(x, y)
        return y


KINDS: Mapping[str, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}


def untrained_adapters(
    dit: nn.Module, rows: Mapping[str, Rows], rank: int, alpha: float, seed: int, kind: str = "lora", factor: int = -1
) -> dict[str, Adapter]:
    """A fresh adapter for each named matrix. The start of each depends on its name and the seed alone."""
    made, size = {}, Size(rank, alpha, factor)
    for name, owned in rows.items():
        rng = torch.Generator().manual_seed(seed ^ crc32(name.encode()))
        made[name] = KINDS[kind].untrained(dit.get_submodule(name).weight.shape, owned, size, rng)
    return made


def reseed(adapters: Mapping[str, Adapter], seed: int) -> None:
    """Give each adapter its own random numbers for the next forward pass (and its repetition in the backward pass)."""
    for name, adapter in adapters.items():
        adapter.seed = random.Random(f"{seed}/{name}").getrandbits(63)


@contextmanager
def attached(dit: nn.Module, adapters: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with its adapters on, for the length of the block."""
    try:
        for name, adapter in adapters.items():
            linear = _linear(dit, name)
            linear.adapter = adapter
            for part in adapter.modules():
                if isinstance(part, DoRA):
                    part.attach(linear)
        yield dit
    finally:
        for name in adapters:
            _linear(dit, name).adapter = None


def _linear(dit: nn.Module, name: str) -> Linear:
    module = dit.get_submodule(name)
    assert isinstance(module, Linear), name
    return module
