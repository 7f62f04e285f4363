"""What a training is like, step by step: metrics.jsonl for tools, and TensorBoard's files when they are wanted.

A line of metrics.jsonl, where null stands for a number that was not finite:

    step, epoch         from 1
    loss                null: the step was skipped, nothing was updated with it
    loss_average        of the last 100 steps that were not skipped
    learning_rate       of the schedule
    effective_rate      what the optimiser made of it (only of those that find the rate themselves)
    gradient_norm       before it was cut
    seconds             of the step and of waiting for its data
    seconds_left        at the pace of the last 100 steps
    memory              most bytes held so far on the device, or by the process
    timesteps, losses   of each sample
    validation_loss     in the steps that end with a validation
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any, TextIO

import torch

from ..devices import peak_memory
from .batches import batches_per_epoch, epoch_of
from .job import Job
from .loop import Step
from .run import Run

log = logging.getLogger("videolora.training")
_AVERAGED = 100
BANDS = 10
Entry = dict[str, Any]


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss that was not finite. The weights are those from before them."""


class Watch:
    """Writes down each step of a run that goes on after step `first`; ends a training that has stopped to learn."""

    def __init__(self, run: Run, job: Job, device: torch.device, first: int) -> None:
        self.run, self.job, self.device = run, job, device
        self.per_epoch = batches_per_epoch(job)
        done = run.metrics()
        self.recent = deque(done[-_AVERAGED:], maxlen=_AVERAGED)
        self.skipped = sum(1 for _ in takewhile(lambda entry: entry["loss"] is None, reversed(done)))
        self.board = None
        if job.watch.tensorboard:
            job.watch.check_installed()
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.path("tensorboard")), purge_step=first + 1)

    def report(self, step: Step, validation: float | None) -> None:
        """Write the step down. Raises NotFinite after too many skipped ones in a row."""
        entry = self._entry(step, validation)
        self.recent.append(entry)
        entry |= {"loss_average": average(self.recent), "seconds_left": self._seconds_left(step.index)}
        self.run.append_metrics(entry)
        if self.board is not None:
            for tag, value in _scalars(entry).items():
                self.board.add_scalar(tag, value, step.index)
        self.skipped = 0 if step.outcome.is_finite else self.skipped + 1
        if self.skipped:
            log.warning("step %d is skipped: its loss is %s, its gradient's norm %s", step.index, step.outcome.loss,
                        step.outcome.gradient_norm)  # fmt: skip
        if self.skipped >= min(self.job.watch.skipped_in_a_row, self.job.steps):
            raise NotFinite(
                f"the loss or its gradient was not finite in the last {self.skipped} steps, up to step {step.index}. Nothing was "
                "updated with it. Lower the learning rate, look for damaged clips, or use bfloat16 instead of float16."
            )

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _entry(self, step: Step, validation: float | None) -> Entry:
        outcome = step.outcome
        return {
            "step": step.index,
            "epoch": epoch_of(step.index, self.job, self.per_epoch),
            "loss": outcome.loss if outcome.is_finite else None,
            "learning_rate": step.learning_rate,
            **({} if step.effective_rate is None else {"effective_rate": step.effective_rate}),
            "gradient_norm": _finite(outcome.gradient_norm),
            "seconds": step.seconds,
            "memory": peak_memory(self.device),
            "timesteps": [round(timestep, 2) for timestep in step.timesteps],
            "losses": [_finite(loss) for loss in outcome.losses],
            **({} if validation is None else {"validation_loss": _finite(validation)}),
        }

    def _seconds_left(self, done: int) -> float:
        return (self.job.steps - done) * fmean(entry["seconds"] for entry in self.recent)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def average(entries: Iterable[Entry]) -> float | None:
    """The mean loss of steps that were not skipped; None when all were."""
    losses = [entry["loss"] for entry in entries if entry["loss"] is not None]
    return fmean(losses) if losses else None


def band_losses(entries: Iterable[Entry]) -> list[float | None]:
    """The mean loss of the samples in each tenth of the timesteps, 0-100 first; None where there are none."""
    found: list[list[float]] = [[] for _ in range(BANDS)]
    for entry in entries:
        for timestep, loss in zip(entry["timesteps"], entry["losses"], strict=True):
            if loss is not None:
                found[band_of(timestep)].append(loss)
    return [fmean(losses) if losses else None for losses in found]


def band_of(timestep: float) -> int:
    return min(int(timestep * BANDS / 1000), BANDS - 1)


def _scalars(entry: Entry) -> dict[str, float]:
    """TensorBoard's names, where others have one the same, and values."""
    found = {
        "loss/current": entry["loss"], "loss/average": entry["loss_average"], "val/loss": entry.get("validation_loss"),
        "lr/unet": entry["learning_rate"], "lr/d*lr/unet": entry.get("effective_rate"),
        "gradient/norm": entry["gradient_norm"], "time/seconds_per_step": entry["seconds"],
        "memory/peak_gib": entry["memory"] / 2**30,
    }  # fmt: skip
    for band, loss in enumerate(band_losses([entry])):
        found[f"loss_by_timestep/{100 * band:03d}-{100 * band + 100:03d}"] = loss
    return {tag: value for tag, value in found.items() if value is not None}


def write_csv(entries: Sequence[Entry], file: TextIO) -> None:
    """All steps as a table; lists as JSON in a cell."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow(
            {name: json.dumps(value) if isinstance(value, list) else value for name, value in entry.items()}
        )
