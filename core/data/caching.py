"""Making the caches: every clip through the VAE, every caption through the text encoder, only what is not there yet."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from ..family import VAE, Family, TextEncoder, VisionEncoder
from ..prefetch import parallel
from ..shapes import VideoSize
from . import cache_files
from .discovery import Item
from .media import UnreadableMedia, read_image, read_windows
from .planning import LatentPlan, PlannedText, PlannedWindow, check_usable

_READ_AHEAD = 2 << 30  # bytes of decoded frames, where a quarter of the free memory is not less
_READERS = 8  # files that are read at a time, at most


@dataclass(frozen=True)
class CacheStep:
    """One file of a caching run. `outcome` is made, kept or failed; `reason` says why it failed."""

    done: int
    total: int
    name: str
    outcome: str
    reason: str = ""


@dataclass
class _Batch:
    """Windows of one size that are encoded together, in every run the same, even where some are cached already: what a
    VAE gives may depend, in its last bits, on what else is in the batch. `frames` fills while files are read."""

    plan: LatentPlan
    missing: list[PlannedWindow]
    frames: dict[PlannedWindow, np.ndarray | None]

    @property
    def is_read(self) -> bool:
        return all(frames is not None for frames in self.frames.values())


def cache_latents(
    plans: Sequence[LatentPlan], family: Family, load_vae: Callable[[], VAE], device: torch.device, batch_size: int = 1,
    load_vision: Callable[[], VisionEncoder | None] = lambda: None,
) -> Iterator[CacheStep]:  # fmt: skip
    """Make the latent files that are missing or out of date. The encoders are loaded only when there is something to do.

    An item that cannot be read is reported as failed, moved to its plan's `left_out`, and the run goes on. Stop by not
    asking for the next step: everything that was reported is on the disk. Raises OSError before anything is made when
    the disk has no room for it.
    """
    files = _each_once(plans)
    total, done = sum(len(windows) for _, windows in files), 0
    batches: dict[PlannedWindow, _Batch] = {}
    missing: set[PlannedWindow] = set()
    for plan, windows in files:
        for window in windows:
            if window.is_cached:
                done += 1
                yield CacheStep(done, total, window.path.name, "kept")
            else:
                missing.add(window)
        batches |= _batches(plan, windows, missing, batch_size)
    if not missing:
        return
    check_room(missing, family)
    vision, vae = load_vision(), load_vae()  # the VAE last: it needs the most room to work
    with closing(_read_ahead(batches, family)) as reads:
        for window, frames in reads:
            batch = batches[window]
            if isinstance(frames, str):
                del batch.frames[window]
                _leave_out(window, frames, plans)
                if window in batch.missing:
                    batch.missing.remove(window)
                    done += 1
                    yield CacheStep(done, total, window.path.name, "failed", frames)
            else:
                batch.frames[window] = frames
            del frames
            if batch.is_read and batch.missing:
                for made in _encode(batch, vae, vision, family, device):
                    done += 1
                    yield CacheStep(done, total, made.path.name, "made")
    for plan in plans:
        check_usable(plan)


def _each_once(plans: Sequence[LatentPlan]) -> list[tuple[LatentPlan, list[PlannedWindow]]]:
    """Each plan with its windows, but those whose file an earlier one names too."""
    seen: set[Path] = set()
    files = []
    for plan in plans:
        own = {window.path: window for window in plan.windows if window.path not in seen}
        seen |= own.keys()
        files.append((plan, list(own.values())))
    return files


def _leave_out(window: PlannedWindow, reason: str, plans: Sequence[LatentPlan]) -> None:
    """A window that cannot be read is in no plan any more."""
    for plan in plans:
        kept = [other for other in plan.windows if other.path != window.path]
        if len(kept) < len(plan.windows):
            plan.windows[:] = kept
            plan.left_out[window.item] = reason


def _batches(
    plan: LatentPlan, windows: Sequence[PlannedWindow], missing: set[PlannedWindow], batch_size: int
) -> dict[PlannedWindow, _Batch]:
    """The batch of each window that has to be read."""
    by_size: dict[VideoSize, list[PlannedWindow]] = {}
    for window in windows:
        if not window.foreign:
            by_size.setdefault(window.size, []).append(window)
    found = {}
    for alike in by_size.values():
        for start in range(0, len(alike), batch_size):
            members = alike[start : start + batch_size]
            wanted = [window for window in members if window in missing]
            if wanted:
                found |= dict.fromkeys(members, _Batch(plan, wanted, dict.fromkeys(members)))
    return found


def check_room(missing: Iterable[PlannedWindow], family: Family) -> None:
    """Raise OSError when a disk cannot hold the latents that are still to be made."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, needed in needed_bytes(missing, family).items():
        disk = _existing(folder).stat().st_dev
        by_disk[disk] = folder, by_disk.get(disk, (folder, 0))[1] + needed
    for folder, needed in by_disk.values():
        free = free_bytes(folder)
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the caches in {folder} will need {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free: free some "
                "space, or give the data set a cache_directory on another disk. What is cached already is kept",
            )


