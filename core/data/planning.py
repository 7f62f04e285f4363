"""What caching a data set will make: a size and windows for every item, a file for each, and what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..family import Family, ImageInput
from ..io.files import digest, fingerprint
from ..shapes import VideoSize
from . import cache_files
from .buckets import choose_bucket
from .config import DatasetConfig
from .discovery import IMAGES, Item, find_items, media_files
from .media import MediaInfo, UnreadableMedia, probe
from .windows import Window, choose_windows

_READING = 1  # counts up when clips are read, resized or cropped in another way than before
_BESIDE = "-videolora"  # added to a name that a file of another trainer has


@dataclass(frozen=True)
class Dataset:
    """A data set with its items found."""

    config: DatasetConfig
    items: tuple[Item, ...]

    @classmethod
    def find(cls, config: DatasetConfig, resolve: Callable[[str], Path] = Path) -> Dataset:
        return cls(config, tuple(find_items(config, resolve)))


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One cache file to be. A `foreign` one was made by another trainer and is used as it is."""

    path: Path
    fingerprint: str
    foreign: bool = False

    @property
    def is_cached(self) -> bool:
        return self.foreign or cache_files.is_current(self.path, self.fingerprint)


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """What is cached of a clip's first (and last) frame for an image-to-video model, besides the latents.
    `encoder_identity` stands for the image encoder's file, where there is one."""

    input: ImageInput
    encoder_identity: str = ""

    @property
    def fingerprint(self) -> str:
        return digest([self.input.needs_end, self.encoder_identity])


@dataclass(frozen=True, kw_only=True)
class PlannedWindow(PlannedFile):
    """A latent file: frames of an item at a size in pixels. `window` is None for an image, `clip` is the item's length in
    frames at the model's rate."""

    item: Item
    window: Window | None
    size: VideoSize
    clip: int
    images: ImagePlan | None = None

    @property
    def is_cached(self) -> bool:
        images = self.images.fingerprint if self.images else ""
        return self.foreign or cache_files.is_current(self.path, self.fingerprint, images)

    @property
    def content(self) -> str:
        """Stands for all of the file that is used."""
        return digest([self.fingerprint, self.images.fingerprint]) if self.images else self.fingerprint


@dataclass(frozen=True, kw_only=True)
class PlannedText(PlannedFile):
    """A text file."""

    caption: str


@dataclass
class LatentPlan:
    """What caching a data set will make, and what it leaves out and why."""

    dataset: Dataset
    images: ImagePlan | None = None
    windows: list[PlannedWindow] = field(default_factory=list)
    left_out: dict[Item, str] = field(default_factory=dict)

    @property
    def by_size(self) -> dict[VideoSize, list[PlannedWindow]]:
        """The windows of each bucket."""
        found: dict[VideoSize, list[PlannedWindow]] = {}
        for window in self.windows:
            found.setdefault(window.size, []).append(window)
        return found

    @property
    def problems(self) -> list[str]:
        """`name (reason)` of everything that is left out, by name."""
        return sorted(f"{item.source.name} ({reason})" for item, reason in self.left_out.items())


def plan_latents(
    dataset: Dataset, family: Family, encoder_identity: str, on_item: Callable[[int, int], None] = lambda *_: None,
    images: ImagePlan | None = None,
) -> LatentPlan:  # fmt: skip
    """Choose size and windows of every item. `encoder_identity` stands for the VAE's file and settings; `on_item` is told
    (items done, items in all), as reading many large clips takes a while; `images` is for image-to-video models.

    Raises ValueError when the data set's size or frame counts do not fit the model, or nothing can be read.
    """
    plan = LatentPlan(dataset, images)
    config = dataset.config
    if not config.enable_bucket:
        family.latent.check(VideoSize(1, config.resolution[1], config.resolution[0]))

    def plan_item(item: Item) -> list[PlannedWindow] | str:
        try:
            return _plan_item(item, config, family, encoder_identity, images)
        except (UnreadableMedia, OSError) as error:
            return str(error)

    readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # each waits for the disk most of the time
    try:
        for done, (item, planned) in enumerate(zip(dataset.items, readers.map(plan_item, dataset.items), strict=True)):
            on_item(done, len(dataset.items))
            if isinstance(planned, str):
                plan.left_out[item] = planned
            else:
                plan.windows += planned
    finally:
        readers.shutdown(cancel_futures=True)
    check_usable(plan)
    return plan


def check_usable(plan: LatentPlan) -> None:
    """Raise ValueError when nothing is left of a data set."""
    if not plan.windows:
        problems = plan.problems
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"nothing in {plan.dataset.config.title} can be used: {', '.join(problems[:5])}{more}")


