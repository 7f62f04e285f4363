"""LoRA files: one form in memory, written in the names that trainers and ComfyUI's own loader know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..io import safetensors
from .inventory import Matrix
from .loraid import Rows

_STEM = "lora_unet_"
# Prefixes of the modules' paths, dotted or with underscores for dots, as different trainers write them.
_PREFIXES = (
    "lora_unet__", "lora_unet_", "lycoris_", "lora_transformer_",
    "model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "pipe.dit.", "",
)  # fmt: skip
_SUFFIXES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_A": "down", ".lora_B": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
}  # fmt: skip
_OTHER_KINDS = re.compile(r"(hada_w\d|lokr_w\d|oft_|boft_|\.diff(_b|_m)?$|dora_scale)")


@dataclass(frozen=True)
class Factors:
    """One matrix's LoRA: delta = alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    @cached_property
    def touched(self) -> Rows:
        """The output rows [start, stop) outside of which `up` is zero: what it really changes."""
        rows = self.up.ne(0).any(dim=1).nonzero()
        return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA read from disk, its matrices by their names in the model. `unmatched` are the keys that fit nothing."""

    path: Path
    metadata: dict[str, str]
    factors: dict[str, Factors]
    unmatched: list[str]


def read(path: Path, matrices: Iterable[Matrix], title: str) -> LoRAFile:
    """Read a LoRA for a model with these matrices; `title` names the model in errors.

    Raises ValueError when the file is damaged, of a kind that is not supported, has factors of a wrong shape, or when
    nothing in it belongs to this model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the LoRA {path} does not exist.")
    tensors, metadata = safetensors.load(path)
    if any(_OTHER_KINDS.search(key) for key in tensors):
        raise ValueError(
            f"{path.name} is no plain LoRA (LoHa, LoKr, DoRA and full differences cannot be read). Use a plain LoRA."
        )
    by_name = {matrix.name: matrix for matrix in matrices}
    by_stem = {name.replace(".", "_"): name for name in by_name} | {name: name for name in by_name}
    parts: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, value in tensors.items():
        name, role = _resolve(key, by_stem)
        if name is None:
            unmatched.append(key)
        else:
            parts.setdefault(name, {})[role] = value
    if not parts:
        raise ValueError(_foreign(path, list(tensors), metadata, title))
    factors = {name: _factors(path, by_name[name], found) for name, found in parts.items()}
    return LoRAFile(path, metadata, factors, unmatched)


def _resolve(key: str, by_stem: Mapping[str, str]) -> tuple[str | None, str]:
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            stem = key.removesuffix(suffix)
            for prefix in _PREFIXES:
                if stem.startswith(prefix) and stem[len(prefix) :] in by_stem:
                    return by_stem[stem[len(prefix) :]], role
    return None, ""


def _factors(path: Path, matrix: Matrix, found: Mapping[str, Tensor]) -> Factors:
    if "down" not in found or "up" not in found:
        raise ValueError(
            f"{path.name}: '{matrix.name}' has only {' and '.join(found)}: the file is damaged, get it again."
        )
    down, up = found["down"].float(), found["up"].float()
    if down.ndim != 2 or up.ndim != 2:
        raise ValueError(f"{path.name}: '{matrix.name}' has factors of {down.ndim} dimensions, a matrix's have 2: this is a LoRA "
                         "for convolutions, which this model has none of.")  # fmt: skip
    if up.shape != (matrix.rows, down.shape[0]) or down.shape[1] != matrix.columns:
        raise ValueError(
            f"{path.name}: '{matrix.name}' is for a matrix of {up.shape[0]} x {down.shape[-1]}, this model's is "
            f"{matrix.rows} x {matrix.columns}: the LoRA belongs to another size of the model."
        )
    # Without an alpha the delta is up @ down as it stands.
    return Factors(down, up, float(found["alpha"]) if "alpha" in found else float(down.shape[0]))


def _foreign(path: Path, keys: list[str], metadata: Mapping[str, str], title: str) -> str:
    if not any(key.endswith(tuple(_SUFFIXES)) for key in keys):
        return f"{path.name} is no LoRA: its tensors are {', '.join(keys[:3])}, ..."
    made_for = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    origin = f"it was made for '{made_for}'" if made_for else f"its keys look like '{keys[0]}'"
    return f"{path.name} does not belong to this model ({title}): none of its {len(keys)} keys match, {origin}."


def save(path: Path, factors: Mapping[str, Factors], metadata: Mapping[str, str]) -> None:
    """Write a LoRA that ComfyUI's own loader and the usual scripts read, in the dtypes of the factors; atomic."""
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        stem = _STEM + name.replace(".", "_")
        tensors[f"{stem}.alpha"] = torch.tensor(factor.alpha)  # float32: rounded, it would scale what was trained
        tensors[f"{stem}.lora_down.weight"] = factor.down
        tensors[f"{stem}.lora_up.weight"] = factor.up
    safetensors.save(path, tensors, {**metadata, "videolora_hash": safetensors.sha256_of_tensors(tensors)})
