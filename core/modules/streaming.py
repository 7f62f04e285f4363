"""Blocks whose frozen weights stay in host memory and visit the device when they are needed.

A block's matrices lie in one pinned host buffer and come in one copy, while an earlier block computes, into one of a few
device buffers that the streamed blocks share. Nothing is copied back: the weights are frozen. What is small in a block, and
its adapters, stay on the device.

Between forward and backward autograd must keep none of these weights: `frozen_linear` asks its layer's parameter for them
again, which then points into the device buffer of the block that is at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import Linear
from .transfer import SideStream, pinned

_ALIGNMENT = 256
_BUFFERS = 2  # one that is computed with, one that is filled


def streamed_blocks(count: int, total: int) -> list[int]:
    """Numbers of `count` of `total` blocks, evenly spread, so that there is computation behind each copy."""
    if count > total:
        raise ValueError(f"block swap is {count}, and this model has {total} blocks: use {total} or fewer.")
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def streamed_weights(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and values of what is streamed of a block: the weights of its linear layers."""
    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, Linear)]
    return [(f"{name}.weight", layer.weight) for name, layer in layers]


def block_bytes(block: nn.Module) -> int:
    """Size of a streamed block's buffer."""
    return sum(_room(weight) for _, weight in streamed_weights(block))


def buffers_bytes(blocks: Sequence[int]) -> int:
    """What the device buffers take for streamed blocks of these sizes."""
    return max(blocks, default=0) * min(_BUFFERS, len(blocks))


@dataclass(eq=False)
class _Buffer:
    """A device buffer, the block in it, and the copy that brings it."""

    memory: Tensor
    tenant: int | None = None
    copied: torch.cuda.Event | None = None


class BlockStream:
    """Streams the blocks `numbers` of `blocks`; call `fetch` with a block before it computes, forward and backward.

    The order in which blocks follow each other is learnt: a training step that goes up and down through all of them, one
    that leaves out the backward pass of a frozen beginning, and a sampler that goes round all repeat themselves. A wrong guess
    costs the time of one copy and nothing else.
    """

    @torch.inference_mode(False)  # a sampler may begin what a training goes on with
    def __init__(self, blocks: Sequence[nn.Module], numbers: Sequence[int], device: torch.device) -> None:
        self.side = SideStream(device)
        self.numbers = {blocks[number]: index for index, number in enumerate(numbers)}
        self.weights = [[weight for _, weight in streamed_weights(blocks[number])] for number in numbers]
        self.masters = [_flattened(weights, device) for weights in self.weights]
        self.buffers: list[_Buffer] = []
        self.follower: dict[tuple[int, int], int] = {}
        self.recent = (-1, -1)

    def fetch(self, block: nn.Module) -> None:
        """Make the block's weights usable for what is computed from now on, and begin to bring those needed next."""
        index = self.numbers.get(block)
        if index is None or index == self.recent[1]:
            return
        if not self.buffers:
            self._make_buffers()
        before, current = self.recent
        self.follower[before, current] = index
        self.recent = current, index
        buffer = self._holding(index)
        self.side.wait(buffer.copied)
        onwards = index + (1 if index > current else -1)
        following = self.follower.get(self.recent, onwards)
        if following in range(len(self.weights)) and following != index:
            self._holding(following)

    def rest(self) -> None:
        """Leave the weights on the host and give the device buffers back, until the next `fetch`."""
        self.side.finish()
        for buffer in self.buffers:
            self._evict(buffer)
        self.buffers.clear()
        self.recent = (-1, -1)

    def close(self) -> None:
        """Leave the weights on the host for good."""
        self.rest()
        self.numbers.clear()

    @property
    def buffers_bytes(self) -> int:
        """What the device buffers take."""
        return buffers_bytes([len(master) for master in self.masters])

    def streams(self, weight: nn.Parameter) -> bool:
        return any(weight is one for weights in self.weights for one in weights)

    @torch.inference_mode(False)
    def _make_buffers(self) -> None:
        largest = max(len(master) for master in self.masters)
        for _ in range(self.buffers_bytes // largest):
            self.buffers.append(_Buffer(torch.empty(largest, dtype=torch.uint8, device=self.side.device)))

    def _holding(self, index: int) -> _Buffer:
        """The buffer that holds the block, or is being filled with it: not the one that is computed with."""
        for buffer in self.buffers:
            if buffer.tenant == index:
                return buffer
        buffer = next(
            buffer for buffer in self.buffers if buffer.tenant is None or buffer.tenant not in self.recent[1:]
        )
        self._evict(buffer)
        master = self.masters[index]
        buffer.copied = self.side.copy(buffer.memory[: len(master)], master)
        buffer.tenant = index
        _point(self.weights[index], buffer.memory)
        return buffer

    def _evict(self, buffer: _Buffer) -> None:
        if buffer.tenant is not None:
            _point(self.weights[buffer.tenant], self.masters[buffer.tenant])
            buffer.tenant = None


def move_resident(model: nn.Module, stream: BlockStream, device: torch.device | str) -> None:
    """Move all of the model to the device but the weights that are streamed."""
    for value in (*model.parameters(), *model.buffers()):
        if not stream.streams(value):
            value.data = value.data.to(device)


def _flattened(weights: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """The weights moved into one pinned host buffer."""
    master = pinned(sum(_room(weight) for weight in weights), device)
    for weight, place in zip(weights, _places(weights, master), strict=True):
        weight.data = place.copy_(weight.data)
    return master


def _point(weights: Sequence[nn.Parameter], memory: Tensor) -> None:
    for weight, place in zip(weights, _places(weights, memory), strict=True):
        weight.data = place


def _places(weights: Sequence[nn.Parameter], memory: Tensor) -> list[Tensor]:
    """Views into `memory`, one per weight, in order."""
    places, begin = [], 0
    for weight in weights:
        places.append(memory[begin : begin + weight.nbytes].view(weight.dtype).view(weight.shape))
        begin += _room(weight)
    return places


def _room(weight: Tensor) -> int:
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
