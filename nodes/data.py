"""Data sets: a folder, a JSONL file, or a TOML file that describes several; and a look at what training will see."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types, io
from PIL import Image

from ..core.data import preview
from ..core.data.config import CACHE_FOLDER, EXTRACTIONS, DatasetConfig, read_toml
from ..core.data.discovery import IMAGES, VIDEOS, frame_folders, media_files
from ..core.data.planning import Dataset, LatentPlan, plan_latents
from ..core.data.statistics import statistics
from ..core.families import check_size
from ..core.io.files import digest
from ..core.shapes import VideoSize
from . import handles, paths
from .progress import Progress, say

log = logging.getLogger("videolora.data")

CATEGORY = "VideoLoRA/data"
_ANY_SIDE = 256  # a width and height that every model takes, to check frame counts alone
_DATASETS = handles.Datasets.Input("datasets", optional=True, tooltip="Further data sets to train on together.")


def _settings(more: list[io.Input]) -> list[io.Input]:
    """What is chosen for a data set wherever its clips come from; `more` stands between the common and the rare."""
    return [
        io.Int.Input("width", default=832, min=16, max=4096, step=16,
                     tooltip="Width to train at, in pixels. With buckets on, width x height is the area."),
        io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height to train at, in pixels."),
        io.String.Input("frames", default="81",
                        tooltip="Frames per training clip, 4n+1 each: 81, or several such as 1, 25, 45. Ignored for "
                        "images. Videos are converted to the model's frame rate."),
        io.Int.Input("repeats", default=1, min=1, max=10000,
                     tooltip="How often an epoch sees each clip: raise it to balance data sets of different size."),
        io.Int.Input("batch_size", default=1, min=1, max=64,
                     tooltip="Clips per step. 1 for video on consumer cards; accumulate gradients instead."),
        io.Boolean.Input("buckets", default=True,
                         tooltip="Train each clip at the shape nearest to its own, at about the same area. Off: "
                         "everything is cropped to width x height."),
        io.Combo.Input("extraction", options=list(EXTRACTIONS), default="head",
                       tooltip="head: the first frames; chunk: the clip in pieces; slide: a sliding window; uniform: "
                       "windows spread over the clip; full: the whole clip."),
        *more,
        io.Int.Input("frame_stride", default=16, min=1, max=1000, advanced=True, optional=True,
                     tooltip="Step of the sliding window, in frames."),
        io.Int.Input("frame_sample", default=2, min=1, max=100, advanced=True, optional=True,
                     tooltip="Number of windows for uniform extraction."),
        io.Int.Input("max_frames", default=129, min=1, max=1000, advanced=True, optional=True,
                     tooltip="Longest clip for full extraction."),
        io.Boolean.Input("no_upscale", default=False, advanced=True, optional=True,
                         tooltip="With buckets on: clips smaller than the area keep their size instead of being enlarged."),
        io.Float.Input("source_fps", default=0.0, min=0.0, max=999.0, step=1.0, advanced=True, optional=True,
                       tooltip="Frame rate of the clips, where what their files say of it is wrong. 0: as the files say."),
        _DATASETS,
    ]  # fmt: skip


def _config(kind: str, *, width: int, height: int, frames: str, repeats: int, batch_size: int, buckets: bool,
            extraction: str, frame_stride: int = 16, frame_sample: int = 2, max_frames: int = 129,
            no_upscale: bool = False, source_fps: float = 0.0, **source: Any) -> DatasetConfig:  # fmt: skip
    """A data set with the settings of a node. Raises ValueError for anything that cannot be trained on."""
    if not buckets:
        check_size(VideoSize(1, height, width))
    video = {
        "target_frames": _frame_counts(frames), "frame_extraction": extraction, "frame_stride": frame_stride,
        "frame_sample": frame_sample, "max_frames": max_frames, "source_fps": source_fps or None,
    }  # fmt: skip
    return DatasetConfig(
        kind=kind, resolution=(width, height), num_repeats=repeats, batch_size=batch_size, enable_bucket=buckets,
        bucket_no_upscale=no_upscale, **source, **(video if kind == "video" else {}),
    )  # fmt: skip


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


class _DatasetNode(io.ComfyNode):
    """What the data set nodes share; `find` gives the data sets of a node's own inputs."""

    find: ClassVar[Callable[..., list[Dataset]]]

    @classmethod
    def validate_inputs(cls, datasets=None, **inputs: Any) -> bool | str:
        if None in inputs.values():
            return True  # something is linked: checked when it runs
        try:
            cls.find(**inputs)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, datasets: tuple[Dataset, ...] = (), **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput((*datasets, *cls.find(**inputs)))

    @classmethod
    def fingerprint_inputs(cls, datasets=None, **inputs: Any) -> str:
        """Changes whenever a clip or caption does."""
        try:
            found = cls.find(**inputs)
        except (ValueError, OSError):
            return ""
        sources = [item.source for dataset in found for item in dataset.items]
        states = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
        return digest([states, [item.caption for dataset in found for item in dataset.items]])


