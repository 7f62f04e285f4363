"""What the editor draws in nodes while their values are changed. Nothing is executed: files are recognised by their headers, and
what a LoRA touches is read from it. Answers are made for JSON."""

from __future__ import annotations

import functools
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..core.checks import require
from ..core.io.safetensors import read_header
from ..core.lora import loraid, workbench
from ..core.lora.inspection import kind_of, shared_rows
from ..core.lora.inventory import Matrix, blocks_of
from ..core.lora.loraid import Loraid, Rows
from ..core.lora.stack import StackEntry
from ..core.sampling.guidance import cfg_plan
from ..core.shapes import VideoSize
from . import paths
from .handles import DiTFile
from .loaders import open_expert
from .sampling import schedule_for

_MOST_LORAS = 16
_MOST_STEPS = 1000
_MOST_BYTES = 4 << 30  # of a dropped file
_NAME = re.compile(r"[^/\\\0]{1,150}\.safetensors")
_TOKEN = re.compile(r"[0-9a-f]{32}")


def schedule(wanted: dict[str, Any]) -> dict[str, Any]:
    """Flow Schedule's and CFG Skip's answer: `shift`, `sigmas`, `plan` (a letter per step), and the `boundary` of a pair of
    experts.

    `wanted` holds the model (see `_opening`), steps, shift, solver, size [frames, height, width] or nothing, and cfg_skip and
    cfg_ratio or nothing.
    """
    dit = _opened(*_opening(wanted))
    sides = wanted.get("size")
    require(not sides or (isinstance(sides, list) and len(sides) == 3), "size must be [frames, height, width].")
    size = VideoSize(*(_whole(side, 1, 10000) for side in sides)) if sides else dit.variant.size
    steps = _whole(wanted.get("steps"), 1, _MOST_STEPS)
    made = schedule_for(dit.variant, size, steps, _number(wanted.get("shift", 0.0)), str(wanted.get("solver", "euler")))
    plan = cfg_plan(str(wanted.get("cfg_skip", "none")), steps, _number(wanted.get("cfg_ratio", 1.0)))
    pair = dit.variant.boundary if wanted.get("expert") else 0.0
    return {
        "model": dit.variant.title, "shift": made.shift, "recommended": not wanted.get("shift"),
        "sigmas": [round(sigma, 5) for sigma in made.sigmas.tolist()], "plan": plan,
        "boundary": _number(wanted.get("boundary", 0.0)) or pair,
    }  # fmt: skip


def ownership(wanted: dict[str, Any]) -> dict[str, Any]:
    """The model as blocks x kinds of matrices, what a LORAID owns of it, what LoRA files touch, and what is shared.

    `wanted` holds the model (see `_opening`), `loraid` {number, unit, units_per_id} or nothing, and `loras`, each {"file": a
    listed file} or {"dropped": what a dropped file was answered with, "name"}. Rows are [index of the matrix, start, stop].
    What cannot be read or does not exist has an `error` in its place.
    """
    opening = _opening(wanted)
    dit = _opened(*opening)
    matrices = dit.matrices
    loras = wanted.get("loras") or []
    require(isinstance(loras, list) and len(loras) <= _MOST_LORAS, f"loras must be a list of at most {_MOST_LORAS}.")
    own, number = None, wanted.get("loraid")
    if number is not None:
        own = _owned(matrices, number)
    shown = [_touched(lora, opening) for lora in loras]
    index = {matrix.name: at for at, matrix in enumerate(matrices)}
    everyone = [("own", own), *enumerate(shown)]
    touching = [(who, one["rows"]) for who, one in everyone if one and "rows" in one]
    shared = [
        {"between": [a, b], **_listed(rows, index, matrices)}
        for at, (b, others) in enumerate(touching)
        for a, mine in touching[:at]
        if (rows := shared_rows(mine, others))
    ]
    kinds, blocks = list(dict.fromkeys(map(kind_of, matrices))), blocks_of(matrices)
    at_block, at_kind = ({name: at for at, name in enumerate(names)} for names in (blocks, kinds))
    return {
        "model": dit.variant.title, "blocks": blocks, "kinds": kinds,
        "matrices": [[at_block[one.block], at_kind[kind_of(one)], one.rows, one.columns] for one in matrices],
        "parameters": sum(one.parameters for one in matrices),
        "own": own and _in_json(own, index, matrices), "loras": [_in_json(one, index, matrices) for one in shown],
        "shared": shared,
    }  # fmt: skip


Opening = tuple[Path, str, str, int]
"""A model file, its variant, the expert it is to be, and when it was written: what `_opened` takes."""


def _opening(wanted: Mapping[str, Any]) -> Opening:
    """By `model`, a listed file, with its `variant` as in Load Video DiT, or as the `expert` of a pair."""
    path = paths.model_path("diffusion_models", str(wanted.get("model", "")))
    return path, str(wanted.get("variant") or "auto"), str(wanted.get("expert") or ""), path.stat().st_mtime_ns


