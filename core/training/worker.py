"""The process that trains one job: loads, resumes, runs the loop, saves, and says in the run's folder how it goes."""

from __future__ import annotations

import logging
import math
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ..devices import best_device, free_memory, peak_memory
from ..families import FAMILIES, open_part
from ..family import Family, Part
from ..io.files import atomic, fingerprint
from ..lora import files, loraid
from ..lora.adapter import Adapter, attached
from ..lora.factors import factors_of
from ..lora.inventory import Matrix, blocks_of, inventory
from ..lora.network import make_adapters, parameter_groups
from ..modules.attention import load_backend, use_attention
from ..modules.compiling import compile_blocks
from ..modules.offloading import Offload
from ..modules.streaming import BlockStream, streamed_blocks
from ..prefetch import prefetched
from ..weights import Checkpoint, load_into
from . import batches, loop, planner, run, state
from .job import Job, MemorySettings
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
    family = FAMILIES[job.family]
    checkpoint, part = _open_dit(job)
    matrices = inventory(family, {name: info.shape for name, info in checkpoint.tensors.items()})
    rows, allocation = _share(job, family, matrices)
    memory = _plan(this, job, family, checkpoint, part, matrices, rows, device)
    dit = _load_dit(family, checkpoint, part, matrices, memory, device)
    title = family.variants[job.variant].title
    adapters = {
        name: adapter.to(device)
        for name, adapter in make_adapters(dit, rows, job.network, matrices, title, job.seed).items()
    }
    optimizer = make_optimizer(parameter_groups(adapters, job.network), job.optimizer)
    trained = sum(parameter.numel() for adapter in adapters.values() for parameter in adapter.parameters())
    log.info("training %d matrices, %s parameters of a %s of rank %d with %s, %s on %s", len(adapters), f"{trained:,}",
             job.network.kind, job.network.rank, job.optimizer.kind.title, str(dit.dtype).removeprefix("torch."), device)  # fmt: skip
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


def _open_dit(job: Job) -> tuple[Checkpoint, Part]:
    path = Path(job.dit)
    opened = open_part(path, "dit")
    if fingerprint(path) != job.dit_fingerprint:
        raise ValueError(
            f"{path} is not the checkpoint this job was made for: it was changed. Queue the training again."
        )
    return opened


def _plan(this: Run, job: Job, family: Family, checkpoint: Checkpoint, part: Part, matrices: list[Matrix],
          rows: Mapping[str, loraid.Rows], device: torch.device) -> MemorySettings:  # fmt: skip
    """Settings that fit, with the precision that the run began with: another one would make another LoRA."""
    settings = replace(job.memory, precision=this.precision() or job.memory.precision)
    largest = max(batches.epoch(job.datasets, job.seed, 0), key=lambda items: len(items) * math.prod(items[0].size))
    batch = batches.make_batch(job, family, 0, largest, job.seed)
    subject = planner.Subject(
        family=family, config=part.config, matrices=matrices, rows=rows, network=job.network, device=device,
        dtypes={part.keymap.to_model(name): info.dtype for name, info in checkpoint.tensors.items()},
        latents=tuple(batch.latents.shape), conditions=batch.conditions,
        optimizer_bytes=job.optimizer.kind.state_bytes,
    )  # fmt: skip
    plan = planner.choose(subject, settings, free_memory(device), free_memory(torch.device("cpu")))
    log.info("planned: %s", plan)
    this.keep_precision(plan.settings.precision)
    return plan.settings


def _load_dit(family: Family, checkpoint: Checkpoint, part: Part, matrices: list[Matrix], memory: MemorySettings,
              device: torch.device) -> torch.nn.Module:  # fmt: skip
    """The transformer with its weights where the settings want them."""
    dtype = planner.compute_dtype(memory.precision, device)
    attend = load_backend(memory.attention, device, dtype, training=True)
    blocks = blocks_of(matrices)
    numbers = streamed_blocks(memory.block_swap, len(blocks))
    on_host = {f"{matrix.name}.weight" for matrix in matrices if matrix.block in {blocks[n] for n in numbers}}
    begin = time.perf_counter()
    with torch.device("meta"):
        dit = family.build_dit(part.config)
    stored = planner.stored_weights(
        memory.precision,
        matrices,
        {part.keymap.to_model(name): info.dtype for name, info in checkpoint.tensors.items()},
    )
    load_into(dit, checkpoint, part.keymap, dtype, lambda name: "cpu" if name in on_host else device, stored)
    modules = [dit.get_submodule(path) for path in blocks]
    use_attention(dit, attend)
    if memory.compile:
        compile_blocks(modules, device)
    dit.run_block.recompute = memory.gradient_checkpointing
    dit.run_block.offload = Offload(device) if memory.offload_checkpoints else None
    dit.run_block.stream = BlockStream(modules, numbers, device) if numbers else None
    log.info("loaded %s (%s) in %.1f s", checkpoint.path.name, part.title, time.perf_counter() - begin)
    return dit


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
