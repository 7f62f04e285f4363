"""The order of the training data: a function of the seed and the step alone, so that a resumed run goes on in it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from ..checks import require
from ..data import cache_files
from ..family import Conditions, Family
from ..flow import noised, velocity
from ..io.files import digest
from ..shapes import VideoSize
from .distributions import Distribution
from .job import Expert, Job, TrainingItem, TrainingSet
from .loss import WEIGHTINGS
from .team import ALONE, Team
from .timesteps import distribution, draw, squares


def split(job: Job) -> tuple[list[TrainingSet], list[TrainingItem]]:
    """The data sets without what is held out for validation, and what is held out.

    A clip goes with all its windows. Which clips go follows from their content alone. Raises ValueError when nothing would
    be left to train on.
    """
    share = job.watch.validation_share
    if not share:
        return list(job.datasets), []
    clips: dict[str, list[TrainingItem]] = {}
    for dataset in job.datasets:
        for item in dataset.items:
            clips.setdefault(item.text, []).append(item)
    order = sorted(clips.values(), key=lambda items: digest([item.fingerprints for item in items]))
    count = max(1, round(share * len(order)))
    require(
        count < len(order),
        f"a validation share of {share:g} of {len(order)} clips leaves none to train on: lower it, or add clips.",
    )
    held_out = [item for items in order[:count] for item in items]
    chosen = set(held_out)
    kept = [replace(one, items=tuple(item for item in one.items if item not in chosen)) for one in job.datasets]
    return kept, held_out


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


_EVEN = torch.ones(1)


@dataclass(frozen=True)
class Batch:
    """One forward pass: noisy latents and target velocity (B, C, F, H, W), sigma (B,), the transformer's conditions, the
    weight of each sample's loss (B,), and the seed of whatever else is random in it."""

    latents: Tensor
    target: Tensor
    sigma: Tensor
    conditions: Conditions
    weight: Tensor = _EVEN
    seed: int = 0


def seed_of(*path: object) -> int:
    """A seed for one part of the work, the same in whichever process does it."""
    return random.Random("/".join(map(str, path))).getrandbits(63)


_ROUND = 100  # steps in which both experts are trained: whole models are moved once in as many