@functools.lru_cache(8)
def _opened(path: Path, variant: str, expert: str, _written: int) -> DiTFile:
    return open_expert(path, expert) if expert else DiTFile.open(path, variant)


def _owned(matrices: tuple[Matrix, ...], wanted: Any) -> dict[str, Any]:
    """Of the LORAID; `owners` are the numbers that own each matrix, where a matrix has one owner."""
    try:
        chosen = Loraid(
            number=_whole(wanted.get("number"), 0, 10**6), unit=str(wanted.get("unit")),
            units_per_id=_whole(wanted.get("units_per_id"), 0, 10**6),
        )  # fmt: skip
        share = loraid.allocate(matrices, chosen)
    except (ValueError, AttributeError) as error:
        return {"error": str(error)}
    owners = None
    if chosen.unit != "row":
        by_name = _owners(matrices, chosen.unit, chosen.units_per_id)
        owners = [by_name.get(matrix.name) for matrix in matrices]
    return {
        "number": chosen.number, "count": -(-share.total // chosen.units_per_id), "rows": share.rows, "owners": owners,
        "text": share.report().splitlines()[0],
    }  # fmt: skip


@functools.lru_cache(8)
def _owners(matrices: tuple[Matrix, ...], unit: str, units_per_id: int) -> dict[str, int]:
    shares = loraid.allocations(matrices, unit, units_per_id)
    return {name: share.loraid.number for share in shares for name in share.rows}


def _touched(lora: Any, opening: Opening) -> dict[str, Any]:
    """What a LoRA file is and touches, or the reason why that cannot be said."""
    require(isinstance(lora, dict), "a LoRA is given as {'file': name} or {'dropped': token, 'name': name}.")
    name = str(lora.get("name") or lora.get("file", ""))[:200]
    try:
        path = Dropped.path(lora["dropped"]) if "dropped" in lora else paths.model_path("loras", name)
    except ValueError as error:
        return {"name": name, "error": str(error)}
    try:
        return {"name": name, **_read(path, path.stat().st_mtime_ns, opening)}
    except (ValueError, OSError) as error:
        return {"name": name, "error": str(error).replace(path.name, Path(name).name)}


@functools.lru_cache(64)
def _read(path: Path, _written: int, opening: Opening) -> dict[str, Any]:
    file = workbench.read(_opened(*opening), StackEntry(path))
    declared = loraid.from_metadata(file.metadata)
    rows = {name: one.touched for name, one in file.factors.items() if one.touched[0] < one.touched[1]}
    number = f"LORAID {declared.number} by {declared.unit}" if declared else "no LORAID"
    return {"rows": rows, "text": f"{number}; {file.report()}", "loraid": declared.number if declared else None}


def _in_json(one: dict[str, Any], index: Mapping[str, int], matrices: tuple[Matrix, ...]) -> dict[str, Any]:
    return {**one, **_listed(one["rows"], index, matrices)} if "rows" in one else one


def _listed(rows: Mapping[str, Rows], index: Mapping[str, int], matrices: tuple[Matrix, ...]) -> dict[str, Any]:
    parameters = sum((stop - start) * matrices[index[name]].columns for name, (start, stop) in rows.items())
    return {"rows": [[index[name], *span] for name, span in rows.items()], "parameters": parameters}


def _whole(value: Any, least: int, most: int) -> int:
    require(isinstance(value, int) and least <= value <= most, f"{value!r}: use a whole number from {least} to {most}.")
    return value


def _number(value: Any) -> float:
    require(isinstance(value, int | float) and math.isfinite(value), f"{value!r} is no number.")
    return float(value)


@dataclass
class Dropped:
    """A LoRA file that was dropped on a map: kept among ComfyUI's temporary files, which go when it starts again.

    Within the block it is written; it stays only when it is a whole safetensors file.
    """

    name: str

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), f"'{self.name}' cannot be shown: drop a LoRA as a .safetensors file.")
        self.token, self.size = uuid.uuid4().hex, 0
        self.place = self._folder() / f"{self.token}.safetensors"

    @staticmethod
    def _folder() -> Path:
        return Path(folder_paths.get_temp_directory()) / "videolora"

    @classmethod
    def path(cls, token: Any) -> Path:
        """The file that a token stands for; ValueError when there is none."""
        found = cls._folder() / f"{token}.safetensors"
        require(
            bool(_TOKEN.fullmatch(str(token))) and found.is_file(),
            "this dropped file is no longer there: drop it again.",
        )
        return found

    def __enter__(self) -> Dropped:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.place, "wb")
        return self

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        require(self.size <= _MOST_BYTES, f"{self.name} is larger than {_MOST_BYTES >> 30} GiB, which no LoRA is.")
        self.file.write(chunk)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.file.close()
        try:
            if kind is None:
                read_header(self.place)
        except ValueError as error:
            kind = ValueError
            raise ValueError(
                str(error).replace(str(self.place), self.name).replace(self.place.name, self.name)
            ) from None
        finally:
            if kind is not None:
                self.place.unlink(missing_ok=True)
