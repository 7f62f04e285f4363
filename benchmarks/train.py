"""Step time over forward time, for a LoRA on the whole model and for the last LORAID, without gradient checkpointing.

python dev.py bench train [--dim 1024] [--blocks 12] [--frames 17] [--width 320] [--height 192]

A frozen base costs a backward pass about as much as the forward (gradients of activations, none of weights), so the whole
model cannot be under 2; the last LORAID only pays for the blocks from its first matrix on.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack

adapter, loop, batches = (pack.load(f"core.{name}") for name in ("lora.adapter", "training.loop", "training.batches"))
inventory, loraid = pack.load("core.lora.inventory"), pack.load("core.lora.loraid")
job, optimizers = pack.load("core.training.job"), pack.load("core.training.optimizers")
devices, shapes = pack.load("core.devices"), pack.load("core.shapes")
FAMILY = pack.load("core.families").FAMILIES["wan"]
wan = pack.load("core.families.wan.dit")


def seconds(action, device: torch.device, repeats: int) -> float:
    """Median time of an action, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def build(dim: int, blocks: int, device: torch.device) -> torch.nn.Module:
    config = wan.WanConfig(
        dim=dim, ffn_dim=dim * 8960 // 1536, depth=blocks, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256
    )
    torch.manual_seed(0)
    with torch.device(device):
        dit = wan.WanDiT(config).to(devices.compute_dtype(device))
    for name, parameter in dit.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if name.endswith("modulation") else None
    return dit.requires_grad_(False).train(False)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {
        "dim": 1024,
        "blocks": 12,
        "frames": 17,
        "width": 320,
        "height": 192,
        "rank": 16,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = devices.best_device()
    dit = build(args.dim, args.blocks, device)
    size = FAMILY.latent.latents(shapes.VideoSize(args.frames, args.height, args.width))
    latents = torch.randn(1, 16, *size)
    batch = batches.Batch(
        latents, torch.randn_like(latents), torch.tensor([0.5]), {"text_states": torch.randn(1, 512, 4096)}
    )
    matrices = inventory.inventory(FAMILY, {name: tuple(value.shape) for name, value in dit.state_dict().items()})
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {devices.compute_dtype(device)}")
    print(f"{args.blocks} blocks of width {args.dim}, {FAMILY.latent.tokens(size)} tokens, rank {args.rank}")

    with torch.no_grad():
        forward = seconds(lambda: loop.flow_loss(dit, batch, device), device, args.repeats)
    print(f"forward                {forward:8.3f} s")
    shares = {
        "whole model": {m.name: (0, m.rows) for m in matrices},
        "last LORAID of 20": loraid.allocate(matrices, loraid.Loraid(number=20)).rows,
    }
    for title, rows in shares.items():
        adapters = adapter.untrained_adapters(dit, rows, args.rank, args.rank, seed=0)
        modules = torch.nn.ModuleList(adapters.values()).to(device)
        settings = job.OptimizerSettings()
        optimizer = optimizers.make_optimizer(modules.parameters(), settings)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with adapter.attached(dit, adapters):
            step = seconds(
                functools.partial(loop.train_step, dit, optimizer, [batch], 1e-4, 1.0, device), device, args.repeats
            )
        peak = f", peak {devices.peak_memory(device) / 2**30:.2f} GiB" if device.type == "cuda" else ""
        print(f"step, {title:17}{step:8.3f} s = {step / forward:.2f} x forward{peak}")


if __name__ == "__main__":
    main()
