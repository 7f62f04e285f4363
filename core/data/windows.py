"""Which frames of a clip become training items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .config import DatasetConfig


class Window(NamedTuple):
    """Frames [start, start + count) at the model's frame rate."""

    start: int
    count: int


def choose_windows(config: DatasetConfig, frames: int, frames_at_most: Callable[[int], int]) -> list[Window]:
    """The windows of a clip with `frames` frames; none when it is shorter than every window.

    `frames_at_most` rounds a count down to one that the model can take.
    """
    lengths = sorted({frames_at_most(count) for count in config.target_frames})
    if config.frame_extraction == "full":
        return [Window(0, frames_at_most(min(frames, config.max_frames)))] if frames else []
    starts = _STARTS[config.frame_extraction]
    windows = (
        Window(start, length) for length in lengths if length <= frames for start in starts(config, frames, length)
    )
    return list(dict.fromkeys(windows))  # uniform sampling of a short clip may name a window twice


def _head(config: DatasetConfig, frames: int, length: int) -> Iterable[int]:
    return (0,)


def _chunk(config: DatasetConfig, frames: int, length: int) -> Iterable[int]:
    return range(0, frames - length + 1, length)


def _slide(config: DatasetConfig, frames: int, length: int) -> Iterable[int]:
    return range(0, frames - length + 1, config.frame_stride)


def _uniform(config: DatasetConfig, frames: int, length: int) -> Iterable[int]:
    return np.linspace(0, frames - length, config.frame_sample).astype(int).tolist()  # as other trainers round


_STARTS = {"head": _head, "chunk": _chunk, "slide": _slide, "uniform": _uniform}