def needed_bytes(windows: Iterable[PlannedWindow], family: Family) -> dict[Path, int]:
    """Cache folder -> bytes that the latents of `windows` take."""
    needed: Counter[Path] = Counter()
    for window in windows:
        images = window.images.input if window.images else None
        needed[window.path.parent] += cache_files.latent_bytes(family.latent.latents(window.size), family, images)
    return dict(needed)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _encode(batch: _Batch, vae: VAE, vision: VisionEncoder | None, family: Family, device: torch.device) -> Iterator[PlannedWindow]:  # fmt: skip
    """Encode a batch and write the files that are missing, naming each."""
    video, images = to_video(list(batch.frames.values()), device), batch.plan.images
    latents = vae.encode(video)  # (B, C, F, H, W)
    states, fingerprint = [{}] * len(video), ""
    if images:
        end = video[:, :, -1] if images.input.needs_end else None
        states = family.image_states(vae, vision, images.input, video[:, :, 0], end, video.shape[2])
        fingerprint = images.fingerprint
    for window, one, told in zip(batch.frames, latents, states, strict=True):
        if window in batch.missing:
            cache_files.save_latents(window.path, one, window.size, family, window.fingerprint, told, fingerprint)
            yield window
    batch.frames.clear()


def _read_ahead(
    batches: Mapping[PlannedWindow, _Batch], family: Family
) -> Iterator[tuple[PlannedWindow, np.ndarray | str]]:
    """Every window with its frames (F, H, W, 3), or why they cannot be read. Several files are read at a time, as many
    as the memory allows."""
    by_item: dict[tuple[int, Item, VideoSize], list[PlannedWindow]] = {}
    for window in sorted(batches, key=lambda window: window.size):  # so that few batches are begun at a time
        plan = id(batches[window].plan)  # two data sets may read one clip in different ways
        by_item.setdefault((plan, window.item, window.size._replace(frames=0)), []).append(window)
    limit = min(_READ_AHEAD, psutil.virtual_memory().available // 4)
    largest = max(prod(window.size) * 3 for window in batches)
    workers = max(1, min(limit // (2 * largest), _READERS, os.cpu_count() or 1))
    sources = (read_item(windows, batches[windows[0]].plan, family) for windows in by_item.values())
    return parallel(
        sources, workers, limit, cost=lambda read: len(read[1]) if isinstance(read[1], str) else read[1].nbytes
    )


def read_item(
    windows: list[PlannedWindow], plan: LatentPlan, family: Family
) -> Iterator[tuple[PlannedWindow, np.ndarray | str]]:
    """Windows of one item and size with their frames (F, H, W, 3), or why they cannot be read, in one pass over its file."""
    source, size = windows[0].item.source, (windows[0].size.width, windows[0].size.height)
    waiting = {window.window: window for window in windows}
    try:
        if None in waiting:
            yield waiting.pop(None), read_image(source, size)
            return
        for window, frames in read_windows(source, list(waiting), size, family.fps, plan.dataset.config.source_fps):
            yield waiting.pop(window), frames
    except (UnreadableMedia, OSError) as error:
        for window in waiting.values():
            yield window, str(error)


def to_video(clips: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Clips (F, H, W, 3) uint8 of one size -> (B, 3, F, H, W) float32 in -1..1."""
    video = torch.stack([torch.from_numpy(frames).to(device) for frames in clips])
    return video.movedim(4, 1).float().div_(127.5).sub_(1)


def cache_text(
    plans: Sequence[PlannedText], family: Family, load_encoder: Callable[[], TextEncoder]
) -> Iterator[CacheStep]:
    """Make the text files that are missing or out of date, as `cache_latents` does. A caption is encoded alone: captions
    differ in length, and so none is padded to that of another."""
    missing, done = [], 0
    plans = list({planned.path: planned for planned in plans}.values())
    for planned in plans:
        if planned.is_cached:
            done += 1
            yield CacheStep(done, len(plans), planned.path.name, "kept")
        else:
            missing.append(planned)
    if not missing:
        return
    encoder = load_encoder()
    for planned in missing:
        (states,) = encoder.encode([planned.caption])
        cache_files.save_text(planned.path, states, planned.caption, family, planned.fingerprint)
        done += 1
        too_long = encoder.tokenizer.too_long(planned.caption)
        yield CacheStep(done, len(plans), planned.path.name, "made",
                        f"the caption is {too_long} tokens too long, its end is cut off" if too_long else "")  # fmt: skip
