"""Which noise levels training sees (`TimestepSettings`), as distributions of sigma (0 data, 1 noise).

A timestep is 1000 * sigma, as the transformer is told it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from ..checks import require
from ..family import Variant
from ..shapes import VideoSize
from .distributions import Cut, Distribution, LogitNormal, Mixture, Mode, Shifted, Squeezed, Steps, Uniform
from .loss import WEIGHTINGS

RECOMMENDED = 0.0
"""As a flow shift: what the model's authors recommend, or none for samplings that are not shifted by nature."""

_DETAIL = LogitNormal(-5.36 / 2, 1.0 / 2)  # log-SNR 5.36 +- 1: the least noise, which shifted samplings hardly see


def _uniform(settings: TimestepSettings, shift: float) -> Distribution:
    return _moved(Uniform(), shift)


def _sigmoid(settings: TimestepSettings, shift: float) -> Distribution:
    return LogitNormal(math.log(shift), settings.sigmoid_scale)


def _logsnr(settings: TimestepSettings, shift: float) -> Distribution:
    """sigma = sigmoid(-l / 2) of a normal log signal-to-noise ratio l."""
    return LogitNormal(math.log(shift) - settings.logit_mean / 2, settings.logit_std / 2)


def _sigma(settings: TimestepSettings, shift: float) -> Distribution:
    return _moved(Steps(DENSITIES[settings.density](settings)), shift)


def _qinglong_flux(settings: TimestepSettings, shift: float) -> Distribution:
    return Mixture(((0.79, _sigmoid(settings, shift)), (0.11, _logsnr(settings, 1.0)), (0.10, _DETAIL)))


def _qinglong_qwen(settings: TimestepSettings, shift: float) -> Distribution:
    return Mixture(((0.95, _sigmoid(settings, shift)), (0.05, _DETAIL)))


def _moved(base: Distribution, shift: float) -> Distribution:
    return base if shift == 1 else Shifted(base, shift)


DENSITIES: dict[str, Callable[[TimestepSettings], Distribution]] = {
    "uniform": lambda settings: Uniform(),
    "logit_normal": lambda settings: LogitNormal(settings.logit_mean, settings.logit_std),
    "mode": lambda settings: Mode(settings.mode_scale),
}
"""How often `sigma` sampling takes each of its 1000 timesteps (arXiv 2403.03206, section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A way of drawing. `uses` are the settings that it heeds, besides those that all do.

    `shift_at` of a frame's `squares` is the logarithm of the flow shift, for samplings that take it from the
    video's size: the straight line through two points (squares, value).
    """

    title: str
    make: Callable[[TimestepSettings, float], Distribution]
    uses: frozenset[str]
    recommended: bool = False
    shift_at: tuple[tuple[float, float], tuple[float, float]] | None = None

    def shift_of(self, squares: int) -> float:
        """The flow shift for a frame of so many squares, when it depends on them."""
        (x0, y0), (x1, y1) = self.shift_at
        return math.exp(y0 + (squares - x0) * (y1 - y0) / (x1 - x0))


