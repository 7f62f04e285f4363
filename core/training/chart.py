"""A picture of which timesteps are trained and what they count, and the same in words. Drawn with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .distributions import Distribution
from .loss import WEIGHTINGS
from .timesteps import SAMPLINGS, WHOLE, TimestepSettings, distribution, draw

DRAWS = 200_000
_BINS = 50
_SCALE = 2  # drawn larger, then reduced: that smooths the edges
_SIZE = (1280, 860)
_PAPER, _INK, _FAINT, _GRID = (250, 250, 248), (38, 42, 51), (116, 122, 134), (226, 228, 231)
_BARS, _MARK, _CURVE, _UNUSED = (63, 112, 196), (224, 109, 46), (36, 138, 110), (238, 238, 235)


@dataclass(frozen=True)
class Shown:
    """What is drawn: timesteps (N,) of many draws, and the settings behind them."""

    timesteps: Tensor
    settings: TimestepSettings
    title: str
    subtitle: str


def show(settings: TimestepSettings, recommended_shift: float, frame: int, size: str,
         levels: tuple[float, float] = WHOLE) -> tuple[Image.Image, str]:  # fmt: skip
    """The picture and the report for a model with this recommended shift and videos with so many `squares` a frame.

    `size` says in words what the videos are, `levels` are the sigmas that the model is used for.
    """
    made = distribution(settings, recommended_shift, frame, levels)
    u = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = 1000 * draw(made, u)
    title = f"Timesteps: {settings.sampling}" + (f", {settings.density}" if settings.sampling == "sigma" else "")
    shown = Shown(timesteps, settings, title, _subtitle(settings, recommended_shift, frame, size, levels))
    return _picture(shown), _report(shown, made)


def _subtitle(settings: TimestepSettings, recommended_shift: float, frame: int, size: str,
              levels: tuple[float, float]) -> str:  # fmt: skip
    shift = settings.shift_for(recommended_shift)
    if shift is None:
        words = [f"flow shift {SAMPLINGS[settings.sampling].shift_of(frame):.2f} for {size}"]
    else:
        words = [f"flow shift {shift:g}" + (" (recommended)" if settings.shift == 0 and shift != 1 else "")]
    if (settings.min_timestep, settings.max_timestep) != (0, 1000):
        how = "cut out" if settings.preserve_distribution_shape else "pressed into"
        words.append(f"{how} {settings.min_timestep:g} to {settings.max_timestep:g}")
    if levels != WHOLE:
        words.append(f"cut out {1000 * levels[0]:g} to {1000 * levels[1]:g}, which this expert is used for")
    if settings.buckets > 1:
        words.append(f"{settings.buckets} buckets")
    return ", ".join([*words, f"{DRAWS:,} draws"])


def _report(shown: Shown, made: Distribution) -> str:
    settings, timesteps = shown.settings, shown.timesteps
    marks = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    quantiles = ", ".join(f"{1000 * t:.0f}" for t in made.quantile(marks).tolist())
    weights = WEIGHTINGS[settings.weighting](timesteps / 1000)
    lines = [
        shown.title, shown.subtitle,
        f"mean {timesteps.mean():.0f}, 5 / 25 / 50 / 75 / 95 % of draws below {quantiles}",
        f"loss weights: {settings.weighting}, mean {weights.mean():.3g}",
        "", "timesteps     draws   share of the loss's weight",
    ]  # fmt: skip
    for low in range(0, 1000, 100):
        inside = (timesteps >= low) & ((timesteps < low + 100) | (low == 900))
        share = weights[inside].sum() / weights.sum()
        lines.append(f"{low:4} to {low + 100:4}   {100 * inside.float().mean():5.1f} %   {100 * share:5.1f} %")
    return "\n".join(lines)


def _picture(shown: Shown) -> Image.Image:
    image = Image.new("RGB", tuple(side * _SCALE for side in _SIZE), _PAPER)
    canvas = _Canvas(ImageDraw.Draw(image))
    canvas.text(80, 34, shown.title, 30, _INK)
    canvas.text(80, 76, shown.subtitle, 18, _FAINT)
    _draw_histogram(canvas, shown, top=130, bottom=500)
    _draw_weights(canvas, shown, top=600, bottom=770)
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


class _Canvas:
    """Draws in pixels of the finished picture."""

    def __init__(self, drawing: ImageDraw.ImageDraw) -> None:
        self.drawing = drawing

    def text(self, x: float, y: float, text: str, size: int, colour: tuple, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self.drawing.text((x * _SCALE, y * _SCALE), text, colour, font, anchor=anchor)

    def line(self, points: list[tuple[float, float]], colour: tuple, width: float) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.drawing.line(scaled, colour, round(width * _SCALE), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: tuple) -> None:
        self.drawing.rectangle([side * _SCALE for side in (left, top, right, bottom)], colour)


_LEFT, _RIGHT = 110, 1230


def _x(timestep: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * timestep / 1000


@dataclass(frozen=True)
class _Axis:
    """The vertical axis of a plot: values 0..most from `bottom` up to `top`."""

    top: float
    bottom: float
    most: float

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * min(value / self.most, 1.0)

    def draw(self, canvas: _Canvas, ticks: int, unit: str, title: str, settings: TimestepSettings) -> None:
        """Title, grid and numbers; what is outside of the trained range is greyed."""
        canvas.text(_LEFT - 30, self.top - 30, title, 18, _INK, anchor="ls")
        for low, high in ((0, settings.min_timestep), (settings.max_timestep, 1000)):
            if low < high:
                canvas.box(_x(low), self.top, _x(high), self.bottom, _UNUSED)
        for tick in range(ticks + 1):
            value = self.most * tick / ticks
            canvas.line([(_LEFT, self.y(value)), (_RIGHT, self.y(value))], _GRID, 1)
            canvas.text(_LEFT - 12, self.y(value), f"{value:g}{unit}", 16, _FAINT, anchor="rm")
        for timestep in range(0, 1001, 100):
            canvas.line([(_x(timestep), self.bottom), (_x(timestep), self.bottom + 6)], _FAINT, 1)
            canvas.text(_x(timestep), self.bottom + 12, str(timestep), 16, _FAINT, anchor="ma")


def _draw_histogram(canvas: _Canvas, shown: Shown, top: float, bottom: float) -> None:
    counts = torch.histc(shown.timesteps, _BINS, 0, 1000) / len(shown.timesteps) * 100
    axis = _Axis(top + 45, bottom, _round_up(float(counts.max())))
    axis.draw(canvas, 4, " %", f"Share of draws, for every {1000 // _BINS} timesteps", shown.settings)
    width = 1000 / _BINS
    for index, count in enumerate(counts.tolist()):
        if count:
            canvas.box(_x(index * width) + 1.5, axis.y(count), _x((index + 1) * width) - 1.5, bottom, _BARS)
    median = float(shown.timesteps.median())
    canvas.line([(_x(median), axis.top - 14), (_x(median), bottom)], _MARK, 2)
    anchor, offset = ("rs", -8) if median > 500 else ("ls", 8)
    canvas.text(_x(median) + offset, axis.top - 4, f"half of all draws below {median:.0f}", 16, _MARK, anchor=anchor)
    canvas.line([(_LEFT, bottom), (_RIGHT, bottom)], _INK, 1.5)
    canvas.text(_LEFT, bottom + 38, "little noise: details", 16, _FAINT)
    canvas.text((_LEFT + _RIGHT) / 2, bottom + 38, "timestep", 16, _INK, anchor="ma")
    canvas.text(_RIGHT, bottom + 38, "much noise: composition and motion", 16, _FAINT, anchor="ra")


def _draw_weights(canvas: _Canvas, shown: Shown, top: float, bottom: float) -> None:
    """The weights as a curve; it leaves the plot where they go beyond any picture, which the title says."""
    steps = torch.linspace(0, 1000, 1001)
    weights = WEIGHTINGS[shown.settings.weighting](steps / 1000)
    most = _round_up(min(float(weights.max()), 20.0))
    cut = f" (up to {float(weights.max()):,.0f} at the lowest timestep)" if weights.max() > most else ""
    axis = _Axis(top + 25, bottom, most)
    axis.draw(canvas, 2, "", f"Weight of the loss: {shown.settings.weighting}{cut}", shown.settings)
    points = zip(steps.tolist(), weights.tolist(), strict=True)
    canvas.line([(_x(t), axis.y(w)) for t, w in points if w <= most], _CURVE, 3)
    canvas.line([(_LEFT, bottom), (_RIGHT, bottom)], _INK, 1.5)
    canvas.text((_LEFT + _RIGHT) / 2, bottom + 38, "timestep", 16, _INK, anchor="ma")


def _round_up(value: float) -> float:
    """A little more than `value`, so that its halves and quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(1.02 * value))
    return next(step * power for step in (1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= 1.02 * value)
