"""What a saved LoRA says of itself, in the names that other trainers and tools use (`ss_*`, `modelspec.*`)."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..family import Family, Variant
from ..lora.loraid import Allocation
from ..shapes import VideoSize
from .batches import batches_per_epoch, epoch_of, split
from .job import Expert, Job, TrainingSet

_IMPLEMENTATION = "https://github.com/videolora/ComfyUI-VideoLoRA"


def describe(
    job: Job, family: Family, expert: Expert, allocation: Allocation | None, step: int, started: float, finished: float
) -> dict[str, str]:
    """The metadata of the LoRA of one expert, or of the only model, after `step` (from 1), trained from `started` to `finished` (seconds since 1970)."""
    per_epoch = batches_per_epoch(job)
    name, variant = job.path_of(expert.name).stem, family.variants[expert.variant]
    return {
        "ss_session_id": str(int(job.digest, 16) & 0xFFFFFFFF),
        "ss_output_name": name,
        "ss_training_started_at": str(started),
        "ss_training_finished_at": str(finished),
        "ss_steps": str(step),
        "ss_epoch": str(epoch_of(step, job, per_epoch)),
        "ss_max_train_steps": str(job.steps),
        "ss_num_epochs": str(epoch_of(job.steps, job, per_epoch)),
        "ss_num_batches_per_epoch": str(per_epoch),
        "ss_num_train_items": str(sum(len(dataset.items) * dataset.num_repeats for dataset in split(job)[0])),
        "ss_datasets": json.dumps([_dataset(dataset) for dataset in job.datasets]),
        "ss_seed": str(job.seed),
        "ss_sd_model_name": Path(expert.dit).name,
        "ss_base_model_version": family.name,
        "ss_mixed_precision": {"bfloat16": "bf16", "float32": "no"}.get(job.memory.precision, job.memory.precision),
        "ss_gradient_checkpointing": str(job.memory.gradient_checkpointing),
        **_network(job),
        **_optimizer(job),
        **_timesteps(job, variant),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.base_model}/lora",
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": name,
        "modelspec.date": datetime.fromtimestamp(finished, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": _resolution(job, family),
        "videolora_job": job.digest,
        "videolora_variant": expert.variant,
        **(allocation.metadata(family.name, variant.expert) if allocation else {}),
    }


def _dataset(dataset: TrainingSet) -> dict[str, Any]:
    settings = {"title": dataset.title, "batch_size_per_device": dataset.batch_size, "num_repeats": dataset.num_repeats}
    return {**dataset.settings, **settings, "num_items": len(dataset.items)}


def _network(job: Job) -> dict[str, str]:
    network = job.network
    arguments = {
        "algo": network.kind, "factor": network.factor, "rank_dropout": network.rank_dropout,
        "module_dropout": network.module_dropout, "loraplus_lr_ratio": network.loraplus_lr_ratio,
        "include_patterns": network.include, "exclude_patterns": network.exclude, "modulation": network.modulation,
    }  # fmt: skip
    return {
        "ss_network_module": "videolora",
        "ss_network_dim": str(network.rank),
        "ss_network_alpha": str(network.alpha),
        "ss_network_dropout": str(network.dropout),
        "ss_network_args": json.dumps(arguments),
        "ss_scale_weight_norms": str(network.max_norm),
    } | ({"videolora_start": Path(network.start_from).name} if network.start_from else {})


def _optimizer(job: Job) -> dict[str, str]:
    settings = job.optimizer
    arguments = ",".join(f"{name}={json.dumps(value)}" for name, value in settings.all_arguments.items())
    return {
        "ss_optimizer": f"{settings.kind.path.replace(':', '.')}({arguments})",
        "ss_learning_rate": str(settings.learning_rate),
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": str(settings.warmup_steps),
        "ss_gradient_accumulation_steps": str(settings.gradient_accumulation),
        "ss_max_grad_norm": str(settings.max_grad_norm),
    }


def _timesteps(job: Job, variant: Variant) -> dict[str, str]:
    settings = job.timesteps
    shift = settings.shift_for(variant.training_shift)
    used_for = variant.levels(job.boundary) if job.low else settings.levels(variant)
    low, high = max(settings.min_timestep, 1000 * used_for[0]), min(settings.max_timestep, 1000 * used_for[1])
    return {
        "ss_timestep_sampling": settings.sampling,
        "ss_sigmoid_scale": str(settings.sigmoid_scale),
        "ss_discrete_flow_shift": "of the size" if shift is None else str(shift),
        "ss_weighting_scheme": settings.weighting,
        "ss_logit_mean": str(settings.logit_mean),
        "ss_logit_std": str(settings.logit_std),
        "ss_mode_scale": str(settings.mode_scale),
        "ss_min_timestep": f"{low:g}",
        "ss_max_timestep": f"{high:g}",
        "ss_preserve_distribution_shape": str(settings.preserve_distribution_shape),
        "ss_num_timestep_buckets": str(settings.buckets),
    } | ({"modelspec.timestep_range": f"{low:g},{high:g}"} if (low, high) != (0, 1000) else {})


def _resolution(job: Job, family: Family) -> str:
    """Width x height of most clips."""
    sizes = Counter(item.size for dataset in job.datasets for item in dataset.items)
    pixels = family.latent.pixels(VideoSize(*sizes.most_common(1)[0][0]))
    return f"{pixels.width}x{pixels.height}"
