"""The planner's forecast of peak memory against what a fresh process really takes, for several settings.

python dev.py bench memory [--dim 1024] [--blocks 12] [--frames 17] [--width 320] [--height 192]

On a GPU: of its memory, as the allocator counts it. On the CPU: of the process's, less what it held before the model was made.
And how much memory a thousand steps of a small model gain, with everything that saves memory switched on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack
import psutil

adapter, loop, batches = (pack.load(f"core.{name}") for name in ("lora.adapter", "training.loop", "training.batches"))
inventory, loraid = pack.load("core.lora.inventory"), pack.load("core.lora.loraid")
job, optimizers = pack.load("core.training.job"), pack.load("core.training.optimizers")
quantized, streaming, offloading = (
    pack.load(f"core.modules.{name}") for name in ("quantized", "streaming", "offloading")
)
devices, shapes, planner = pack.load("core.devices"), pack.load("core.shapes"), pack.load("core.training.planner")
FAMILY = pack.load("core.families").FAMILIES["wan"]
wan = pack.load("core.families.wan.dit")

SETTINGS = {
    "plain": {"gradient_checkpointing": False},
    "last LORAID of 20": {"gradient_checkpointing": False, "loraid": 20},
    "checkpointing": {},
    "checkpointing, last LORAID of 20": {"loraid": 20},
    "bfloat16": {"precision": "bfloat16"},
    "float16 weights": {"precision": "float16"},
    "fp8_scaled": {"precision": "fp8_scaled"},
    "fp8_scaled, plain": {"precision": "fp8_scaled", "gradient_checkpointing": False},
    "offloaded": {"offload_checkpoints": True},
    "8 blocks streamed": {"block_swap": 8},
    "fp8_scaled, offloaded, 10 streamed": {"precision": "fp8_scaled", "offload_checkpoints": True, "block_swap": 10},
}


def subject(args: argparse.Namespace, number: int | None, device: torch.device):
    config = wan.WanConfig(
        dim=args.dim, ffn_dim=args.dim * 8960 // 1536, depth=args.blocks, in_channels=16, out_channels=16, text_dim=4096,
        freq_dim=256,
    )  # fmt: skip
    with torch.device("meta"):
        sizes = {name: tuple(value.shape) for name, value in wan.WanDiT(config).state_dict().items()}
    matrices = inventory.inventory(FAMILY, sizes)
    whole = {matrix.name: (0, matrix.rows) for matrix in matrices}
    rows = loraid.allocate(matrices, loraid.Loraid(number=number)).rows if number else whole
    latents = FAMILY.latent.latents(shapes.VideoSize(args.frames, args.height, args.width))
    return planner.Subject(
        family=FAMILY, config=config, matrices=matrices, dtypes=dict.fromkeys(sizes, torch.float32), rows=rows,
        network=job.NetworkSettings(rank=args.rank, alpha=args.rank), device=device, latents=(1, 16, *latents),
        conditions={"text_states": torch.empty(1, 512, 4096)}, optimizer_bytes=job.OptimizerSettings().kind.state_bytes,
    )  # fmt: skip


def build(about, settings) -> torch.nn.Module:
    """The transformer with random weights, made tensor by tensor where it will be, as from a checkpoint."""
    dtype = planner.compute_dtype(settings.precision, about.device)
    stored = planner.stored_weights(settings.precision, about.matrices, about.dtypes)
    blocks = inventory.blocks_of(about.matrices)
    numbers = streaming.streamed_blocks(settings.block_swap, len(blocks))
    with torch.device("meta"):
        dit = FAMILY.build_dit(about.config)
    on_host = {f"{m.name}.weight" for m in about.matrices if m.block in {blocks[n] for n in numbers}}
    state, scales = {}, {}
    for name, value in dit.state_dict().items():
        home = "cpu" if name in on_host else about.device
        made = torch.empty(value.shape, dtype=dtype, device=home).normal_(std=0.02)
        state[name], scales[name] = stored[name](quantized.Stored(made)) if name in stored else (made, None)
    dit.load_state_dict(state, assign=True)
    for name, scale in scales.items():
        if scale is not None:
            dit.get_submodule(name.removesuffix(".weight")).weight_scale = scale
    modules = [dit.get_submodule(path) for path in blocks]
    dit.run_block.recompute = settings.gradient_checkpointing
    dit.run_block.offload = offloading.Offload(about.device) if settings.offload_checkpoints else None
    dit.run_block.stream = streaming.BlockStream(modules, numbers, about.device) if numbers else None
    return dit.requires_grad_(False).train(False)


def trained(about, dit):
    """Adapters and their optimizer, and a batch."""
    adapters = adapter.untrained_adapters(dit, about.rows, about.network.rank, about.network.alpha, seed=0)
    modules = torch.nn.ModuleList(adapters.values()).to(about.device)
    optimizer = optimizers.make_optimizer(modules.parameters(), job.OptimizerSettings())
    latents = torch.randn(about.latents)
    text = torch.randn(about.conditions["text_states"].shape)
    return adapters, optimizer, batches.Batch(latents, latents, torch.tensor([0.5]), {"text_states": text})


def steps(about, settings) -> None:
    """Make everything, and train three steps."""
    dit = build(about, settings)
    adapters, optimizer, batch = trained(about, dit)
    with adapter.attached(dit, adapters):
        for _ in range(3):
            loop.train_step(dit, optimizer, [batch], 1e-4, 1.0, about.device)


def step_now(args: argparse.Namespace) -> None:
    """In a process of its own: forecast, then the steps, and the peak."""
    chosen = dict(SETTINGS[args.setting])
    number = chosen.pop("loraid", None)
    settings = job.MemorySettings(mode="manual", **chosen)
    tiny = argparse.Namespace(**{**vars(args), "dim": 128, "frames": 1, "width": 32, "height": 32})
    steps(subject(tiny, number, devices.best_device()), settings)  # libraries load what they need
    about = subject(args, number, devices.best_device())
    plan = planner.predict(about, settings)
    gc.collect()
    if about.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = 0 if about.device.type == "cuda" else psutil.Process().memory_info().rss
    steps(about, settings)
    predicted = plan.device + (plan.host if about.device.type == "cpu" else 0)
    print(json.dumps([predicted, devices.peak_memory(about.device) - before]))


def growth(device: torch.device) -> tuple[int, int]:
    """Bytes held after 200 and after 1,200 steps of a small model."""
    small = argparse.Namespace(dim=128, blocks=4, frames=1, width=64, height=64, rank=16)
    about = subject(small, None, device)
    settings = job.MemorySettings(mode="manual", precision="fp8_scaled", offload_checkpoints=True, block_swap=3)
    dit = build(about, settings)
    adapters, optimizer, batch = trained(about, dit)
    held = []
    with adapter.attached(dit, adapters):
        for step in range(1200):
            loop.train_step(dit, optimizer, [batch], 1e-4, 1.0, device)
            if step in (199, 1199):
                gc.collect()
                held.append(
                    torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
                )
    return held[0], held[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"dim": 1024, "blocks": 12, "frames": 17, "width": 320, "height": 192, "rank": 16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.setting:
        return step_now(args)
    device = devices.best_device()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = FAMILY.latent.latents(shapes.VideoSize(args.frames, args.height, args.width))
    print(f"{machine}, torch {torch.__version__}; {args.blocks} blocks of width {args.dim}, "
          f"{FAMILY.latent.tokens(size)} tokens, rank {args.rank}")  # fmt: skip
    print(f"{'':36}{'forecast':>12}{'measured':>12}{'ratio':>8}")
    # What the C library keeps of freed memory for later is none of the step's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    for setting in SETTINGS:
        command = [sys.executable, __file__, *sys.argv[1:], "--setting", setting]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        forecast, measured = json.loads(output.splitlines()[-1])
        print(
            f"{setting:36}{forecast / 2**20:8.0f} MiB{measured / 2**20:8.0f} MiB{forecast / measured:8.2f}", flush=True
        )
    early, late = growth(device)
    print(f"held after 200 and 1,200 steps: {early / 2**20:.1f} and {late / 2**20:.1f} MiB = {late / early:.3f}")
    return None


if __name__ == "__main__":
    main()
