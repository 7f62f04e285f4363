"""Running transformer blocks, with what is traded for memory."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .offloading import Offload
from .streaming import BlockStream


class BlockRunner:
    """Runs transformer blocks.

    recompute   a block's activations are made again in the backward pass; its input alone is kept
    offload     where that input waits meanwhile, instead of on the device
    stream      brings the weights of blocks that live in host memory

    A block that no gradient passes through is never recomputed: the frozen part below the first trained matrix runs
    without a graph.
    """

    def __init__(self) -> None:
        self.recompute = False
        self.offload: Offload | None = None
        self.stream: BlockStream | None = None

    def __call__(self, block: nn.Module, x: Tensor, *inputs: Tensor | None) -> Tensor:
        """x (B, L, D) -> (B, L, D); `inputs` are what all blocks are given."""
        if self.recompute and torch.is_grad_enabled() and (x.requires_grad or _is_trained(block)):
            with self._kept(x):
                return checkpoint(self._run, block, x, *inputs, use_reentrant=False, preserve_rng_state=False)
        y = self._run(block, x, *inputs)
        if self.stream is not None and y.requires_grad:
            y.register_hook(lambda grad: self.stream.fetch(block))  # before the first of its backward steps
        return y

    def _run(self, block: nn.Module, x: Tensor, *inputs: Tensor | None) -> Tensor:
        if self.stream is not None:
            self.stream.fetch(block)
        return block(x, *inputs)

    def _kept(self, x: Tensor) -> torch.autograd.graph.saved_tensors_hooks | nullcontext:
        """What becomes of the inputs that checkpointing saves: x is a block's own, the others all blocks share."""
        if self.offload is None:
            return nullcontext()
        offload, own = self.offload, (x.data_ptr(), x.shape)  # not x: the hooks live as long as the graph

        def pack(tensor: Tensor):
            return offload.put(tensor) if (tensor.data_ptr(), tensor.shape) == own else tensor

        return torch.autograd.graph.saved_tensors_hooks(
            pack, lambda kept: kept if torch.is_tensor(kept) else kept.get()
        )


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())
