"""The registry: one line per family, and what a file is by its content."""

from __future__ import annotations

from pathlib import Path

from ..family import KIND_TITLES, Family, Kind, Part, Variant
from ..keymap import find_prefix
from ..shapes import VideoSize
from ..weights import Checkpoint, open_checkpoint
from .hunyuan_video import FAMILY as HUNYUAN_VIDEO
from .hunyuan_video_15 import FAMILY as HUNYUAN_VIDEO_15
from .wan import FAMILY as WAN

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15)}


def recognise(checkpoint: Checkpoint) -> tuple[Checkpoint, Part]:
    """What the checkpoint is, from tensor names and shapes alone, and the checkpoint without its prefix.

    Raises ValueError when no family knows it.
    """
    refusals = []
    for family in FAMILIES.values():
        prefix = find_prefix(checkpoint.tensors, family.anchors)
        if prefix is None:
            continue
        inner = checkpoint.without_prefix(prefix)
        try:
            part = family.recognise({name: info.shape for name, info in inner.tensors.items()})
        except KeyError as error:
            refusals.append(
                f"{checkpoint.path.name} is incomplete: it looks like {family.title}, but {error} is missing. Get the file again."
            )
        except (IndexError, ZeroDivisionError):
            refusals.append(
                f"{checkpoint.path.name} is damaged: it looks like {family.title}, but its tensors have shapes that this cannot "
                "have. Get the file again."
            )
        except ValueError as error:
            refusals.append(f"{checkpoint.path.name}: {error}")
        else:
            if part is not None:
                return inner.viewed(part.views) if part.views else inner, part
    if refusals:
        raise ValueError(refusals[0])
    names = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    raise ValueError(
        f"{checkpoint.path.name} is not a model this pack knows (its first tensors: {names}). "
        f"It knows: {', '.join(family.title for family in FAMILIES.values())}."
    )


def check_size(size: VideoSize) -> None:
    """Raise ValueError when no family can take a video of this size."""
    errors = []
    for family in FAMILIES.values():
        try:
            return family.latent.check(size)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def open_part(path: Path, kind: Kind) -> tuple[Checkpoint, Part]:
    """Open and recognise a file that should be a `kind`; ValueError says what it is instead."""
    checkpoint, part = recognise(open_checkpoint(path))
    if part.kind != kind:
        raise ValueError(
            f"{path.name} is a {KIND_TITLES[part.kind]} ({part.title}), not a {KIND_TITLES[kind]}. Choose another file."
        )
    return checkpoint, part


def variant_of(path: Path, part: Part, name: str = "auto") -> Variant:
    """The release that a transformer is taken for: `name`, or with 'auto' one of those that have its tensors: the one that
    the file or its folder is named after, else the most likely. Raises ValueError for one that it cannot be."""
    variants = FAMILIES[part.family].variants
    if name in part.variants:
        return variants[name]
    if name != "auto":
        raise ValueError(f"{path.name} is no {name}: its tensors are those of {' or '.join(part.variants)}.")
    words = f"{path.parent.name}/{path.stem}".lower().replace("-", "_")
    named = (variants[one] for one in part.variants if variants[one].file_word and variants[one].file_word in words)
    return max(named, key=lambda variant: len(variant.file_word), default=variants[part.variants[0]])
