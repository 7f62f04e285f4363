"""The process that trains one job: loads, resumes, runs the loop, saves, and says in the run's folder how it goes."""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

from ..devices import best_device, peak_memory, training_dtype
from ..families import FAMILIES, open_part
from ..family import Family
from ..io.files import atomic, fingerprint
from ..lora import files, loraid
from ..lora.adapter import Adapter, attached
from ..lora.factors import factors_of
from ..lora.inventory import Matrix, inventory
from ..lora.network import make_adapters, parameter_groups
from ..prefetch import prefetched
from ..weights import load_into
from . import batches, loop, run, state
from .job import Job
from .metadata import describe
from .optimizers import Optimizer, given_out, make_optimizer
from .run import Run

log = logging.getLogger("videolora.training")
_STATE_SECONDS = 600  # a crash costs at most this much work, whatever the save settings
_STATUS_SECONDS = 0.2


def work(folder: Path, device: str | None = None) -> int:
    """Train the job in `folder` to its end or until it is asked to stop. Returns the process's exit code."""
    this = Run(folder)
    this.claim()
    try:
        this.write_status(run.RUNNING, this.status()["step"])
        _train(this, this.job(), torch.device(device) if device else best_device())
    except torch.OutOfMemoryError as error:
        advice = (
            "Use fewer frames, a smaller resolution, batch size 1 or a lower rank, and leave gradient checkpointing on."
        )
        return _failed(this, f"out of memory ({error}). {advice}")
    except (OSError, ValueError, loop.NotFinite) as error:
        return _failed(this, str(error))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        return _failed(this, f"{type(error).__name__}: {error}")
    return 0


def _failed(this: Run, error: str) -> int:
    log.error("%s", error)
    this.write_status(run.FAILED, this.status()["step"], error=error)
    return 1


def _train(this: Run, job: Job, device: torch.device) -> None:
    dtype = training_dtype(device) if job.memory.precision == "auto" else getattr(torch, job.memory.precision)
    family = FAMILIES[job.family]
    dit, matrices = _load_dit(job, family, dtype, device)
    rows, allocation = _share(job, family, matrices)
    title = family.variants[job.variant].title
    adapters = {
        name: adapter.to(device)
        for name, adapter in make_adapters(dit, rows, job.network, matrices, title, job.seed).items()
    }
    optimizer = make_optimizer(parameter_groups(adapters, job.network), job.optimizer)
    trained = sum(parameter.numel() for adapter in adapters.values() for parameter in adapter.parameters())
    log.info("training %d matrices, %s parameters of a %s of rank %d with %s, %s on %s", len(adapters), f"{trained:,}",
             job.network.kind, job.network.rank, job.optimizer.kind.title, str(dtype).removeprefix("torch."), device)  # fmt: skip
    first = state.load_state(this, adapters, optimizer, job.digest)
    if first:
        log.info("going on after step %d", first)
    this.cut_metrics(first)
    writer = _Writer(this, job, family, matrices, adapters, optimizer, allocation)
    with attached(dit, adapters):
        _run_steps(this, job, family, dit, device, first, writer)


def _run_steps(this: Run, job: Job, family: Family, dit: torch.nn.Module, device: torch.device, first: int,
               writer: _Writer) -> None:  # fmt: skip
    if this.should_stop:  # asked for while the model was loading
        this.forget_stop()
        this.write_status(run.STOPPED, first)
        return
    per_epoch = batches.batches_per_epoch(job)
    done, saved_at, reported_at = first, time.monotonic(), 0.0
    with closing(prefetched(batches.steps(job, family, first))) as data:
        for step in loop.train(dit, writer.adapters, writer.optimizer, data, job, device, first):
            done = step.index
            this.append_metrics({
                "step": done, "loss": step.loss, "learning_rate": step.learning_rate, "seconds": step.seconds,
                "epoch": batches.epoch_of(done, job, per_epoch), "memory": peak_memory(device),
            })  # fmt: skip
            if time.monotonic() - reported_at > _STATUS_SECONDS:
                reported_at = time.monotonic()
                this.write_status(run.RUNNING, done)
            stopping = this.should_stop and done < job.steps
            due = _is_due(job, done, per_epoch)
            if stopping or due:
                writer.save(done, publish=due)
                saved_at = time.monotonic()
            elif time.monotonic() - saved_at > _STATE_SECONDS:
                writer.save_state(done)
                saved_at = time.monotonic()
            if stopping:
                this.forget_stop()
                this.write_status(run.STOPPED, done)
                log.info("stopped after step %d of %d; run the same job again to go on", done, job.steps)
                return
    written = writer.finish(job.steps)
    this.write_status(run.FINISHED, job.steps, files=[str(path) for path in written])
    log.info("finished: %s", job.final_path)