def squares(latents: VideoSize) -> int:
    """How many squares of two by two latents a frame holds: the tokens of those models that the samplings which depend on the
    size were made for, and what trainers count for all others too."""
    return (latents.height // 2) * (latents.width // 2)


_FLUX, _QWEN = ((256, 0.5), (4096, 1.15)), ((256, 0.5), (8192, 0.9))
_LOGIT = {"logit_mean", "logit_std"}

SAMPLINGS: Mapping[str, Sampling] = {
    "uniform": Sampling(title="all alike", make=_uniform, uses=frozenset({"shift"})),
    "sigmoid": Sampling(title="mostly the middle", make=_sigmoid, uses=frozenset({"shift", "sigmoid_scale"})),
    "shift": Sampling(title="the middle, moved by the flow shift as in sampling", make=_sigmoid,
                      uses=frozenset({"shift", "sigmoid_scale"}), recommended=True),
    "flux_shift": Sampling(title="moved more for larger videos", make=_sigmoid, uses=frozenset({"sigmoid_scale"}),
                           shift_at=_FLUX),
    "qwen_shift": Sampling(title="moved a little more for larger videos", make=_sigmoid,
                           uses=frozenset({"sigmoid_scale"}), shift_at=_QWEN),
    "logsnr": Sampling(title="a normal log signal-to-noise ratio", make=_logsnr, uses=frozenset({"shift"} | _LOGIT)),
    "qinglong_flux": Sampling(title="flux_shift, with a fifth for low noise", make=_qinglong_flux,
                              uses=frozenset({"sigmoid_scale"} | _LOGIT), shift_at=_FLUX),
    "qinglong_qwen": Sampling(title="qwen_shift, with a twentieth for low noise", make=_qinglong_qwen,
                              uses=frozenset({"sigmoid_scale"}), shift_at=_QWEN),
    "sigma": Sampling(title="the sampler's 1000 timesteps, by a density", make=_sigma,
                      uses=frozenset({"shift", "density", "mode_scale"} | _LOGIT), recommended=True),
}  # fmt: skip

_DENSITY_USES = {"uniform": set(), "logit_normal": _LOGIT, "mode": {"mode_scale"}}
_OF_SOME = ("shift", "sigmoid_scale", "logit_mean", "logit_std", "density", "mode_scale")


@dataclass(frozen=True, kw_only=True)
class TimestepSettings:
    """How noise levels are drawn and weighted.

    shift               flow shift; 0 for what the model's authors recommend
    sigmoid_scale       spread of the samplings around the middle
    min_timestep, max_timestep   the range that is trained, 0..1000; low is little noise. All of it means, for one of two
                        experts, the part that it is used for
    preserve_distribution_shape  cut the range out of the distribution instead of pressing all of it into the range
    buckets             so many consecutive draws are spread evenly over as many equal parts of the distribution
    density, logit_mean, logit_std, mode_scale   of `sigma` sampling, and of the log-SNR
    weighting           of the loss, see `loss.py`
    """

    sampling: str = "shift"
    shift: float = RECOMMENDED
    sigmoid_scale: float = 1.0
    min_timestep: int = 0
    max_timestep: int = 1000
    preserve_distribution_shape: bool = False
    buckets: int = 0
    weighting: str = "none"
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        for name, choices in (("sampling", SAMPLINGS), ("density", DENSITIES), ("weighting", WEIGHTINGS)):
            value = getattr(self, name)
            require(value in choices, f"timestep {name} '{value}': use one of {', '.join(choices)}.")
        low, high = self.min_timestep, self.max_timestep
        require(
            0 <= low < high <= 1000, f"timesteps {low:g} to {high:g}: use a range inside 0 to 1000, the smaller first."
        )
        require(
            0 <= self.shift <= 100, f"flow shift is {self.shift}: use 0 for the model's own, or a number up to 100."
        )
        require(0.1 <= self.sigmoid_scale <= 100, f"sigmoid scale is {self.sigmoid_scale}: use 0.1 to 100, usually 1.")
        require(0 <= self.buckets <= 1000, f"timestep buckets is {self.buckets}: use 0 (off) or 2 to 1000.")
        require(-10 <= self.logit_mean <= 10, f"logit mean is {self.logit_mean}: use -10 to 10, usually 0.")
        require(0.1 <= self.logit_std <= 10, f"logit std is {self.logit_std}: use 0.1 to 10, usually 1.")
        # Beyond 2 / (pi - 2) the formula of the density would turn back on itself.
        require(-1 <= self.mode_scale <= 1.75, f"mode scale is {self.mode_scale}: use -1 to 1.75, usually 1.29.")
        self._refuse_unused()

    def shift_for(self, recommended: float) -> float | None:
        """The flow shift for a model with this recommendation; None when it depends on the video's size."""
        sampling = SAMPLINGS[self.sampling]
        if sampling.shift_at:
            return None
        if self.shift == RECOMMENDED:
            return recommended if sampling.recommended else 1.0
        return self.shift

    def levels(self, variant: Variant, boundary: float = 0.0) -> tuple[float, float]:
        """The sigmas that one expert alone is trained for: those it is used for, unless a range was chosen."""
        chosen = (self.min_timestep, self.max_timestep) != (0, 1000)
        return WHOLE if chosen else variant.levels(boundary)

    def _refuse_unused(self) -> None:
        used = set(SAMPLINGS[self.sampling].uses)
        if self.sampling == "sigma":
            used -= (_LOGIT | {"mode_scale"}) - _DENSITY_USES[self.density]
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in _OF_SOME:
            if name not in used and getattr(self, name) != defaults[name]:
                density = f" with density '{self.density}'" if self.sampling == "sigma" else ""
                reason = "takes its shift from the size of the videos" if name == "shift" else f"has no {name}"
                raise ValueError(
                    f"'{self.sampling}' sampling{density} {reason}, and {name} is {getattr(self, name)}: set it to "
                    f"{defaults[name]}, or use another sampling."
                )


WHOLE = (0.0, 1.0)


def distribution(
    settings: TimestepSettings, recommended_shift: float, size: int, levels: tuple[float, float] = WHOLE
) -> Distribution:
    """The distribution of sigma. Some samplings depend on the `size` of a frame, in `squares`. `levels` cuts out of it the
    sigmas that a model is used for.

    Raises ValueError when the sampling makes nothing in the range.
    """
    sampling = SAMPLINGS[settings.sampling]
    shift = settings.shift_for(recommended_shift)
    whole = sampling.make(settings, sampling.shift_of(size) if shift is None else shift)
    low, high = settings.min_timestep / 1000, settings.max_timestep / 1000
    if (low, high) != WHOLE:
        whole = (Cut if settings.preserve_distribution_shape else Squeezed)(whole, low, high)
    return whole if levels == WHOLE else Cut(whole, *levels)


def draw(given: Distribution, u: Tensor) -> Tensor:
    """sigma (B,) in float32 from uniform numbers (B,) in float64."""
    return given.quantile(u).float()
