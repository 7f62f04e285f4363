"""Writing a checkpoint anew with some of its matrices changed: everything else is copied byte for byte.

Parts are read, computed and written by several threads, each at its own place in the target, a few MiB at a time: memory
depends on neither the model's size nor its largest matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..family import Part
from ..io import safetensors
from ..io.safetensors import TensorInfo
from ..modules.quantized import FP8
from ..prefetch import parallel
from ..weights import SCALES, View, read_header
from .loraid import Rows

_COPY_BYTES = 32 << 20  # of untouched data at a time
_WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Stored:
    """A tensor in its file."""

    path: Path
    info: TensorInfo


class Piece(NamedTuple):
    """Rows of a matrix of the model, where they lie in the file: from row `start` on in tensor `name`, up to row `stop`;
    in the matrix they begin at row `first`."""

    name: str
    start: int
    stop: int
    first: int


class Source:
    """A checkpoint as it lies in its file or files; `prefix` stands before the model's names in it."""

    def __init__(self, path: Path, prefix: str, part: Part) -> None:
        self.path, self.prefix, self.part = path, prefix, part
        header = read_header(path)
        self.metadata = header.metadata
        self.tensors = {name: Stored(home, header.tensors[name]) for name, home in header.homes.items()}

    def pieces(self, matrix: str) -> list[Piece]:
        """Where the rows of a matrix of the model are: in one tensor, or in several where the file divides it otherwise."""
        name = f"{matrix}.weight"
        view = self.part.views.get(name)
        if view is None:
            source = self.part.keymap.to_file(name)
            view = View.of(self.tensors[self.prefix + source].info.shape, source)
        pieces, first = [], 0
        for source, rows in view.pieces:
            full = self.prefix + source
            start, stop, _ = rows.indices(self.tensors[full].info.shape[0])
            pieces.append(Piece(full, start, stop, first))
            first += stop - start
        return pieces

    def in_file(self, matrix: str, rows: Sequence[Rows]) -> Iterator[tuple[str, Rows]]:
        """Rows [start, stop) of a matrix as rows of tensors of the file."""
        for piece in self.pieces(matrix):
            moved = piece.start - piece.first
            for start, stop in rows:
                start, stop = max(start + moved, piece.start), min(stop + moved, piece.stop)
                if start < stop:
                    yield piece.name, (start, stop)

    def scale(self, name: str) -> str | None:
        """The name of the factor of a scaled fp8 tensor."""
        if self.tensors[name].info.dtype not in FP8:
            return None
        names = (name.removesuffix("weight") + scale for scale in SCALES)
        return next((name for name in names if name in self.tensors), None)

    def factor(self, name: str) -> Tensor | None:
        """The factor of a scaled fp8 tensor in float32, (1, 1) or (rows, 1)."""
        scale = self.scale(name)
        return None if scale is None else self.read(scale).float().reshape(-1, 1)

    def bands(self, matrix: str) -> Iterator[tuple[int, Tensor]]:
        """A matrix of the model in bands: (first row, the rows in float32)."""
        for name, start, stop, row in self.pieces(matrix):
            stored, factor = self.tensors[name], self.factor(name)
            for first, last in bands(stored.info):
                first, last = max(first, start), min(last, stop)
                if first < last:
                    band = read_rows(stored, first, last).float()
                    yield row + first - start, band if factor is None else band * rows_of(factor, first, last)

    def read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        with open(stored.path, "rb") as file:
            return safetensors.read_tensor(file, stored.info)

    def check_not(self, target: Path) -> None:
        if target.exists() and target.samefile(self.path):
            raise ValueError(f"{target.name} is the checkpoint itself: choose another name for the new one.")