def _plan_item(
    item: Item, config: DatasetConfig, family: Family, encoder: str, images: ImagePlan | None
) -> list[PlannedWindow]:
    state = _state(item.source)
    info = _probed(item.source, family.fps, config.source_fps, state)
    if min(info.width, info.height) < family.latent.multiple:
        raise UnreadableMedia(f"it is only {info.width}x{info.height} pixels large")
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
        path = _foreign_path(item, window, pixels, (info.width, info.height), config.cache, family, images)
        foreign = path is not None
        if foreign:
            identity = fingerprint(path)
        else:
            identity = digest(
                [_READING, content, encoder, list(pixels), list(window or ()), family.fps, config.source_fps]
            )
            path = cache_files.latent_path(config.cache, item.key, window, size, family)
            if cache_files.is_foreign(path):
                path = cache_files.latent_path(config.cache, item.key + _BESIDE, window, size, family)
        planned.append(PlannedWindow(item=item, window=window, size=pixels, clip=info.frames, path=path,
                                     fingerprint=identity, foreign=foreign, images=images))  # fmt: skip
    return planned


def _foreign_path(
    item: Item, window: Window | None, pixels: VideoSize, original: tuple[int, int], cache: Path, family: Family,
    images: ImagePlan | None,
) -> Path | None:  # fmt: skip
    """The latents that another trainer made of this window, unless the clip has changed since. It names those of images
    by the image's own size."""
    size = (pixels.width, pixels.height) if window else original
    path = cache_files.latent_path(cache, item.key, window, size, family)
    if not path.is_file() or path.stat().st_mtime < item.source.stat().st_mtime:
        return None
    wanted = images.input if images else None
    return path if cache_files.is_foreign_latents(path, family.latent.latents(pixels), family, wanted) else None


def _state(source: Path) -> tuple:
    """Sizes and times of change: while they stay the same, a file or a folder of frames is not read again."""
    files = [source] if source.is_file() else media_files(source, IMAGES)
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=1 << 16)
def _probed(source: Path, fps: float, source_fps: float | None, state: tuple) -> MediaInfo:
    return probe(source, fps, source_fps)


@lru_cache(maxsize=1 << 16)
def _content(source: Path, state: tuple) -> str:
    """What identifies the content of a file or a folder of frames."""
    if source.is_file():
        return fingerprint(source)
    return digest([[path.name, fingerprint(path)] for path in media_files(source, IMAGES)])


def content(item: Item) -> str:
    """What identifies the item's content; the same for copies under other names."""
    return _content(item.source, _state(item.source))


def plan_text(dataset: Dataset, family: Family, encoder_identity: str) -> list[PlannedText]:
    """`encoder_identity` stands for the text encoder's file and dtype."""
    planned = []
    for item in dataset.items:
        path = cache_files.text_path(dataset.config.cache, item.key, family)
        foreign = cache_files.is_foreign_text(path, item.caption, family)
        if not foreign and cache_files.is_foreign(path):
            path = cache_files.text_path(dataset.config.cache, item.key + _BESIDE, family)
        identity = fingerprint(path) if foreign else digest([item.caption, encoder_identity])
        planned.append(PlannedText(caption=item.caption, path=path, fingerprint=identity, foreign=foreign))
    return planned


def check_distinct(planned: Iterable[PlannedFile]) -> None:
    """Raise ValueError when two data sets would write one cache file with different contents."""
    wanted: dict[Path, str] = {}
    for one in planned:
        if wanted.setdefault(one.path, one.fingerprint) != one.fingerprint:
            raise ValueError(
                f"two data sets would both write {one.path} with different contents: give each its own cache_directory, or "
                "its own folder."
            )


def stale_files(planned: Sequence[PlannedFile], family: Family, left_out: Iterable[Item] = ()) -> list[Path]:
    """Files in the planned caches that this pack made for this family and that nothing planned needs any more: of other
    sizes, of clips that are gone. `planned` is all latents or all text of all data sets; files of items that are
    `left_out`, which may be readable again tomorrow, are not stale."""
    wanted = {one.path for one in planned}
    text = any(map(cache_files.is_text, wanted))
    spared = tuple(f"{item.key}{beside}_" for item in left_out for beside in ("", _BESIDE))
    found = (path for folder in sorted({path.parent for path in wanted}) for path in cache_files.ours(folder, family))
    return [
        path for path in found
        if path not in wanted and cache_files.is_text(path) == text and not path.name.startswith(spared)
    ]  # fmt: skip
