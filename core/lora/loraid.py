"""LORAID: every number owns a share of the model that no other number touches.

The inventory is divided into units; number k (from 1) owns units [(k - 1) * n, k * n). Half-open ranges of a partition
cannot overlap. The division depends on the model's shapes and these settings alone and is versioned: it must never
change under a number that somebody has trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ..io.files import digest
from .inventory import Matrix

VERSION = "1"
UNITS = ("slot", "block", "matrix", "row")
DIVISIONS = 240  # slots, and bands of rows: 20, 80, 120 or 240 LORAIDs at 12, 3, 2 or 1 units each

Rows = tuple[int, int]
"""Output rows [start, stop) of a matrix."""


@dataclass(frozen=True, kw_only=True)
class Loraid:
    """A number together with the way of dividing that gives it its meaning."""

    number: int
    unit: str = "slot"
    units_per_id: int = 12

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"LORAID unit '{self.unit}' is unknown: use one of {', '.join(UNITS)}.")
        if self.units_per_id < 1:
            raise ValueError(f"units per LORAID is {self.units_per_id}: use 1 or more.")
        if self.number < 1:
            raise ValueError(f"LORAID {self.number} is out of range: LORAIDs are numbered from 1.")


@dataclass(frozen=True)
class Allocation:
    """What a LORAID owns: rows of matrices, in inventory order, and units [first, last] of `total`."""

    loraid: Loraid
    first: int
    last: int
    total: int
    rows: dict[str, Rows]
    parameters: int

    @property
    def digest(self) -> str:
        return digest([[name, *rows] for name, rows in self.rows.items()])

    def metadata(self, family: str, expert: str = "") -> dict[str, str]:
        """What a LoRA file says of its share. `ss_loraid` alone is what older LORAID files carry."""
        return {
            "ss_loraid": str(self.loraid.number),
            "ss_loraid_version": VERSION,
            "ss_loraid_unit": self.loraid.unit,
            "ss_loraid_units_per_id": str(self.loraid.units_per_id),
            "ss_loraid_total_units": str(self.total),
            "ss_loraid_range": f"{self.first}-{self.last}",
            "ss_loraid_family": family,
            "ss_loraid_expert": expert or "both",
            "ss_loraid_digest": self.digest,
        }

    def report(self) -> str:
        """What the share is, for people."""
        loraid = self.loraid
        count = self.last - self.first + 1
        short = f" (partial: {count} of {loraid.units_per_id})" if count < loraid.units_per_id else ""
        lines = [
            f"LORAID {loraid.number}: {_plural(count, loraid.unit)} {self.first} to {self.last} of {self.total}{short}, "
            f"{len(self.rows)} matrices, {self.parameters:,} parameters of the model"
        ]
        for block, names in groupby(self.rows, key=_block_of):
            lines.append(f"  {block}: " + ", ".join(_describe(name.removeprefix(block + "."), self.rows[name],
                                                              loraid.unit == "row") for name in names))  # fmt: skip
        return "\n".join(lines)


def _plural(count: int, unit: str) -> str:
    return {"matrix": "matrices"}.get(unit, unit + "s") if count > 1 else unit


def _block_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def _describe(name: str, rows: Rows, banded: bool) -> str:
    return f"{name}[{rows[0]}:{rows[1]}]" if banded else name


def allocate(matrices: Sequence[Matrix], loraid: Loraid) -> Allocation:
    """The share of `loraid` in a model with these matrices (see `inventory`).

    Raises ValueError when the model has no such LORAID, with the settings that would fit.
    """
    matrices = _owned(matrices)
    total, unit = _DIVIDE[loraid.unit](matrices)
    n = loraid.units_per_id
    capacity = -(-total // n)
    if loraid.number > capacity:
        raise ValueError(
            f"LORAID {loraid.number} is out of range: this model has {total} {_plural(total, loraid.unit)}, which gives "
            f"LORAIDs 1 to {capacity} at {n} per LORAID. {_suggestion(matrices, loraid)}"
        )
    first, last = (loraid.number - 1) * n, min(loraid.number * n, total) - 1
    rows: dict[str, Rows] = {}
    for index in range(first, last + 1):
        for name, (start, stop) in unit(index):
            rows[name] = (min(start, rows[name][0]), max(stop, rows[name][1])) if name in rows else (start, stop)
    if not rows:
        raise ValueError(
            f"LORAID {loraid.number} would own nothing: {total} {_plural(total, loraid.unit)} are more than this "
            f"model's {len(matrices)} matrices can fill. {_suggestion(matrices, loraid)}"
        )
    columns = {matrix.name: matrix.columns for matrix in matrices}
    parameters = sum((stop - start) * columns[name] for name, (start, stop) in rows.items())
    return Allocation(loraid, first, last, total, rows, parameters)


def allocations(matrices: Sequence[Matrix], unit: str, units_per_id: int) -> Iterator[Allocation]:
    """Those of all LORAIDs of this division that own something."""
    for number in range(1, -(-_DIVIDE[unit](_owned(matrices)).total // units_per_id) + 1):
        with suppress(ValueError):
            yield allocate(matrices, Loraid(number=number, unit=unit, units_per_id=units_per_id))


def _owned(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Those that are divided among LORAIDs."""
    return [matrix for matrix in matrices if not matrix.modulation]


