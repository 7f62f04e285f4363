"""Solvers of the flow's differential equation: generators over (velocity, latents, sigmas) that yield after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

StepVelocity = Callable[[Tensor, float, int], Tensor]
"""(latents, sigma, index of the step) -> velocity."""


def euler(velocity: StepVelocity, latents: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """First order: x += (sigma_next - sigma) * v."""
    for index, (sigma, following) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False)):
        latents = latents + (following - sigma) * velocity(latents, sigma, index)
        yield latents


SOLVERS: dict[str, Callable[[StepVelocity, Tensor, Tensor], Iterator[Tensor]]] = {"euler": euler}