@dataclass(frozen=True)
class Target:
    """The file that is being written, and where each tensor lies in it."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def write(self, name: str, value: Tensor) -> int:
        """Write a whole tensor; how many bytes that were."""
        return self._write_at(self.tensors[name].start, value)

    def write_rows(self, name: str, first: int, value: Tensor) -> int:
        info = self.tensors[name]
        return self._write_at(info.start + first * info.nbytes // info.shape[0], value)

    def _write_at(self, position: int, value: Tensor) -> int:
        data = safetensors.tensor_bytes(value)
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(position)
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            _start_writing(file.fileno(), position, len(data))
        return len(data)

    def copy(self, source: Path, start: int, stop: int, position: int) -> Iterator[int]:
        """Bytes [start, stop) of another file, written from `position` on; yields the bytes done each time."""
        for begin in range(start, stop, _COPY_BYTES):
            end = min(begin + _COPY_BYTES, stop)
            with open(source, "rb") as file, open(self.path, "r+b") as output:
                output.seek(position + begin - start)
                safetensors.copy_bytes(file, output, begin, end)
                _start_writing(output.fileno(), position + begin - start, end - begin)
            yield end - begin


def _start_writing(file: int, start: int, length: int) -> None:
    """Let the disk begin at once: left to itself the system waits until much is to be written, and then all wait."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


Change = Callable[[Target], Iterator[int]]
"""Writes the tensors it stands for, yielding the bytes done each time."""


def rewritten(
    source: Source, target: Path, metadata: Mapping[str, str], changes: Mapping[tuple[str, ...], Change]
) -> Iterator[tuple[int, int]]:
    """Write `source` to `target` as one file, in which each of `changes` writes the tensors it is named by and all others
    are copied; yields (bytes done, bytes in all). The target appears only when it is complete."""
    source.check_not(target)
    layout = [(name, stored.info.shape, stored.info.dtype) for name, stored in source.tensors.items()]
    total, done = sum(stored.info.nbytes for stored in source.tensors.values()), 0
    changed = {name for names in changes for name in names}
    with safetensors.laid_out(target, layout, metadata) as (path, tensors):
        output = Target(path, tensors)
        # What is computed comes first: copies keep the disk busy while the last of it is done.
        work = [*(_alone(change(output)) for change in changes.values()), *_copies(source, output, changed)]
        try:
            with closing(parallel(work, _WORKERS, limit=4 * _WORKERS, cost=lambda _: 1)) as steps:
                for written in steps:
                    done += written
                    yield done, total
        finally:
            torch.set_num_threads(torch.get_num_threads())  # threads to come take what was set last
        assert done == total, f"{target.name}: wrote {done} of {total} bytes"


def _alone(steps: Iterator[int]) -> Iterator[int]:
    """Computed by the worker's thread alone: the workers together keep all processors busy, and pieces are too small to be
    divided (half as long in all)."""
    torch.set_num_threads(1)
    yield from steps


def _copies(source: Source, target: Target, changed: set[str]) -> list[Iterator[int]]:
    """Copies of runs of neighbouring untouched tensors."""
    runs: list[tuple[Path, int, int, int]] = []
    for name, stored in source.tensors.items():
        if name in changed:
            continue
        start, stop, position = stored.info.start, stored.info.stop, target.tensors[name].start
        if (
            runs
            and runs[-1][0] == stored.path
            and runs[-1][2] == start
            and runs[-1][3] + start - runs[-1][1] == position
        ):
            runs[-1] = (stored.path, runs[-1][1], stop, runs[-1][3])
        else:
            runs.append((stored.path, start, stop, position))
    return [target.copy(*run) for run in runs]


def bands(info: TensorInfo, elements: int = 1 << 20) -> Sequence[tuple[int, int]]:
    """Rows [first, last) of a matrix, a million elements at a time: 4 MiB in float32 stay in the processor's cache. They
    depend on the matrix alone, so sums are reproducible."""
    rows, columns = info.shape
    step = max(1, elements // columns)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def rows_of(factor: Tensor, first: int, last: int) -> Tensor:
    """The part of a factor, (1, 1) or (rows, 1), that rows [first, last) have."""
    return factor if len(factor) == 1 else factor[first:last]


def read_rows(stored: Stored, first: int, last: int) -> Tensor:
    """Rows [first, last) of a matrix as they are stored."""
    rows, columns = stored.info.shape
    row_bytes = stored.info.nbytes // rows
    span = (stored.info.start + row * row_bytes for row in (first, last))
    with open(stored.path, "rb", buffering=0) as file:
        return safetensors.read_tensor(file, TensorInfo((last - first, columns), stored.info.dtype, *span))
