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
from .optimizers import Optimizer, restore_state, state_of
from .run import Run

log = logging.getLogger("videolora.training")
_KEPT = 2  # states: the newest, and the one before in case its disk dies with it


def save_state(run: Run, step: int, adapters: Mapping[str, Adapter], optimizer: Optimizer, job_digest: str) -> None:
    """Write the state after `step` and remove older ones."""
    tensors = {f"adapter/{name}/{role}": value for name, role, value in _parts(adapters)}
    gathered, rest = state_of(optimizer)
    tensors |= {f"optimizer/{name}": value for name, value in gathered.items()}
    safetensors.save(run.state_path(step), tensors, {"step": str(step), "job": job_digest, "optimizer": rest})
    for old in run.states()[_KEPT:]:
        old.unlink(missing_ok=True)


@torch.inference_mode(False)
def load_state(run: Run, adapters: Mapping[str, Adapter], optimizer: Optimizer, job_digest: str) -> int:
    """Load the newest whole state of this job and return its step (0 when there is none)."""
    for path in run.states():
        try:
            tensors, metadata = safetensors.load(path)
        except ValueError as error:
            log.warning("%s is skipped: %s", path.name, error)
            continue
        if metadata.get("job") != job_digest:
            log.warning("%s is skipped: it belongs to another job", path.name)
            continue
        _restore(tensors, metadata["optimizer"], adapters, optimizer)
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
