"""Step time and peak memory of each way to save memory, over a step without any and over the forward pass.

python dev.py bench train [--dim 1024] [--blocks 12] [--frames 17] [--width 320] [--height 192]

A frozen base costs a backward pass about as much as the forward (gradients of activations, none of weights), so a step on
the whole model cannot be under 2 forward passes, with checkpointing 3; the last LORAID pays only for the blocks from its
first matrix on. Peak memory is that of a GPU; for the CPU see `bench memory`, which starts a process for each.
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
layers, quantized = pack.load("core.modules.layers"), pack.load("core.modules.quantized")
streaming, offloading = pack.load("core.modules.streaming"), pack.load("core.modules.offloading")
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
    whole = {m.name: (0, m.rows) for m in matrices}
    last = loraid.allocate(matrices, loraid.Loraid(number=20)).rows
    half = args.blocks // 2
    ways = {
        "whole model": (whole, {}),
        "checkpointing": (whole, {"recompute": True}),
        "offloaded": (whole, {"recompute": True, "offload": True}),
        f"{half} blocks streamed": (whole, {"recompute": True, "streamed": half}),
        "fp8_scaled": (whole, {"recompute": True, "storing": "fp8_scaled"}),
        "all of these": (whole, {"recompute": True, "offload": True, "streamed": half, "storing": "fp8_scaled"}),
        "last LORAID of 20": (last, {}),
        "the same, checkpointing": (last, {"recompute": True}),
    }
    plain = None
    for title, (rows, saving) in ways.items():
        taken, peak = measured(dit, batch, rows, saving, args, device)
        plain = plain or (taken, peak)
        memory = f", peak {peak / 2**30:.2f} GiB = {peak / plain[1]:.2f} x plain" if device.type == "cuda" else ""
        bound = bound_of(dit, rows, saving.get("recompute", False))
        print(f"step, {title:24}{taken:8.3f} s = {taken / plain[0]:.2f} x plain = {taken / forward:.2f} x forward "
              f"(bound {bound:.2f}){memory}", flush=True)  # fmt: skip


def bound_of(dit: torch.nn.Module, rows, recompute: bool) -> float:
    """Forward passes that a step takes at least, reckoned in whole blocks."""
    first = min(index for index, block in enumerate(dit.blocks) if any(is_in(block, dit, name) for name in rows))
    share = 1 - first / len(dit.blocks)
    return 1 + share * (2 if recompute else 1)


def is_in(block: torch.nn.Module, dit: torch.nn.Module, name: str) -> bool:
    return any(module is dit.get_submodule(name) for module in block.modules())


def measured(dit, batch, rows, saving, args: argparse.Namespace, device: torch.device) -> tuple[float, int]:
    """Seconds and peak memory of a step; the model is left as it was."""
    kept = {name: layer.weight for name, layer in dit.blocks.named_modules() if isinstance(layer, layers.Linear)}
    for name in kept if "storing" in saving else ():
        layer = dit.blocks.get_submodule(name)
        weight, layer.weight_scale = quantized.STORINGS[saving["storing"]](quantized.Stored(layer.weight.data))
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        kept[name].data = kept[name].data.cpu()
    runner = dit.run_block
    runner.recompute = saving.get("recompute", False)
    runner.offload = offloading.Offload(device) if "offload" in saving else None
    numbers = streaming.streamed_blocks(saving.get("streamed", 0), len(dit.blocks))
    runner.stream = streaming.BlockStream(dit.blocks, numbers, device) if numbers else None
    adapters = adapter.untrained_adapters(dit, rows, args.rank, args.rank, seed=0)
    modules = torch.nn.ModuleList(adapters.values()).to(device)
    optimizer = optimizers.make_optimizer(modules.parameters(), job.OptimizerSettings())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with adapter.attached(dit, adapters):
        taken = seconds(
            functools.partial(loop.train_step, dit, optimizer, [batch], 1e-4, 1.0, device), device, args.repeats
        )
    peak = devices.peak_memory(device)
    if runner.stream:
        runner.stream.close()
    runner.recompute, runner.offload, runner.stream = False, None, None
    for name, weight in kept.items():
        layer = dit.blocks.get_submodule(name)
        weight.data = weight.data.to(device)
        layer.weight, layer.weight_scale = weight, None
    return taken, peak


if __name__ == "__main__":
    main()
