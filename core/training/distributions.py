"""Distributions of sigma on 0..1, each by its cumulative distribution function and that function's inverse.

A single uniform number makes a draw. So a range is cut out exactly, without drawing again, and numbers that are dealt
out evenly (see `batches.py`) give draws that are spread as the distribution is. Values are float64 (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow import shifted

_BISECTIONS = 60  # halvings of 0..1: beyond what float64 tells apart


def _inverse(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The smallest x in 0..1 at which the rising `function` reaches `value`."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = function(middle) >= value
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


class Distribution:
    """A kind states one of the two functions, or both; the one it leaves out is found by halving."""

    def cdf(self, sigma: Tensor) -> Tensor:
        """The probability of a draw up to `sigma`."""
        return _inverse(self.quantile, sigma)

    def quantile(self, u: Tensor) -> Tensor:
        """The sigma below which a share `u` of all draws lies: of a uniform number it makes a draw."""
        return _inverse(self.cdf, u)


class Uniform(Distribution):
    def cdf(self, sigma: Tensor) -> Tensor:
        return sigma

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal(Distribution):
    """sigmoid(N(mean, std)). A flow shift of D moves the mean by ln D."""

    mean: float
    std: float

    def cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(sigma) - self.mean) / self.std)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode(Distribution):
    """Heavy in the middle for a positive scale, at the ends for a negative (arXiv 2403.03206, section 3.1)."""

    scale: float

    def quantile(self, u: Tensor) -> Tensor:
        v = 1 - u  # the paper's formula falls in its argument
        return 1 - v - self.scale * (torch.cos(math.pi / 2 * v).square() - 1 + v)


@dataclass(frozen=True)
class Mixture(Distribution):
    """Draws from each part with its probability; the probabilities sum to 1."""

    parts: tuple[tuple[float, Distribution], ...]

    def cdf(self, sigma: Tensor) -> Tensor:
        return sum(weight * part.cdf(sigma) for weight, part in self.parts)


@dataclass(frozen=True)
class Steps(Distribution):
    """Rounded up to a multiple of 1 / count: the timesteps of a discrete schedule."""

    base: Distribution
    count: int = 1000

    def cdf(self, sigma: Tensor) -> Tensor:
        return self.base.cdf(torch.floor(sigma * self.count + 1e-9) / self.count)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.ceil(self.base.quantile(u) * self.count).clamp(min=1) / self.count


@dataclass(frozen=True)
class Shifted(Distribution):
    """Moved by the flow shift."""

    base: Distribution
    shift: float

    def cdf(self, sigma: Tensor) -> Tensor:
        return self.base.cdf(shifted(sigma, 1 / self.shift))

    def quantile(self, u: Tensor) -> Tensor:
        return shifted(self.base.quantile(u), self.shift)


@dataclass(frozen=True)
class Squeezed(Distribution):
    """The whole of the base, pressed into low..high."""

    base: Distribution
    low: float
    high: float

    def cdf(self, sigma: Tensor) -> Tensor:
        return self.base.cdf(((sigma - self.low) / (self.high - self.low)).clamp(0, 1))

    def quantile(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.base.quantile(u)


class Cut(Distribution):
    """What of the base lies in low..high, in its own shape. Raises ValueError when nothing does."""

    def __init__(self, base: Distribution, low: float, high: float) -> None:
        self.base, self.low, self.high = base, low, high
        self.below, up_to = base.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        self.mass = up_to - self.below
        if self.mass < 1e-9:
            raise ValueError(
                f"this sampling makes (almost) no timesteps between {1000 * low:g} and {1000 * high:g}. Widen the range, use "
                "another sampling, or switch preserve_distribution_shape off."
            )

    def cdf(self, sigma: Tensor) -> Tensor:
        return ((self.base.cdf(sigma.clamp(self.low, self.high)) - self.below) / self.mass).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(self.below + self.mass * u).clamp(self.low, self.high)
