"""Caching latents against the VAE alone on frames that are already in memory, and whether memory grows with the data.

python dev.py bench cache [--clips 100] [--width 832] [--height 480] [--frames 81] [--channels 96]

The VAE bounds it: reading, resizing and writing should hide behind it. Every caching runs in a fresh process, on clips of
twice the size in each direction and another frame rate. The sizes above are those on a GPU; a CPU gets smaller ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import clips
import pack

caching, planning, config = (pack.load(f"core.data.{name}") for name in ("caching", "planning", "config"))
devices = pack.load("core.devices")
media, windows = pack.load("core.data.media"), pack.load("core.data.windows")
FAMILY = pack.load("core.families").FAMILIES["wan"]
vae_module = pack.load("core.families.wan.vae")


def build_vae(channels: int, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    widths = (channels, channels * 2, channels * 4, channels * 4)
    with torch.device(device):
        vae = vae_module.WanVAE(vae_module.WanVAEConfig(widths=widths, latent_channels=16))
    return vae.to(devices.compute_dtype(device)).requires_grad_(False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> None:
    """One caching in this process: seconds of the encoder alone and of the caching, then the peak memory in bytes."""
    device = devices.best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # reading has the other cores, as it has all of them beside a GPU
    vae = build_vae(args.channels, device)
    size = (args.width, args.height)
    source = args.folder / "clips"
    first = sorted(source.glob("*.mp4"))[0]
    ((_, frames),) = media.read_windows(first, [windows.Window(0, args.frames)], size, FAMILY.fps)
    alone = []
    for _ in range(4):
        begin = time.perf_counter()
        vae.encode(caching.to_video([frames], device)).cpu()
        synchronize(device)
        alone.append(time.perf_counter() - begin)
    settings = config.DatasetConfig(kind="video", folder=source, cache=args.folder / f"cache_{args.clips}", resolution=size,
                                    target_frames=(args.frames,))  # fmt: skip
    found = planning.Dataset.find(settings)
    found = planning.Dataset(settings, found.items[: args.clips])
    begin = time.perf_counter()
    plan = planning.plan_latents(found, FAMILY, "bench")
    planned = time.perf_counter() - begin
    begin = time.perf_counter()
    steps = list(caching.cache_latents([plan], FAMILY, lambda: vae, device))
    seconds = time.perf_counter() - begin
    assert [step.outcome for step in steps] == ["made"] * args.clips
    print(min(alone[1:]), planned, seconds, devices.peak_memory(torch.device("cpu")))


def main() -> None:
    device = devices.best_device()
    parser = argparse.ArgumentParser()
    sizes = {"clips": 100, "width": 832, "height": 480, "frames": 81, "channels": 96}
    if device.type == "cpu":
        sizes |= {"width": 64, "height": 64, "frames": 17, "channels": 8}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        return measure(args)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread for the VAE"
    print(f"{machine}, torch {torch.__version__}, {devices.compute_dtype(device)}")
    print(
        f"clips of {args.width * 2}x{args.height * 2} at 24 fps -> {args.width}x{args.height}, {args.frames} frames at 16 fps"
    )
    with tempfile.TemporaryDirectory() as folder:
        many = args.clips * 4
        rendered = clips.render_clips(Path(folder) / "clips", "zarko", 2, frames=args.frames * 3 // 2 + 2,
                                      size=(args.width * 2, args.height * 2), fps=24)  # fmt: skip
        for index in range(len(rendered), many):
            for suffix in (".mp4", ".txt"):
                copy = Path(folder) / "clips" / f"zarko_{index:03d}{suffix}"
                shutil.copy(rendered[index % len(rendered)].with_suffix(suffix), copy)
        peaks = {}
        for count in (args.clips, many):
            words = [f"--{name}={getattr(args, name)}" for name in ("width", "height", "frames", "channels")]
            command = [sys.executable, __file__, *words, f"--clips={count}", f"--folder={folder}"]
            # Freed blocks go back to the system: their fragments would count as growth.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
            numbers = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout.split()
            alone, planned, seconds, peaks[count] = map(float, numbers)
            print(f"{count:4} clips: VAE alone {count / alone / count:6.2f} per s, caching {count / seconds:6.2f} per s = "
                  f"{alone * count / seconds:.2f} of it; looking at them {planned:.2f} s; "
                  f"peak memory {peaks[count] / 2**20:.0f} MiB")  # fmt: skip
    print(f"peak memory of {many} clips over that of {args.clips}: {peaks[many] / peaks[args.clips]:.2f}")
    return None


if __name__ == "__main__":
    main()
