"""Noise levels of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow import model_time, shifted
from .guidance import SkipLayers, cfg_plan
from .solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps, flow shift, solver, in which steps guidance is applied, and skip-layer guidance."""

    steps: int
    shift: float
    solver: str = "euler"
    cfg_skip: str = "none"
    cfg_ratio: float = 1.0
    skip_layers: SkipLayers | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: use 1 or more.")
        if not 0 < self.shift <= 100:
            raise ValueError(f"flow shift is {self.shift}: use a number above 0.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver '{self.solver}' is unknown: use one of {', '.join(SOLVERS)}.")
        self.plan  # noqa: B018  checks mode and ratio

    @property
    def sigmas(self) -> Tensor:
        """(steps + 1,) float32, from the solver's first, which is 1 or next to it, to exactly 0."""
        return self._levels.float()

    @property
    def times(self) -> Tensor:
        """(steps,) float32: what the model is told in each step."""
        times = model_time(self._levels[:-1])
        return (times.floor() if SOLVERS[self.solver].whole_times else times).float()

    @property
    def _levels(self) -> Tensor:
        """The sigmas in float64, in which times are rounded."""
        first = SOLVERS[self.solver].first
        even = first - torch.arange(self.steps + 1, dtype=torch.float64) * (first / self.steps)
        even[-1] = 0
        return shifted(even, self.shift)

    @property
    def plan(self) -> str:
        """A letter per step: A guidance is applied, S it is skipped."""
        return cfg_plan(self.cfg_skip, self.steps, self.cfg_ratio)
