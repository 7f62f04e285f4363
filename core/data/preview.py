"""Pictures of what training will see: the windows of every bucket with their captions, and where they lie in the clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..family import Family
from .caching import read_item
from .discovery import Item
from .planning import LatentPlan, PlannedWindow
from .statistics import buckets
from .windows import Window

WIDTH = 1280  # of the contact sheet, in pixels
_MARGIN, _GAP = 24, 12
_STRIP = 104  # height of a strip of frames
_STRIP_FRAMES = 16  # at most in the editor's strips
_LANE = 10  # height of a window on a time line
_LANES = 6  # of a clip at most
_CLIPS = 40  # time lines at most
_MOVING = 16  # windows of videos that are shown from their first frame to their last
T = TypeVar("T")
_BACKGROUND, _TEXT, _FAINT, _BAR = "#1d1f24", "#e8e8ea", "#9a9ca4", "#3a3d46"
_WARNING = "#ff7b72"
_COLOURS = ("#4f8ef7", "#3fb68b", "#e3a83b", "#b07ce8", "#e8728e", "#55b9d6")


@dataclass(frozen=True)
class Sight:
    """A window and its frames (F, h, w, 3) uint8 as training crops them, made small; three of them, or all (`moves`)."""

    planned: PlannedWindow
    frames: np.ndarray
    moves: bool


def choose(plans: Sequence[LatentPlan], shown: int) -> list[tuple[LatentPlan, PlannedWindow]]:
    """Up to `shown` windows of every bucket, spread over it."""
    chosen = []
    for plan in plans:
        for windows in plan.by_size.values():
            chosen += [(plan, window) for window in _spread(windows, shown)]
    return chosen


def sights(
    chosen: Sequence[tuple[LatentPlan, PlannedWindow]], family: Family, height: int = 2 * _STRIP
) -> Iterator[Sight]:
    """The chosen windows, `height` pixels high; what cannot be read joins its plan's `left_out`."""
    moving = {id(window) for _, window in _spread([entry for entry in chosen if entry[1].window], _MOVING)}
    for plan, planned in chosen:
        ((_, frames),) = read_item([planned], plan, family)
        if isinstance(frames, str):
            plan.left_out[planned.item] = frames
            continue
        moves = id(planned) in moving
        yield Sight(planned, _small(frames if moves else _three(frames), height), moves)


