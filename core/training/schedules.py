"""Learning rates as pure functions of the step: a resumed run needs nothing but its step's number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from ..checks import require


@dataclass(frozen=True)
class Position:
    """Where a step is after the warm-up: `done` of `total` steps, as `progress` from 0 up to less than 1."""

    done: int
    total: int

    @property
    def progress(self) -> float:
        return self.done / max(self.total, 1)


def _constant(settings: ScheduleSettings, at: Position) -> float:
    return 1.0


def _linear(settings: ScheduleSettings, at: Position) -> float:
    return 1 - at.progress


def _cosine(settings: ScheduleSettings, at: Position) -> float:
    return _half_wave(at.progress)


def _cosine_with_restarts(settings: ScheduleSettings, at: Position) -> float:
    """Half waves one after another (SGDR, arXiv 1608.03983)."""
    return _half_wave(settings.cycles * at.progress % 1.0)


def _polynomial(settings: ScheduleSettings, at: Position) -> float:
    return (1 - at.progress) ** settings.power


def _warmup_stable_decay(settings: ScheduleSettings, at: Position) -> float:
    """Constant, then a half wave over the last `decay_steps` (WSD, arXiv 2404.06395)."""
    return _half_wave(max(0, at.done - at.total + settings.decay_steps) / settings.decay_steps)


def _rex(settings: ScheduleSettings, at: Position) -> float:
    """Falls late: z / (0.1 + 0.9 z) of what is left, z (after REX, arXiv 2107.04197)."""
    left = 1 - at.progress
    return left / (0.1 + 0.9 * left)


def _half_wave(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """How the rate goes from 1 to 0 after the warm-up, and the settings that only some schedules heed."""

    factor: Callable[[ScheduleSettings, Position], float]
    uses: frozenset[str] = frozenset()


_FALLS = "min_lr_ratio"

SCHEDULES: Mapping[str, Schedule] = {
    "constant": Schedule(_constant),
    "linear": Schedule(_linear, frozenset({_FALLS})),
    "cosine": Schedule(_cosine, frozenset({_FALLS})),
    "cosine_with_restarts": Schedule(_cosine_with_restarts, frozenset({_FALLS, "cycles"})),
    "polynomial": Schedule(_polynomial, frozenset({_FALLS, "power"})),
    "warmup_stable_decay": Schedule(_warmup_stable_decay, frozenset({_FALLS, "decay_steps"})),
    "rex": Schedule(_rex, frozenset({_FALLS})),
}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How the learning rate goes.

    warmup_steps    it rises in a line over so many steps
    min_lr_ratio    what it falls to, as a share of the full rate
    cycles          half waves of cosine_with_restarts
    power           of polynomial
    decay_steps     last steps of warmup_stable_decay, over which it falls
    """

    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    cycles: int = 1
    power: float = 1.0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        name = self.schedule
        require(name in SCHEDULES, f"learning rate schedule '{name}': use one of {', '.join(SCHEDULES)}.")
        require(self.warmup_steps >= 0, f"warm-up is {self.warmup_steps} steps: use 0 or more.")
        require(0 <= self.min_lr_ratio <= 1, f"min learning rate ratio is {self.min_lr_ratio}: use 0 to 1.")
        require(self.cycles >= 1, f"cycles is {self.cycles}: use 1 or more.")
        require(0 < self.power <= 100, f"power is {self.power}: use a number above 0, such as 1 (linear) or 2.")
        require(self.decay_steps >= 0, f"decay is {self.decay_steps} steps: use 0 or more.")
        defaults = {entry.name: entry.default for entry in fields(ScheduleSettings)}
        for setting in ("min_lr_ratio", "cycles", "power", "decay_steps"):
            value = getattr(self, setting)
            if setting not in SCHEDULES[name].uses and value != defaults[setting]:
                others = " or ".join(other for other, made in SCHEDULES.items() if setting in made.uses)
                raise ValueError(f"the schedule '{name}' has no {setting}, and it is {value}: set it to {defaults[setting]}, or "
                                 f"use {others}.")  # fmt: skip
        if name == "warmup_stable_decay":
            require(self.decay_steps > 0, "decay is 0 steps, with warmup_stable_decay: use a tenth of the steps or so.")

    def check(self, steps: int) -> None:
        """Raise ValueError when warm-up and decay do not fit into so many steps."""
        needed = self.warmup_steps + self.decay_steps
        require(
            needed <= steps,
            f"warm-up ({self.warmup_steps}) and decay ({self.decay_steps}) are longer than the training of {steps} steps: "
            "use fewer, or train longer.",
        )


def rate_factor(settings: ScheduleSettings, step: int, steps: int) -> float:
    """The learning rate of 0-based `step` of `steps`, as a share of the full rate."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    position = Position(step - settings.warmup_steps, steps - settings.warmup_steps)
    factor = SCHEDULES[settings.schedule].factor(settings, position)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor
