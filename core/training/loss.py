"""The loss: mean squared error of the velocity (flow matching, arXiv 2210.02747), weighted by the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LEAST_SIGMA = (
    0.001  # the lowest of a discrete schedule's 1000 timesteps; nearer to 0 a weight of sigma^-2 has no bound
)


def _none(sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def _sigma_sqrt(sigma: Tensor) -> Tensor:
    """sigma^-2: low noise counts (far) more."""
    return sigma.clamp(min=_LEAST_SIGMA) ** -2


def _cosmap(sigma: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)): the middle counts twice as much as the ends (arXiv 2403.03206, section 3.1)."""
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = {"none": _none, "sigma_sqrt": _sigma_sqrt, "cosmap": _cosmap}
"""sigma (B,) -> the weight of each sample's loss."""


def weighted_errors(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weight (B,) times each sample's mean squared error, (B,); predicted and target are (B, ...)."""
    return ((predicted.float() - target) ** 2).flatten(1).mean(1).mul(weight)