def _is_due(job: Job, step: int, per_epoch: int) -> bool:
    """Whether the step, not the last one, ends an interval of steps or of epochs."""
    done, before = (at * job.optimizer.gradient_accumulation // per_epoch for at in (step, step - 1))  # whole epochs
    steps, epochs = job.save.every_steps, job.save.every_epochs
    ends = (steps and step % steps == 0) or (epochs and done // epochs > before // epochs)
    return step < job.steps and bool(ends)


def _load_dit(
    job: Job, family: Family, dtype: torch.dtype, device: torch.device
) -> tuple[torch.nn.Module, list[Matrix]]:
    path = Path(job.dit)
    checkpoint, part = open_part(path, "dit")
    if fingerprint(path) != job.dit_fingerprint:
        raise ValueError(
            f"{path} is not the checkpoint this job was made for: it was changed. Queue the training again."
        )
    with torch.device("meta"):
        dit = family.build_dit(part.config)
    begin = time.perf_counter()
    load_into(dit, checkpoint, part.keymap, dtype, device)
    dit.run_block.recompute = job.memory.gradient_checkpointing
    log.info("loaded %s (%s) in %.1f s", path.name, part.title, time.perf_counter() - begin)
    return dit, inventory(family, {name: info.shape for name, info in checkpoint.tensors.items()})


def _share(job: Job, family: Family, matrices: list[Matrix]) -> tuple[dict[str, loraid.Rows], loraid.Allocation | None]:
    """The rows to train: of a LORAID's share or the whole model, what the patterns choose."""
    rows, allocation = {matrix.name: (0, matrix.rows) for matrix in matrices}, None
    if job.loraid is not None:
        allocation = loraid.allocate(matrices, job.loraid)
        log.info("%s", allocation.report())
        rows = allocation.rows
    return job.network.chosen(rows, (matrix.name for matrix in matrices)), allocation


class _Writer:
    """Writes the run's files and publishes LoRAs where ComfyUI finds them."""

    def __init__(self, this: Run, job: Job, family: Family, matrices: list[Matrix], adapters: Mapping[str, Adapter],
                 optimizer: Optimizer, allocation: loraid.Allocation | None) -> None:  # fmt: skip
        self.run, self.job, self.family, self.adapters, self.optimizer = this, job, family, adapters, optimizer
        self.rows = {matrix.name: matrix.rows for matrix in matrices}
        self.allocation = allocation

    def save_state(self, step: int) -> None:
        state.save_state(self.run, step, self.adapters, self.optimizer, self.job.digest)

    def save(self, step: int, publish: bool = True) -> None:
        """LoRA and state after `step`, in the run's folder first: where publishing fails, nothing is lost."""
        self._save_lora(step)
        self.save_state(step)
        if publish:
            self._publish(step, self.published_path(step))
        self._remove_old()

    def finish(self, step: int) -> list[Path]:
        """The last LoRA under its plain name; all files that were published."""
        self._save_lora(step)
        self.save_state(step)
        self._publish(step, self.job.final_path)
        return [*map(self.published_path, self._published_steps()), self.job.final_path]

    def published_path(self, step: int) -> Path:
        return self.job.final_path.with_name(f"{self.job.final_path.stem}-step{step:08d}.safetensors")

    def _saved_steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("lora-")) for path in self.run.folder.glob("lora-*.safetensors"))

    def _published_steps(self) -> list[int]:
        return [step for step in self._saved_steps() if self.published_path(step).exists()]

    def _remove_old(self) -> None:
        """Keep as many LoRAs as was asked for, and of those that were not published only the newest."""
        published = self._published_steps()
        kept = set(published[-self.job.save.keep :]) if self.job.save.keep else set(published)
        for step in set(published) - kept:
            self.published_path(step).unlink(missing_ok=True)
        newest = max(self._saved_steps())
        for step in self._saved_steps():
            if step not in kept and step != newest:
                self.run.lora_path(step).unlink(missing_ok=True)

    def _publish(self, step: int, target: Path) -> None:
        with atomic(target) as temporary:
            shutil.copyfile(self.run.lora_path(step), temporary)
        log.info("saved %s", target)

    def _save_lora(self, step: int) -> None:
        dtype = getattr(torch, self.job.save.precision)
        with given_out(self.optimizer, self.job.optimizer.kind):
            factors = {
                name: factors_of(adapter, self.rows[name], self.job.network.alpha).to(dtype)
                for name, adapter in self.adapters.items()
            }
        metadata = describe(self.job, self.family, self.allocation, step, self.run.started(), time.time())
        files.save(self.run.lora_path(step), factors, metadata)
