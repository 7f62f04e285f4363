"""What a set of LoRAs is: the modules each one touches, where they overlap and how their deltas lie to each other there,
which LORAIDs are free; as a report and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from PIL import Image, ImageDraw, ImageFont

from . import loraid
from .factors import Factors, LoRAFactors
from .files import LoRAFile
from .inventory import Matrix, blocks_of

_MOST_RANK = 512  # larger factors are not compared: their angles would take minutes
_SCALE = 2  # drawn larger, then reduced: that smooths the edges
_PAPER, _INK, _FAINT, _EMPTY, _BOTH = (250, 250, 248), (38, 42, 51), (116, 122, 134), (232, 233, 235), (38, 42, 51)
_COLOURS = (
    (63, 112, 196),
    (224, 109, 46),
    (36, 138, 110),
    (150, 90, 190),
    (200, 60, 90),
    (60, 150, 190),
    (150, 130, 40),
    (110, 120, 140),
)
_CELL, _MARGIN, _LABEL = 14, 24, 120


@dataclass(frozen=True)
class Overlap:
    """Two LoRAs on the same rows: the matrices, their parameters, the cosine of the two deltas over all of these, and in the
    matrix where they are most alike the smallest principal angles, in degrees, of what they write and what they read.

    None where the factors are too large to compare, or a DoRA's, whose delta depends on the model.
    """

    first: int
    second: int
    matrices: list[str]
    parameters: int
    cosine: float | None = None
    closest: str = ""
    output_angle: float = 90.0
    input_angle: float = 90.0


@dataclass(frozen=True)
class Inspection:
    """LoRAs, the model's matrices, what each of the LoRAs touches (parameters of the model), and where they overlap."""

    loras: list[LoRAFile]
    matrices: list[Matrix]
    parameters: list[int]
    overlaps: list[Overlap]


def inspect(loras: Sequence[LoRAFile], matrices: Sequence[Matrix]) -> Inspection:
    """Compare LoRAs, which were read for a model with these matrices."""
    columns = {m.name: m.columns for m in matrices}
    parameters = [
        sum((f.touched[1] - f.touched[0]) * columns[name] for name, f in lora.factors.items()) for lora in loras
    ]
    pairs = (_overlap(a, b, loras[a], loras[b], columns) for a, b in combinations(range(len(loras)), 2))
    return Inspection(list(loras), list(matrices), parameters, [pair for pair in pairs if pair.matrices])


def _overlap(a: int, b: int, one: LoRAFile, other: LoRAFile, columns: dict[str, int]) -> Overlap:
    touched = ({name: factors.touched for name, factors in lora.factors.items()} for lora in (one, other))
    shared = {name: (stop - start) * columns[name] for name, (start, stop) in shared_rows(*touched).items()}
    names = [name for name in columns if name in shared]
    compared = [name for name in names if all(_comparable(f.factors[name]) for f in (one, other))]
    if not names or len(compared) < len(names):
        return Overlap(a, b, names, sum(shared.values()))
    inner = norm_a = norm_b = 0.0
    best, closest = -1.0, ""
    for name in names:
        x, y = (f.factors[name].as_lora().to(torch.float32) for f in (one, other))
        xy, xx, yy = _inner(x, y), _inner(x, x), _inner(y, y)
        inner, norm_a, norm_b = inner + xy, norm_a + xx, norm_b + yy
        if xx and yy and abs(xy) / math.sqrt(xx * yy) > best:
            best, closest = abs(xy) / math.sqrt(xx * yy), name
    cosine = inner / math.sqrt(norm_a * norm_b) if norm_a and norm_b else 0.0
    x, y = (f.factors[closest].as_lora().to(torch.float32) for f in (one, other))
    return Overlap(a, b, names, sum(shared.values()), cosine, closest, principal_angle(x.up, y.up),
                   principal_angle(x.down.t(), y.down.t()))  # fmt: skip


def shared_rows(one: Mapping[str, loraid.Rows], other: Mapping[str, loraid.Rows]) -> dict[str, loraid.Rows]:
    """The rows of matrices that are in both."""
    both = {name: (max(a, other[name][0]), min(b, other[name][1])) for name, (a, b) in one.items() if name in other}
    return {name: (start, stop) for name, (start, stop) in both.items() if start < stop}


def _comparable(factors: Factors) -> bool:
    most = (
        factors.rank**2
        if factors.kind == "loha"
        else factors.rank * (factors.w1.shape[1] if factors.kind == "lokr" else 1)
    )
    return factors.kind != "dora" and most <= _MOST_RANK


def _inner(x: LoRAFactors, y: LoRAFactors) -> float:
    """The sum of products of the elements of two deltas, by matrices of the size of their ranks."""
    return x.scale * y.scale * float(((x.up.t() @ y.up).double() * (x.down @ y.down.t()).double()).sum())


