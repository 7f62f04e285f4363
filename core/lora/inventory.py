"""The LoRA-able matrices of a transformer, in the one order that LORAID counts them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..family import BlockKind, Family


class Matrix(NamedTuple):
    """A weight matrix (rows, columns) = (outputs, inputs); `block` is the path of the block it is in, `modulation` says
    that it is trained only where that is wished (see BlockKind)."""

    name: str
    rows: int
    columns: int
    block: str
    modulation: bool = False

    @property
    def parameters(self) -> int:
        return self.rows * self.columns


def inventory(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
    """All matrices that adapters may be put on. `shapes` are those of the model's parameters, by name."""
    matrices = []
    for kind in family.blocks:
        index = 0
        while found := _block(kind.path.replace("{i}", str(index)), kind, shapes):
            matrices += found
            index += 1
    return matrices


def blocks_of(matrices: Sequence[Matrix]) -> list[str]:
    """Paths of the transformer blocks that the matrices are in, in order."""
    return list(dict.fromkeys(matrix.block for matrix in matrices))


def _block(path: str, kind: BlockKind, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
    names = {f"{path}.{name}": name in kind.modulation for name in (*kind.matrices, *kind.modulation)}
    return [Matrix(name, *shapes[f"{name}.weight"], path, modulation)
            for name, modulation in names.items() if f"{name}.weight" in shapes]  # fmt: skip
