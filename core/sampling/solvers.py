"""Solvers of the flow's differential equation: generators over (velocity, latents, sigmas) that yield after each step.

With x = sigma * noise + (1 - sigma) * data, the model's velocity v gives data = x - sigma * v, and l = log((1 - sigma) / sigma)
is half the logarithm of the signal to noise ratio, -inf at sigma 1 and inf at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

StepVelocity = Callable[[Tensor, float, int], Tensor]
"""(latents, sigma, index of the step) -> velocity."""


class Reached(NamedTuple):
    """Latents after a step, and what the model took for the data in it."""

    latents: Tensor
    denoised: Tensor


def euler(velocity: StepVelocity, x: Tensor, sigmas: Tensor) -> Iterator[Reached]:
    """First order: x += (sigma_next - sigma) * v."""
    for index, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        v = velocity(x, sigma, index)
        denoised = x - sigma * v
        x = x + (following - sigma) * v
        yield Reached(x, denoised)


def dpmpp(velocity: StepVelocity, x: Tensor, sigmas: Tensor) -> Iterator[Reached]:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2); the first and the last step are of first order."""
    levels = sigmas.tolist()
    before = None
    for index, (sigma, following) in enumerate(pairwise(levels)):
        data = x - sigma * velocity(x, sigma, index)
        base, toward = _first_order(x, data, sigma, following)
        if before is not None and following > 0:
            ratio = (_l(sigma) - _l(levels[index - 1])) / (_l(following) - _l(sigma))
            base = base - 0.5 * toward / ratio * (data - before)
        x, before = base, data
        yield Reached(x, data)


def unipc(velocity: StepVelocity, x: Tensor, sigmas: Tensor) -> Iterator[Reached]:
    """UniPC of order 2 with B2(h) = e^h - 1 (arXiv 2302.04867, section 3); the first and the last step are of first order."""
    levels = sigmas.tolist()
    steps, order = len(levels) - 1, 0
    start, data = x, []  # of the step before; the data predicted so far, the newest first
    for index, (sigma, following) in enumerate(pairwise(levels)):
        predicted = x - sigma * velocity(x, sigma, index)
        if index:
            x = _corrected(start, predicted, data, levels[: index + 1], order)
        start, data, order = x, [predicted, *data[:1]], min(2, steps - index, index + 1)
        x, toward = _first_order(x, predicted, sigma, following)
        if order == 2:
            x = x + 0.5 * toward / _distance(levels[: index + 2]) * (predicted - data[1])
        yield Reached(x, predicted)


def _corrected(start: Tensor, predicted: Tensor, data: list[Tensor], levels: list[float], order: int) -> Tensor:
    """The sample at the last of `levels`, made again from the one before with what the model predicted since."""
    before, sigma = levels[-2:]
    base, toward = _first_order(start, data[0], before, sigma)
    if order == 1:
        return base - 0.5 * toward * (predicted - data[0])
    r, h = _distance(levels), _l(before) - _l(sigma)
    c1 = math.expm1(h) / h - 1
    c2 = c1 / h - 0.5
    b1, b2 = c1 / math.expm1(h), 2 * c2 / math.expm1(h)
    older = (b1 - b2) / (1 - r)  # the weights rho solve rho0 + rho1 = b1 and r * rho0 + rho1 = b2
    return base - toward * (older / r * (data[1] - data[0]) + (b1 - older) * (predicted - data[0]))


def _first_order(x: Tensor, data: Tensor, sigma: float, following: float) -> tuple[Tensor, float]:
    """One step of the exponential integrator as if the data stayed the same, and the factor of its corrections."""
    toward = (1 - following) * math.expm1(_l(sigma) - _l(following))
    return (following / sigma) * x - toward * data, toward


def _distance(levels: list[float]) -> float:
    """How far the step before last reaches back, over the length of the last; negative."""
    older, sigma, following = levels[-3:]
    return (_l(older) - _l(sigma)) / (_l(following) - _l(sigma))


def _l(sigma: float) -> float:
    if sigma >= 1:
        return -math.inf
    return math.log(1 - sigma) - math.log(sigma) if sigma > 0 else math.inf


@dataclass(frozen=True)
class Solver:
    """`first` is where its noise levels begin before the flow shift; `whole_times` tell the model 1000 * sigma without its
    fraction, as the releases that recommend it were tuned."""

    steps: Callable[[StepVelocity, Tensor, Tensor], Iterator[Reached]]
    first: float = 1.0
    whole_times: bool = False


SOLVERS = {
    "euler": Solver(euler),
    "unipc": Solver(unipc, first=0.9990000128746033, whole_times=True),  # float32's 0.999: l is finite
    "dpm++": Solver(dpmpp, whole_times=True),
}
