"""How other tools name a transformer's matrices, and which rows of theirs are which rows of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..keymap import KeyMap


class Share(NamedTuple):
    """Parts [start, stop) of a matrix whose rows are divided into `of` equal parts."""

    start: int = 0
    stop: int = 1
    of: int = 1

    def rows(self, total: int) -> tuple[int, int]:
        """Rows [start, stop) of a matrix with `total` rows."""
        return self.start * total // self.of, self.stop * total // self.of

    def whole(self, rows: int) -> int:
        """Rows of the matrix of which this share has `rows`."""
        return rows * self.of // (self.stop - self.start)


WHOLE = Share()


@dataclass(frozen=True)
class Named:
    """A matrix in another tool's names, `{i}` for the block's number: its rows `of_theirs` are the rows `of_ours` of the
    model's matrix."""

    theirs: str
    ours: str
    of_theirs: Share = WHOLE
    of_ours: Share = WHOLE


@dataclass(frozen=True, kw_only=True)
class LoRANames:
    """A family's matrices in the names of others; a matrix that a table does not list has the model's own name there.

    comfyui     what ComfyUI's own LoRA loader finds
    diffusers   as diffusers has the model
    aliases     further names that are read and not written
    prefixes    further prefixes of names
    saved       the dialect that LoRAs are saved in, of which ComfyUI's own loader must find every key
    """

    comfyui: tuple[Named, ...] = ()
    diffusers: tuple[Named, ...] = ()
    aliases: tuple[Named, ...] = ()
    prefixes: tuple[str, ...] = ()
    saved: str = "training"


class Placed(NamedTuple):
    """Where a file's matrix belongs: its rows `of_theirs` are rows `of_ours` of the model's matrix `name`."""

    name: str
    of_theirs: Share
    of_ours: Share


def renamed(names: Iterable[str], table: Iterable[Named]) -> dict[str, list[Placed]]:
    """A tool's matrices for a model's `names`, in their order."""
    rules = [(KeyMap(((entry.ours, entry.theirs),)), entry) for entry in table]
    found: dict[str, list[Placed]] = {}
    for name in names:
        listed = [(keymap.to_model(name), entry) for keymap, entry in rules]
        entries = [(theirs, entry) for theirs, entry in listed if theirs != name]
        for theirs, entry in entries or [(name, Named(name, name))]:
            found.setdefault(theirs, []).append(Placed(name, entry.of_theirs, entry.of_ours))
    return found


def stems(names: Iterable[str], known: LoRANames) -> dict[str, tuple[str, list[Placed]]]:
    """Every name a model's matrices may have in a file, dotted and with underscores: title of the naming, and the places."""
    names = list(names)
    tables: Mapping[str, tuple[Named, ...]] = {
        "": (), "ComfyUI's names": (*known.comfyui, *known.aliases), "diffusers' names": known.diffusers,
    }  # fmt: skip
    found: dict[str, tuple[str, list[Placed]]] = {}
    for title, table in tables.items():
        for theirs, places in renamed(names, table).items():
            for stem in (theirs, theirs.replace(".", "_")):
                found.setdefault(stem, (title, places))
    return found
