"""The order of the training data: a function of the seed and the step alone, so that a resumed run goes on in it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import cache_files
from ..family import Family
from ..flow import noised, velocity
from .job import Job, TrainingItem, TrainingSet
from .timesteps import SAMPLINGS


def epoch(datasets: Sequence[TrainingSet], seed: int, number: int) -> list[tuple[TrainingItem, ...]]:
    """The batches of one epoch, shuffled. A batch holds items of one data set and size."""
    rng = random.Random(f"{seed}/{number}")
    batches = []
    for dataset in datasets:
        by_size: dict[tuple[int, int, int], list[TrainingItem]] = {}
        for item in dataset.items:
            by_size.setdefault(item.size, []).extend([item] * dataset.num_repeats)
        for items in by_size.values():
            rng.shuffle(items)
            starts = range(0, len(items), dataset.batch_size)
            batches += [tuple(items[start : start + dataset.batch_size]) for start in starts]
    rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class Batch:
    """One forward pass: noisy latents and target velocity (B, C, F, H, W), sigma (B,), the transformer's conditions."""

    latents: Tensor
    target: Tensor
    sigma: Tensor
    conditions: dict[str, Tensor]


def generator(seed: int, step: int, part: int) -> torch.Generator:
    """Random numbers for one part of one step, the same in whichever process the step runs."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{step}/{part}").getrandbits(63))


def steps(job: Job, family: Family, first: int) -> Iterator[list[Batch]]:
    """From step `first` (0-based) to the end: each step's batches, as many as gradients are accumulated."""
    per_step = job.optimizer.gradient_accumulation
    order = _order(job, skip=first * per_step)
    for step in range(first, job.steps):
        yield [make_batch(job, family, next(order), generator(job.seed, step, part)) for part in range(per_step)]


def _order(job: Job, skip: int) -> Iterator[tuple[TrainingItem, ...]]:
    number, length = 0, len(epoch(job.datasets, job.seed, 0))
    number, skip = divmod(skip, length)
    while True:
        yield from epoch(job.datasets, job.seed, number)[skip:]
        number, skip = number + 1, 0


def steps_per_epoch(job: Job) -> int:
    """Optimizer steps that see all data once (rounded up)."""
    return -(-len(epoch(job.datasets, job.seed, 0)) // job.optimizer.gradient_accumulation)


def make_batch(job: Job, family: Family, items: Sequence[TrainingItem], rng: torch.Generator) -> Batch:
    """Read the cached samples and noise them."""
    data = torch.stack([cache_files.load_latents(Path(item.latents), family) for item in items])
    noise = torch.randn(data.shape, generator=rng)
    sigma = SAMPLINGS[job.timesteps.sampling](len(items), job.timesteps, rng)
    conditions = family.conditions([cache_files.load_text(Path(item.text)) for item in items])
    return Batch(noised(data, noise, sigma), velocity(data, noise), sigma, conditions)
