"""safetensors files: their header without their data, atomic saving, writing piece by piece."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .files import atomic

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in its file: bytes [start, stop)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    stop: int = 0

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a safetensors file, in the order of its data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read names, shapes, dtypes, byte ranges and metadata.

    Raises ValueError when the file is truncated, damaged or no safetensors file at all.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{path.name} is not a safetensors file.")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(_truncated(path, 8 + length, size))
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be texts")
        tensors = {name: _tensor_info(entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a safetensors file: its header cannot be read ({error}).") from error
    needed = max((info.stop for info in tensors.values()), default=8 + length)
    if size < needed:
        raise ValueError(_truncated(path, needed, size))
    return Header(dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata)


def _tensor_info(entry: dict, data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    start, stop = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*entry["shape"], start, stop)):
        raise ValueError("shapes and offsets must be whole numbers")
    info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]], data_start + start, data_start + stop)
    if info.nbytes != _nbytes(info.shape, info.dtype):
        raise ValueError("a tensor's byte range does not match its shape")
    return info


def _truncated(path: Path, needed: int, size: int) -> str:
    return (
        f"{path.name} is truncated: it should have {needed:,} bytes and has {size:,}. "
        "The download or copy was not finished; get the file again."
    )


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count


def read_tensor(file: BinaryIO, info: TensorInfo) -> Tensor:
    """Read one tensor from an open file."""
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    file.seek(info.start)
    if file.readinto(memoryview(buffer.numpy())) != info.nbytes:
        raise ValueError(f"{file.name} ended early: it was changed while it was being read.")
    return buffer.view(info.dtype).view(info.shape)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a small file."""
    header = read_header(path)
    with open(path, "rb") as file:
        return {name: read_tensor(file, info) for name, info in header.tensors.items()}, header.metadata


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically."""
    with writing(path, _layout(tensors), metadata) as file:
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))


def _layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


@contextmanager
def writing(
    path: Path, layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> Iterator[BinaryIO]:
    """A file with the header for `layout`, to which the block writes the tensors' bytes in that order; atomic."""
    header, size = _header(layout, metadata)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        yield file
        written = file.tell() - len(header)
        assert written == size, f"{path.name}: wrote {written} bytes of data where the header says {size}"


@contextmanager
def laid_out(
    path: Path, layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> Iterator[tuple[Path, dict[str, TensorInfo]]]:
    """A file with the header for `layout` and room for the data, which the block may write in any order and from several
    threads: where to write, and where each tensor lies there. Atomic."""
    header, size = _header(layout, metadata)
    with atomic(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        yield temporary, read_header(temporary).tensors


def _header(
    layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The bytes before the data, and how many bytes of data follow."""
    entries: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, shape, dtype in layout:
        end = position + _nbytes(shape, dtype)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 256)  # aligned data can be mapped straight into tensors
    return struct.pack("<Q", len(raw)) + raw, position


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values that does not depend on the order or the metadata."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensor_bytes(tensors[name]))
    return hasher.hexdigest()


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """The two hashes that image tools know a LoRA file by: SHA-256 of its data, and the first 8 digits of that of 64 KiB
    from 1 MiB on, of a file with only this metadata."""
    data, window, position = hashlib.sha256(), hashlib.sha256(), 0
    start, stop = 1 << 20, (1 << 20) + (1 << 16)
    header, _ = _header(_layout(tensors), metadata)
    for index, part in enumerate((memoryview(header), *map(tensor_bytes, tensors.values()))):
        if index:
            data.update(part)
        window.update(part[max(0, start - position) : max(0, stop - position)])
        position += len(part)
    return data.hexdigest(), window.hexdigest()[:8]


def copy_bytes(source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
    """Write bytes [start, stop) of `source` to `target` where that stands, inside the kernel where the system can."""
    source.seek(start)
    left = stop - start
    if sys.platform == "linux":  # elsewhere sendfile is for sockets only
        target.flush()
        end = target.tell() + left
        while left:
            sent = os.sendfile(target.fileno(), source.fileno(), stop - left, min(left, 1 << 30))
            if sent == 0:
                raise ValueError(f"{source.name} ended early: it was changed while it was being read.")
            left -= sent
        target.seek(end)
        return
    while left:
        block = source.read(min(left, 16 << 20))
        if not block:
            raise ValueError(f"{source.name} ended early: it was changed while it was being read.")
        target.write(block)
        left -= len(block)
