"""Several processes that train one job, started by torchrun on one machine or many.

Every process holds all adapters and takes its part of each step's batches; the adapters' gradients are added up once per
step, so what makes up a step, and the LoRA, do not depend on the number of processes (but for rounding). Each holds the model
too, and no process waits for another inside a step: their batches may differ in size. Only where the weights are divided among
them (`sharding.py`) do they go through the model together. The first one writes all files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PATIENCE = timedelta(days=7)  # while the first process samples previews, or is paused, the others wait


@dataclass(frozen=True)
class Team:
    """This process's place (from 0) among `size` processes."""

    place: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and answers the user."""
        return self.place == 0

    def add_up(self, parameters: Sequence[nn.Parameter], *values: Tensor) -> None:
        """Replace the parameters' gradients and the values by their sums over all processes, in one exchange."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process's batches gave none
                parameter.grad = torch.zeros_like(parameter)
        tensors = [*(parameter.grad for parameter in parameters), *values]
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def agree(self, value: bool, device: torch.device) -> bool:
        """What the first process says."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.uint8, device=device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of what the processes say."""
        if self.size == 1:
            return value
        said = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return int(said.item())

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All processes in a row."""
        from torch.distributed.device_mesh import init_device_mesh  # some builds of torch have none

        return init_device_mesh(device.type, (self.size,))


ALONE = Team()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """The team this process belongs to by torchrun's environment, and its own device; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
