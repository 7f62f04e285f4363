"""LoRA files: read in every dialect that is about, into one form; written in the dialects that other tools take."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io import safetensors
from ..io.files import read_json
from .factors import DoRAFactors, Factors, LoHaFactors, LoKrFactors, LoRAFactors, summed
from .inventory import Matrix
from .names import LoRANames, Named, Placed, renamed, stems
from .patterns import chosen

# Prefixes of the modules' names, dotted or with underscores for dots, and what writes them.
_PREFIXES = {
    "lora_unet__": "underscored names with two bars", "lora_unet_": "training names", "lycoris_": "LyCORIS",
    "lora_transformer_": "OneTrainer", "model.diffusion_model.": "dotted names", "diffusion_model.": "dotted names",
    "base_model.model.": "PEFT", "transformer.": "dotted names after 'transformer'", "pipe.dit.": "DiffSynth", "": "bare names",
}  # fmt: skip
_SUFFIXES = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_A": "down", ".lora_B": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".dora_scale": "dora", ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora", ".lora_magnitude_vector.default.weight": "dora",
}  # fmt: skip
_SUFFIXES |= {
    f".{role}": role
    for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    )
}  # fmt: skip
_OTHER_KINDS = {
    r"oft_|boft_": "OFT", r"hada_t\d|lokr_t2|lora_mid": "Tucker factors, which are for convolutions",
    r"\.(a1|b1|a2|b2)\.weight$": "GLoRA",
}  # fmt: skip
_ADAPTER_METADATA = "lora_adapter_metadata"  # what diffusers (0.34 and newer) keeps PEFT's settings under


@dataclass(frozen=True)
class Dialect:
    """How a file is written. `names` is the field of LoRANames for its matrices, or "" for the model's own. `alpha` says
    where alpha / rank is kept: in a tensor, in both factors, or in the metadata as diffusers has it."""

    title: str
    prefix: str
    separator: str
    down: str
    up: str
    names: str = ""
    alpha: str = "tensor"
    kinds: tuple[str, ...] = ("lora",)


_ALL = ("lora", "loha", "lokr", "dora")
DIALECTS = {
    "training": Dialect("training names, as trainers write them", "lora_unet_", "_", "lora_down.weight", "lora_up.weight", kinds=_ALL),
    "comfyui": Dialect("ComfyUI", "diffusion_model.", ".", "lora_down.weight", "lora_up.weight", "comfyui", kinds=_ALL),
    "peft": Dialect("PEFT", "diffusion_model.", ".", "lora_A.weight", "lora_B.weight"),
    "peft_folded": Dialect("PEFT, alpha multiplied into both factors", "diffusion_model.", ".", "lora_A.weight",
                           "lora_B.weight", alpha="factors"),
    "diffusers": Dialect("diffusers", "transformer.", ".", "lora_A.weight", "lora_B.weight", "diffusers", alpha="metadata"),
}  # fmt: skip


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA read from disk, its matrices by their names in the model. `matched` keys belong to one of them, `unmatched`
    fit nothing; `dtype` is what the file is stored in, `names` are those of the model's family."""

    path: Path
    metadata: dict[str, str]
    factors: dict[str, Factors]
    unmatched: list[str]
    matched: int = 0
    dialect: str = ""
    dtype: torch.dtype = torch.float32
    names: LoRANames = field(default_factory=LoRANames)

    def report(self) -> str:
        """Dialect, kinds, ranks, alphas and keys, for people."""
        kinds = "".join(f" {kind}," for kind in sorted({factors.kind for factors in self.factors.values()} - {"lora"}))
        ranks = _listed(sorted({factors.rank for factors in self.factors.values()}))
        alphas = _listed(sorted({factors.alpha for factors in self.factors.values()}))
        words = f"{self.dialect},{kinds} rank {ranks}, alpha {alphas}, {self.matched} keys matched"
        if self.unmatched:
            words += f", {len(self.unmatched)} keys belong to no matrix: {', '.join(self.unmatched[:3])}"
        return words


def _listed(numbers: Sequence[float]) -> str:
    shown = ", ".join(f"{number:g}" for number in numbers[:4])
    return shown if len(numbers) <= 4 else f"{shown} ... {numbers[-1]:g}"


