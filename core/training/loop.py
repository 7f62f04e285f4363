"""The training loop: a generator of steps. Saving, progress and stopping are the caller's business."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..flow import model_time
from ..lora.adapter import Adapter, reseed
from .batches import Batch
from .job import Job
from .loss import weighted_error
from .optimizers import Optimizer
from .schedules import rate_factor


@dataclass(frozen=True)
class Step:
    """A finished step; `index` counts from 1."""

    index: int
    loss: float
    learning_rate: float
    seconds: float


class NotFinite(RuntimeError):
    """The loss became NaN or infinite. The weights are those from before the step."""


def train(
    dit: nn.Module,
    adapters: Mapping[str, Adapter],
    optimizer: Optimizer,
    steps: Iterable[Sequence[Batch]],
    job: Job,
    device: torch.device,
    first: int = 0,
) -> Iterator[Step]:
    """Run one optimizer step for each element of `steps`, counting from 0-based `first`.

    `dit` has `adapters` attached, which alone are in the optimizer. Raises NotFinite before a bad update.
    """
    for index, batches in enumerate(steps, start=first):
        begin = time.perf_counter()
        rate = job.optimizer.learning_rate * rate_factor(job.optimizer, index, job.steps)
        loss = train_step(dit, optimizer, batches, rate, job.optimizer.max_grad_norm, device, adapters)
        if not math.isfinite(loss):
            raise NotFinite(
                f"the loss became {loss} at step {index + 1}. Nothing was updated with it. Lower the learning rate, or use "
                "bfloat16 instead of float16."
            )
        if job.network.max_norm:
            for adapter in adapters.values():
                adapter.limit_norm(job.network.max_norm)
        yield Step(index + 1, loss, rate, time.perf_counter() - begin)


@torch.inference_mode(False)
@torch.enable_grad()
def train_step(
    dit: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], rate: float, max_norm: float,
    device: torch.device, adapters: Mapping[str, Adapter] = MappingProxyType({}),
) -> float:  # fmt: skip
    """Forward and backward over `batches`, then one update. Returns the mean loss; not finite: nothing was updated."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for batch in batches:
        reseed(adapters, batch.seed)
        loss = flow_loss(dit, batch, device) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    value, norm = torch.stack((torch.stack(losses).sum(), norm)).tolist()  # the step's one wait for the device
    if math.isfinite(value) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1.0)
        optimizer.step()
    else:
        value = math.nan
    optimizer.zero_grad(set_to_none=True)
    return value


def flow_loss(dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The weighted error of the predicted velocity."""
    conditions = {name: value.to(device, non_blocking=True) for name, value in batch.conditions.items()}
    latents, target, sigma, weight = (
        x.to(device, non_blocking=True) for x in (batch.latents, batch.target, batch.sigma, batch.weight)
    )
    return weighted_error(dit(latents, model_time(sigma), **conditions), target, weight)