class DatasetFolder(_DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetFolder",
            display_name="Data Set from Folder",
            category=CATEGORY,
            description="A folder of videos or images, each with a caption file of the same name; a folder of images with a "
            "caption file beside it is a video too. Chain several of these to train on several folders.",
            inputs=[
                io.String.Input("caption_extension", default=".txt", tooltip="Extension of the caption files."),
                *_settings([
                    io.Combo.Input("folder", options=paths.data_folders(),
                                   tooltip="A folder inside ComfyUI's input folder, or inside a folder listed under 'datasets' "
                                   "in extra_model_paths.yaml."),
                ]),
            ],
            outputs=[handles.Datasets.Output("all_datasets", display_name="datasets")],
        )  # fmt: skip

    @classmethod
    def find(cls, *, folder: str, caption_extension: str, **settings: Any) -> list[Dataset]:
        """The folder's videos and images, each as a data set."""
        path = paths.data_path(folder)
        found = {
            "video": media_files(path, VIDEOS) or frame_folders(path, caption_extension),
            "image": media_files(path, IMAGES),
        }
        kinds = [kind for kind, sources in found.items() if sources]
        source = {"folder": path, "caption_extension": caption_extension}
        return [
            Dataset.find(_config(kind, cache=path / CACHE_FOLDER / f"{kind}s", **source, **settings))
            for kind in kinds or ["video"]
        ]


class DatasetJSONL(_DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetJSONL",
            display_name="Data Set from JSONL",
            category=CATEGORY,
            description='A text file with one clip per line: {"video_path": "clips/a.mp4", "caption": "..."}, or "image_path" '
            "for images. A video path may be a folder of images. Paths are relative to ComfyUI's input folder.",
            inputs=[
                io.Combo.Input("file", options=_files("*.jsonl"), tooltip="A .jsonl file in ComfyUI's input folder."),
                io.Combo.Input("kind", options=["video", "image"], default="video", tooltip="What the file lists."),
                *_settings([]),
            ],
            outputs=[handles.Datasets.Output("all_datasets", display_name="datasets")],
        )  # fmt: skip

    @classmethod
    def find(cls, *, file: str, kind: str, **settings: Any) -> list[Dataset]:
        path = paths.data_path(file)
        cache = path.parent / CACHE_FOLDER / path.stem
        return [Dataset.find(_config(kind, jsonl=path, cache=cache, **settings), paths.data_path)]


class DatasetTOML(_DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetTOML",
            display_name="Data Sets from TOML",
            category=CATEGORY,
            description="A TOML file that describes one or more data sets, as other video LoRA trainers use it.",
            inputs=[
                io.Combo.Input("file", options=_files("*.toml", "*.json"),
                               tooltip="A .toml file (or the same as .json) in ComfyUI's input folder. Paths in it are relative "
                               "to that folder."),
                _DATASETS,
            ],
            outputs=[handles.Datasets.Output("all_datasets", display_name="datasets")],
        )  # fmt: skip

    @classmethod
    def find(cls, *, file: str) -> list[Dataset]:
        return [Dataset.find(config, paths.data_path) for config in read_toml(paths.data_path(file), paths.data_path)]


