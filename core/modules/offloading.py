"""Activations that wait for the backward pass in pinned host memory."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .transfer import SideStream, pinned


class Offload:
    """Takes tensors to the host beside the computation, and brings them back in reverse order, one ahead of its use.

    The host buffers are used again when their tensors are gone, whether they were asked for or not.
    """

    def __init__(self, device: torch.device) -> None:
        self.side = SideStream(device)
        self.free: list[Tensor] = []
        self.last: weakref.ref[_Parked] | None = None

    def put(self, tensor: Tensor) -> _Parked:
        parked = _Parked(self, tensor, self.last)
        self.last = weakref.ref(parked)
        return parked

    def buffer(self, nbytes: int) -> Tensor:
        """The smallest free buffer that is large enough, or a new one; too small ones are given up, not collected."""
        fitting = [index for index, buffer in enumerate(self.free) if len(buffer) >= nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda index: len(self.free[index])))
        if self.free:
            self.side.finish()
            self.free.pop()
        return pinned(nbytes, self.side.device)


class _Parked:
    """One tensor on the host."""

    def __init__(self, offload: Offload, tensor: Tensor, before: weakref.ref[_Parked] | None) -> None:
        self.offload, self.before = offload, before
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        buffer = offload.buffer(tensor.nbytes)
        weakref.finalize(self, offload.free.append, buffer)
        self.host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        offload.side.copy(self.host, tensor)
        offload.side.keep(tensor)

    def fetch(self) -> None:
        """Begin to bring the tensor back."""
        if self.arriving is None:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.arriving = tensor, self.offload.side.copy(tensor, self.host)

    def get(self) -> Tensor:
        """The tensor on its device, once; the one that was put before it follows."""
        self.fetch()
        tensor, copied = self.arriving
        self.arriving = None
        self.offload.side.wait(copied)
        before = self.before and self.before()
        if before is not None:
            before.fetch()
        return tensor
