"""The training node: describes the job, starts or joins its process, and shows how it goes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_management as mm
from comfy_api.latest import io
from server import PromptServer

from ..core.data.config import describe
from ..core.io import safetensors
from ..core.io.files import fingerprint
from ..core.lora.loraid import Loraid, allocate
from ..core.lora.network import read_start
from ..core.lora.stack import StackEntry
from ..core.training import run as runs
from ..core.training.job import (
    Expert,
    Job,
    NetworkSettings,
    OptimizerSettings,
    TimestepSettings,
    TrainingItem,
    TrainingSet,
    WatchSettings,
)
from ..core.training.run import REQUESTS, STOP, MetricsReader, Run
from ..core.training.watching import BANDS, average, band_losses
from . import gpus, handles, paths
from .progress import Progress, say

CATEGORY = "VideoLoRA/training"
_CORE = Path(__file__).resolve().parents[1] / "core"
starting: set[str] = set()
"""Names of the runs that wait for a GPU, or whose process has not spoken yet."""


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRATrain",
            display_name="Train Video LoRA",
            category=CATEGORY,
            description="Trains a LoRA in a process of its own. Cancel stops after the running step with everything saved; "
            "queue the same again to go on. A finished training is found again and returned at once. With several GPUs the "
            "trainings of a workflow run at the same time.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model to train on."),
                handles.LatentCacheType.Input("latents", lazy=True, tooltip="The clips, from Cache Latents."),
                handles.TextCacheType.Input("text", lazy=True, tooltip="The captions, from Cache Text."),
                io.String.Input("name", default="my_lora",
                                tooltip="Name of the LoRA file in ComfyUI's output/loras; may hold a folder, as in people/anna."),
                io.Int.Input("steps", default=1000, min=1, max=1000000, tooltip="Number of optimizer steps."),
                io.Int.Input("seed", default=42, min=0, max=0xFFFFFFFF, control_after_generate=False,
                             tooltip="The same seed and data give the same LoRA."),
                handles.LoraidType.Input("loraid", optional=True,
                                         tooltip="Train only the share of this LORAID. Without it the whole model is adapted."),
                handles.Network.Input("network", optional=True, tooltip="Kind, rank and alpha."),
                handles.Optimizer.Input("optimizer", optional=True, tooltip="Learning rate and more."),
                handles.Timesteps.Input("timesteps", optional=True, tooltip="Which noise levels are trained."),
                handles.Memory.Input("memory", optional=True, tooltip="What to trade for memory."),
                handles.SaveType.Input("save", optional=True, tooltip="When to save on the way."),
                handles.Watch.Input("watch", optional=True, tooltip="Validation, TensorBoard, and when to give up."),
                handles.Previews.Input("previews", optional=True, tooltip="What to sample on the way."),
                io.Int.Input("gpus", default=1, min=1, max=64, optional=True, advanced=True,
                             tooltip="GPUs to train on together: each step sees as many times the batches, in the same time."),
            ],
            outputs=[
                handles.Stack.Output("loras", display_name="loras"),
                io.String.Output("path", display_name="path"),
                io.LossMap.Output("loss", display_name="loss"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        return paths.checked_output("loras", name)

    @classmethod
    def check_lazy_status(
        cls,
        dit: handles.DiTFile,
        name: str,
        steps: int,
        loraid: Loraid | None = None,
        latents=None,
        text=None,
        **settings,
    ) -> list[str]:
        """Everything that is cheap to check comes before the caches, which may take hours."""
        network = settings.get("network", NetworkSettings())
        rows = network.chosen(dit.matrices, allocate(dit.matrices, loraid).rows if loraid else None)
        if network.start_from:
            read_start(network, rows, dit.matrices, dit.variant.title, dit.family.lora_names)
        optimizer = settings.get("optimizer", OptimizerSettings())
        optimizer.kind.check_installed()
        optimizer.check(steps)
        settings.get("watch", WatchSettings()).check_installed()
        gpus.check(settings.get("gpus", 1))
        if dit.is_set_up:
            raise ValueError("Sampling Memory and Speed is linked to a training, which does not heed it: link the loader itself, and "
                             "Memory Settings to the training.")  # fmt: skip
        if any(expert.loras for expert in dit.experts):
            raise ValueError(
                "the model to train on has LoRAs applied to it: merge them first, or link the loader itself."
            )
        for expert in dit.experts:
            ending = f"_{expert.variant.expert}" if dit.low else ""
            _refuse_to_overwrite(paths.output_file("loras", name.removesuffix(".safetensors") + ending))
        return [missing for missing, value in (("latents", latents), ("text", text)) if value is None]

    @classmethod
    async def execute(cls, dit: handles.DiTFile, latents: handles.LatentCache, text: handles.TextCache, name: str, steps: int,
                seed: int, loraid: Loraid | None = None, **settings: Any) -> io.NodeOutput:  # fmt: skip
        target = paths.output_file("loras", name)
        job = Job(
            name=str(target.relative_to(paths.output_folder("loras")).with_suffix("").as_posix()),
            output_folder=str(paths.output_folder("loras")),
            family=dit.family.name,
            variant=dit.variant.name,
            dit=str(dit.path),
            dit_fingerprint=fingerprint(dit.path),
            datasets=_training_sets(dit, latents, text),
            steps=steps,
            seed=seed,
            loraid=loraid,
            low=dit.low and _low_expert(dit.low),
            boundary=dit.boundary,
            **{"timesteps": TimestepSettings(sampling=dit.variant.training_sampling), **settings},
        )
        run = Run.of(job, paths.runs_folder())
        finished = _is_finished(run, job)
        with nullcontext() if finished else _starting(run):
            _announce(run, job, cls.hidden)
            if not finished:
                await _train(run, job, Progress(cls.hidden.unique_id, job.steps))
        metrics = run.metrics()
        summary = _summary(run, job, metrics)
        say(summary["text"], cls.hidden.unique_id)
        return io.NodeOutput(
            tuple(StackEntry(path, 1.0, loraid.number if loraid else 0) for path in job.final_paths),
            "\n".join(map(str, job.final_paths)),
            {"loss": [entry["loss"] for entry in metrics if entry["loss"] is not None]},
            ui={"videolora_run": [summary]},
        )


@contextmanager
def _starting(run: Run) -> Iterator[None]:
    starting.add(run.folder.name)
    try:
        yield
    finally:
        starting.discard(run.folder.name)


def _announce(run: Run, job: Job, hidden: Any) -> None:
    """Say in the run's folder and to every open editor which node it belongs to."""
    workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
    origin = {"workflow": str(workflow.get("id") or ""), "node": str(hidden.unique_id or "")}
    run.keep_origin(**origin)
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync("videolora.run", {"id": run.folder.name, "name": job.name, "origin": origin})