def _spread(values: Sequence[T], count: int) -> list[T]:
    """`count` of the values, evenly spaced, or all when there are fewer."""
    count = min(count, len(values))
    return [values[len(values) * index // count] for index in range(count)]


def _three(frames: np.ndarray) -> np.ndarray:
    """The first frame, the middle one and the last."""
    return frames[np.linspace(0, len(frames) - 1, min(3, len(frames))).astype(int)]


def _small(frames: np.ndarray, height: int) -> np.ndarray:
    size = (max(1, round(frames.shape[2] * height / frames.shape[1])), height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def mosaic(seen: Sequence[Sight], columns: int = 4) -> np.ndarray:
    """The windows that move side by side, (F, H, W, 3) uint8 with even sides, which video encoders ask for; a window that
    ends earlier stands still on its last frame."""
    seen = [sight for sight in seen if sight.moves]
    if not seen:
        return np.zeros((1, 16, 16, 3), np.uint8)
    count = max(len(sight.frames) for sight in seen)
    width, height = max(sight.frames.shape[2] for sight in seen), max(sight.frames.shape[1] for sight in seen)
    columns = min(columns, len(seen))
    rows = -(-len(seen) // columns)
    canvas = np.zeros((count, rows * height + rows * height % 2, columns * width + columns * width % 2, 3), np.uint8)
    for index, sight in enumerate(seen):
        frames = sight.frames[np.minimum(np.arange(count), len(sight.frames) - 1)]
        top, left = index // columns * height, index % columns * width
        canvas[:, top : top + frames.shape[1], left : left + frames.shape[2]] = frames
    return canvas


def strip(sight: Sight) -> tuple[np.ndarray, int]:
    """Frames of a window from left to right, (h, n * w, 3) uint8, and how many."""
    frames = _small(np.stack(_spread(sight.frames, _STRIP_FRAMES)), _STRIP)
    return np.concatenate(list(frames), axis=1), len(frames)


def outline(plan: LatentPlan) -> dict[str, Any]:
    """A data set without its pictures, for the editor: its buckets, its clips with their windows [start, count], and what is
    left out."""
    config, clips = plan.dataset.config, _clips(plan) if plan.dataset.config.kind == "video" else {}
    return {
        "title": config.title,
        "buckets": [{"size": str(one.size), "text": one.describe(config.noun)} for one in buckets(plan)],
        "clips": [
            {"name": item.source.name, "frames": windows[0].clip, "windows": [list(one.window) for one in windows]}
            for item, windows in list(clips.items())[:_CLIPS]
        ],
        "more_clips": max(0, len(clips) - _CLIPS),
        "left_out": plan.problems,
    }  # fmt: skip


def _clips(plan: LatentPlan) -> dict[Item, list[PlannedWindow]]:
    clips: dict[Item, list[PlannedWindow]] = {}
    for planned in plan.windows:
        clips.setdefault(planned.item, []).append(planned)
    return clips


def contact_sheet(plans: Sequence[LatentPlan], seen: Sequence[Sight]) -> np.ndarray:
    """One picture (H, 1280, 3) uint8: per data set its buckets with sample windows, then the time lines of its clips."""
    parts = []
    for plan in plans:
        of_plan = [sight for sight in seen if sight.planned in plan.windows]
        config = plan.dataset.config
        parts.append(_line(config.title, 22, _TEXT))
        for bucket in buckets(plan):
            parts.append(_line(bucket.describe(config.noun), 15, _FAINT))
            parts.append(_cells([sight for sight in of_plan if sight.planned.size == bucket.size]))
        if config.kind == "video":
            parts.append(_time_lines(plan))
        parts += [_line(f"left out: {problem}", 14, _WARNING) for problem in plan.problems]
    sheet = Image.new("RGB", (WIDTH, sum(part.height + _GAP for part in parts) + 2 * _MARGIN), _BACKGROUND)
    top = _MARGIN
    for part in parts:
        sheet.paste(part, (_MARGIN, top))
        top += part.height + _GAP
    return np.array(sheet)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line(text: str, size: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (WIDTH - 2 * _MARGIN, size + 8), _BACKGROUND)
    ImageDraw.Draw(image).text((0, 2), text, colour, _font(size))
    return image


def _cells(seen: Sequence[Sight]) -> Image.Image:
    """The windows in rows, each with up to three frames, its name and its caption."""
    strips = [_cell(sight) for sight in seen]
    if not strips:
        return Image.new("RGB", (1, 1), _BACKGROUND)
    columns = max(1, (WIDTH - 2 * _MARGIN + _GAP) // (max(strip.width for strip in strips) + _GAP))
    width, height = max(strip.width for strip in strips) + _GAP, strips[0].height + _GAP
    image = Image.new("RGB", (WIDTH - 2 * _MARGIN, -(-len(strips) // columns) * height), _BACKGROUND)
    for index, strip in enumerate(strips):
        image.paste(strip, (index % columns * width, index // columns * height))
    return image


def _cell(sight: Sight) -> Image.Image:
    shown = _small(_three(sight.frames), _STRIP)
    strip = np.concatenate([np.pad(frame, ((0, 0), (0, 2), (0, 0))) for frame in shown], axis=1)
    width = max(strip.shape[1], 240)
    image = Image.new("RGB", (width, _STRIP + 58), _BACKGROUND)
    image.paste(Image.fromarray(strip), (0, 0))
    draw, window = ImageDraw.Draw(image), sight.planned.window
    name = sight.planned.item.source.name + (
        f", frames {window.start} to {window.start + window.count - 1}" if window else ""
    )
    draw.text((0, _STRIP + 4), _cut(name, width // 7), _TEXT, _font(13))
    lines = wrap(sight.planned.item.caption, width // 6)
    caption = "\n".join([*lines[:1], _cut(" ".join(lines[1:]), width // 6)])
    draw.multiline_text((0, _STRIP + 21), caption, _FAINT, _font(12), spacing=3)
    return image


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _time_lines(plan: LatentPlan) -> Image.Image:
    """A bar per clip, as long as the clip, and its windows on it; windows that overlap lie under each other."""
    clips = _clips(plan)
    shown = dict(list(clips.items())[:_CLIPS])
    longest = max(windows[0].clip for windows in shown.values())
    left, right = 230, WIDTH - 2 * _MARGIN - 190
    lanes = {item: _lanes([planned.window for planned in windows]) for item, windows in shown.items()}
    heights = [max(18, (max(of_clip) + 1) * _LANE + 8) for of_clip in lanes.values()]
    more = len(clips) - len(shown)
    image = Image.new("RGB", (WIDTH - 2 * _MARGIN, sum(heights) + 24), _BACKGROUND)
    draw, top = ImageDraw.Draw(image), 0
    counts = sorted({planned.window.count for planned in plan.windows})
    for (item, windows), height in zip(shown.items(), heights, strict=True):
        scale = (right - left) / longest
        draw.text((0, top + 1), _cut(item.source.name, 32), _TEXT, _font(13))
        draw.rectangle((left, top + 3, left + windows[0].clip * scale, top + height - 6), _BAR)
        for planned, lane in zip(windows, lanes[item], strict=True):
            start, y = left + planned.window.start * scale, top + 3 + lane * _LANE
            end = start + max(3.0, planned.window.count * scale - 2)
            draw.rectangle(
                (start, y + 1, end, y + _LANE - 1), _COLOURS[counts.index(planned.window.count) % len(_COLOURS)]
            )
        plural = "s" if len(windows) > 1 else ""
        draw.text((right + 12, top + 1), f"{len(windows)} window{plural}, {windows[0].clip} frames", _FAINT, _font(13))
        top += height
    if more:
        draw.text((0, top + 2), f"and {more} more clips", _FAINT, _font(13))
    for index, count in enumerate(counts):
        x = left + index * 120
        draw.rectangle((x, image.height - 15, x + 14, image.height - 6), _COLOURS[index % len(_COLOURS)])
        draw.text((x + 20, image.height - 19), f"{count} frames", _FAINT, _font(13))
    return image


def _lanes(windows: Sequence[Window]) -> list[int]:
    """A lane for each window such that those in one lane do not overlap; what would need more than `_LANES` shares the last."""
    ends: list[int] = []
    chosen = []
    for window in windows:
        lane = next((lane for lane, end in enumerate(ends) if end <= window.start), len(ends))
        lane = min(lane, _LANES - 1)
        ends[lane : lane + 1] = [window.start + window.count]
        chosen.append(lane)
    return chosen
