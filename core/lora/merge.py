"""Merging LoRAs into a checkpoint of any floating dtype, and taking them out again.

Each weight is read once, all deltas are added in float32 and the sum is rounded once, to the dtype it is stored in. What
no LoRA touches is copied byte for byte. The metadata say what was merged, so that it can be taken out again.

A scaled fp8 weight is restored with its factor, and the sum stored with the same factor; only where the sum is too large
for that the factor grows, for the row or the matrix that it is for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..family import Part
from ..io.files import fingerprint
from ..modules.quantized import FP8
from .combine import Adding, Combination, Share, adding
from .loraid import Rows
from .rewriting import Change, Piece, Source, Stored, Target, bands, read_rows, rewritten, rows_of
from .stack import LoadedLoRA

_PROVENANCE = "videolora_merged"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
SUM = Combination()


def merge(
    source: Path, target: Path, prefix: str, part: Part, stack: Sequence[LoadedLoRA], how: Combination = SUM
) -> Iterator[tuple[int, int]]:
    """Write `source` with the stack merged in to `target`; yields (bytes done, bytes in all).

    `prefix` stands before the model's names in the file; a source of several shards becomes one file. The target appears
    only when it is complete. Raises ValueError when the source cannot be merged into.
    """
    checkpoint = Source(source, prefix, part)
    metadata = {**checkpoint.metadata, _PROVENANCE: json.dumps(_provenance(checkpoint, stack, how))}
    yield from rewritten(checkpoint, target, metadata, _merging(checkpoint, stack, how))


def is_merged(
    source: Path, target: Path, prefix: str, part: Part, stack: Sequence[LoadedLoRA], how: Combination = SUM
) -> bool:
    """Whether `target` is exactly this merge, made earlier."""
    try:
        found = Source(target, prefix, part).metadata.get(_PROVENANCE)
    except (OSError, ValueError):
        return False
    return found == json.dumps(_provenance(Source(source, prefix, part), stack, how))


def _touched(lora: LoadedLoRA) -> dict[str, Rows]:
    return {name: factors.touched for name, factors in lora.file.factors.items() if factors.touched != (0, 0)}


def _check_dtype(source: Source, weight: str) -> None:
    info = source.tensors[weight].info
    if info.dtype not in _DTYPES or len(info.shape) != 2:
        raise ValueError(f"{source.path.name}: '{weight}' is stored as {info.dtype}, which nothing can be added to. Merge into a "
                         "32-bit, 16-bit or fp8 version of the checkpoint.")  # fmt: skip
    scale = source.scale(weight)
    if scale is not None:
        shape = source.tensors[scale].info.shape
        if shape not in ((), (1,), (1, 1), (info.shape[0],), (info.shape[0], 1)):
            raise ValueError(f"{source.path.name}: '{scale}' has shape {shape}, and only one factor for a matrix or one for each "
                             "row can be kept. Merge into the 16-bit version of the checkpoint.")  # fmt: skip


def _merging(
    source: Source, stack: Sequence[LoadedLoRA], how: Combination, sign: float = 1.0
) -> dict[tuple[str, ...], Change]:
    """For each touched tensor of the file (and its factor, if it has one) what writes it with the deltas, times `sign`."""
    contents = {lora.entry.path: fingerprint(lora.entry.path) for lora in stack}
    shares: dict[str, list[Share]] = {}
    for lora in stack:
        for matrix in _touched(lora):
            share = Share(lora.file.factors[matrix], sign * lora.entry.multiplier, contents[lora.entry.path])
            shares.setdefault(matrix, []).append(share)
    deltas: dict[str, list[_Delta]] = {}
    for matrix, of_matrix in shares.items():
        for piece in source.pieces(matrix):
            _check_dtype(source, piece.name)
            deltas.setdefault(piece.name, []).append(_Delta(source, matrix, piece, of_matrix, how))
    changes: dict[tuple[str, ...], Change] = {}
    for weight, of_tensor in deltas.items():
        scale = source.scale(weight)
        if scale is None:
            changes[weight,] = _Plain(source, weight, of_tensor)
        else:
            changes[weight, scale] = _Scaled(source, weight, scale, of_tensor)
    return changes


@dataclass(frozen=True)
class _Delta:
    """What the LoRAs make of a matrix, for one tensor of the file that holds rows of it."""

    source: Source
    matrix: str
    piece: Piece
    shares: Sequence[Share]
    how: Combination

    def adding(self) -> Adding:
        """Adds to rows of the tensor."""
        add = adding(self.how, self.matrix, self.shares, lambda: self.source.bands(self.matrix))
        _, start, stop, row = self.piece

        def to_tensor(band: Tensor, first: int, weight: Tensor, touched: Tensor) -> None:
            inside = slice(max(start - first, 0), max(stop - first, 0))
            if len(band[inside]):
                add(band[inside], max(first, start) - start + row, weight[inside], touched[inside])

        return to_tensor


@dataclass(frozen=True)
class _Plain:
    """Writes a tensor with its deltas."""

    source: Source
    weight: str
    deltas: Sequence[_Delta]

    def __call__(self, target: Target) -> Iterator[int]:
        stored, adds = self.source.tensors[self.weight], [delta.adding() for delta in self.deltas]
        for first, last in bands(stored.info):
            raw = read_rows(stored, first, last)
            summed, touched = _summed(raw.float(), first, adds)
            yield target.write_rows(self.weight, first, _rounded(summed, raw, touched))


@dataclass(frozen=True)
class _Scaled:
    """Writes a scaled fp8 tensor with its deltas, and its factor."""

    source: Source
    weight: str
    scale: str
    deltas: Sequence[_Delta]

    def __call__(self, target: Target) -> Iterator[int]:
        stored, info = self.source.tensors[self.weight], self.source.tensors[self.scale].info
        rows, whole = stored.info.shape[0], bands(stored.info)
        factor, adds = self.source.factor(self.weight), [delta.adding() for delta in self.deltas]

        def summed_rows(first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
            raw = read_rows(stored, first, last)
            return raw, *_summed(raw.float() * rows_of(factor, first, last), first, adds)

        largest = torch.zeros(rows, 1)
        for first, last in whole:
            _, summed, touched = summed_rows(first, last)
            largest[first:last] = summed.abs_().amax(dim=1, keepdim=True) * touched[:, None]
        needed = largest / torch.finfo(stored.info.dtype).max
        new = torch.maximum(factor, needed if len(factor) > 1 else needed.amax(dim=0, keepdim=True))
        new = new.to(info.dtype).float()  # as it will be read
        grown = (new != factor).flatten().expand(rows)
        for first, last in whole:
            raw, summed, touched = summed_rows(first, last)
            summed /= rows_of(new, first, last)
            yield target.write_rows(self.weight, first, _rounded(summed, raw, touched | grown[first:last]))
        yield target.write(self.scale, new.reshape(info.shape).to(info.dtype))


def _summed(full: Tensor, first: int, adds: Sequence[Adding]) -> tuple[Tensor, Tensor]:
    """The rows from `first` on in float32 with all deltas, and which of them are touched."""
    delta, touched = torch.zeros_like(full), torch.zeros(len(full), dtype=torch.bool)
    for add in adds:
        add(delta, first, full, touched)
    return delta.add_(full), touched


def _rounded(summed: Tensor, raw: Tensor, touched: Tensor) -> Tensor:
    """In the dtype of the file; rows that are not touched as they were."""
    if raw.dtype in FP8:
        most = torch.finfo(raw.dtype).max
        summed = summed.clamp_(-most, most)  # beyond it the cast gives no number
    rounded = summed.to(raw.dtype)
    if not touched.all():
        rounded.view(torch.uint8)[~touched] = raw.view(torch.uint8)[~touched]
    return rounded


def _provenance(source: Source, stack: Sequence[LoadedLoRA], how: Combination) -> list[dict[str, Any]]:
    """What was merged, this time and before."""
    loras = [
        {
            "file": lora.entry.path.name,
            "fingerprint": fingerprint(lora.entry.path),
            "multiplier": lora.entry.multiplier,
            "loraid": lora.number,
            "rows": _touched(lora),
        }
        for lora in sorted(stack, key=lambda lora: (lora.number or 0, lora.entry.path.name))  # the order has no effect
    ]
    return [
        *_history(source),
        {"base": source.path.name, "base_fingerprint": fingerprint(source.path), "loras": loras, **how.describe()},
    ]


_MERGED = {"base": str, "base_fingerprint": str, "loras": list, "method": str}
_LORA = {"file": str, "fingerprint": str, "multiplier": (int, float), "rows": dict}


def _history(source: Source) -> list[dict[str, Any]]:
    """What the file says was merged into it. Raises ValueError when that cannot be read."""
    try:
        history = json.loads(source.metadata.get(_PROVENANCE, "[]"))
        for entry, fields in [(merged, _MERGED) for merged in history] + [
            (lora, _LORA) for merged in history for lora in merged["loras"]
        ]:
            if not all(isinstance(entry[name], kind) for name, kind in fields.items()):
                raise ValueError("an entry is of another kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source.path.name}: what it says was merged into it ({_PROVENANCE}) cannot be read ({error}): get the file again."
        ) from error
    return history


def unmerge(
    source: Path,
    target: Path,
    prefix: str,
    part: Part,
    stack: Sequence[LoadedLoRA],
    base: tuple[Path, str, Part] | None = None,
) -> Iterator[tuple[int, int]]:
    """Write `source`, a merged checkpoint, without the LoRAs of the stack to `target`; yields (bytes done, bytes in all).

    With `base`, the checkpoint (and its prefix and part) that was merged into first, the rows come from there: the original
    bytes. Without it the deltas are subtracted, which leaves the rounding of the merge.

    Raises ValueError when the file does not say that these were merged into it, and when others were merged into the same
    rows.
    """
    if not stack:
        raise ValueError("there is nothing to take out: every multiplier is 0.")
    checkpoint = Source(source, prefix, part)
    history = _history(checkpoint)
    left, removed = _divided(checkpoint, history, stack)
    if base is None:
        _check_subtractable(checkpoint, history, stack)
        changes = _merging(checkpoint, stack, SUM, sign=-1.0)
    else:
        changes = _restoring(checkpoint, Source(*base), history, left, removed)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != _PROVENANCE}
    if left:
        metadata[_PROVENANCE] = json.dumps(left)
    yield from rewritten(checkpoint, target, metadata, changes)


_Rows = dict[str, list[Rows]]


def _divided(
    source: Source, history: list[dict[str, Any]], stack: Sequence[LoadedLoRA]
) -> tuple[list[dict[str, Any]], _Rows]:
    """The history without these LoRAs, and the rows that they changed."""
    left = [{**merged, "loras": list(merged["loras"])} for merged in history]
    removed: list[dict[str, Any]] = []
    for lora in stack:
        wanted = (fingerprint(lora.entry.path), lora.entry.multiplier)
        for merged in left:
            found = next((one for one in merged["loras"] if (one["fingerprint"], one["multiplier"]) == wanted), None)
            if found:
                merged["loras"].remove(found)
                removed.append(found)
                break
        else:
            there = [f"{one['file']} x {one['multiplier']:g}" for merged in history for one in merged["loras"]]
            raise ValueError(f"{source.path.name} does not say that {lora.entry.path.name} x {lora.entry.multiplier:g} was merged "
                             f"into it; it says: {', '.join(there) or 'nothing'}.")  # fmt: skip
    rows = _rows_of(removed)
    for merged in left:
        for one in merged["loras"]:
            for name, (start, stop) in one["rows"].items():
                if any(max(start, a) < min(stop, b) for a, b in rows.get(name, ())):
                    raise ValueError(f"{one['file']} was merged into the same rows of '{name}', and would go too: unmerge it as "
                                     "well, and merge it again afterwards.")  # fmt: skip
    return [merged for merged in left if merged["loras"]], rows


def _rows_of(loras: Iterable[Mapping[str, Any]]) -> _Rows:
    rows: _Rows = {}
    for lora in loras:
        for name, (start, stop) in lora["rows"].items():
            rows.setdefault(name, []).append((start, stop))
    return rows


def _in_file(source: Source, rows: _Rows) -> _Rows:
    """The same rows by the tensors of the file."""
    found: _Rows = {}
    for matrix, of_matrix in rows.items():
        for name, span in source.in_file(matrix, of_matrix):
            found.setdefault(name, []).append(span)
    return found


def _check_subtractable(source: Source, history: list[dict[str, Any]], stack: Sequence[LoadedLoRA]) -> None:
    names = {lora.entry.path.name for lora in stack}
    for merged in history:
        if merged["method"] != "sum" and names & {one["file"] for one in merged["loras"]}:
            raise ValueError(f"{source.path.name} was merged by {merged['method']}, which cannot be subtracted: give the base "
                             f"checkpoint, {merged['base']}.")  # fmt: skip
    for lora in stack:
        if any(factors.kind == "dora" for factors in lora.file.factors.values()):
            raise ValueError(f"{lora.entry.path.name} is a DoRA, which cannot be subtracted: give the base checkpoint.")


def _restoring(
    source: Source, base: Source, history: list[dict[str, Any]], left: list[dict[str, Any]], removed: _Rows
) -> dict[tuple[str, ...], Change]:
    """For each tensor what writes the removed rows as the base has them, and the others as the source has them."""
    if history[0]["base_fingerprint"] != fingerprint(base.path):
        raise ValueError(f"{base.path.name} is not what {source.path.name} was made of: that was {history[0]['base']}.")
    still = _in_file(source, _rows_of(one for merged in left for one in merged["loras"]))
    changes: dict[tuple[str, ...], Change] = {}
    for weight, of_tensor in _in_file(source, removed).items():
        scale, ours = source.scale(weight), base.tensors[weight]
        if scale is not None and not torch.equal(source.read(scale), base.read(scale)):
            if weight in still:
                raise ValueError(f"the fp8 factor of '{weight}' has grown with the merge, and other LoRAs are merged into it too: "
                                 "unmerge all of them, and merge those again that are to stay.")  # fmt: skip
            changes[weight, scale] = _Copied(weight, source, ours, [(0, ours.info.shape[0])], scale, base.read(scale))
        else:
            changes[weight,] = _Copied(weight, source, ours, of_tensor)
    return changes


@dataclass(frozen=True)
class _Copied:
    """Writes a matrix, some rows of it from another file, and its fp8 factor if that is given."""

    weight: str
    source: Source
    other: Stored
    rows: list[Rows]
    scale: str = ""
    factor: Tensor | None = None

    def __call__(self, target: Target) -> Iterator[int]:
        info, done = target.tensors[self.weight], 0
        own = self.source.tensors[self.weight]
        for start, stop in [*sorted(self.rows), (info.shape[0], info.shape[0])]:
            for stored, first, last in ((own, done, max(start, done)), (self.other, max(start, done), max(stop, done))):
                a, b = (row * (info.nbytes // info.shape[0]) for row in (first, last))
                yield from target.copy(stored.path, stored.info.start + a, stored.info.start + b, info.start + a)
            done = max(stop, done)
        if self.factor is not None:
            yield target.write(self.scale, self.factor)
