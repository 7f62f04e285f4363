"""Classifier-free guidance (arXiv 2207.12598), in which steps it is left out to save time, and skip-layer guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..checks import require

SKIP_LAYER_MODES = ("uncond", "original")
CFG_SKIP_MODES = ("none", "early", "late", "middle", "early_late", "alternate")

Velocity = Callable[..., Tensor]
"""(latents, time, numbers of the blocks that are left out = ()) -> velocity."""


@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance, as published with Stable Diffusion 3.5: leads away from what the model makes without some of its
    blocks.

    layers      numbers of the blocks that are left out, from 0
    mode        uncond: the pass with the negative prompt is made without them, two passes in all; original: a third pass,
                with the negative prompt and without them, from which `scale` leads away too
    start, end  share of the steps from which on and up to which it works, where guidance does
    """

    layers: tuple[int, ...]
    mode: str = "uncond"
    scale: float = 3.0
    start: float = 0.0
    end: float = 0.3

    def __post_init__(self) -> None:
        require(bool(self.layers), "no layers are given to leave out: name some, as in 9,10.")
        require(min(self.layers) >= 0, f"layer {min(self.layers)}: layers are numbered from 0.")
        modes = ", ".join(SKIP_LAYER_MODES)
        require(self.mode in SKIP_LAYER_MODES, f"skip-layer mode '{self.mode}' is unknown: use one of {modes}.")
        require(
            0 <= self.start < self.end <= 1, f"start is {self.start} and end {self.end}: use 0 <= start < end <= 1."
        )

    def works_in(self, step: int, steps: int) -> bool:
        return int(self.start * steps) <= step < int(self.end * steps)


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


def guided(positive: Velocity, negative: Velocity | None, scale: float, skip: SkipLayers | None = None,
           both: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = None) -> Velocity:  # fmt: skip
    """v = v_neg + scale * (v_pos - v_neg); one pass when there is nothing to guide away from. `skip` changes v_neg, or adds
    skip.scale * (v_pos - v_without). `both` gives v_pos and v_neg in one pass, where the same blocks make them."""
    if negative is None or scale == 1:
        return positive

    def velocity(latents: Tensor, time: float) -> Tensor:
        if both is not None and not (skip and skip.mode == "uncond"):
            toward, away = both(latents, time)
        else:
            away = negative(latents, time, skip.layers if skip and skip.mode == "uncond" else ())
            toward = positive(latents, time)
        result = away + scale * (toward - away)
        if skip and skip.mode == "original":
            result = result + skip.scale * (toward - negative(latents, time, skip.layers))
        return result

    return velocity
