"""The process that trains one job: loads, resumes, runs the loop, and says in the run's folder how it goes."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import require
from ..devices import best_device
from ..families import FAMILIES
from ..family import Family, Part
from ..lora.adapter import Adapter
from ..lora.inventory import Matrix, inventory
from ..lora.loraid import Rows
from ..lora.network import make_adapters, parameter_groups
from ..prefetch import prefetched
from . import batches, loop, planner, run, state
from .experts import Experts, all_adapters
from .job import Expert, Job, SaveSettings
from .loading import load_dit, open_dit, plan_memory, trained_share
from .optimizers import given_out, make_optimizer
from .previews import Previews
from .prompts import PreviewSettings
from .run import PAUSE, REQUESTS, SAVE, STOP, Run
from .saving import Writer
from .team import ALONE, Team, joined
from .validation import validation_loss
from .watching import NotFinite, Watch

log = logging.getLogger("videolora.training")
_STATE_SECONDS = 600  # a crash costs at most this much work, whatever the save settings
_STATUS_SECONDS = 0.2


def work(folder: Path, device: str | None = None) -> int:
    """Train the job in `folder` to its end or until it is asked to stop. Returns the process's exit code."""
    this = Run(folder)
    try:
        with joined(torch.device(device) if device else best_device()) as (team, own_device):
            if team.leads:
                this.claim()
                this.write_status(run.RUNNING, this.status()["step"])
            _train(this, this.job(), own_device, team)
    except torch.OutOfMemoryError as error:
        advice = (
            "Use fewer frames, a smaller resolution, batch size 1 or a lower rank, and leave gradient checkpointing on."
        )
        return _failed(this, f"out of memory ({error}). {advice}")
    except (OSError, ValueError, NotFinite) as error:
        return _failed(this, str(error))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        return _failed(this, f"{type(error).__name__}: {error}")
    return 0


def _failed(this: Run, error: str) -> int:
    log.error("%s", error)
    this.write_status(run.FAILED, this.status()["step"], error=error)
    return 1


def _train(this: Run, job: Job, device: torch.device, team: Team) -> None:
    job.watch.check_installed()
    batches.split(job)  # raises when the settings leave nothing to train on
    family = FAMILIES[job.family]
    checkpoint, part = opened = open_dit(job.experts[0])
    files = {expert.name: open_dit(expert) for expert in job.experts[1:]} | {job.experts[0].name: opened}
    require(
        all(one.config == part.config for _, one in files.values()), "the two experts are models of different sizes."
    )
    matrices = inventory(family, checkpoint.shapes(part.keymap))
    rows, allocation = trained_share(job, family, matrices)
    memory = plan_memory(this, job, family, checkpoint, part, matrices, rows, device, team)
    adapters = {expert.name: _adapters(job, family, expert, part, matrices, rows, device) for expert in job.experts}
    every = all_adapters(adapters)
    optimizer = make_optimizer(parameter_groups(every, job.network), job.optimizer)
    trained = sum(parameter.numel() for adapter in every.values() for parameter in adapter.parameters())
    dtype = str(planner.compute_dtype(memory.precision, device)).removeprefix("torch.")
    log.info("training %d matrices, %s parameters of a %s of rank %d with %s, %s on %s", len(every), f"{trained:,}",
             job.network.kind, job.network.rank, job.optimizer.kind.title, dtype, device)  # fmt: skip
    first = state.load_state(this, every, optimizer, job)
    if first:
        log.info("going on after step %d", first)
    writer = Writer(this, job, family, matrices, adapters, optimizer, allocation)

    def load(expert: Expert) -> nn.Module:
        return load_dit(family, *files[expert.name], matrices, memory, device, team)

    with closing(Experts(job, adapters, load, device)) as experts:
        _Session(this, job, family, experts, device, writer, first, team, together=memory.shard).train()


def _adapters(job: Job, family: Family, expert: Expert, part: Part, matrices: list[Matrix], rows: Mapping[str, Rows],
              device: torch.device) -> dict[str, Adapter]:  # fmt: skip
    """Those to be trained on one transformer, of which only the sizes are needed."""
    with torch.device("meta"):
        dit = family.build_dit(part.config)
    title = family.variants[expert.variant].title
    made = make_adapters(dit, rows, job.network, matrices, title, job.seed, family.lora_names)
    return {name: adapter.to(device) for name, adapter in made.items()}


def _led(method: Callable) -> Callable:
    """Done by the first process alone, which writes the files and answers the user."""

    @functools.wraps(method)
    def there(self: _Session, *args: Any) -> Any:
        return method(self, *args) if self.team.leads else None

    return there


