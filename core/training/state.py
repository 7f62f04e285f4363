"""What a run needs to go on: adapters and optimizer in one safetensors file, which exists whole or not at all.

Random numbers and data order follow from seed and step (see `batches.py`), so they need not be saved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..io import safetensors
from ..lora.adapter import Adapter
from .job import Job
from .optimizers import Optimizer, restore_state, state_of
from .run import Run

log = logging.getLogger("videolora.training")


def save_state(run: Run, step: int, adapters: Mapping[str, Adapter], optimizer: Optimizer, job: Job) -> None:
    """Write the state after `step`; remove the oldest, and those of later steps, which were damaged or skipped."""
    tensors = {f"adapter/{name}/{role}": value for name, role, value in _parts(adapters)}
    gathered, rest = state_of(optimizer)
    tensors |= {f"optimizer/{name}": value for name, value in gathered.items()}
    safetensors.save(run.state_path(step), tensors, {"step": str(step), "job": job.digest, "optimizer": rest})
    current = run.state_path(step)
    kept = [path for path in run.states() if path <= current][: job.save.keep_states]
    for path in run.states():
        if path not in kept:
            path.unlink(missing_ok=True)


@torch.inference_mode(False)
def load_state(run: Run, adapters: Mapping[str, Adapter], optimizer: Optimizer, job: Job) -> int:
    """Load the newest whole state of this job and return its step (0 when there is none). What is skipped is noted."""
    for path in run.states():
        try:
            tensors, metadata = safetensors.load(path)
            if metadata.get("job") != job.digest:
                raise ValueError("it belongs to another job.")
            _restore(tensors, metadata["optimizer"], adapters, optimizer)
        except ValueError as error:
            reason = f"{path.name} is skipped, an older state is looked for: {error}"
            log.warning("%s", reason)
            run.note(reason)
            continue
        return int(metadata["step"])
    return 0


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], rest: str, adapters: Mapping[str, Adapter], optimizer: Optimizer) -> None:
    for name, role, parameter in _parts(adapters):
        parameter.copy_(tensors[f"adapter/{name}/{role}"])
    prefix = "optimizer/"
    gathered = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    restore_state(optimizer, gathered, rest)


def _parts(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, str, Tensor]]:
    """(name of the matrix, role, parameter) of everything that is trained."""
    for name, adapter in adapters.items():
        yield from ((name, role, parameter) for role, parameter in adapter.named_parameters())
