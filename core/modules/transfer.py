"""Copies between host and device that run beside the computation."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger("videolora")


def pinned(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised bytes on the host, pinned where `device` can then copy from them without waiting.

    Not by `pin_memory=True`, which takes up to twice as much: it rounds to powers of two.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if device.type == "cuda" and nbytes:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        else:
            log.warning("%.1f GiB of memory could not be pinned, copies from it will be slower", nbytes / 2**30)
    return buffer


class SideStream:
    """A queue of copies. On CUDA it is a stream of its own; elsewhere a copy is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Begins after all that was queued on the device before. Returns what `wait` takes.

        Whoever frees one of the two before having waited must have called `keep` on it.
        """
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """Let the computation that is queued from now on begin after the copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def keep(self, tensor: Tensor) -> None:
        """The memory of `tensor` is not given to others before the copies queued so far are done."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def finish(self) -> None:
        """Wait on the host for all copies."""
        if self.stream is not None:
            self.stream.synchronize()
