"""Caching: clips through the VAE and captions through the text encoder, once, to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import comfy.model_management as mm
from comfy_api.latest import io

from ..core.data import caching
from ..core.data.caching import CacheStep, LatentPlan
from . import handles
from .progress import Progress, say

CATEGORY = "VideoLoRA/caching"


def _follow(steps: Iterator[CacheStep], node_id: str | None, what: str) -> list[CacheStep]:
    """Run a caching generator with progress; cancelling keeps everything that was made."""
    progress, taken = Progress(node_id), []
    with closing(steps):
        for step in steps:
            taken.append(step)
            progress.update(step.done, step.total, f"{what} {step.done} of {step.total}")
    return taken


def _counts(steps: Sequence[CacheStep]) -> str:
    outcomes = [step.outcome for step in steps]
    return f"{outcomes.count('made')} made, {outcomes.count('kept')} up to date"


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
            ],
            outputs=[
                handles.LatentCacheType.Output("latents", display_name="latent cache"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    fingerprint_inputs = classmethod(_each_run)

    @classmethod
    def execute(cls, datasets, vae: handles.VAEFile) -> io.NodeOutput:
        node_id, progress = cls.hidden.unique_id, Progress(cls.hidden.unique_id)

        def checking(done: int, total: int) -> None:
            progress.update(done, total, f"checking clip {done + 1} of {total}")

        plans = [caching.plan_latents(dataset, vae.family, vae.identity, checking) for dataset in datasets]
        windows = [window for plan in plans for window in plan.windows]
        caching.check_distinct(windows)
        largest = max((window.size for window in windows), key=lambda size: size.height * size.width)
        steps = caching.cache_latents(plans, vae.family, lambda: vae.load(largest), mm.get_torch_device())
        steps = _follow(steps, node_id, "latents")
        report = "\n".join([f"latents: {_counts(steps)}", *map(_describe, plans)])
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(handles.LatentCache(vae.family, tuple(plans)), report)


def _describe(plan: LatentPlan) -> str:
    sizes: dict[str, int] = {}
    for window in plan.windows:
        sizes[str(window.size)] = sizes.get(str(window.size), 0) + 1
    lines = [f"{plan.dataset.config.title}: " + "; ".join(f"{count} of {size}" for size, count in sizes.items())]
    lines += [f"  left out: {name} ({reason})" for name, reason in plan.left_out.items()]
    return "\n".join(lines)


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
            ],
            outputs=[
                handles.TextCacheType.Output("text", display_name="text cache"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    fingerprint_inputs = classmethod(_each_run)

    @classmethod
    def execute(cls, datasets, text_encoder: handles.TextEncoderFile) -> io.NodeOutput:
        family = text_encoder.family
        plans = [(dataset, tuple(caching.plan_text(dataset, family, text_encoder.identity))) for dataset in datasets]
        everything = [planned for _, texts in plans for planned in texts]
        caching.check_distinct(everything)
        steps = _follow(caching.cache_text(everything, family, text_encoder.load), cls.hidden.unique_id, "captions")
        warnings = [f"  {step.name}: {step.reason}" for step in steps if step.reason]
        report = "\n".join([f"captions: {_counts(steps)}", *warnings])
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(handles.TextCache(family, tuple(plans)), report)
