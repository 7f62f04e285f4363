"""What a data set is, and the TOML form of it that trainers of this field share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CACHE_FOLDER = "videolora_cache"
EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One data set: a folder, or a JSONL file with one item per line.

    `resolution` is (width, height) in pixels; with buckets on it only sets the area. `target_frames` are the window
    lengths in frames at the model's own frame rate; `source_fps` overrides the rate written in the video files.
    """

    kind: Literal["image", "video"]
    folder: Path | None = None
    jsonl: Path | None = None
    cache: Path
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str = ".txt"
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.jsonl is None):
            raise ValueError("give either a folder or a JSONL file.")
        if self.frame_extraction not in EXTRACTIONS:
            raise ValueError(f"frame_extraction is '{self.frame_extraction}': use one of {', '.join(EXTRACTIONS)}.")
        for name in ("batch_size", "num_repeats", "frame_stride", "frame_sample", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more.")
        if not self.target_frames or min(self.target_frames) < 1:
            raise ValueError(f"target_frames is {list(self.target_frames)}: use frame counts of 1 or more.")
        if not self.caption_extension.startswith("."):
            raise ValueError(f"caption_extension is '{self.caption_extension}': write it with its dot, such as '.txt'.")
        if min(self.resolution) < 16:
            raise ValueError(f"resolution is {list(self.resolution)}: use width and height of 16 or more.")
        if self.source_fps is not None and not 0 < self.source_fps < 1000:
            raise ValueError(f"source_fps is {self.source_fps}: use the frame rate of the videos.")

    @property
    def noun(self) -> str:
        """What one of its items is called."""
        return "clip" if self.kind == "video" else "image"

    @property
    def title(self) -> str:
        return (self.folder or self.jsonl).name


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return float(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text in quotes")
    return value


def _resolution(value: Any) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, list) and len(value) == 2:
        return _integer(value[0]), _integer(value[1])
    raise TypeError("a whole number or [width, height]")


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError("a list of whole numbers")
    return tuple(_integer(entry) for entry in value)


_COMMON: dict[str, Callable] = {
    "resolution": _resolution, "caption_extension": _text, "batch_size": _integer, "num_repeats": _integer,
    "enable_bucket": _truth, "bucket_no_upscale": _truth,
}  # fmt: skip
_SOURCES = {
    "video_directory": ("video", "folder"), "video_jsonl_file": ("video", "jsonl"),
    "image_directory": ("image", "folder"), "image_jsonl_file": ("image", "jsonl"),
}  # fmt: skip
_VIDEO: dict[str, Callable] = {
    "target_frames": _integers, "frame_extraction": _text, "frame_stride": _integer, "frame_sample": _integer,
    "max_frames": _integer, "source_fps": _number,
}  # fmt: skip
# Known in other trainers; refused rather than ignored.
_UNSUPPORTED = {
    "control_directory": "control data is not supported",
    "multiple_target": "it belongs to layered-image models",
    "no_resize_control": "control data is not supported",
    "control_resolution": "control data is not supported",
    "fp_latent_window_size": "it belongs to FramePack",
    "fp_1f_clean_indices": "one-frame training is not supported",
    "fp_1f_target_index": "one-frame training is not supported",
    "fp_1f_no_post": "one-frame training is not supported",
}


def read_toml(path: Path, resolve: Callable[[str], Path]) -> list[DatasetConfig]:
    """Read a data set description (TOML, or the same as JSON).

    `resolve` turns a path written in it into a real one, or raises ValueError. Raises ValueError that names file, table
    and key of anything that is wrong or unknown.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no tables: it needs at least one [[datasets]].")
    unknown = content.keys() - {"general", "datasets"}
    if unknown:
        raise ValueError(f"{path.name}: unknown table '{min(unknown)}': only [general] and [[datasets]] are known.")
    tables = content.get("datasets")
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{path.name} has no [[datasets]] table.")
    general = _values(content.get("general", {}), _COMMON, f"{path.name}, [general]")
    configs = []
    for number, table in enumerate(tables, start=1):
        where = f"{path.name}, [[datasets]] number {number}"
        try:
            configs.append(_dataset(table, general, where, resolve))
        except ValueError as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
    caches = [config.cache for config in configs]
    for cache in caches:
        if caches.count(cache) > 1:
            raise ValueError(
                f"{path.name}: two data sets use the cache folder {cache}: give each its own cache_directory."
            )
    return configs


def _dataset(table: Any, general: Mapping[str, Any], where: str, resolve: Callable[[str], Path]) -> DatasetConfig:
    if not isinstance(table, dict):
        raise ValueError("it must be a table.")
    sources = [key for key in _SOURCES if key in table]
    if len(sources) != 1:
        raise ValueError(f"give exactly one of {', '.join(_SOURCES)}.")
    kind, role = _SOURCES[sources[0]]
    known = {**_COMMON, **(_VIDEO if kind == "video" else {}), sources[0]: _text, "cache_directory": _text}
    values = {**general, **_values(table, known, where)}
    source = resolve(values.pop(sources[0]))
    cache = values.pop("cache_directory", None)
    if cache is None and role == "jsonl":
        raise ValueError("a JSONL data set needs a cache_directory.")
    return DatasetConfig(kind=kind, **{role: source}, cache=resolve(cache) if cache is not None else source, **values)


def _values(table: Any, known: Mapping[str, Callable], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: it must be a table.")
    values = {}
    for key, value in table.items():
        if key in _UNSUPPORTED:
            raise ValueError(f"{where}: '{key}' cannot be used, {_UNSUPPORTED[key]}.")
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}'. Known here: {', '.join(sorted(known))}.")
        try:
            values[key] = known[key](value)
        except TypeError as error:
            raise ValueError(f"{where}: '{key}' is {value!r}, it must be {error}.") from None
    return values


def describe(config: DatasetConfig) -> dict[str, Any]:
    """The settings as JSON values, without the paths."""
    hidden = {"folder", "jsonl", "cache"}
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in hidden}