def read(path: Path, matrices: Iterable[Matrix], title: str, names: LoRANames | None = None,
         include: Sequence[str] = (), exclude: Sequence[str] = ()) -> LoRAFile:  # fmt: skip
    """Read a LoRA for a model with these matrices; `title` names the model in errors, `names` are its family's.

    `include` and `exclude` are patterns on whole names of matrices. Raises ValueError when the file is damaged, of a kind
    that is not supported, has factors of a wrong shape, or when nothing in it belongs to this model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the LoRA {path} does not exist.")
    tensors, metadata = safetensors.load(path)
    _refuse_other_kinds(path, tensors)
    by_name = {matrix.name: matrix for matrix in matrices}
    names = names or LoRANames()
    known, prefixes = stems(by_name, names), {**dict.fromkeys(names.prefixes, "the authors' own"), **_PREFIXES}
    modules: dict[str, dict[str, Tensor]] = {}
    dialects: Counter[str] = Counter()
    unmatched = []
    for key, value in tensors.items():
        stem, prefix, role = _resolve(key, known, prefixes)
        if stem is None:
            unmatched.append(key)
        else:
            modules.setdefault(stem, {})[role] = value
            dialects[_dialect(key, prefixes[prefix], known[stem][0])] += 1
    if not modules:
        raise ValueError(_foreign(path, list(tensors), metadata, title))
    alphas = _declared_alphas(path, metadata)
    parts: dict[str, list[Factors]] = {}
    for stem, found in modules.items():
        whole = _factors(path, stem, found, alphas(stem, found))
        placed = [(place.name, _placed(path, whole, place, by_name[place.name])) for place in known[stem][1]]
        trained = [one for one in placed if one[1].touched != (0, 0)]  # of a fused matrix perhaps not all
        for name, factors in trained or placed:
            parts.setdefault(name, []).append(factors)
    wanted = chosen(parts, include, exclude, list(by_name))
    if not wanted:
        raise ValueError(f"{path.name}: include and exclude leave none of its {len(parts)} matrices: widen them.")
    factors = {name: _joined(parts[name]) for name in by_name if name in set(wanted)}
    stored = {
        value.dtype for found in modules.values() for role, value in found.items() if role not in ("alpha", "dora")
    }
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    dtype = dtype if dtype.is_floating_point else torch.float32
    return LoRAFile(
        path,
        metadata,
        factors,
        unmatched,
        len(tensors) - len(unmatched),
        dialects.most_common(1)[0][0],
        dtype,
        names,
    )


def _joined(parts: Sequence[Factors]) -> Factors:
    return parts[0] if len(parts) == 1 else summed([part.to(torch.float32) for part in parts])


def _refuse_other_kinds(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise ValueError(
                    f"{path.name} is neither a LoRA nor a LoHa, LoKr or DoRA of matrices: '{key}' is of {kind}, which cannot be "
                    "applied. Use one of these."
                )


def _resolve(key: str, known: Mapping, prefixes: Mapping[str, str]) -> tuple[str | None, str, str]:
    """The module's name, the prefix before it and the role of the tensor."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            stem = key.removesuffix(suffix)
            for prefix in prefixes:
                if stem.startswith(prefix) and stem[len(prefix) :] in known:
                    return stem[len(prefix) :], prefix, role
    return None, "", ""


def _dialect(key: str, prefix_title: str, naming: str) -> str:
    form = "lora_A" if ".lora_A" in key or ".lora_B" in key else ""
    return ", ".join(word for word in (prefix_title, form, naming) if word)


def _declared_alphas(path: Path, metadata: Mapping[str, str]) -> Callable[[str, Mapping[str, Tensor]], float | None]:
    """(module, its tensors) -> alpha: from a tensor, or from PEFT's settings in the metadata or in the file beside."""
    settings = _peft_settings_of(path, metadata)
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}

    def of(stem: str, found: Mapping[str, Tensor]) -> float | None:
        if "alpha" in found:
            if found["alpha"].numel() != 1:
                raise ValueError(
                    f"{path.name}: '{stem}' has {found['alpha'].numel()} alphas: the file is damaged, get it again."
                )
            return float(found["alpha"])
        value = next((value for name, value in patterns.items() if stem == name or stem.endswith("." + name)), alpha)
        if value is None or "down" not in found:
            return None
        return float(value) * (math.sqrt(len(found["down"])) if settings.get("use_rslora") else 1.0)

    return of