def _low_expert(dit: handles.DiTFile) -> Expert:
    return Expert(name="low", variant=dit.variant.name, dit=str(dit.path), dit_fingerprint=fingerprint(dit.path))


def _refuse_to_overwrite(target: Path) -> None:
    """A LoRA of another training may be replaced (its own run keeps it), anything else may not."""
    if target.exists() and "videolora_job" not in safetensors.read_header(target).metadata:
        raise ValueError(f"{target} exists and was not made by this node: choose another name.")


def _training_sets(
    dit: handles.DiTFile, latents: handles.LatentCache, text: handles.TextCache
) -> tuple[TrainingSet, ...]:
    """The cached clips, each with its caption. Raises ValueError when the caches are not of this model and data."""
    for cache, what in ((latents, "latents"), (text, "captions")):
        if cache.family.name != dit.family.name:
            raise ValueError(f"the {what} were cached for {cache.family.title}, and the model is {dit.family.title}.")
    captions = {
        (dataset.config.cache, item.key): planned
        for dataset, texts in text.plans
        for item, planned in zip(dataset.items, texts, strict=True)
    }
    sets = []
    for plan in latents.plans:
        config, items = plan.dataset.config, []
        if dit.variant.images and (plan.images is None or plan.images.input != dit.variant.images):
            raise ValueError(f"the latents were cached without what {dit.variant.title} is told of the clips' images: link the "
                             "model to Cache Latents, and queue again.")  # fmt: skip
        for window in plan.windows:
            caption = captions.get((config.cache, window.item.key))
            if caption is None:
                raise ValueError(f"{window.item.source.name} has cached latents but no cached caption: link the same data sets "
                                 "to Cache Latents and Cache Text.")  # fmt: skip
            items.append(TrainingItem(
                latents=str(window.path), text=str(caption.path), size=tuple(dit.family.latent.latents(window.size)),
                fingerprints=(window.content if dit.variant.images else window.fingerprint, caption.fingerprint),
            ))  # fmt: skip
        sets.append(TrainingSet(title=config.title, batch_size=config.batch_size, num_repeats=config.num_repeats,
                                items=tuple(items), settings=describe(config)))  # fmt: skip
    return tuple(sets)


def _is_finished(run: Run, job: Job) -> bool:
    if run.status()["state"] != runs.FINISHED:
        return False
    try:
        made = [safetensors.read_header(path).metadata.get("videolora_job") for path in job.final_paths]
        return all(digest == job.digest for digest in made)
    except (OSError, ValueError):
        return False


async def _train(run: Run, job: Job, progress: Progress) -> None:
    """Start the run's process, or join it, and follow it to its end."""
    joins = run.is_alive()
    async with gpus.taken(job.gpus, run.gpus() if joins else ()) as share:
        if not joins and not share.leaves_comfyui_alone:
            handles.Slot.release_all()
        process = None if joins else _start(run, share)
        try:
            view = _View(run, job, progress)
            while _at_work(run, process):
                if run.is_alive():
                    starting.discard(run.folder.name)
                view.show()
                await share.wait()
        except (
            mm.InterruptProcessingException,
            asyncio.CancelledError,
        ):  # by the user, or with the rest of the workflow
            run.ask(STOP)
            while _at_work(run, process):
                await share.wait()
            raise
    status = run.status()
    if status["state"] == runs.FAILED:
        raise RuntimeError(f"Training failed: {status['error']}\n\nThe end of {run.log}:\n{run.log_end()}")
    code = process.returncode if process else None
    if code:
        raise RuntimeError(
            f"The training process ended unexpectedly (exit code {code}) after step {_last_step(run)} of {job.steps}; it "
            "may have run out of main memory or been killed. Queue it again to go on from the last save.\n\n"
            f"The end of {run.log}:\n{run.log_end()}"
        )
    if status["state"] != runs.FINISHED:  # asked for from outside, with everything saved: as the user's own Cancel
        say(f"stopped after step {status['step']} of {job.steps}; queue it again to go on", progress.node_id)
        raise mm.InterruptProcessingException


