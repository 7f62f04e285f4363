"""Merging LoRAs into a checkpoint, as a stream: memory does not depend on the model's size.

Each weight is read once, all deltas are added in float32 and the sum is rounded once. Rows that no LoRA touches are
copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..family import Part
from ..io import safetensors
from ..io.files import fingerprint
from ..io.safetensors import Header, TensorInfo, read_tensor
from ..prefetch import prefetched
from ..weights import shards
from .stack import LoadedLoRA

_PROVENANCE = "videolora_merged"
_CHUNK_ELEMENTS = 1 << 20  # of a matrix at a time: 4 MiB in float32 stay in the processor's cache, twice as fast


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
    with ExitStack() as context:
        opened = {path: context.enter_context(open(path, "rb")) for path in headers}
        output = context.enter_context(safetensors.writing(target, layout, _metadata(source, headers, stack)))
        # Sums are made in a thread while the disk takes what is ready.
        pieces = context.enter_context(closing(prefetched(_pieces(opened, headers, touched, stack), depth=8)))
        for piece in pieces:
            if isinstance(piece, Tensor):
                output.write(safetensors.tensor_bytes(piece))
                done += piece.nbytes
            else:
                with open(piece.path, "rb") as file:  # not the one that the thread is reading from
                    safetensors.copy_bytes(file, output, piece.start, piece.stop)
                done += piece.stop - piece.start
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
    return {name for lora in stack for name, factors in lora.file.factors.items() if factors.touched != (0, 0)}


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
        for lora in sorted(stack, key=lambda lora: (lora.number or 0, lora.entry.path.name))  # the order has no effect
    ]
    earlier = json.loads(metadata.get(_PROVENANCE, "[]"))
    now = {"base": source.name, "base_fingerprint": fingerprint(source), "loras": loras}
    return {**metadata, _PROVENANCE: json.dumps([*earlier, now])}


class Untouched(NamedTuple):
    """Bytes of a source file that stay as they are."""

    path: Path
    start: int
    stop: int


def _pieces(
    opened: Mapping[Path, BinaryIO],
    headers: Mapping[Path, Header],
    touched: Mapping[str, str],
    stack: Sequence[LoadedLoRA],
) -> Iterator[Untouched | Tensor]:
    """The target's data in order: runs of untouched bytes, and the merged rows of touched matrices."""
    for path, header in headers.items():
        start = stop = None
        for name, info in header.tensors.items():
            if start is not None and (name in touched or stop != info.start):
                yield Untouched(path, start, stop)
                start = None
            if name in touched:
                yield from _merged_bands(opened[path], info, touched[name], stack)
            else:
                start, stop = info.start if start is None else start, info.stop
        if start is not None:
            yield Untouched(path, start, stop)


def _merged_bands(file: BinaryIO, info: TensorInfo, name: str, stack: Sequence[LoadedLoRA]) -> Iterator[Tensor]:
    """One matrix, a band of rows at a time. Bands lie the same way whatever the stack: sums are reproducible."""
    rows, columns = info.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    row_bytes = columns * info.dtype.itemsize
    for first in range(0, rows, step):
        last = min(first + step, rows)
        span = (info.start + row * row_bytes for row in (first, last))
        weight = read_tensor(file, TensorInfo((last - first, columns), info.dtype, *span))
        yield _merged(weight, first, name, stack)


def _merged(weight: Tensor, first: int, name: str, stack: Sequence[LoadedLoRA]) -> Tensor:
    """weight (rows, columns), whose first row is number `first` of its matrix, with all deltas of the stack."""
    delta = torch.zeros(weight.shape)
    touched = torch.zeros(len(weight), dtype=torch.bool)
    for lora in stack:
        if name not in lora.file.factors:
            continue
        factors = lora.file.factors[name]
        start, stop = (min(max(row - first, 0), len(weight)) for row in factors.touched)
        if start < stop:
            factors.add_to(delta[start:stop], first + start, lora.entry.multiplier, weight[start:stop])
            touched[start:stop] = True
    merged = delta.add_(weight).to(weight.dtype)
    return merged if touched.all() else torch.where(touched[:, None], merged, weight)
