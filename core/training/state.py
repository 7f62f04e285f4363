"""What a run needs to go on: adapters and optimizer in one safetensors file, which exists whole or not at all.

Random numbers and data order follow from seed and step (see `batches.py`), so they need not be saved.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..io import safetensors
from ..lora.adapter import LoRA
from .run import Run

log = logging.getLogger("videolora.training")
_KEPT = 2  # states: the newest, and the one before in case its disk dies with it


def save_state(
    run: Run, step: int, adapters: Mapping[str, LoRA], optimizer: torch.optim.Optimizer, job_digest: str
) -> None:
    """Write the state after `step` and remove older ones."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        tensors[f"adapter/{name}/down"], tensors[f"adapter/{name}/up"] = adapter.down, adapter.up
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in entries.items()}
    safetensors.save(run.state_path(step), tensors, {"step": str(step), "job": job_digest})
    for old in run.states()[_KEPT:]:
        old.unlink(missing_ok=True)


@torch.inference_mode(False)
def load_state(run: Run, adapters: Mapping[str, LoRA], optimizer: torch.optim.Optimizer, job_digest: str) -> int:
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
        _restore(tensors, adapters, optimizer, path)
        return int(metadata["step"])
    return 0


def _restore(
    tensors: Mapping[str, Tensor], adapters: Mapping[str, LoRA], optimizer: torch.optim.Optimizer, path: Path
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            owner, _, role = rest.rpartition("/")
            if kind == "adapter":
                getattr(adapters[owner], role).copy_(value)
            else:
                state.setdefault(int(owner), {})[role] = value
    assert sum(key.startswith("adapter/") for key in tensors) == 2 * len(adapters), path
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
