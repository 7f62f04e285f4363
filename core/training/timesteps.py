"""Which noise levels training sees. Each function draws sigma (B,) in 0..1 (0 data, 1 noise) on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..flow import shifted

if TYPE_CHECKING:
    from .job import TimestepSettings


def _uniform(count: int, settings: TimestepSettings, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def _sigmoid(count: int, settings: TimestepSettings, generator: Generator) -> Tensor:
    """Logit-normal: most draws in the middle."""
    return torch.sigmoid(settings.sigmoid_scale * torch.randn(count, generator=generator))


def _shift(count: int, settings: TimestepSettings, generator: Generator) -> Tensor:
    """Logit-normal, moved towards noise as the sampler's flow shift does."""
    return shifted(_sigmoid(count, settings, generator), settings.shift)


SAMPLINGS: dict[str, Callable[[int, TimestepSettings, Generator], Tensor]] = {
    "uniform": _uniform, "sigmoid": _sigmoid, "shift": _shift,
}  # fmt: skip