def expert_at(job: Job, family: Family, step: int) -> Expert:
    """Which transformer a step (from 0) trains.

    Two experts are trained as often as the noise levels that are drawn fall to them, but in turns of many steps. They begin
    a round by turns, so that the one that ends a round begins the next.
    """
    if job.low is None:
        return job.experts[0]
    rounds = -(-job.steps // _ROUND)
    number = ((step + 1) * rounds - 1) // job.steps
    begin, end = (at * job.steps // rounds for at in (number, number + 1))
    high = min(max(round(_share_of_high(job, family) * (end - begin)), 1), end - begin - 1)
    is_high = step - begin < high if number % 2 == 0 else end - step <= high
    return job.experts[0 if is_high else 1]


def stretches(job: Job, family: Family, first: int) -> Iterator[tuple[Expert, int, int]]:
    """From step `first` to the end: the transformer, and the steps [begin, end) in which it alone is trained."""
    for expert, numbers in groupby(range(first, job.steps), key=lambda step: expert_at(job, family, step)):
        steps = list(numbers)
        yield expert, steps[0], steps[-1] + 1


def _share_of_high(job: Job, family: Family) -> float:
    """The share of the drawn noise levels that the high-noise expert is used for."""
    size = next(item.size for dataset in job.datasets for item in dataset.items)
    drawn = distribution(job.timesteps, family.variants[job.variant].training_shift, squares(VideoSize(*size)))
    return 1 - drawn.cdf(torch.tensor([job.boundary], dtype=torch.float64)).item()


def levels(job: Job, family: Family, expert: Expert, latents: VideoSize) -> Distribution:
    """The noise levels that a transformer is trained with. Raises ValueError when the settings leave none for it."""
    variant = family.variants[expert.variant]
    used_for = variant.levels(job.boundary) if job.low else job.timesteps.levels(variant)
    return distribution(job.timesteps, variant.training_shift, squares(latents), used_for)


def steps(job: Job, family: Family, first: int, team: Team = ALONE) -> Iterator[list[Batch]]:
    """From step `first` (0-based) to the end: the batches of each step that fall to this process.

    Raises ValueError when they cannot be dealt evenly.
    """
    per_step = job.batches_per_step
    require(
        per_step % team.size == 0,
        f"{per_step} batches of a step cannot be dealt to {team.size} processes: start {job.gpus} of them.",
    )
    order = _order(job, skip=first * per_step)
    for step in range(first, job.steps):
        parts = list(enumerate(islice(order, per_step)))[team.place :: team.size]
        expert = expert_at(job, family, step)
        yield [make_batch(job, family, expert, *items, seed_of(job.seed, step, part)) for part, items in parts]


def _order(job: Job, skip: int) -> Iterator[tuple[int, tuple[TrainingItem, ...]]]:
    """All batches after the first `skip`, each with the number of samples before it."""
    datasets, _ = split(job)
    first = epoch(datasets, job.seed, 0)
    samples = sum(map(len, first))
    number, skip = divmod(skip, len(first))
    while True:
        before = number * samples
        for index, items in enumerate(epoch(datasets, job.seed, number)):
            if index >= skip:
                yield before, items
            before += len(items)
        number, skip = number + 1, 0


def batches_per_epoch(job: Job) -> int:
    return len(epoch(split(job)[0], job.seed, 0))


def epoch_of(step: int, job: Job, per_epoch: int) -> int:
    """The epoch (from 1) that `step` (from 1) ends in, of `per_epoch` batches."""
    return -(-step * job.batches_per_step // per_epoch)


def make_batch(
    job: Job, family: Family, expert: Expert, before: int, items: Sequence[TrainingItem], seed: int
) -> Batch:
    """Read the cached samples and noise them. `before` is the number of samples that training saw before them."""
    rng = torch.Generator().manual_seed(seed)
    return batch_at(job, family, expert, items, uniform(job, before, len(items), rng), rng, seed)


def batch_at(job: Job, family: Family, expert: Expert, items: Sequence[TrainingItem], u: Tensor, rng: torch.Generator,
             seed: int = 0) -> Batch:  # fmt: skip
    """Read the cached samples and noise them to the quantiles `u` (B,) of the noise levels that `expert` is trained with."""
    variant = family.variants[expert.variant]
    latents, images = zip(
        *(cache_files.load_sample(Path(item.latents), family, variant.images) for item in items), strict=True
    )
    data = torch.stack(latents)
    noise = torch.randn(data.shape, generator=rng)
    sigma = draw(levels(job, family, expert, VideoSize(*data.shape[2:])), u)
    weight = WEIGHTINGS[job.timesteps.weighting](sigma)
    texts = (cache_files.load_text(Path(item.text)) for item in items)
    conditions = family.conditions([{**text, **seen} for text, seen in zip(texts, images, strict=True)])
    return Batch(noised(data, noise, sigma), velocity(data, noise), sigma, conditions, weight, seed)


def uniform(job: Job, before: int, count: int, rng: torch.Generator) -> Tensor:
    """Uniform numbers (count,) for samples number `before` and on.

    With n buckets each run of n consecutive samples has one number in each n-th of 0..1, in an order that is drawn anew
    for every run and follows from the samples' numbers.
    """
    u, buckets = torch.rand(count, generator=rng, dtype=torch.float64), job.timesteps.buckets
    if buckets < 2:
        return u
    numbers = [divmod(number, buckets) for number in range(before, before + count)]
    orders = {run: random.Random(f"{job.seed}/buckets/{run}").sample(range(buckets), buckets) for run, _ in numbers}
    return (torch.tensor([orders[run][place] for run, place in numbers]) + u) / buckets
