"""Caching: clips through the VAE and captions through the text encoder, once, to disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing

import comfy.model_management as mm
from comfy_api.latest import io

from ..core.data import caching, planning
from ..core.data.caching import CacheStep
from ..core.data.discovery import Item
from ..core.data.planning import PlannedFile
from ..core.data.statistics import describe
from ..core.family import Family
from . import handles
from .progress import Progress, say

log = logging.getLogger("videolora.data")

CATEGORY = "VideoLoRA/caching"


def _follow(steps: Iterator[CacheStep], node_id: str | None, what: str) -> list[CacheStep]:
    """Run a caching generator with progress; cancelling keeps everything that was made."""
    progress, taken = Progress(node_id), []
    with closing(steps):
        for step in steps:
            taken.append(step)
            progress.update(step.done, step.total, f"{what} {step.done} of {step.total}")
    return taken


def _counts(what: str, steps: Sequence[CacheStep], planned: Sequence[PlannedFile]) -> list[str]:
    outcomes = [step.outcome for step in steps]
    failed = f", {outcomes.count('failed')} failed" if "failed" in outcomes else ""
    lines = [f"{what}: {outcomes.count('made')} made, {outcomes.count('kept')} up to date{failed}"]
    foreign = sum(one.foreign for one in planned)
    if foreign:
        lines.append(f"  {foreign} of them made by another trainer; delete those files to have them made anew")
    return lines


def _stale(planned: Sequence[PlannedFile], family: Family, delete: bool, left_out: Sequence[Item] = ()) -> list[str]:
    """Say which files of earlier runs nothing needs any more, and delete them if that is wished."""
    stale = planning.stale_files(planned, family, left_out)
    if not stale:
        return []
    size = sum(path.stat().st_size for path in stale) / 2**20
    if delete:
        for path in stale:
            path.unlink(missing_ok=True)
    names = ", ".join(path.name for path in stale[:3]) + (", ..." if len(stale) > 3 else "")
    return [
        f"{len(stale)} files that are no longer needed {'were deleted' if delete else 'are kept'} ({size:.1f} MiB): {names}"
    ]


_DELETE_STALE = io.Boolean.Input(
    "delete_stale", default=False, optional=True, advanced=True,
    tooltip="Delete the files of earlier runs that these data sets no longer need (other sizes, clips that are gone). Only "
    "files that this pack made. Off: they are kept, and the report says how many there are.",
)  # fmt: skip


def _each_run(cls, **_) -> float:
    """Not a number is equal to nothing: the caches are checked in every run, because files may have changed."""
    return float("nan")


class CacheLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRACacheLatents",
            display_name="Cache Latents",
            category=CATEGORY,
            description="Encodes the data sets with the VAE and keeps the latents on disk beside the clips. Only what is "
            "missing or has changed is done; cancelling loses nothing.",
            inputs=[
                handles.Datasets.Input("datasets", tooltip="From a data set node."),
                handles.Vae.Input("vae", tooltip="The VAE of the model to be trained."),
                handles.DiT.Input(
                    "dit",
                    optional=True,
                    tooltip="The model to be trained, if it is an image-to-video model: what "
                    "it is told of a clip's first frame is cached too.",
                ),
                handles.VisionEncoderType.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For Wan 2.1 (CLIP) and HunyuanVideo 1.5 (SigLIP) image-to-video, which also look at the first frame with it.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Windows of one size that are encoded together. More than 1 helps small images only.",
                ),
                _DELETE_STALE,
            ],
            outputs=[
                handles.LatentCacheType.Output("latents", display_name="latent cache"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    fingerprint_inputs = classmethod(_each_run)

    @classmethod
    def execute(cls, datasets, vae: handles.VAEFile, batch_size: int = 1, delete_stale: bool = False,
                dit: handles.DiTFile | None = None, clip_vision: handles.VisionEncoderFile | None = None) -> io.NodeOutput:  # fmt: skip
        node_id, progress = cls.hidden.unique_id, Progress(cls.hidden.unique_id)
        images = handles.image_plan(dit, clip_vision)
        if dit is not None:
            handles.check_family(dit, vae)

        def checking(done: int, total: int) -> None:
            progress.update(done, total, f"checking clip {done + 1} of {total}")

        plans = [planning.plan_latents(dataset, vae.family, vae.identity, checking, images) for dataset in datasets]
        windows = [window for plan in plans for window in plan.windows]
        planning.check_distinct(windows)
        largest = max((window.size for window in windows), key=lambda size: size.height * size.width)
        steps = caching.cache_latents(
            plans, vae.family, lambda: vae.load(largest, batch_size), mm.get_torch_device(), batch_size,
            lambda: clip_vision and clip_vision.load(),
        )  # fmt: skip
        counts = _counts("latents", _follow(steps, node_id, "latents"), windows)
        left_out = [item for plan in plans for item in plan.left_out]
        stale = _stale(windows, vae.family, delete_stale, left_out)
        report = "\n".join([*counts, *map(describe, plans), *stale])
        log.info("%s", report)
        say(report, node_id)
        return io.NodeOutput(handles.LatentCache(vae.family, tuple(plans)), report)


class CacheText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRACacheText",
            display_name="Cache Text",
            category=CATEGORY,
            description="Encodes the captions and keeps the result on disk. Only what is missing or has changed is done.",
            inputs=[
                handles.Datasets.Input("datasets", tooltip="From a data set node."),
                handles.TextEncoderType.Input("text_encoder", tooltip="The text encoder of the model to be trained."),
                _DELETE_STALE,
            ],
            outputs=[
                handles.TextCacheType.Output("text", display_name="text cache"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    fingerprint_inputs = classmethod(_each_run)

    @classmethod
    def execute(cls, datasets, text_encoder: handles.TextEncoderFile, delete_stale: bool = False) -> io.NodeOutput:
        family = text_encoder.family
        plans = [(dataset, tuple(planning.plan_text(dataset, family, text_encoder.identity))) for dataset in datasets]
        everything = [planned for _, texts in plans for planned in texts]
        planning.check_distinct(everything)
        steps = _follow(caching.cache_text(everything, family, text_encoder.load), cls.hidden.unique_id, "captions")
        warnings = [f"  {step.name}: {step.reason}" for step in steps if step.reason]
        report = "\n".join(
            [*_counts("captions", steps, everything), *warnings, *_stale(everything, family, delete_stale)]
        )
        log.info("%s", report)
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(handles.TextCache(family, tuple(plans)), report)