class _Session:
    """The steps from `first` on, and what is done between them; `together` all processes go through the model between
    steps too, else the others wait there for the first one."""

    def __init__(self, this: Run, job: Job, family: Family, experts: Experts, device: torch.device, writer: Writer,
                 first: int, team: Team, *, together: bool) -> None:  # fmt: skip
        self.run, self.job, self.family, self.experts, self.device = this, job, family, experts, device
        self.writer, self.first, self.team = writer, first, team
        self.looks = team.leads or together
        self.previews = Previews(this, job, family, device, team if together else ALONE)
        self.watch = self._begin_watch()
        self.per_epoch = batches.batches_per_epoch(job)
        self.reported_at = 0.0

    @_led
    def _begin_watch(self) -> Watch:
        self.run.cut_metrics(self.first)
        return Watch(self.run, self.job, self.device, self.first)

    def train(self) -> None:
        """To the last step, or until the run is asked to stop."""
        job = self.job
        self._preview(self.first)
        if self._is_to_stop():  # asked for while the model was loading
            return self._stopped(self.first)
        data = prefetched(batches.steps(job, self.family, self.first, self.team))
        with closing(self.watch) if self.watch else nullcontext(), closing(data):
            for step in self._steps(data):
                self._report(step)
                if step.index == job.steps:
                    break
                self._save(step.index)
                self._preview(step.index)
                self._pause(step.index)
                if self._is_to_stop():
                    return self._stopped(step.index)
        written = self._finish()
        self._preview(job.steps)
        return self._finished(written)

    def _steps(self, data: Iterator[list[batches.Batch]]) -> Iterator[loop.Step]:
        for expert, begin, end in batches.stretches(self.job, self.family, self.first):
            self.experts.use(expert.name)
            yield from loop.train(
                self.experts.of(expert.name), self.writer.adapters[expert.name], self.writer.optimizer,
                islice(data, end - begin), self.job, self.device, begin, self.team,
            )  # fmt: skip

    def _is_to_stop(self) -> bool:
        """Asked for by the user; all processes learn of it."""
        return self.team.agree(self.run.is_asked(STOP), self.device)

    def _report(self, step: loop.Step) -> None:
        self._write_down(step, self._validation(step.index))

    @_led
    def _write_down(self, step: loop.Step, validation: float | None) -> None:
        self.watch.report(step, validation)
        if time.monotonic() - self.reported_at > _STATUS_SECONDS:
            self._status(step.index)

    @_led
    def _status(self, step: int, doing: str = "") -> None:
        self.reported_at = time.monotonic()
        self.run.write_status(run.RUNNING, step, doing=doing)

    def _validation(self, step: int) -> float | None:
        watch = self.job.watch
        if (
            not self.looks
            or not watch.validation_share
            or (step % watch.validation_every_steps and step != self.job.steps)
        ):
            return None
        self._status(step, "validating")
        with self._as_saved():
            loss = validation_loss(self.experts, self.job, self.family, self.device)
        self._status(step)
        return loss

    @_led
    def _save(self, step: int) -> None:
        asked = self.run.is_asked(SAVE)
        if asked or self._ends_interval(step, self.job.save):
            self.writer.save(step)
            self.writer.publish(step)
            if asked:
                self.run.forget(SAVE)
        elif time.monotonic() - self.writer.saved_at > _STATE_SECONDS:
            self.writer.save_state(step)

    def _preview(self, step: int) -> None:
        settings = self.job.previews
        if self.looks and settings.prompts and (self._ends_interval(step, settings) if step else settings.at_start):
            self._status(step, "sampling previews")
            with self._as_saved():
                self.previews.make(step, self.experts)
            self._status(step)

    @_led
    def _pause(self, step: int) -> None:
        if not self.run.is_asked(PAUSE):
            return
        self.writer.save(step)
        self.run.write_status(run.PAUSED, step)
        log.info("paused after step %d of %d", step, self.job.steps)
        while self.run.is_asked(PAUSE) and not self.run.is_asked(STOP):
            time.sleep(_STATUS_SECONDS)
        self._status(step)

    @_led
    def _finish(self) -> list[Path]:
        return self.writer.finish(self.job.steps)

    @_led
    def _finished(self, written: list[Path]) -> None:
        self.run.forget(*REQUESTS)
        self.run.write_status(run.FINISHED, self.job.steps, files=[str(path) for path in written])
        log.info("finished: %s", ", ".join(map(str, self.job.final_paths)))

    @_led
    def _stopped(self, step: int) -> None:
        if step > self.first:
            self.writer.save(step)
        self.run.forget(*REQUESTS)
        self.run.write_status(run.STOPPED, step)
        log.info("stopped after step %d of %d; run the same job again to go on", step, self.job.steps)

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """Within the block the adapters are those that would be saved, and nothing of them is dropped."""
        adapters = all_adapters(self.writer.adapters).values()
        with given_out(self.writer.optimizer, self.job.optimizer.kind):
            try:
                for adapter in adapters:
                    adapter.eval()
                yield
            finally:
                for adapter in adapters:
                    adapter.train()

    def _ends_interval(self, step: int, every: SaveSettings | PreviewSettings) -> bool:
        """Whether the step ends an interval of steps or of epochs."""
        done, before = (at * self.job.batches_per_step // self.per_epoch for at in (step, step - 1))  # whole epochs
        steps, epochs = every.every_steps, every.every_epochs
        return bool((steps and step % steps == 0) or (epochs and done // epochs > before // epochs))
