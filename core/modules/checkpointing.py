"""Gradient checkpointing of transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BlockRunner:
    """Runs transformer blocks; with `recompute` a block's activations are made again in the backward pass.

    A block that no gradient passes through is never recomputed: the frozen part below the first trained matrix runs
    without a graph.
    """

    def __init__(self) -> None:
        self.recompute = False

    def __call__(self, block: nn.Module, x: Tensor, *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and (x.requires_grad or _is_trained(block)):
            return checkpoint(block, x, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(x, *inputs)


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())
