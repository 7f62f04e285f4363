"""Peak memory of one HunyuanVideo training step at 544 x 960 over three lengths, forecast and measured in a fresh process.

python dev.py bench sequence [--dim 128] [--double 1] [--single 1] [--frames 13 25 49]

The width is small, so that a tensor that grew with the square of the sequence would outgrow everything else.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack
import psutil

adapter, loop, batches = (pack.load(f"core.{name}") for name in ("lora.adapter", "training.loop", "training.batches"))
inventory, job, optimizers = (
    pack.load(f"core.{name}") for name in ("lora.inventory", "training.job", "training.optimizers")
)
devices, shapes, planner = pack.load("core.devices"), pack.load("core.shapes"), pack.load("core.training.planner")
FAMILY = pack.load("core.families").FAMILIES["hunyuan_video"]
hunyuan = pack.load("core.families.hunyuan_video.dit")
SETTINGS = job.MemorySettings(mode="manual", precision="float32")


def subject(args: argparse.Namespace, frames: int, side: int, device: torch.device):
    """A training on one clip of so many frames."""
    config = hunyuan.HunyuanVideoConfig(
        dim=args.dim, ffn_dim=4 * args.dim, double_depth=args.double, single_depth=args.single, refiner_depth=2,
        in_channels=16, out_channels=16, text_dim=4096, pooled_dim=768, freq_dim=256, guidance=True,
    )  # fmt: skip
    with torch.device("meta"):
        sizes = {name: tuple(value.shape) for name, value in FAMILY.build_dit(config).state_dict().items()}
    matrices = inventory.inventory(FAMILY, sizes)
    latents = FAMILY.latent.latents(shapes.VideoSize(frames, 544 // side, 960 // side))
    return planner.Subject(
        family=FAMILY, config=config, matrices=matrices, dtypes=dict.fromkeys(sizes, torch.float32),
        rows={matrix.name: (0, matrix.rows) for matrix in matrices}, network=job.NetworkSettings(), device=device,
        latents=(1, 16, *latents), conditions=FAMILY.conditions([FAMILY.blank_text(config)]),
        optimizer_bytes=job.OptimizerSettings().kind.state_bytes,
    )  # fmt: skip


def step(about) -> None:
    """Make everything, and train one step."""
    with torch.device("meta"):
        dit = FAMILY.build_dit(about.config)
    dit = dit.to_empty(device=about.device).requires_grad_(False).train(False)
    for value in dit.parameters():
        value.normal_(std=0.02)
    dit.run_block.recompute = True
    adapters = adapter.untrained_adapters(dit, about.rows, about.network.rank, about.network.alpha, seed=0)
    modules = torch.nn.ModuleList(adapters.values()).to(about.device)
    optimizer = optimizers.make_optimizer(modules.parameters(), job.OptimizerSettings())
    latents = torch.randn(about.latents)
    batch = batches.Batch(latents, latents, torch.tensor([0.5]), about.conditions)
    with adapter.attached(dit, adapters):
        loop.train_step(dit, optimizer, [batch], 1e-4, 1.0, about.device)


def measure(args: argparse.Namespace) -> None:
    """In a process of its own: tokens, the forecast and the peak."""
    device = devices.best_device()
    step(subject(args, 1, 16, device))  # libraries load what they need
    about = subject(args, args.frames[0], 1, device)
    plan = planner.predict(about, SETTINGS)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    step(about)
    tokens = FAMILY.latent.tokens(shapes.VideoSize(*about.latents[2:]))
    print(json.dumps([tokens, plan.device, devices.peak_memory(device) - before]))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"dim": 128, "double": 1, "single": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--frames", type=int, nargs="+", default=[13, 25, 49])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    print(f"{'frames':>6}{'tokens':>9}{'forecast':>14}{'measured':>14}{'per token':>14}{'a mask would be':>18}")
    for frames in args.frames:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", "--frames", str(frames)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        tokens, forecast, measured = json.loads(output.splitlines()[-1])
        print(f"{frames:6}{tokens:9}{forecast / 2**20:10.0f} MiB{measured / 2**20:10.0f} MiB{measured / tokens:8.0f} bytes"
              f"{tokens**2 * 4 / 2**20:14.0f} MiB", flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
