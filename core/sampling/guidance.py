"""Classifier-free guidance (arXiv 2207.12598), and in which steps it is left out to save time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

CFG_SKIP_MODES = ("none", "early", "late", "middle", "early_late", "alternate")

Velocity = Callable[[Tensor, float], Tensor]
"""(latents, sigma) -> velocity."""


def cfg_plan(mode: str, steps: int, ratio: float) -> str:
    """A letter per step: A guidance is applied, S it is skipped.

    `ratio` of the steps (0..1, rounded down) apply it. `early` skips the first steps, `late` the last, `middle` those in
    between, `early_late` both ends, `alternate` spreads the applied ones. `none` applies it in every step.
    """
    if mode not in CFG_SKIP_MODES:
        raise ValueError(f"CFG skip mode '{mode}' is unknown: use one of {', '.join(CFG_SKIP_MODES)}.")
    if not 0 <= ratio <= 1:
        raise ValueError(f"CFG apply ratio is {ratio}: use 0 to 1.")
    if mode == "none":
        return "A" * steps
    if mode == "alternate":
        return _alternate(steps, ratio)
    applied = int(steps * ratio)
    skipped = steps - applied
    return {
        "early": "S" * skipped + "A" * applied,
        "late": "A" * applied + "S" * skipped,
        "middle": "A" * (applied // 2) + "S" * skipped + "A" * (applied - applied // 2),
        "early_late": "S" * (skipped // 2) + "A" * applied + "S" * (skipped - skipped // 2),
    }[mode]


def _alternate(steps: int, ratio: float) -> str:
    """Adds up `ratio` and applies at every whole number, in plain floats: the published plans come from their rounding."""
    plan, weight = "", 0.0
    for _ in range(steps):
        weight += ratio
        apply = weight >= 1.0
        weight -= apply
        plan += "A" if apply else "S"
    return plan


def guided(positive: Velocity, negative: Velocity | None, scale: float) -> Velocity:
    """v = v_neg + scale * (v_pos - v_neg); one pass when there is nothing to guide away from."""
    if negative is None or scale == 1:
        return positive

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        away = negative(latents, sigma)
        return away + scale * (positive(latents, sigma) - away)

    return velocity