def _peft_settings_of(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """PEFT's settings with the names that it gives them, or nothing. Raises ValueError for what cannot be any."""
    settings: Any = {}
    try:
        if _ADAPTER_METADATA in metadata:
            settings = json.loads(metadata[_ADAPTER_METADATA])
            settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        elif path.name.startswith("adapter_model") and (beside := path.with_name("adapter_config.json")).is_file():
            settings = read_json(beside)
        alphas = [settings.get("lora_alpha"), *(settings.get("alpha_pattern") or {}).values()]
        if not all(alpha is None or math.isfinite(alpha) for alpha in alphas):
            raise ValueError("an alpha is not finite")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: PEFT's settings of it cannot be read ({error}): get the file again.") from error
    return settings


def _factors(path: Path, name: str, found: Mapping[str, Tensor], alpha: float | None) -> Factors:
    parts = {role: _kept(value) for role, value in found.items() if role not in ("alpha", "dora")}
    for value in parts.values():
        if value.ndim != 2:
            raise ValueError(f"{path.name}: '{name}' has factors of {value.ndim} dimensions, a matrix's have 2: this is a "
                             "LoRA for convolutions, which this model has none of.")  # fmt: skip
    if not all(value.isfinite().all() for value in parts.values()) or not math.isfinite(alpha or 0.0):
        raise ValueError(f"{path.name}: '{name}' holds values that are not finite: its training went wrong, use an earlier "
                         "file of it.")  # fmt: skip
    for roles, make in _KINDS:
        if parts and parts.keys() == roles:
            factors = make(parts, alpha)
            break
    else:
        raise ValueError(f"{path.name}: '{name}' has only {' and '.join(found)}: the file is damaged, get it again.")
    if not all(a.shape[1] == b.shape[0] > 0 for a, b in factors.products):
        raise ValueError(
            f"{path.name}: the factors of '{name}' do not fit each other: the file is damaged, get it again."
        )
    return factors if "dora" not in found else _dora(path, name, factors, found["dora"].float())


def _kept(value: Tensor) -> Tensor:
    """As it is stored where it can be computed with: a LoRA of a large model is 600 MB in 16 bits."""
    return value if value.dtype in (torch.bfloat16, torch.float16) else value.float()


def _dora(path: Path, name: str, inner: Factors, magnitude: Tensor) -> DoRAFactors:
    rows, columns = inner.shape
    if magnitude.shape not in ((rows,), (rows, 1), (1, columns)) or not magnitude.isfinite().all():
        raise ValueError(
            f"{path.name}: '{name}' is a DoRA with lengths of shape {tuple(magnitude.shape)} for a matrix of {rows} x {columns}, "
            "which has a length for each row or for each column: the file is damaged, get it again."
        )
    return DoRAFactors(inner, magnitude if magnitude.shape == (1, columns) else magnitude.reshape(rows, 1))


def _placed(path: Path, whole: Factors, place: Placed, matrix: Matrix) -> Factors:
    """The share of a file's matrix that belongs to the model's, where it belongs."""
    start, stop = place.of_ours.rows(matrix.rows)
    theirs = (place.of_theirs.whole(stop - start), matrix.columns)
    if whole.shape != theirs:
        raise ValueError(
            f"{path.name}: '{matrix.name}' is for a matrix of {whole.shape[0]} x {whole.shape[1]}, this model's is "
            f"{theirs[0]} x {theirs[1]}: the LoRA was made for another size of the model, or for another model."
        )
    rows = place.of_theirs.rows(theirs[0])
    try:
        cut = whole if rows == (0, theirs[0]) else whole.cut(rows)
        return cut if (start, stop) == (0, matrix.rows) else cut.placed(start, matrix.rows)
    except ValueError as error:
        raise ValueError(f"{path.name}: '{matrix.name}': {error}") from error


def _lora(parts: Mapping[str, Tensor], alpha: float | None) -> LoRAFactors:
    return LoRAFactors(parts["down"], parts["up"], _or_rank(alpha, parts["down"]))


def _loha(parts: Mapping[str, Tensor], alpha: float | None) -> LoHaFactors:
    factors = (parts[f"hada_{name}"].float() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return LoHaFactors(*factors, _or_rank(alpha, parts["hada_w1_b"]))


def _lokr(parts: Mapping[str, Tensor], alpha: float | None) -> LoKrFactors:
    """alpha counts where a factor is divided; with both divided, w2's rank is the one it is divided by."""
    parts = {role: value.float() for role, value in parts.items()}
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


def save(path: Path, factors: Mapping[str, Factors], metadata: Mapping[str, str], dialect: str = "",
         names: LoRANames | None = None) -> None:  # fmt: skip
    """Write a LoRA in the dtypes of the factors; atomic. `names` are those of the model's family, which also say in which
    dialect it is written where none is given.

    Raises ValueError for factors that the dialect has no form for.
    """
    names = names or LoRANames()
    form = DIALECTS[dialect or names.saved]
    modules = _modules(factors, getattr(names, form.names) if form.names else ())
    tensors: dict[str, Tensor] = {}
    for module, factor in modules.items():
        if factor.kind not in form.kinds:
            raise ValueError(f"'{module}' is a {factor.kind}, which {form.title} has no form for: resize it to a LoRA first, or "
                             "choose training or comfyui.")  # fmt: skip
        stem = form.prefix + module.replace(".", form.separator)
        if form.alpha == "tensor":
            tensors[f"{stem}.alpha"] = torch.tensor(factor.alpha)  # float32: rounded, it would scale what was trained
        elif form.alpha == "factors":
            factor = _folded(factor)
        roles = {"down": form.down, "up": form.up}
        tensors |= {f"{stem}.{roles.get(role, role)}": value for role, value in factor.tensors().items()}
    metadata = {key: value for key, value in metadata.items() if key != _ADAPTER_METADATA}
    if form.alpha == "metadata":
        metadata[_ADAPTER_METADATA] = json.dumps(_peft_settings(modules))
    write(path, tensors, metadata)


def _modules(factors: Mapping[str, Factors], table: Sequence[Named]) -> dict[str, Factors]:
    """The factors by the matrices of a tool that names and divides them by this table."""
    found = {}
    for theirs, places in renamed(factors, table).items():
        parts = []
        for place in places:
            ours = factors[place.name]
            rows = place.of_ours.rows(ours.shape[0])
            cut = ours if rows == (0, ours.shape[0]) else ours.cut(rows)
            start, stop = place.of_theirs.rows(total := place.of_theirs.whole(cut.shape[0]))
            parts.append(cut if stop - start == total else cut.placed(start, total))
        whole = summed(parts)
        if whole.touched != (0, 0) or places[0].of_ours.of == 1:  # a divided matrix may be trained in part
            found[theirs] = whole
    return found


def _folded(factor: LoRAFactors) -> LoRAFactors:
    """With alpha / rank as root in both factors, as converters of the field have it; a sign goes to `up`."""
    root = math.sqrt(abs(factor.scale))
    up = factor.up.float() * math.copysign(root, factor.scale)
    return LoRAFactors((factor.down.float() * root).to(factor.down.dtype), up.to(factor.up.dtype), float(factor.rank))


def _peft_settings(modules: Mapping[str, LoRAFactors]) -> dict[str, object]:
    """What diffusers makes PEFT's LoraConfig of: the most frequent rank and alpha, and the exceptions."""
    rank = Counter(factor.rank for factor in modules.values()).most_common(1)[0][0]
    alpha = Counter(factor.alpha for factor in modules.values()).most_common(1)[0][0]
    settings = {
        "r": rank, "lora_alpha": alpha, "target_modules": list(modules),
        "rank_pattern": {name: factor.rank for name, factor in modules.items() if factor.rank != rank},
        "alpha_pattern": {name: factor.alpha for name, factor in modules.items() if factor.alpha != alpha},
    }  # fmt: skip
    return {f"transformer.{key}": value for key, value in settings.items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA's tensors with metadata whose hashes are theirs; atomic."""
    metadata = {key: value for key, value in metadata.items() if key != "modelspec.hash_sha256"}
    trained = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    model, legacy = safetensors.model_hashes(tensors, trained)
    hashes = {"sshs_model_hash": model, "sshs_legacy_hash": legacy}
    safetensors.save(path, tensors, {**metadata, **hashes, "videolora_hash": safetensors.sha256_of_tensors(tensors)})
