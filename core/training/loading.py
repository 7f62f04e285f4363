"""Loading what is trained: the checkpoint, the share of it that is adapted, and the transformer as the settings want it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..devices import free_memory
from ..families import open_part
from ..family import Family, Part
from ..io.files import fingerprint
from ..lora import loraid
from ..lora.inventory import Matrix, blocks_of
from ..modules.attention import load_backend, use_attention
from ..modules.compiling import compile_blocks
from ..modules.offloading import Offload
from ..modules.quantized import stored_weights
from ..modules.sharding import shard
from ..modules.streaming import BlockStream, streamed_blocks
from ..weights import Checkpoint, load_into
from . import batches, planner
from .job import Expert, Job, MemorySettings
from .run import Run
from .team import Team

log = logging.getLogger("videolora.training")


def open_dit(expert: Expert) -> tuple[Checkpoint, Part]:
    """The checkpoint to train on. Raises ValueError when it is not the one that the job was made for."""
    path = Path(expert.dit)
    opened = open_part(path, "dit")
    if fingerprint(path) != expert.dit_fingerprint:
        raise ValueError(
            f"{path} is not the checkpoint this job was made for: it was changed. Queue the training again."
        )
    return opened


def plan_memory(this: Run, job: Job, family: Family, checkpoint: Checkpoint, part: Part, matrices: list[Matrix],
                rows: Mapping[str, loraid.Rows], device: torch.device, team: Team) -> MemorySettings:  # fmt: skip
    """Settings that fit, with the precision that the run began with: another one would make another LoRA. All processes
    of a team plan with what the one with least has free, and so alike."""
    settings = replace(job.memory, precision=this.precision() or job.memory.precision)
    largest = max(batches.epoch(job.datasets, job.seed, 0), key=lambda items: len(items) * math.prod(items[0].size))
    batch, *_ = (batches.make_batch(job, family, expert, 0, largest, job.seed) for expert in job.experts)
    subject = planner.Subject(
        family=family, config=part.config, matrices=matrices, rows=rows, network=job.network, device=device,
        dtypes=checkpoint.dtypes(part.keymap),
        latents=tuple(batch.latents.shape), conditions=batch.conditions,
        optimizer_bytes=job.optimizer.kind.state_bytes, processes=team.size, networks=len(job.experts),
    )  # fmt: skip
    free, free_host = (team.least(free_memory(where), device) for where in (device, torch.device("cpu")))
    plan = planner.choose(subject, settings, free, free_host // team.size)
    log.info("planned: %s", plan)
    this.keep_precision(plan.settings.precision)
    return plan.settings


def load_dit(family: Family, checkpoint: Checkpoint, part: Part, matrices: list[Matrix], memory: MemorySettings,
             device: torch.device, team: Team) -> torch.nn.Module:  # fmt: skip
    """The transformer with its weights where the settings want them."""
    dtype = planner.compute_dtype(memory.precision, device)
    attend = load_backend(memory.attention, device, dtype, training=True)
    blocks = blocks_of(matrices)
    numbers = streamed_blocks(memory.block_swap, len(blocks))
    on_host = {f"{matrix.name}.weight" for matrix in matrices if matrix.block in {blocks[n] for n in numbers}}
    begin = time.perf_counter()
    with torch.device("meta"):
        dit = family.build_dit(part.config)
    stored = stored_weights(
        memory.precision, (f"{matrix.name}.weight" for matrix in matrices), checkpoint.dtypes(part.keymap)
    )
    modules = [dit.get_submodule(path) for path in blocks]
    kept = {"kept": shard(dit, modules, team.mesh(device))} if memory.shard else {}
    load_into(dit, checkpoint, part.keymap, dtype, lambda name: "cpu" if name in on_host else device, stored, **kept)
    use_attention(dit, attend)
    if memory.compile:
        compile_blocks(modules, device)
    dit.run_block.recompute = memory.gradient_checkpointing
    dit.run_block.offload = Offload(device) if memory.offload_checkpoints else None
    dit.run_block.stream = BlockStream(modules, numbers, device) if numbers else None
    log.info("loaded %s (%s) in %.1f s", checkpoint.path.name, part.title, time.perf_counter() - begin)
    return dit


def trained_share(
    job: Job, family: Family, matrices: list[Matrix]
) -> tuple[dict[str, loraid.Rows], loraid.Allocation | None]:
    """The rows to train: of a LORAID's share or the whole model, what the patterns choose."""
    allocation = loraid.allocate(matrices, job.loraid) if job.loraid else None
    if allocation:
        log.info("%s", allocation.report())
    return job.network.chosen(matrices, allocation and allocation.rows), allocation
