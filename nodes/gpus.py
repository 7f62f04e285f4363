"""Which GPUs a training gets.

A training that leaves ComfyUI's own GPU alone lets the rest of the workflow go on, so that several LoRAs are trained at the
same time, one per GPU. On ComfyUI's own GPU, which is given out last, it keeps the rest waiting: both would not fit.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import comfy.model_management as mm
import torch

_POLL_SECONDS = 0.2
_taken: set[int] = set()


@dataclass(frozen=True)
class Share:
    """The GPUs `numbers` of this machine; none on a machine without CUDA or ROCm."""

    numbers: tuple[int, ...]

    @property
    def leaves_comfyui_alone(self) -> bool:
        return bool(self.numbers) and own() not in self.numbers

    @property
    def environment(self) -> dict[str, str]:
        """What shows a process these GPUs alone."""
        if not self.numbers:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(count())]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[number].strip() for number in self.numbers)}

    async def wait(self) -> None:
        """Until the next look at the training."""
        if self.leaves_comfyui_alone:
            await asyncio.sleep(_POLL_SECONDS)
        else:
            time.sleep(_POLL_SECONDS)


def count() -> int:
    """GPUs to train on."""
    return torch.cuda.device_count() if mm.get_torch_device().type == "cuda" else 0


def own() -> int:
    """The GPU that ComfyUI works on."""
    return mm.get_torch_device().index or 0


def check(wanted: int) -> None:
    """Raise ValueError when there are not so many."""
    present = count()
    if present and wanted > present:
        raise ValueError(f"gpus is {wanted}, and this machine has {present}: use {present} or fewer.")


@asynccontextmanager
async def taken(wanted: int, already: Sequence[int] = ()) -> AsyncIterator[Share]:
    """So many GPUs for one training, as soon as they are free; those it has `already` when it is joined."""
    while (numbers := tuple(already) or _free(wanted)) is None:
        mm.throw_exception_if_processing_interrupted()
        await asyncio.sleep(_POLL_SECONDS)
    _taken.update(numbers)
    try:
        yield Share(numbers)
    finally:
        _taken.difference_update(numbers)


def _free(wanted: int) -> tuple[int, ...] | None:
    """The last of the GPUs that are not taken, or None when they are too few."""
    if not count():
        return ()
    free = sorted(set(range(count())) - _taken, key=lambda number: (number == own(), number))
    return tuple(free[:wanted]) if len(free) >= wanted else None