Unit = list[tuple[str, Rows]]


def _whole(matrices: Sequence[Matrix]) -> Unit:
    return [(matrix.name, (0, matrix.rows)) for matrix in matrices]


class Division(NamedTuple):
    """How many units there are, and what is in each."""

    total: int
    unit: Callable[[int], Unit]


def _slots(matrices: Sequence[Matrix]) -> Division:
    """240 runs of neighbouring matrices, as equal in number as can be."""
    count = len(matrices)
    return Division(DIVISIONS, lambda i: _whole(matrices[i * count // DIVISIONS : (i + 1) * count // DIVISIONS]))


def _blocks(matrices: Sequence[Matrix]) -> Division:
    blocks = [list(block) for _, block in groupby(matrices, key=lambda matrix: matrix.block)]
    return Division(len(blocks), lambda i: _whole(blocks[i]))


def _matrices(matrices: Sequence[Matrix]) -> Division:
    return Division(len(matrices), lambda i: _whole(matrices[i : i + 1]))


def _bands(matrices: Sequence[Matrix]) -> Division:
    """240 bands of rows through all matrices."""

    def band(index: int) -> Unit:
        edges = ((m.name, (index * m.rows // DIVISIONS, (index + 1) * m.rows // DIVISIONS)) for m in matrices)
        return [(name, (start, stop)) for name, (start, stop) in edges if stop > start]

    return Division(DIVISIONS, band)


_DIVIDE = {"slot": _slots, "block": _blocks, "matrix": _matrices, "row": _bands}


def _suggestion(matrices: Sequence[Matrix], loraid: Loraid) -> str:
    """For each kind of unit the largest number per LORAID, up to 12, at which this LORAID owns something."""
    fits = []
    for kind, divide in _DIVIDE.items():
        total, unit = divide(matrices)
        for n in range(12, 0, -1):
            if any(unit(index) for index in range((loraid.number - 1) * n, min(loraid.number * n, total))):
                fits.append(f"unit '{kind}' with {n} per LORAID")
                break
    if not fits:
        return "No setting gives this model that many LORAIDs."
    return f"It would fit with {' or '.join(fits)}."


def from_metadata(metadata: Mapping[str, str]) -> Loraid | None:
    """The LORAID a file declares, or None. Older files carry the number alone: those own real blocks."""
    number = metadata.get("ss_loraid", "")
    if not number.isdigit() or int(number) == 0:
        return None
    try:
        if metadata.get("ss_loraid_version") is None:
            return Loraid(number=int(number), unit="block")
        if metadata["ss_loraid_version"] != VERSION:
            raise ValueError(
                f"its LORAID is divided by version {metadata['ss_loraid_version']} of the rule, this pack knows "
                f"version {VERSION}: update the pack."
            )
        return Loraid(
            number=int(number),
            unit=metadata["ss_loraid_unit"],
            units_per_id=int(metadata["ss_loraid_units_per_id"]),
        )
    except KeyError as error:
        raise ValueError(f"its LORAID is incomplete: {error} is missing in the metadata.") from error
