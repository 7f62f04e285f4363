"""The files and captions of a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..io.files import digest
from .config import DatasetConfig

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"))
VIDEOS = frozenset((".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"))

_LONGEST_STEM = 180  # bytes; file systems take 255, and frames, size and family follow


@dataclass(frozen=True)
class Item:
    """One clip or image with its caption. `key` names its cache files; it is unique within the data set."""

    source: Path
    caption: str
    key: str


def find_items(config: DatasetConfig, resolve: Callable[[str], Path] = Path) -> list[Item]:
    """All items of a data set, sorted. Raises ValueError when there are none, or that names all unusable captions."""
    rows = _from_jsonl(config, resolve) if config.jsonl is not None else _from_folder(config)
    stems = Counter(source.stem.casefold() for source, _ in rows)
    uses = Counter(source for source, _ in rows)
    return [Item(source, caption, _key(source, caption if uses[source] > 1 else "", stems)) for source, caption in rows]


def _key(source: Path, caption: str, stems: Counter) -> str:
    """The stem, as other trainers name their caches; with a hash where several items share a stem, or it is too long."""
    stem = source.stem.encode()[:_LONGEST_STEM].decode(errors="ignore")
    is_own = stems[source.stem.casefold()] == 1 and stem == source.stem
    return stem if is_own else f"{stem}-{digest([str(source), caption])[:8]}"


def media_files(folder: Path, extensions: frozenset[str]) -> list[Path]:
    """The files of these kinds in a folder, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in extensions and path.is_file())


def _from_folder(config: DatasetConfig) -> list[tuple[Path, str]]:
    extensions = VIDEOS if config.kind == "video" else IMAGES
    sources = media_files(config.folder, extensions)
    if config.kind == "video":
        sources = sorted([*sources, *frame_folders(config.folder, config.caption_extension)])
    if not sources:
        raise ValueError(f"the folder {config.folder} holds no {config.kind}s ({', '.join(sorted(extensions))}).")
    rows, problems = [], []
    for source in sources:
        try:
            rows.append((source, _caption(_caption_path(source, config.caption_extension))))
        except ValueError as error:
            problems.append(f"{source.name} ({error})")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(sources)} {config.kind}s in {config.folder} have no usable caption: {_some(problems)}. "
            f"Each needs a text file with its name and '{config.caption_extension}' beside it."
        )
    return rows


def frame_folders(folder: Path, caption_extension: str) -> list[Path]:
    """Folders of images that stand for clips: those with a caption beside them."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _caption_path(path, caption_extension).is_file()]


def _caption_path(source: Path, extension: str) -> Path:
    return source.with_name(source.name + extension) if source.is_dir() else source.with_suffix(extension)


def _caption(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    caption = _text(path).strip()
    if not caption:
        raise ValueError(f"{path.name} is empty: describe what is to be seen")
    return caption


def _from_jsonl(config: DatasetConfig, resolve: Callable[[str], Path]) -> list[tuple[Path, str]]:
    rows, problems = [], []
    for number, line in enumerate(_text(config.jsonl).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_row(line, f"{config.kind}_path", resolve))
            except ValueError as error:
                problems.append(f"{config.jsonl.name}, line {number}: {error}")
    if problems:
        raise ValueError(_some(problems))
    if not rows:
        raise ValueError(f"{config.jsonl} is empty.")
    return sorted(rows)


def _row(line: str, field: str, resolve: Callable[[str], Path]) -> tuple[Path, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str) or not isinstance(row.get("caption"), str):
        raise ValueError(f'it must have "{field}" and "caption" as texts.')
    control = next((key for key in row if key.startswith("control_path")), None)
    if control:
        raise ValueError(f"'{control}' cannot be used, control data is not supported.")
    if not row["caption"].strip():
        raise ValueError("the caption is empty.")
    source = resolve(row[field])
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    return source, row["caption"].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: save it as UTF-8") from error


def _some(problems: list[str]) -> str:
    return ", ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
