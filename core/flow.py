"""Rectified flow. sigma = 0 is data, sigma = 1 is noise, the model predicts noise - data.

The transformer is told the time as 1000 * sigma, in training as in sampling.
"""

from __future__ import annotations

from torch import Tensor


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) so that it multiplies `like`."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


def noised(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The straight path between data and noise at `sigma` (B,)."""
    return data.lerp(noise, expand(sigma, data))


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What the transformer learns to predict, the same at every sigma."""
    return noise - data


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Flow shift (Esser et al. 2024, arXiv 2403.03206, eq. 23): more steps at high noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def model_time(sigma: Tensor) -> Tensor:
    """sigma -> the time that the transformer is told."""
    return 1000 * sigma
