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


@dataclass(frozen=True)
class Item:
    """One clip or image with its caption. `key` names its cache files; it is unique within the data set."""

    source: Path
    caption: str
    key: str


def find_items(config: DatasetConfig, resolve: Callable[[str], Path] = Path) -> list[Item]:
    """All items of a data set, sorted. Raises ValueError when there are none or a caption is missing."""
    rows = _from_jsonl(config, resolve) if config.jsonl is not None else _from_folder(config)
    stems = Counter(source.stem for source, _ in rows)
    return [Item(source, caption, _key(source, caption, stems)) for source, caption in rows]


def _key(source: Path, caption: str, stems: Counter) -> str:
    """The stem, as other trainers name their caches; with a hash where several items share a stem."""
    return source.stem if stems[source.stem] == 1 else f"{source.stem}-{digest([str(source), caption])[:8]}"


def media_files(folder: Path, extensions: frozenset[str]) -> list[Path]:
    """The files of these kinds in a folder, sorted by name."""
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in extensions and path.is_file())


def _from_folder(config: DatasetConfig) -> list[tuple[Path, str]]:
    sources = media_files(config.folder, VIDEOS if config.kind == "video" else IMAGES)
    if not sources:
        kinds = VIDEOS if config.kind == "video" else IMAGES
        raise ValueError(f"the folder {config.folder} holds no {config.kind}s ({', '.join(sorted(kinds))}).")
    missing = [source.name for source in sources if not source.with_suffix(config.caption_extension).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(sources)} {config.kind}s in {config.folder} have no caption: {_some(missing)}. "
            f"Write a '{config.caption_extension}' file with the same name beside each of them."
        )
    return [(source, _caption(source.with_suffix(config.caption_extension))) for source in sources]


def _caption(path: Path) -> str:
    caption = _text(path).strip()
    if not caption:
        raise ValueError(f"the caption {path} is empty: describe what is to be seen.")
    return caption


def _from_jsonl(config: DatasetConfig, resolve: Callable[[str], Path]) -> list[tuple[Path, str]]:
    field = f"{config.kind}_path"
    rows = []
    for number, line in enumerate(_text(config.jsonl).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{config.jsonl.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str) or not isinstance(row.get("caption"), str):
            raise ValueError(f'{where}: it must have "{field}" and "caption" as texts.')
        if "control_path" in row:
            raise ValueError(f"{where}: 'control_path' cannot be used, control data is not supported.")
        if not row["caption"].strip():
            raise ValueError(f"{where}: the caption is empty.")
        source = resolve(row[field])
        if not source.exists():
            raise ValueError(f"{where}: {source} does not exist.")
        rows.append((source, row["caption"].strip()))
    if not rows:
        raise ValueError(f"{config.jsonl} is empty.")
    return sorted(rows)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8.") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
