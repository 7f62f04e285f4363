"""Seconds per sampling step over that of ComfyUI's own sampler on the same model, and what each way to hold the model costs.

python dev.py bench sample [--dim 1024] [--blocks 12] [--frames 17] [--width 320] [--height 192] [--steps 6]

Both run in this process, with the same weights, noise, sigmas and conditioning, guidance in every step (two passes); the bound
is two bare forward passes of our transformer. Then, against our own plain sampling: the difference of the latents (relative), and the
time, of each precision and of blocks that are streamed, and what leaving guidance out saves.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack
import server
from safetensors.torch import save_file

sampling, schedules = pack.load("core.sampling.sample"), pack.load("core.sampling.schedule")
layers, quantized, streaming = (pack.load(f"core.modules.{name}") for name in ("layers", "quantized", "streaming"))
families, weights = pack.load("core.families"), pack.load("core.weights")
devices, shapes = pack.load("core.devices"), pack.load("core.shapes")
wan = pack.load("core.families.wan.dit")
FAMILY = families.FAMILIES["wan"]
SHIFT, GUIDANCE, SEED = 3.0, 5.0, 7


def import_comfyui():
    """ComfyUI's own code, which reads the command line when it is imported."""
    words, sys.argv = sys.argv, sys.argv[:1] + ([] if torch.accelerator.is_available() else ["--cpu"])
    sys.path.insert(0, str(server.COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.sd

    sys.argv = words
    return comfy


def write_checkpoint(path: Path, dim: int, blocks: int, dtype: torch.dtype) -> None:
    """A transformer of this size with random weights."""
    config = wan.WanConfig(
        dim=dim, ffn_dim=dim * 8960 // 1536, depth=blocks, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        sizes = {name: value.shape for name, value in wan.WanDiT(config).state_dict().items()}
    made = {}
    for name, size in sizes.items():
        spread = 1.0 if "norm" in name and name.endswith("weight") else 0.02
        made[name] = torch.ones(size, dtype=dtype) if spread == 1.0 else (torch.randn(size) * spread).to(dtype)
    save_file(made, path)


def ours(path: Path, dtype: torch.dtype, device: torch.device, precision: str = "auto") -> torch.nn.Module:
    checkpoint, part = families.open_part(path, "dit")
    with torch.device("meta"):
        dit = FAMILY.build_dit(part.config)
    names = [name for name in quantized.linear_weights(dit) if name.startswith("blocks.")]
    fast = precision == "fp8_fast"
    stored = quantized.stored_weights("fp8_scaled" if fast else precision, names, checkpoint.dtypes(part.keymap))
    weights.load_into(dit, checkpoint, part.keymap, dtype, device, stored)
    if fast:
        layers.use_fast_products(dit)
    return dit


def per_step(steps) -> tuple[float, torch.Tensor]:
    """Median seconds of the steps but the first, and what the last one reached."""
    times, begin, reached = [], time.perf_counter(), None
    for latents, _ in steps:
        reached = latents.cpu()  # waits for the device
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return statistics.median(times[1:]), reached


def stock_steps(comfy, model, noise, positive, negative, sigmas):
    """As `per_step`, of ComfyUI's own Euler."""
    times, begin = [], time.perf_counter()

    def after(*_) -> None:
        nonlocal begin
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()

    reached = comfy.sample.sample_custom(
        model, noise, GUIDANCE, comfy.samplers.sampler_object("euler"), sigmas, positive, negative,
        torch.zeros_like(noise), callback=after, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    return statistics.median(times[1:]), reached


def seconds(action, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        action().cpu()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"dim": 1024, "blocks": 12, "frames": 17, "width": 320, "height": 192, "steps": 6}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    comfy = import_comfyui()
    device = devices.best_device()
    dtype = devices.compute_dtype(device)
    size = FAMILY.latent.latents(shapes.VideoSize(args.frames, args.height, args.width))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, {dtype}; {args.blocks} blocks of width {args.dim}, "
          f"{FAMILY.latent.tokens(size)} tokens, {args.steps} steps of Euler, guidance {GUIDANCE:g}")  # fmt: skip
    states = [{"varlen_t5": torch.randn(length, 4096)} for length in (60, 40)]
    latents = torch.zeros(1, 16, *size)
    schedule = schedules.Schedule(steps=args.steps, shift=SHIFT)

    def steps(dit, schedule=schedule):
        return sampling.sample(dit, FAMILY, latents, *states, schedule, GUIDANCE, SEED, device)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit.safetensors"
        write_checkpoint(path, args.dim, args.blocks, torch.bfloat16 if device.type == "cuda" else torch.float32)
        theirs = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
        conditioning = [[[*FAMILY.to_comfyui(one)]] for one in states]
        noise = sampling.seeded_noise(tuple(latents.shape), SEED)
        stock, stock_end = stock_steps(comfy, theirs, noise, *conditioning, schedule.sigmas)
        comfy.model_management.unload_all_models()
        del theirs

        dit = ours(path, dtype, device)
        x, time_ = noise.to(device), torch.tensor([500.0], device=device)
        told = {name: value.to(device) for name, value in FAMILY.conditions(states[:1]).items()}
        forward = seconds(functools.partial(dit, x, time_, **told))
        plain, end = per_step(steps(dit))
        stock_end = FAMILY.latent.to_model(stock_end.float())
        print(f"bare forward, two of them     {2 * forward:8.3f} s")
        print(f"step, ComfyUI's own sampler   {stock:8.3f} s")
        print(f"step, ours                    {plain:8.3f} s = {plain / stock:.2f} x ComfyUI's = {plain / (2 * forward):.2f} x the bound; "
              f"latents differ from ComfyUI's by {error(end, stock_end):.1e}")  # fmt: skip
        _, whole = timed(lambda: list(steps(dit))[-1])
        for mode in ("late", "early_late"):
            skipping = schedules.Schedule(steps=args.steps, shift=SHIFT, cfg_skip=mode, cfg_ratio=0.5)
            last, loop = timed(functools.partial(lambda plan: list(steps(dit, plan))[-1], skipping))
            print(f"loop with CFG skip, {skipping.plan}    {loop:8.3f} s, saves {1 - loop / whole:.0%}; "
                  f"latents differ by {error(last.latents.cpu(), end):.2f}")  # fmt: skip
        numbers = streaming.streamed_blocks(args.blocks // 2, args.blocks)
        dit.run_block.stream = streaming.BlockStream(list(dit.blocks), numbers, device)
        show(f"{args.blocks // 2} blocks streamed", *per_step(steps(dit)), plain, end)
        dit.run_block.stream.close()
        for precision in ("fp8", "fp8_scaled", "fp8_fast"):
            show(precision, *per_step(steps(ours(path, dtype, device, precision))), plain, end)


def timed(action):
    begin = time.perf_counter()
    result = action()
    return result, time.perf_counter() - begin


def show(title: str, taken: float, end: torch.Tensor, plain: float, plain_end: torch.Tensor) -> None:
    print(
        f"step, {title:24}{taken:8.3f} s = {taken / plain:.2f} x plain; latents differ by {error(end, plain_end):.1e}",
        flush=True,
    )


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


if __name__ == "__main__":
    main()
