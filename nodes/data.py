"""Data sets: a folder, or a TOML file that describes several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..core.data.caching import Dataset
from ..core.data.config import EXTRACTIONS, DatasetConfig, default_cache, read_toml
from ..core.data.discovery import IMAGES, VIDEOS, media_files
from ..core.families import check_size
from ..core.io.files import digest
from ..core.shapes import VideoSize
from . import handles, paths

CATEGORY = "VideoLoRA/data"
_ANY_SIDE = 256  # a width and height that every model takes, to check frame counts alone


def _fingerprint(folders: list[Path]) -> str:
    """Changes whenever a file in the folders does."""
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return digest([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)])


class DatasetFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetFolder",
            display_name="Data Set from Folder",
            category=CATEGORY,
            description="A folder of videos or images, each with a caption file of the same name. Chain several of these to "
            "train on several folders.",
            inputs=[
                io.String.Input("caption_extension", default=".txt", tooltip="Extension of the caption files."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16,
                             tooltip="Width to train at, in pixels. With buckets on, width x height is the area."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height to train at, in pixels."),
                io.String.Input("frames", default="81",
                                tooltip="Frames per training clip, 4n+1 each: 81, or several such as 1, 25, 45. Ignored for "
                                "images. Videos are converted to the model's frame rate."),
                io.Int.Input("repeats", default=1, min=1, max=10000,
                             tooltip="How often an epoch sees each clip: raise it to balance folders of different size."),
                io.Int.Input("batch_size", default=1, min=1, max=64,
                             tooltip="Clips per step. 1 for video on consumer cards; accumulate gradients instead."),
                io.Boolean.Input("buckets", default=True,
                                 tooltip="Train each clip at the shape nearest to its own, at about the same area. Off: "
                                 "everything is cropped to width x height."),
                io.Combo.Input("extraction", options=list(EXTRACTIONS), default="head",
                               tooltip="head: the first frames; chunk: the clip in pieces; slide: a sliding window; uniform: "
                               "windows spread over the clip; full: the whole clip."),
                io.Int.Input("frame_stride", default=16, min=1, max=1000, advanced=True, optional=True,
                             tooltip="Step of the sliding window, in frames."),
                io.Int.Input("frame_sample", default=2, min=1, max=100, advanced=True, optional=True,
                             tooltip="Number of windows for uniform extraction."),
                io.Int.Input("max_frames", default=129, min=1, max=1000, advanced=True, optional=True,
                             tooltip="Longest clip for full extraction."),
                io.Combo.Input("folder", options=paths.data_folders(),
                               tooltip="A folder inside ComfyUI's input folder, or inside a folder listed under 'datasets' in "
                               "extra_model_paths.yaml."),
                handles.Datasets.Input("datasets", optional=True, tooltip="Further data sets to train on together."),
            ],
            outputs=[handles.Datasets.Output("all_datasets", display_name="datasets")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, datasets=None, **settings: Any) -> bool | str:
        if None in settings.values():
            return True  # something is linked: checked when it runs
        try:
            _folder_datasets(**settings)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, **_) -> str:
        try:
            return _fingerprint([paths.data_path(folder)])
        except ValueError:
            return ""

    @classmethod
    def execute(cls, datasets: tuple[Dataset, ...] = (), **settings: Any) -> io.NodeOutput:
        return io.NodeOutput((*datasets, *_folder_datasets(**settings)))


def _folder_datasets(*, folder: str, caption_extension: str, width: int, height: int, frames: str, repeats: int,
                     batch_size: int, buckets: bool, extraction: str, frame_stride: int = 16, frame_sample: int = 2,
                     max_frames: int = 129) -> list[Dataset]:  # fmt: skip
    """The folder's videos and images, each as a data set. Raises ValueError for anything that cannot be trained on."""
    if not buckets:
        check_size(VideoSize(1, height, width))
    path = paths.data_path(folder)
    kinds = [kind for kind, extensions in (("video", VIDEOS), ("image", IMAGES)) if media_files(path, extensions)]
    common = {
        "folder": path, "caption_extension": caption_extension, "resolution": (width, height), "num_repeats": repeats,
        "batch_size": batch_size, "enable_bucket": buckets,
    }  # fmt: skip
    video = {
        "target_frames": _frame_counts(frames), "frame_extraction": extraction, "frame_stride": frame_stride,
        "frame_sample": frame_sample, "max_frames": max_frames,
    }  # fmt: skip
    return [
        Dataset.find(
            DatasetConfig(
                kind=kind, cache=default_cache(path) / f"{kind}s", **common, **(video if kind == "video" else {})
            )
        )
        for kind in kinds or ["video"]
    ]


def _frame_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"frames is '{text}': give whole numbers such as 81, or 1, 25, 45.") from None
    for count in counts:
        check_size(VideoSize(count, _ANY_SIDE, _ANY_SIDE))
    if not counts:
        raise ValueError("frames is empty: give at least one frame count, such as 81.")
    return counts


class DatasetTOML(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetTOML",
            display_name="Data Sets from TOML",
            category=CATEGORY,
            description="A TOML file that describes one or more data sets, as other video LoRA trainers use it.",
            inputs=[
                io.Combo.Input("file", options=_toml_files(),
                               tooltip="A .toml file in ComfyUI's input folder. Paths in it are relative to that folder."),
                handles.Datasets.Input("datasets", optional=True, tooltip="Further data sets to train on together."),
            ],
            outputs=[handles.Datasets.Output("all_datasets", display_name="datasets")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        if file is None:
            return True
        try:
            cls._find(file)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_) -> str:
        try:
            path = paths.data_path(file)
            folders = [config.folder or config.jsonl.parent for config in read_toml(path, paths.data_path)]
            return _fingerprint([path.parent, *folders])
        except (ValueError, OSError):
            return ""

    @classmethod
    def _find(cls, file: str) -> list[Dataset]:
        return [Dataset.find(config, paths.data_path) for config in read_toml(paths.data_path(file), paths.data_path)]

    @classmethod
    def execute(cls, file: str, datasets=()) -> io.NodeOutput:
        return io.NodeOutput((*datasets, *cls._find(file)))


def _toml_files() -> list[str]:
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in root.glob("*.toml")) if root.is_dir() else []
