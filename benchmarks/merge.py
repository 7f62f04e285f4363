"""Merging into a large checkpoint: seconds over those of copying the same file, and the peak memory of the process.

python dev.py bench merge [--gib 4]

Bound by the disk: the file is read once and written once, as in a copy. Both are flushed to the disk, which must have room
for two such files. The memory is that of the LoRAs and a few bands of rows: a larger checkpoint takes no more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack

DIM, FFN, RANK = 5120, 13824, 32  # the sizes of the 14B models
FOLDER = Path(__file__).resolve().parents[1] / ".dev" / "bench"
FAMILY = pack.load("core.families").FAMILIES["wan"]
families, stack, inventory = pack.load("core.families"), pack.load("core.lora.stack"), pack.load("core.lora.inventory")
loraid, files, merge = pack.load("core.lora.loraid"), pack.load("core.lora.files"), pack.load("core.lora.merge")
devices, CPU = pack.load("core.devices"), torch.device("cpu")
safetensors, wan = pack.load("core.io.safetensors"), pack.load("core.families.wan.dit")


def make_checkpoint(path: Path, gib: float) -> None:
    """A checkpoint with as many 14B blocks as fit."""
    block = 2 * (8 * DIM * DIM + 2 * DIM * FFN)
    config = wan.WanConfig(dim=DIM, ffn_dim=FFN, depth=max(1, int(gib * 2**30 / block)), in_channels=16, out_channels=16,
                           text_dim=4096, freq_dim=256)  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in wan.WanDiT(config).state_dict().items()}
    layout = [(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with safetensors.writing(path, layout, {}) as file:
        for shape in shapes.values():
            file.write(safetensors.tensor_bytes(torch.randn(shape).bfloat16()))


def make_lora(path: Path, matrices, number: int | None) -> None:
    share = loraid.allocate(matrices, loraid.Loraid(number=number)) if number else None
    factors = {
        m.name: files.LoRAFactors(
            torch.randn(RANK, m.columns).bfloat16(), torch.randn(m.rows, RANK).bfloat16(), float(RANK)
        )
        for m in matrices
        if share is None or m.name in share.rows
    }
    files.save(path, factors, share.metadata(FAMILY.name) if share else {})


def matrices_of(path: Path):
    checkpoint, part = families.open_part(path, "dit")
    return part, inventory.inventory(FAMILY, {name: info.shape for name, info in checkpoint.tensors.items()})


def merge_now(names: list[str]) -> None:
    """In a process of its own, so that its peak memory can be read."""
    part, matrices = matrices_of(FOLDER / "dit.safetensors")
    before = devices.peak_memory(CPU)
    begin = time.perf_counter()
    variant = FAMILY.variants["2.1-t2v-14B"]
    loaded = stack.load_stack(
        [stack.StackEntry(FOLDER / name) for name in names], FAMILY, variant, matrices, allow_overlap=False
    )
    for _ in merge.merge(FOLDER / "dit.safetensors", FOLDER / "merged.safetensors", "", part, loaded):
        pass
    taken = time.perf_counter() - begin
    print(f"{taken} {devices.peak_memory(CPU)} {before}")


def copy_now() -> None:
    """Copy the checkpoint, flushed to the disk as a merge is."""
    source = FOLDER / "dit.safetensors"
    begin = time.perf_counter()
    with open(source, "rb") as file, open(FOLDER / "merged.safetensors", "wb") as output:
        safetensors.copy_bytes(file, output, 0, source.stat().st_size)
        os.fsync(output.fileno())
    print(time.perf_counter() - begin, devices.peak_memory(CPU), 0)


def measured(*words: str) -> list[float]:
    """Seconds, peak memory and memory before the work, of a fresh process: the system treats old and new ones differently."""
    command = [sys.executable, __file__, *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (FOLDER / "merged.safetensors").unlink()
    os.sync()
    return [float(word) for word in printed.split()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--merge", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--copy", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.copy:
        copy_now()
    elif args.merge:
        merge_now(args.merge)
    else:
        compare(args.gib)


def compare(gib: float) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        _compare(gib)
    finally:
        for path in FOLDER.iterdir():
            path.unlink()


def _compare(gib: float) -> None:
    source = FOLDER / "dit.safetensors"
    make_checkpoint(source, gib)
    _, matrices = matrices_of(source)
    for number in (1, 2):
        make_lora(FOLDER / f"loraid_{number}.safetensors", matrices, number)
    make_lora(FOLDER / "whole.safetensors", matrices, None)
    size = source.stat().st_size / 2**30
    print(f"checkpoint of {size:.2f} GiB, rank {RANK}, {os.cpu_count()} cores, torch {torch.__version__}")
    measured("--copy")  # brings the file into memory
    for title, names in {
        "two LORAIDs": ["loraid_1.safetensors", "loraid_2.safetensors"],
        "whole model": ["whole.safetensors"],
    }.items():
        # The disk's pace changes from minute to minute: in turns, and the best of each counts.
        rounds = [(measured("--copy"), measured("--merge", *names)) for _ in range(3)]
        copied = min(copy[0] for copy, _ in rounds)
        taken, peak, before = min(merged for _, merged in rounds)
        print(f"{title}: {taken:.2f} s, copy {copied:.2f} s, ratio {taken / copied:.2f}, peak {peak / 2**30:.2f} GiB "
              f"({before / 2**30:.2f} of it Python and torch)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
