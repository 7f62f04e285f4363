"""The training loop: a generator of steps. Saving, progress, stopping and what is shown are the caller's business."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..family import moved
from ..flow import model_time
from ..lora.adapter import Adapter, reseed
from .batches import Batch
from .job import Job
from .loss import weighted_errors
from .optimizers import Optimizer, effective_rate
from .schedules import rate_factor
from .team import ALONE, Team


@dataclass(frozen=True)
class Outcome:
    """What a step came to: the mean of the losses, the norm of the gradient before it was cut, each sample's loss."""

    loss: float
    gradient_norm: float
    losses: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether anything was updated."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class Step:
    """A finished step.

    index            from 1
    learning_rate    of the schedule
    effective_rate   what the optimiser made of it, where it finds the rate itself
    seconds          of the step and of waiting for its data
    timesteps        of each sample, 0..1000
    """

    index: int
    outcome: Outcome
    learning_rate: float
    effective_rate: float | None
    seconds: float
    timesteps: tuple[float, ...]


def train(
    dit: nn.Module,
    adapters: Mapping[str, Adapter],
    optimizer: Optimizer,
    steps: Iterable[Sequence[Batch]],
    job: Job,
    device: torch.device,
    first: int = 0,
    team: Team = ALONE,
) -> Iterator[Step]:
    """Run one optimizer step for each element of `steps`, counting from 0-based `first`.

    `dit` has `adapters` attached, which alone are in the optimizer. Each process of a team is given its own part of each
    step's batches, and all take the same step. A step whose loss or gradient is not finite changes
    nothing; the next one has other data.
    """
    begin = time.perf_counter()
    for index, batches in enumerate(steps, start=first):
        rate = job.optimizer.learning_rate * rate_factor(job.optimizer, index, job.steps)
        outcome = train_step(dit, optimizer, batches, rate, job.optimizer.max_grad_norm, device, adapters, team)
        if job.network.max_norm and outcome.is_finite:
            for adapter in adapters.values():
                adapter.limit_norm(job.network.max_norm)
        timesteps = tuple(1000 * sigma for batch in batches for sigma in batch.sigma.tolist())
        yield Step(index + 1, outcome, rate, effective_rate(optimizer), time.perf_counter() - begin, timesteps)
        begin = time.perf_counter()


@torch.inference_mode(False)
@torch.enable_grad()
def train_step(
    dit: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], rate: float, max_norm: float,
    device: torch.device, adapters: Mapping[str, Adapter] = MappingProxyType({}), team: Team = ALONE,
) -> Outcome:  # fmt: skip
    """Forward and backward over `batches`, then one update, which is left out when the outcome is not finite.

    With a team the gradient is that of the batches of all its processes, and so are the outcome's loss and norm.
    """
    losses = []
    for batch in batches:
        reseed(adapters, batch.seed)
        each = flow_losses(dit, batch, device)
        (each.mean() / (len(batches) * team.size)).backward()
        losses.append(each.detach())
    # Those of an expert that rests meanwhile are neither exchanged nor changed.
    parameters = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
    loss = torch.stack([each.mean() for each in losses]).mean() / team.size
    team.add_up(parameters, loss)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    mean, norm, *values = torch.cat(
        (loss.view(1), norm.view(1), *losses)
    ).tolist()  # the step's one wait for the device
    outcome = Outcome(mean, norm, tuple(values))
    if outcome.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return outcome


def flow_loss(dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The mean of the samples' losses, a scalar."""
    return flow_losses(dit, batch, device).mean()


def flow_losses(dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The weighted error of the predicted velocity of each sample, (B,)."""
    latents, target, sigma, weight = (
        x.to(device, non_blocking=True) for x in (batch.latents, batch.target, batch.sigma, batch.weight)
    )
    return weighted_errors(dit(latents, model_time(sigma), **moved(batch.conditions, device)), target, weight)
