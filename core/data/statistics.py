"""What a person checks before a night's run: how much there is, how much is still to do, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from ..family import Family, Tokenizer
from ..shapes import VideoSize
from .caching import free_bytes, needed_bytes
from .discovery import Item
from .planning import LatentPlan, content


@dataclass(frozen=True)
class Bucket:
    """Windows of one size in one data set; `batches` is how many of them an epoch has, repeats included."""

    size: VideoSize
    items: int
    windows: int
    batches: int

    def describe(self, noun: str) -> str:
        return f"{self.size}: {_count(self.windows, 'window')} of {_count(self.items, noun)}, {_batches(self.batches)} an epoch"


def buckets(plan: LatentPlan) -> list[Bucket]:
    """The buckets of a data set, the largest number of windows first."""
    config = plan.dataset.config
    found = [
        Bucket(
            size, len({window.item for window in windows}), len(windows),
            ceil(len(windows) * config.num_repeats / config.batch_size),
        )
        for size, windows in plan.by_size.items()
    ]  # fmt: skip
    return sorted(found, key=lambda bucket: -bucket.windows)


def describe(plan: LatentPlan) -> str:
    """A table of a data set's buckets, its batches in an epoch, and what was left out and why."""
    config, table = plan.dataset.config, buckets(plan)
    batches = sum(bucket.batches for bucket in table)
    lines = [
        f"{config.title}: {_count(len({window.item for window in plan.windows}), config.noun)}, "
        f"{_count(len(plan.windows), 'window')}, {_batches(batches)} an epoch "
        f"(batch size {config.batch_size}, {_count(config.num_repeats, 'repeat')})"
    ]
    lines += [f"  {bucket.describe(config.noun)}" for bucket in table]
    lines += [f"  left out: {problem}" for problem in plan.problems]
    return "\n".join(lines)


def statistics(plans: Sequence[LatentPlan], family: Family, tokenizer: Tokenizer | None = None) -> str:
    """All data sets: their buckets, batches in an epoch, cache sizes, copies of the same file, captions that are too
    long for the text encoder (when its tokenizer is given)."""
    items = [item for plan in plans for item in plan.dataset.items]
    batches = sum(bucket.batches for plan in plans for bucket in buckets(plan))
    lines = [*map(describe, plans), f"together: {_batches(batches)} an epoch"]
    lines += _disk(plans, family)
    lines += _copies(items)
    if tokenizer is not None:
        lines += _captions(items, tokenizer)
    return "\n".join(lines)


def _disk(plans: Sequence[LatentPlan], family: Family) -> list[str]:
    windows = [window for plan in plans for window in plan.windows]
    missing = [window for window in windows if not window.is_cached]
    lines = [f"latent caches: {len(windows) - len(missing)} of {len(windows)} are there"]
    for folder, needed in needed_bytes(missing, family).items():
        lines.append(f"  {_gibibytes(needed)} to be written to {folder}, {_gibibytes(free_bytes(folder))} are free")
    return lines


def _copies(items: Iterable[Item]) -> list[str]:
    by_content: dict[str, list[str]] = {}
    for item in items:
        try:
            names = by_content.setdefault(content(item), [])
        except OSError:  # it was left out, and is named there
            continue
        if str(item.source) not in names:
            names.append(str(item.source))
    return [f"the same content: {_some(names)}" for names in by_content.values() if len(names) > 1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _captions(items: Sequence[Item], tokenizer: Tokenizer) -> list[str]:
    too_long = {item: tokenizer.too_long(item.caption) for item in items}
    return [
        f"caption too long: {item.source.name}, its last {_count(tokens, 'token')} will be cut off"
        for item, tokens in too_long.items() if tokens
    ]  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _batches(number: int) -> str:
    return "1 batch" if number == 1 else f"{number} batches"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
