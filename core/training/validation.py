"""Validation: the loss of clips that are never trained, at fixed noise and timesteps, so that two of them compare."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import torch

from ..family import Family
from . import batches
from .batches import Batch
from .experts import Experts
from .job import Expert, Job
from .loop import flow_loss

_LEVELS = 4  # noise levels per sample, in the middle of as many equal parts of the distribution that is trained


def validation_batches(job: Job, family: Family, expert: Expert) -> Iterator[Batch]:
    """Each held-out sample at each noise level, one at a time; the same in every validation of every run of the job."""
    for item in batches.split(job)[1]:
        for level in range(_LEVELS):
            rng = torch.Generator().manual_seed(batches.seed_of(job.seed, "validation", *item.fingerprints, level))
            u = torch.tensor([(level + 0.5) / _LEVELS], dtype=torch.float64)
            yield batches.batch_at(job, family, expert, [item], u, rng)


@torch.no_grad()
def validation_loss(experts: Experts, job: Job, family: Family, device: torch.device) -> float:
    """The mean loss of the held-out samples, of all that are trained."""
    losses = [
        flow_loss(experts.use(expert.name), batch, device)
        for expert in job.experts
        for batch in validation_batches(job, family, expert)
    ]
    return fmean(torch.stack(losses).tolist())
