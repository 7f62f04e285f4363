"""Merging LoRAs into a checkpoint, as a stream: memory does not depend on the model's size.

Each weight is read once, all deltas are added in float32 and the sum is rounded once. Rows that no LoRA touches are
copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..family import Part
from ..io import safetensors
from ..io.files import fingerprint
from ..io.safetensors import Header, TensorInfo
from ..weights import shards
from .stack import LoadedLoRA

_PROVENANCE = "videolora_merged"
_CHUNK_ELEMENTS = 8 << 20  # of a matrix at a time: 32 MiB in float32


def merge(
    source: Path, target: Path, prefix: str, part: Part, stack: Sequence[LoadedLoRA]
) -> Iterator[tuple[int, int]]:
    """Write `source` with the stack merged in to `target`; yields (bytes done, bytes in all).

    `prefix` stands before the model's names in the file; a source of several shards becomes one file. The target appears
    only when it is complete. Raises ValueError when the source cannot be merged into.
    """
    headers = {path: safetensors.read_header(path) for path in _source_files(source, target)}
    touched = {f"{prefix}{part.keymap.to_file(name + '.weight')}": name for name in _touched_matrices(stack)}
    tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
    for weight in touched:
        if tensors[weight].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{source.name}: '{weight}' is stored as {tensors[weight].dtype}. Merge into the 16-bit or 32-bit version of "
                "the checkpoint."
            )
    layout = [(name, info.shape, info.dtype) for name, info in tensors.items()]
    total, done = sum(info.nbytes for info in tensors.values()), 0
    with safetensors.writing(target, layout, _metadata(source, headers, stack)) as output:
        for path, header in headers.items():
            with open(path, "rb") as file:
                for start, stop, name in _runs(header, touched):
                    if name is None:
                        safetensors.copy_bytes(file, output, start, stop)
                    else:
                        _merge_matrix(file, output, header.tensors[name], touched[name], stack)
                    done += stop - start
                    yield done, total


def is_merged(source: Path, target: Path, stack: Sequence[LoadedLoRA]) -> bool:
    """Whether `target` is exactly this merge, made earlier."""
    try:
        found = safetensors.read_header(target).metadata.get(_PROVENANCE)
    except (OSError, ValueError):
        return False
    headers = {path: safetensors.read_header(path) for path in _source_files(source, target)}
    return found == _metadata(source, headers, stack)[_PROVENANCE]


def _source_files(source: Path, target: Path) -> list[Path]:
    if source.suffix.lower() != ".safetensors":
        raise ValueError(f"{source.name}: only safetensors checkpoints can be merged into.")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target.name} is the checkpoint itself: choose another name for the merged one.")
    return shards(source)


def _touched_matrices(stack: Sequence[LoadedLoRA]) -> set[str]:
    return {name for lora in stack for name, factors in lora.file.factors.items() if factors.touched() != (0, 0)}


def _metadata(source: Path, headers: Mapping[Path, Header], stack: Sequence[LoadedLoRA]) -> dict[str, str]:
    """The source's own metadata, and what was merged into it, this time and before."""
    metadata = {key: value for header in headers.values() for key, value in header.metadata.items()}
    loras = [
        {
            "file": lora.entry.path.name,
            "fingerprint": fingerprint(lora.entry.path),
            "multiplier": lora.entry.multiplier,
            "loraid": lora.number,
        }
        for lora in stack
    ]
    earlier = json.loads(metadata.get(_PROVENANCE, "[]"))
    now = {"base": source.name, "base_fingerprint": fingerprint(source), "loras": loras}
    return {**metadata, _PROVENANCE: json.dumps([*earlier, now])}


def _runs(header: Header, touched: Mapping[str, str]) -> Iterator[tuple[int, int, str | None]]:
    """Byte ranges of the source in order: neighbouring untouched tensors as one (None), touched ones by name."""
    run: list[int] = []
    for name, info in header.tensors.items():
        contiguous = run and run[1] == info.start
        if run and (name in touched or not contiguous):
            yield run[0], run[1], None
            run = []
        if name in touched:
            yield info.start, info.stop, name
        else:
            run = [run[0] if run else info.start, info.stop]
    if run:
        yield run[0], run[1], None


def _merge_matrix(file: BinaryIO, output: BinaryIO, info: TensorInfo, name: str, stack: Sequence[LoadedLoRA]) -> None:
    """Write one matrix, a band of rows at a time. Bands lie the same way whatever the stack: sums are reproducible."""
    rows, columns = info.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    row_bytes = columns * info.dtype.itemsize
    for first in range(0, rows, step):
        last = min(first + step, rows)
        band = TensorInfo(
            (last - first, columns), info.dtype, info.start + first * row_bytes, info.start + last * row_bytes
        )
        weight = safetensors.read_tensor(file, band)
        output.write(safetensors.tensor_bytes(_merged(weight, first, name, stack)))


def _merged(weight: Tensor, first: int, name: str, stack: Sequence[LoadedLoRA]) -> Tensor:
    """weight (rows, columns), whose first row is number `first` of its matrix, with all deltas of the stack."""
    delta = torch.zeros(weight.shape)
    touched = torch.zeros(len(weight), dtype=torch.bool)
    for lora in stack:
        if name not in lora.file.factors:
            continue
        factors = lora.file.factors[name]
        start, stop = (min(max(row - first, 0), len(weight)) for row in factors.touched())
        if start < stop:
            up = factors.up[first + start : first + stop]
            delta[start:stop].addmm_(up, factors.down, alpha=factors.scale * lora.entry.multiplier)
            touched[start:stop] = True
    merged = delta.add_(weight).to(weight.dtype)
    return merged if touched.all() else torch.where(touched[:, None], merged, weight)


def _provenance(header: Header, stack: Sequence[LoadedLoRA]) -> list[dict]:
    earlier = json.loads(header.metadata.get("videolora_merged", "[]"))
    return earlier + [
        {
            "file": lora.entry.path.name,
            "fingerprint": fingerprint(lora.entry.path),
            "multiplier": lora.entry.multiplier,
            "loraid": lora.number,
        }
        for lora in stack
    ]
