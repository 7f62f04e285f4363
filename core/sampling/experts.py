"""Releases of two transformers, one for high and one for low noise, sampled as if they were one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..flow import model_time

_ROUNDING = 1e-3  # what a time on 0..1000 in float32 may be off by


@dataclass(frozen=True)
class ExpertPair:
    """In the place of a transformer: the high-noise expert from sigma `boundary` on, the low-noise expert below.

    `use` brings the expert of that name ("high" or "low"), loaded when it is first needed; the other may go then.
    `guidance` is that of each.
    """

    boundary: float
    use: Callable[[str], nn.Module]
    guidance: Mapping[str, float]

    def _expert_at(self, time: float) -> str:
        return "high" if time >= model_time(self.boundary) - _ROUNDING else "low"

    def guidance_at(self, sigma: float) -> float:
        return self.guidance[self._expert_at(model_time(sigma))]

    def __call__(self, latents: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """As a transformer; all samples are at one time, that of the first."""
        return self.use(self._expert_at(float(time[0])))(latents, time, **conditions)
