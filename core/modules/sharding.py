"""Frozen weights divided among the processes that train together: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each process keeps its share of every tensor. A block's weights are gathered while an earlier block computes, forward and
again backward, and let go of after it; frozen weights have no gradients to exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GATHERED_BLOCKS = 3  # whole at once: one that is computed with, one that arrives, and its copy while it is taken apart


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """Divide a model on the meta device, its `blocks` one by one and what is left together.

    Returns the function that makes this process's share of a whole tensor: the model's parameters are to be filled with
    those. Must be called before adapters are attached, which stay whole.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    return lambda whole: _share(whole, mesh)


def sharded_bytes(blocks: Sequence[int], total: int, processes: int) -> int:
    """What a process holds at most of a model of `total` bytes whose blocks have these sizes."""
    rest = total - sum(blocks)  # gathered from a step's begin to its end
    return total // processes + rest + GATHERED_BLOCKS * max(blocks, default=0)


def _share(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A DTensor divided by rows; a copy, so that the whole can be freed."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    rows = [Shard(0)]
    piece = distribute_tensor(whole, mesh, rows, src_data_rank=None).to_local().clone()
    return DTensor.from_local(piece, mesh, rows, run_check=False, shape=whole.shape, stride=whole.stride())
