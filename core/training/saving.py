"""Saving what was trained: states to go on from, LoRAs, and the latter where ComfyUI finds them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..family import Family
from ..io.files import atomic
from ..lora import files, loraid
from ..lora.factors import factors_of
from ..lora.inventory import Matrix
from . import state
from .experts import Adapters, all_adapters
from .job import Expert, Job
from .metadata import describe
from .optimizers import Optimizer, given_out
from .run import Run
from .watching import NotFinite

log = logging.getLogger("videolora.training")


class Writer:
    """Writes the run's files and publishes LoRAs where ComfyUI finds them."""

    def __init__(self, this: Run, job: Job, family: Family, matrices: list[Matrix], adapters: Adapters,
                 optimizer: Optimizer, allocation: loraid.Allocation | None) -> None:  # fmt: skip
        self.run, self.job, self.family, self.adapters, self.optimizer = this, job, family, adapters, optimizer
        self.rows = {matrix.name: matrix.rows for matrix in matrices}
        self.allocation = allocation
        self.saved_step, self.saved_at = -1, time.monotonic()

    def save_state(self, step: int) -> None:
        adapters = all_adapters(self.adapters)
        _require_finite(parameter for adapter in adapters.values() for parameter in adapter.parameters())
        state.save_state(self.run, step, adapters, self.optimizer, self.job)
        self.saved_at = time.monotonic()

    def save(self, step: int) -> None:
        """LoRA and state after `step`, in the run's folder: where publishing fails, nothing is lost."""
        if step != self.saved_step:
            self._save_lora(step)
            self.save_state(step)
            self.saved_step = step
            self._remove_old()

    def publish(self, step: int) -> None:
        """The LoRA that was saved after `step`, under a name of its own, where ComfyUI finds it."""
        for expert in self.adapters:
            self._publish(step, expert, self.job.path_of(expert, step))
        self._remove_old()

    def finish(self, step: int) -> list[Path]:
        """The last LoRA under its plain name; all files that were published."""
        self._save_lora(step)
        self.save_state(step)
        for expert in self.adapters:
            self._publish(step, expert, self.job.path_of(expert))
        earlier = [self.job.path_of(expert, one) for one in self._published_steps() for expert in self.adapters]
        return [*earlier, *self.job.final_paths]

    def _saved_steps(self) -> list[int]:
        return sorted({int(path.stem.split("-")[1]) for path in self.run.folder.glob("lora-*.safetensors")})

    def _published_steps(self) -> list[int]:
        first = next(iter(self.adapters))
        return [step for step in self._saved_steps() if self.job.path_of(first, step).exists()]

    def _remove_old(self) -> None:
        """Keep as many LoRAs as was asked for, and of those that were not published only the newest."""
        published = self._published_steps()
        kept = set(published[-self.job.save.keep :]) if self.job.save.keep else set(published)
        for step in set(published) - kept:
            for expert in self.adapters:
                self.job.path_of(expert, step).unlink(missing_ok=True)
        newest = max(self._saved_steps())
        for step in self._saved_steps():
            if step not in kept and step != newest:
                for expert in self.adapters:
                    self.run.lora_path(step, expert).unlink(missing_ok=True)

    def _publish(self, step: int, expert: str, target: Path) -> None:
        with atomic(target) as temporary:
            shutil.copyfile(self.run.lora_path(step, expert), temporary)
        log.info("saved %s", target)

    def _save_lora(self, step: int) -> None:
        for expert in self.job.experts:
            self._save_lora_of(expert, step)

    def _save_lora_of(self, expert: Expert, step: int) -> None:
        dtype = getattr(torch, self.job.save.precision)
        with given_out(self.optimizer, self.job.optimizer.kind):
            factors = {
                name: factors_of(adapter, self.rows[name], self.job.network.alpha).to(dtype)
                for name, adapter in self.adapters[expert.name].items()
            }
        _require_finite(value for factor in factors.values() for value in factor.tensors().values())
        metadata = describe(self.job, self.family, expert, self.allocation, step, self.run.started(), time.time())
        files.save(self.run.lora_path(step, expert.name), factors, metadata, names=self.family.lora_names)


def _require_finite(tensors: Iterable[Tensor]) -> None:
    """Raise NotFinite before numbers are written that nobody could use."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NotFinite("the LoRA's weights are not finite and are not saved; an older state is kept. Lower the learning rate, "
                        "or save in bfloat16 or float32.")  # fmt: skip
