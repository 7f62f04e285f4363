"""Low-rank adapters (LoRA, arXiv 2106.09685): y = W x + alpha / rank * up (down x)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.layers import Linear
from .loraid import Rows


class LoRA(nn.Module):
    """An adapter on the output rows [start, stop) of one matrix.

    down (rank, inputs), up (stop - start, rank), both in float32 when trained; they are cast to the dtype of the
    activations.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, rows: Rows) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.scale = scale
        self.rows = rows

    @classmethod
    def untrained(cls, inputs: int, rows: Rows, rank: int, alpha: float, seed: int) -> LoRA:
        """Adds nothing yet: `down` uniform in +-1 / sqrt(inputs) (Kaiming with a = sqrt 5), `up` zero."""
        bound = inputs**-0.5
        down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        return cls(down, torch.zeros(rows[1] - rows[0], rank), alpha / rank, rows)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y = W x with the adapter's share added; y must be the linear layer's fresh output, it may be written to."""
        hidden = F.linear(x, self.down.to(x.dtype)).flatten(0, -2)  # (tokens, rank)
        up, flat = self.up.to(x.dtype).t(), y.flatten(0, -2)
        if up.shape[1] == flat.shape[1]:  # out of place: the gradient of a view that was written to is copied whole
            return torch.addmm(flat, hidden, up, alpha=self.scale).view_as(y)
        flat[:, self.rows[0] : self.rows[1]].addmm_(hidden, up, alpha=self.scale)
        return y


class Several(nn.Module):
    """More than one adapter on the same matrix."""

    def __init__(self, adapters: list[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for adapter in self.adapters:
            y = adapter(x, y)
        return y


def untrained_adapters(dit: nn.Module, rows: Mapping[str, Rows], rank: int, alpha: float, seed: int) -> dict[str, LoRA]:
    """A fresh adapter for each named matrix. The start of each depends on its name and the seed alone."""
    return {
        name: LoRA.untrained(dit.get_submodule(name).in_features, owned, rank, alpha, seed ^ crc32(name.encode()))
        for name, owned in rows.items()
    }


@contextmanager
def attached(dit: nn.Module, adapters: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with its adapters on, for the length of the block."""
    try:
        for name, adapter in adapters.items():
            _linear(dit, name).adapter = adapter
        yield dit
    finally:
        for name in adapters:
            _linear(dit, name).adapter = None


def _linear(dit: nn.Module, name: str) -> Linear:
    module = dit.get_submodule(name)
    assert isinstance(module, Linear), name
    return module