def _files(*patterns: str) -> list[str]:
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for pattern in patterns for path in root.glob(pattern)) if root.is_dir() else []


class DatasetPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRADatasetPreview",
            display_name="Preview Data Sets",
            category=CATEGORY,
            description="Shows what training will see, before anything is cached: the buckets with sample windows and their "
            "captions, where the windows lie in the clips, what is left out and why, and how much there is to do.",
            inputs=[
                handles.Datasets.Input("datasets", tooltip="From a data set node."),
                handles.Vae.Input("vae", tooltip="The VAE of the model to be trained: it decides sizes and frame rate. It is not "
                                  "loaded."),
                io.Int.Input("shown", default=4, min=1, max=64, tooltip="Windows shown of every bucket."),
                handles.TextEncoderType.Input("text_encoder", optional=True,
                                              tooltip="To find captions that are too long for it. Its weights are not loaded."),
            ],
            outputs=[
                io.Image.Output("contact_sheet", display_name="contact sheet"),
                io.Video.Output("video", display_name="video"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")  # equal to nothing: what is cached may have changed

    @classmethod
    def execute(cls, datasets, vae: handles.VAEFile, shown: int, text_encoder=None) -> io.NodeOutput:
        progress, family = Progress(cls.hidden.unique_id), vae.family

        def looking(done: int, total: int) -> None:
            progress.update(done, total, f"looking at clip {done + 1} of {total}")

        plans = [plan_latents(dataset, family, vae.identity, looking) for dataset in datasets]
        chosen, seen = preview.choose(plans, shown), []
        for sight in preview.sights(chosen, family):
            seen.append(sight)
            progress.update(len(seen), len(chosen), f"window {len(seen)} of {len(chosen)}")
        tokenizer = text_encoder.tokenizer() if text_encoder else None
        report = statistics(plans, family, tokenizer)
        log.info("%s", report)
        say(report, cls.hidden.unique_id)
        picture = preview.contact_sheet(plans, seen)
        sheet = _images(picture[None])
        video = Types.VideoComponents(images=_images(preview.mosaic(seen)), frame_rate=Fraction(family.fps))
        return io.NodeOutput(
            sheet, InputImpl.VideoFromComponents(video), report, ui={"videolora_data": [_sight(plans, seen, picture)]}
        )


def _sight(plans: Sequence[LatentPlan], seen: Sequence[preview.Sight], sheet: np.ndarray) -> dict[str, Any]:
    """What the editor shows: `sets` with their buckets, each with strips of frames of its `windows`; the whole contact `sheet`."""
    folder = paths.temporary_folder()
    sets = [preview.outline(plan) for plan in plans]
    for plan, shown in zip(plans, sets, strict=True):
        for bucket in shown["buckets"]:
            bucket["windows"] = []
        by_size = {bucket["size"]: bucket["windows"] for bucket in shown["buckets"]}
        for sight in seen:
            if sight.planned in plan.windows:
                by_size[str(sight.planned.size)].append(_window(sight, folder))
    path = folder / "contact_sheet.png"
    Image.fromarray(sheet).save(path, compress_level=1)
    return {"sets": sets, "sheet": paths.shown(path)}


def _window(sight: preview.Sight, folder: Path) -> dict[str, Any]:
    pixels, count = preview.strip(sight)
    path = folder / f"{len(list(folder.iterdir())):04d}.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    planned = sight.planned
    return {
        "strip": paths.shown(path), "frames": count, "width": pixels.shape[1] // count, "height": pixels.shape[0],
        "name": planned.item.source.name, "caption": planned.item.caption, "window": planned.window and list(planned.window),
    }  # fmt: skip


def _images(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> IMAGE."""
    return torch.from_numpy(frames).float().div_(255)
