"""The transformers of a run, one of them in memory at a time. Most runs have one; two experts take turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..devices import release_memory
from ..lora.adapter import Adapter, attached
from ..sampling.experts import ExpertPair
from .job import Expert, Job

Adapters = Mapping[str, Mapping[str, Adapter]]
"""Name of the expert -> name of the matrix -> adapter."""


def all_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """The adapters of all experts by names of their own."""
    return {
        "/".join(filter(None, (expert, name))): one for expert, own in adapters.items() for name, one in own.items()
    }


class Experts:
    """Brings each transformer when it is used, with its adapters attached; those of the others take no part meanwhile."""

    def __init__(self, job: Job, adapters: Adapters, load: Callable[[Expert], nn.Module], device: torch.device) -> None:
        self.job, self.adapters, self.load, self.device = job, adapters, load, device
        self._named = {expert.name: expert for expert in job.experts}
        self._current: str | None = None
        self._dit: nn.Module | None = None
        self._attached = ExitStack()

    def use(self, name: str) -> nn.Module:
        """The transformer of that expert, in the place of the one that was used before."""
        if name != self._current:
            self.close()
            self._dit = self.load(self._named[name])
            self._attached.enter_context(attached(self._dit, self.adapters[name]))
            for expert, adapters in self.adapters.items():
                for adapter in adapters.values():
                    adapter.requires_grad_(expert == name)
            self._current = name
        return self._dit

    def of(self, name: str) -> Callable[..., Tensor]:
        """As the transformer of that expert, which may be let go of between two calls."""
        return lambda *args, **conditions: self.use(name)(*args, **conditions)

    def sampler(self, guidance: float) -> nn.Module | ExpertPair:
        """What is sampled with: the transformer, or both of a pair as one."""
        if self.job.low is None:
            return self.use(self.job.experts[0].name)
        return ExpertPair(self.job.boundary, self.use, dict.fromkeys(self._named, guidance))

    def close(self) -> None:
        """Let go of the transformer."""
        self._attached.close()
        if self._dit is not None:
            self._dit = self._current = None
            gc.collect()
            release_memory(self.device)
