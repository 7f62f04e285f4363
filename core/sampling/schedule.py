"""Noise levels of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..flow import shifted
from .guidance import cfg_plan
from .solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps, flow shift, solver, and in which steps guidance is applied."""

    steps: int
    shift: float
    solver: str = "euler"
    cfg_skip: str = "none"
    cfg_ratio: float = 1.0

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
        """(steps + 1,) float32, from exactly 1 to exactly 0."""
        return shifted(torch.linspace(1, 0, self.steps + 1), self.shift)

    @property
    def plan(self) -> str:
        """A letter per step: A guidance is applied, S it is skipped."""
        return cfg_plan(self.cfg_skip, self.steps, self.cfg_ratio)