def principal_angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest angle, in degrees, between the column spaces of a (n, p) and b (n, q): 0 where they share a direction, 90
    where they are orthogonal."""
    one, other = (_basis(x) for x in (a, b))
    if not one.shape[1] or not other.shape[1]:
        return 90.0
    return math.degrees(math.acos(min(1.0, float(torch.linalg.matrix_norm(one.t() @ other, 2)))))


def _basis(x: torch.Tensor) -> torch.Tensor:
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    return u[:, s > s.max().clamp(min=1e-30) * 1e-6]


def report(found: Inspection) -> str:
    """A line or two for each LoRA, each overlap, and the free LORAIDs."""
    total = sum(m.parameters for m in found.matrices)
    lines = []
    for lora, parameters in zip(found.loras, found.parameters, strict=True):
        declared = loraid.from_metadata(lora.metadata)
        number = f"LORAID {declared.number} by {declared.unit}" if declared else "no LORAID"
        blocks = blocks_of(
            [m for m in found.matrices if lora.factors.get(m.name) and lora.factors[m.name].touched != (0, 0)]
        )
        lines.append(f"{lora.path.name} ({number}): {lora.report()}")
        lines.append(
            f"  changes {len(lora.factors)} matrices in {_span(blocks)}: {parameters:,} parameters, {parameters / total:.1%} of the model's"
        )
    for overlap in found.overlaps:
        names = " and ".join(found.loras[index].path.name for index in (overlap.first, overlap.second))
        lines.append(f"{names} overlap in {len(overlap.matrices)} matrices ({overlap.matrices[0]}, ...), {overlap.parameters:,} parameters: "
                     + _likeness(overlap))  # fmt: skip
    if len(found.loras) > 1 and not found.overlaps:
        lines.append("no overlap: no parameter is touched twice. They merge in any order to the same bytes.")
    lines += _free(found)
    return "\n".join(lines)


def _likeness(overlap: Overlap) -> str:
    if overlap.cosine is None:
        return "too large, or of a kind that cannot be compared"
    return (f"cosine of the deltas {overlap.cosine:+.3f}; in {overlap.closest} the smallest angle between what they write is "
            f"{overlap.output_angle:.0f} degrees, between what they read {overlap.input_angle:.0f}")  # fmt: skip


def _span(blocks: Sequence[str]) -> str:
    if not blocks:
        return "no block"
    return blocks[0] if len(blocks) == 1 else f"{len(blocks)} blocks, {blocks[0]} to {blocks[-1]}"


def _free(found: Inspection) -> list[str]:
    """Per way of dividing that these files use, the numbers that touch nothing of what any of them touches."""
    declared = {loraid.from_metadata(lora.metadata) for lora in found.loras} - {None}
    lines = []
    for unit, units_per_id in sorted({(one.unit, one.units_per_id) for one in declared}):
        shares = list(loraid.allocations(found.matrices, unit, units_per_id))
        sizes = [share.parameters for share in shares]
        lines.append(f"free LORAIDs by {unit}, {units_per_id} each: {_runs(_free_of(shares, found)) or 'none'}; there are {len(shares)}, "
                     f"which own {min(sizes):,} to {max(sizes):,} parameters of the model")  # fmt: skip
    return lines


def _free_of(shares: Sequence[loraid.Allocation], found: Inspection) -> list[int]:
    """The LORAIDs that share no parameter with any of the files."""
    taken: dict[str, list[loraid.Rows]] = {}
    for lora in found.loras:
        for name, factors in lora.factors.items():
            taken.setdefault(name, []).append(factors.touched)
    return [
        share.loraid.number
        for share in shares
        if not any(max(a, c) < min(b, d) for name, (a, b) in share.rows.items() for c, d in taken.get(name, ()))
    ]


def _runs(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as '1-3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def picture(found: Inspection) -> Image.Image:
    """A map per LoRA, blocks from left to right and kinds of matrices from top to bottom: how full a cell is, is the share of
    its rows that are touched; what another LoRA touches too is framed."""
    blocks = blocks_of(found.matrices)
    kinds = list(dict.fromkeys(kind_of(m) for m in found.matrices))
    across = max(len(blocks) * _CELL, 360)
    each = 34 + len(kinds) * _CELL + 26
    size = (2 * _MARGIN + _LABEL + across, 2 * _MARGIN + 44 + each * len(found.loras))
    image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image)
    _text(
        draw,
        _MARGIN,
        _MARGIN,
        f"{len(found.loras)} LoRAs on {len(blocks)} blocks, {len(found.matrices)} matrices",
        16,
        _INK,
    )
    twice = {
        (index, name)
        for overlap in found.overlaps
        for name in overlap.matrices
        for index in (overlap.first, overlap.second)
    }
    total = sum(m.parameters for m in found.matrices)
    for index, lora in enumerate(found.loras):
        top = _MARGIN + 40 + index * each
        number = lora.metadata.get("ss_loraid")
        title = (
            lora.path.stem
            + (f", LORAID {number}" if number else "")
            + f": {found.parameters[index] / total:.1%} of the model"
        )
        _text(draw, _MARGIN, top, title, 13, _COLOURS[index % len(_COLOURS)])
        for row, kind in enumerate(kinds):
            _text(draw, _MARGIN, top + 24 + row * _CELL, kind, 10, _FAINT)
        for m in found.matrices:
            left = _MARGIN + _LABEL + blocks.index(m.block) * _CELL
            y = top + 24 + kinds.index(kind_of(m)) * _CELL
            _box(draw, left, y, left + _CELL - 2, y + _CELL - 2, _EMPTY)
            start, stop = lora.factors[m.name].touched if m.name in lora.factors else (0, 0)
            if start < stop:
                height = max(2.0, (_CELL - 2) * (stop - start) / m.rows)
                offset = min((_CELL - 2) * start / m.rows, _CELL - 2 - height)
                _box(draw, left, y + offset, left + _CELL - 2, y + offset + height, _COLOURS[index % len(_COLOURS)])
            if (index, m.name) in twice:
                draw.rectangle(
                    [side * _SCALE for side in (left, y, left + _CELL - 2, y + _CELL - 2)],
                    outline=_BOTH,
                    width=2 * _SCALE,
                )
    return image.resize(size, Image.Resampling.LANCZOS)


def kind_of(matrix: Matrix) -> str:
    """Its name in its block."""
    return matrix.name.removeprefix(matrix.block + ".")


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, colour: tuple) -> None:
    draw.text((x * _SCALE, y * _SCALE), text, colour, ImageFont.load_default(size * _SCALE))


def _box(draw: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: tuple) -> None:
    draw.rectangle([side * _SCALE for side in (left, top, right, bottom)], colour)