def _at_work(run: Run, process: subprocess.Popen | None) -> bool:
    return process.poll() is None if process else run.is_alive()


def _start(run: Run, share: gpus.Share) -> subprocess.Popen:
    """The worker: this Python, our own file, no shell. It lives on when ComfyUI is closed; the run can then be joined."""
    user_site = ["-s"] if sys.flags.no_user_site else []
    processes = run.job().gpus
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    worker = [str(_CORE), "train", str(run.folder), mm.get_torch_device().type]
    command = [sys.executable, *user_site, *launcher, *worker]
    environment = {**os.environ, **share.environment, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    detached: dict[str, Any] = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        if os.name == "nt"
        else {"start_new_session": True}
    )
    run.forget(*REQUESTS)
    run.keep_gpus(share.numbers)
    run.write_status(runs.STOPPED, _last_step(run))  # an earlier failure is not this one's
    with open(run.log, "w", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=run.folder,
            **detached,
        )  # fmt: skip


def _last_step(run: Run) -> int:
    metrics = run.metrics()
    return metrics[-1]["step"] if metrics else 0


class _View:
    """Shows in the editor what a run has done since the last look."""

    def __init__(self, run: Run, job: Job, progress: Progress) -> None:
        self.run, self.job, self.progress = run, job, progress
        self.reader = MetricsReader(run)

    def show(self) -> None:
        """Raises ComfyUI's interrupt when the user has cancelled."""
        latest, status = list(self.reader.read()), self.run.status()
        if latest:
            doing = status["state"] if status["state"] == runs.PAUSED else status.get("doing")
            line = _line(latest, self.job) + (f"\n{doing}" if doing else "")
            self.progress.update(latest[-1]["step"], self.job.steps, line)
        elif self.run.log.exists():
            self.progress.update(0, self.job.steps, self.run.log_end(1))


def _line(recent: list[dict[str, Any]], job: Job) -> str:
    last = recent[-1]
    left, skipped = int(last["seconds_left"]), sum(entry["loss"] is None for entry in recent)
    parts = [
        f"step {last['step']} of {job.steps}",
        f"loss {_number(last['loss_average'])}",
        f"learning rate {last.get('effective_rate', last['learning_rate']):.2e}",
        f"gradient {_number(last['gradient_norm'])}",
        f"{last['seconds']:.2f} s per step",
        f"{last['memory'] / 2**30:.1f} GiB",
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
    ]
    validated = [entry["validation_loss"] for entry in recent if "validation_loss" in entry]
    if validated:
        parts.insert(2, f"validation {_number(validated[-1])}")
    if skipped:
        parts.append(f"{skipped} of the last {len(recent)} steps skipped")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _summary(run: Run, job: Job, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run did, for the editor and for API clients."""
    tenth = max(1, len(metrics) // 10)
    first, last = average(metrics[:tenth]), average(metrics[-tenth:])
    seconds = sum(entry["seconds"] for entry in metrics)
    skipped = sum(entry["loss"] is None for entry in metrics)
    bands, notes = band_losses(metrics), run.notes()
    validation = {entry["step"]: entry["validation_loss"] for entry in metrics if "validation_loss" in entry}
    files = run.status().get("files", [])
    lines = [f"{job.steps} steps in {seconds:.0f} s, loss {_number(first)} -> {_number(last)}"]
    if validation:
        values = list(validation.values())
        lines.append(f"validation loss {_number(values[0])} -> {_number(values[-1])}")
    width = 1000 // BANDS
    shown = [f"{width * band}: {loss:.3f}" for band, loss in enumerate(bands) if loss is not None]
    lines.append(f"loss by timestep, from {', '.join(shown)}")
    if skipped:
        lines.append(f"{skipped} steps were skipped, their loss was not finite")
    return {
        "name": job.name, "loraid": job.loraid.number if job.loraid else None, "steps": job.steps,
        "loss_start": first, "loss_end": last, "seconds": seconds, "files": files, "loras": [paths.shown(Path(file)) for file in files],
        "run": str(run.folder),
        "peak_memory": max((entry["memory"] for entry in metrics), default=0), "loss_by_timestep": bands,
        "validation_loss": validation, "skipped": skipped, "notes": notes,
        "previews": [paths.shown(path) for path in run.previews()], "text": "\n".join([*lines, *notes[-3:], *files]),
    }  # fmt: skip
