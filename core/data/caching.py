"""Making the caches: every clip through the VAE, every caption through the text encoder, only what is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..family import VAE, Family, TextEncoder
from ..io.files import digest, fingerprint
from ..prefetch import prefetched
from ..shapes import VideoSize
from . import cache_files
from .buckets import choose_bucket
from .config import DatasetConfig
from .discovery import Item, find_items
from .media import MediaInfo, UnreadableMedia, probe, read_image, read_windows
from .windows import Window, choose_windows

_TEXT_BATCH = 8


@dataclass(frozen=True)
class Dataset:
    """A data set with its items found."""

    config: DatasetConfig
    items: tuple[Item, ...]

    @classmethod
    def find(cls, config: DatasetConfig, resolve: Callable[[str], Path] = Path) -> Dataset:
        return cls(config, tuple(find_items(config, resolve)))


@dataclass(frozen=True)
class PlannedWindow:
    """One latent file to be: frames of an item at a size in pixels. `window` is None for an image."""

    item: Item
    window: Window | None
    size: VideoSize
    path: Path
    fingerprint: str


@dataclass
class LatentPlan:
    """What caching a data set will make, and what it leaves out and why (item's file name -> reason)."""

    dataset: Dataset
    windows: list[PlannedWindow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheStep:
    """One file of a caching run. `outcome` is made, kept or failed; `reason` says why it failed."""

    done: int
    total: int
    name: str
    outcome: str
    reason: str = ""


def plan_latents(
    dataset: Dataset, family: Family, encoder_identity: str, on_item: Callable[[int, int], None] = lambda *_: None
) -> LatentPlan:
    """Choose size and windows of every item. `encoder_identity` stands for the VAE's file and dtype; `on_item` is told
    (items done, items in all), as reading many large clips takes a while.

    Raises ValueError when the data set's size or frame counts do not fit the model, or nothing can be read.
    """
    plan = LatentPlan(dataset)
    config = dataset.config
    if not config.enable_bucket:
        family.latent.check(VideoSize(1, config.resolution[1], config.resolution[0]))
    for done, item in enumerate(dataset.items):
        on_item(done, len(dataset.items))
        try:
            plan.windows += _plan_item(item, config, family, encoder_identity)
        except UnreadableMedia as error:
            plan.left_out[item.source.name] = str(error)
    if not plan.windows:
        raise ValueError(f"nothing in {config.title} can be used: {reasons(plan.left_out)}")
    return plan


def _plan_item(item: Item, config: DatasetConfig, family: Family, encoder: str) -> list[PlannedWindow]:
    state = _state(item.source)
    info = _probed(item.source, family.fps, config.source_fps, state)
    if config.enable_bucket:
        size = choose_bucket((info.width, info.height), config.resolution, family.latent.multiple,
                             no_upscale=config.bucket_no_upscale)  # fmt: skip
    else:
        size = config.resolution
    windows: list[Window | None] = [None]
    if config.kind == "video":
        windows = list(choose_windows(config, info.frames, family.latent.frames_at_most))
        if not windows:
            raise UnreadableMedia(
                f"it has {info.frames} frames at {family.fps} fps, fewer than target_frames {min(config.target_frames)}"
            )
    content = _content(item.source, state)
    planned = []
    for window in windows:
        pixels = VideoSize(window.count if window else 1, size[1], size[0])
        identity = digest([content, encoder, list(pixels), list(window or ()), family.fps, config.source_fps])
        path = cache_files.latent_path(config.cache, item.key, window, size, family)
        planned.append(PlannedWindow(item, window, pixels, path, identity))
    return planned


def _state(source: Path) -> tuple:
    """Sizes and times of change: while they stay the same, a file or a folder of frames is not read again."""
    files = [source] if source.is_file() else sorted(source.iterdir())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=1 << 16)
def _probed(source: Path, fps: float, source_fps: float | None, state: tuple) -> MediaInfo:
    return probe(source, fps, source_fps)


@lru_cache(maxsize=1 << 16)
def _content(source: Path, state: tuple) -> str:
    """What identifies the content of a file or a folder of frames."""
    if source.is_file():
        return fingerprint(source)
    return digest([[path.name, fingerprint(path)] for path in sorted(source.iterdir()) if path.is_file()])


def check_distinct(planned: Iterable[PlannedWindow | PlannedText]) -> None:
    """Raise ValueError when two data sets would write one cache file with different contents."""
    wanted: dict[Path, str] = {}
    for one in planned:
        if wanted.setdefault(one.path, one.fingerprint) != one.fingerprint:
            raise ValueError(
                f"two data sets would both write {one.path} with different contents: give each its own cache_directory, or "
                "its own folder."
            )


def reasons(left_out: dict[str, str]) -> str:
    """`name (reason), ...` for messages."""
    listed = [f"{name} ({reason})" for name, reason in left_out.items()]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def cache_latents(
    plans: Sequence[LatentPlan], family: Family, load_vae: Callable[[], VAE], device: torch.device
) -> Iterator[CacheStep]:
    """Make the latent files that are missing or out of date. The VAE is loaded only when there is something to do.

    An item that cannot be read is reported as failed, moved to its plan's `left_out`, and the run goes on. Stop by not
    asking for the next step: everything that was reported is on the disk.
    """
    total = sum(len(plan.windows) for plan in plans)
    todo: list[tuple[LatentPlan, list[PlannedWindow]]] = []
    done = 0
    for plan in plans:
        by_item: dict[Item, list[PlannedWindow]] = {}
        for window in plan.windows:
            if cache_files.is_current(window.path, window.fingerprint):
                done += 1
                yield CacheStep(done, total, window.path.name, "kept")
            else:
                by_item.setdefault(window.item, []).append(window)
        todo += [(plan, windows) for windows in by_item.values()]
    if not todo:
        return
    vae = load_vae()
    with closing(prefetched(_read_all(todo, family))) as clips:
        for plan, planned, frames in clips:
            done += 1
            if isinstance(frames, UnreadableMedia):
                plan.left_out[planned.item.source.name] = str(frames)
                plan.windows.remove(planned)
                yield CacheStep(done, total, planned.path.name, "failed", str(frames))
                continue
            latents = vae.encode(to_video(frames, device))[0]
            cache_files.save_latents(planned.path, latents, planned.size, family, planned.fingerprint)
            yield CacheStep(done, total, planned.path.name, "made")
    for plan in plans:
        if not plan.windows:
            raise ValueError(f"nothing in {plan.dataset.config.title} can be used: {reasons(plan.left_out)}")


def _read_all(
    todo: Sequence[tuple[LatentPlan, list[PlannedWindow]]], family: Family
) -> Iterator[tuple[LatentPlan, PlannedWindow, np.ndarray | UnreadableMedia]]:
    for plan, windows in todo:
        waiting = {window.window: window for window in windows}
        source, size = windows[0].item.source, (windows[0].size.width, windows[0].size.height)
        try:
            if None in waiting:
                yield plan, waiting.pop(None), read_image(source, size)
            else:
                wanted = list(waiting)
                for window, frames in read_windows(source, wanted, size, family.fps, plan.dataset.config.source_fps):
                    yield plan, waiting.pop(window), frames
        except UnreadableMedia as error:
            for window in waiting.values():
                yield plan, window, error


def to_video(frames: np.ndarray, device: torch.device) -> Tensor:
    """(F, H, W, 3) uint8 -> (1, 3, F, H, W) float32 in -1..1."""
    return torch.from_numpy(frames).to(device).movedim(3, 0)[None].float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class PlannedText:
    """One text file to be."""

    caption: str
    path: Path
    fingerprint: str


def plan_text(dataset: Dataset, family: Family, encoder_identity: str) -> list[PlannedText]:
    """`encoder_identity` stands for the text encoder's file and dtype."""
    return [
        PlannedText(
            item.caption,
            cache_files.text_path(dataset.config.cache, item.key, family),
            digest([item.caption, encoder_identity]),
        )
        for item in dataset.items
    ]


def cache_text(
    plans: Sequence[PlannedText], family: Family, load_encoder: Callable[[], TextEncoder]
) -> Iterator[CacheStep]:
    """Make the text files that are missing or out of date, as `cache_latents` does."""
    todo, done = [], 0
    for planned in plans:
        if cache_files.is_current(planned.path, planned.fingerprint):
            done += 1
            yield CacheStep(done, len(plans), planned.path.name, "kept")
        else:
            todo.append(planned)
    if not todo:
        return
    encoder = load_encoder()
    for start in range(0, len(todo), _TEXT_BATCH):
        batch = todo[start : start + _TEXT_BATCH]
        states = encoder.encode([planned.caption for planned in batch])
        for planned, state in zip(batch, states, strict=True):
            cache_files.save_text(planned.path, state, planned.caption, family, planned.fingerprint)
            done += 1
            too_long = encoder.too_long(planned.caption)
            yield CacheStep(done, len(plans), planned.path.name, "made",
                            f"the caption is {too_long} tokens too long, its end is cut off" if too_long else "")  # fmt: skip
