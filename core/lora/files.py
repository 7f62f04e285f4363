"""LoRA files: one form in memory, written in the names that trainers and ComfyUI's own loader know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..io import safetensors
from .factors import Factors, LoHaFactors, LoKrFactors, LoRAFactors
from .inventory import Matrix

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
_SUFFIXES |= {
    f".{role}": role
    for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    )
}  # fmt: skip
_WRITTEN = {"down": "lora_down.weight", "up": "lora_up.weight"}  # other roles are written as they are called
_OTHER_KINDS = re.compile(r"(hada_t\d|lokr_t2|oft_|boft_|\.diff(_b|_m)?$|dora_scale)")


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
            f"{path.name} is neither a LoRA nor a LoHa or LoKr of matrices (DoRA, OFT, full differences and convolutions "
            "cannot be read). Use one of these."
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
    parts = {role: value.float() for role, value in found.items() if role != "alpha"}
    for value in parts.values():
        if value.ndim != 2:
            raise ValueError(f"{path.name}: '{matrix.name}' has factors of {value.ndim} dimensions, a matrix's have 2: this is a "
                             "LoRA for convolutions, which this model has none of.")  # fmt: skip
    for roles, make in _KINDS:
        if parts and parts.keys() == roles:
            factors = make(parts, float(found["alpha"]) if "alpha" in found else None)
            break
    else:
        raise ValueError(
            f"{path.name}: '{matrix.name}' has only {' and '.join(found)}: the file is damaged, get it again."
        )
    fits = all(a.shape[1] == b.shape[0] for a, b in factors.products)
    if not fits or factors.shape != (matrix.rows, matrix.columns):
        raise ValueError(
            f"{path.name}: '{matrix.name}' is for a matrix of {factors.shape[0]} x {factors.shape[1]}, this model's is "
            f"{matrix.rows} x {matrix.columns}: the LoRA belongs to another size of the model."
        )
    return factors


def _lora(parts: Mapping[str, Tensor], alpha: float | None) -> LoRAFactors:
    return LoRAFactors(parts["down"], parts["up"], _or_rank(alpha, parts["down"]))


def _loha(parts: Mapping[str, Tensor], alpha: float | None) -> LoHaFactors:
    factors = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return LoHaFactors(*factors, _or_rank(alpha, parts["hada_w1_b"]))


def _lokr(parts: Mapping[str, Tensor], alpha: float | None) -> LoKrFactors:
    """alpha counts where a factor is divided; with both divided, w2's rank is the one it is divided by."""
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" not in parts:
        return LoKrFactors(w1, parts["lokr_w2_a"], parts["lokr_w2_b"], _or_rank(alpha, parts["lokr_w2_b"]))
    if "lokr_w1" not in parts and alpha is not None:
        w1 = w1 * (alpha / parts["lokr_w1_b"].shape[0])
    return LoKrFactors(w1, parts["lokr_w2"], None, 1.0)


def _or_rank(alpha: float | None, by_rank: Tensor) -> float:
    """Without an alpha the delta is the product as it stands."""
    return float(by_rank.shape[0]) if alpha is None else alpha


_KINDS: tuple[tuple[set[str], Callable[[Mapping[str, Tensor], float | None], Factors]], ...] = (
    ({"down", "up"}, _lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, _loha),
    ({"lokr_w1", "lokr_w2"}, _lokr),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, _lokr),
)


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
        tensors |= {f"{stem}.{_WRITTEN.get(role, role)}": value for role, value in factor.tensors().items()}
    trained = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    model, legacy = safetensors.model_hashes(tensors, trained)
    hashes = {"sshs_model_hash": model, "sshs_legacy_hash": legacy}
    safetensors.save(path, tensors, {**metadata, **hashes, "videolora_hash": safetensors.sha256_of_tensors(tensors)})
