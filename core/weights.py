"""Checkpoints read lazily and strictly: names and shapes at once, values only when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .io import safetensors, torch_file
from .io.safetensors import TensorInfo
from .keymap import KeyMap
from .modules.quantized import FP8, Stored, Storing, restored

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
# A scaled fp8 weight is stored beside the factor that restores it (facts of the format: W = fp8 * scale).
SCALES = ("scale_weight", "weight_scale", "fp8_scale")
_FP8_MAP = "_map.pt"  # Tencent's fp8 .pt files have the factors of their layers in a file of their own
_NO_WEIGHTS = ("scaled_fp8", "spiece_model", "tokenizer", "tokenizer_json")
_NO_WEIGHT_SUFFIXES = (".comfy_quant", ".position_ids", ".scale_input", ".input_scale")


class View(NamedTuple):
    """A tensor made of rows of tensors in a file, one below the other, in a shape of as many values."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[str, slice], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], *sources: str) -> View:
        """Of whole tensors."""
        return cls(shape, tuple((source, slice(None)) for source in sources))


class Checkpoint:
    """One model file, or all the shards it belongs to.

    `tensors` maps each weight's name, without the file's prefix, to its TensorInfo. Tokenizers, fp8 scales and other
    things that are no weights are not in it; `extra(name)` reads those.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str],
                 read: Callable[[str], Tensor], prefix: str = "") -> None:  # fmt: skip
        self.path = path
        self.metadata = dict(metadata)
        self.prefix = prefix
        self._all = tensors
        self._read = read
        names = (name for name in tensors if name.startswith(prefix))
        self.tensors = {name[len(prefix) :]: tensors[name] for name in names if _is_weight(name)}

    def without_prefix(self, prefix: str) -> Checkpoint:
        """The same file, seen through the names that follow `prefix`."""
        return Checkpoint(self.path, self._all, self.metadata, self._read, prefix)

    def viewed(self, views: Mapping[str, View]) -> Checkpoint:
        """The same file as the tensors that `views` name, and no others."""

        return _Viewed(self, views)

    def shapes(self, keymap: KeyMap) -> dict[str, tuple[int, ...]]:
        """The shape of each of the model's parameters."""
        return {keymap.to_model(name): info.shape for name, info in self.tensors.items()}

    def dtypes(self, keymap: KeyMap) -> dict[str, torch.dtype]:
        """The dtype in which each of the model's parameters is stored."""
        return {keymap.to_model(name): info.dtype for name, info in self.tensors.items()}

    def extra(self, name: str) -> Tensor | None:
        """A tensor that is no weight, such as a tokenizer, or None."""
        return self._read(name) if name in self._all else None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One weight on the CPU, fp8 scales applied; in `dtype`, or as it is stored."""
        stored = self.read_stored(name)
        if stored.scale is not None:
            return restored(*stored, dtype or torch.bfloat16)
        return stored.weight if dtype is None else stored.weight.to(dtype)

    def read_stored(self, name: str) -> Stored:
        """One weight on the CPU as it is stored, and its fp8 scale."""
        full = self.prefix + name
        value = self._read(full)
        layer = full.removesuffix("weight")
        scale = next((self._read(layer + s) for s in SCALES if layer + s in self._all), None)
        if scale is None or value.dtype not in FP8:
            return Stored(value)
        if scale.numel() not in (1, value.shape[0]):
            raise ValueError(
                f"{self.path.name}: '{name}' has fp8 scales of shape {tuple(scale.shape)}, which cannot be read. "
                "Use the 16-bit version of the model."
            )
        return Stored(value, scale.float().reshape(-1, *[1] * (value.ndim - 1)))


class _Viewed(Checkpoint):
    """A checkpoint seen through views; one that shows rows of a tensor leaves them as they are stored."""

    def __init__(self, source: Checkpoint, views: Mapping[str, View]) -> None:
        infos = {name: TensorInfo(view.shape, source.tensors[view.pieces[0][0]].dtype) for name, view in views.items()}
        super().__init__(source.path, infos, source.metadata, source.extra)
        self.source, self.views, self.prefix = source, views, source.prefix

    def extra(self, name: str) -> Tensor | None:
        return self.source.extra(name)

    def read_stored(self, name: str) -> Stored:
        shape, pieces = self.views[name]
        source, rows = pieces[0]
        whole = self.source.tensors[source].shape
        if len(pieces) > 1 or shape[1:] != whole[1:]:
            return Stored(torch.cat([self.source.read(source)[rows] for source, rows in pieces]).reshape(shape))
        stored = self.source.read_stored(source)
        if shape == whole:
            return stored
        weight, scale = stored.weight[rows].clone(), stored.scale  # without the rest of what was read
        return Stored(weight, scale if scale is None or len(scale) == 1 else scale[rows])


def _is_weight(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last not in _NO_WEIGHTS and last not in SCALES and not name.endswith(_NO_WEIGHT_SUFFIXES)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model file; a file that is one of several shards opens all of them.

    Raises FileNotFoundError, or ValueError that says what is wrong with the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} is not a model file: expected one of {', '.join(SUFFIXES)}.")
    if path.suffix.lower() != ".safetensors":
        tensors = torch_file.load(path)
        if (factors := _factor_file(path, tensors)) is not None:
            tensors |= _factors(factors, torch_file.load(factors), tensors)
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
        return Checkpoint(path, infos, {}, tensors.__getitem__)
    infos, homes, metadata = read_header(path)

    def read(name: str) -> Tensor:
        with open(homes[name], "rb") as file:
            return safetensors.read_tensor(file, infos[name])

    return Checkpoint(path, infos, metadata, read)


class Header(NamedTuple):
    """What a checkpoint holds, where it lies (`homes`: the file of each tensor), and its metadata."""

    tensors: dict[str, TensorInfo]
    homes: dict[str, Path]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The byte ranges of all tensors of a model file, or of all the shards it belongs to, with their names in the file.

    Raises FileNotFoundError, or ValueError that says what is wrong with the file.
    """
    whole = Header({}, {}, {})
    if path.suffix.lower() != ".safetensors":
        parts = [(path, torch_file.read_header(path))]
        if (factors := _factor_file(*parts[0])) is not None:
            parts.append((factors, _factors(factors, torch_file.read_header(factors), parts[0][1])))
    else:
        parts = []
        for shard in shards(path):
            header = safetensors.read_header(shard)
            parts.append((shard, header.tensors))
            whole.metadata.update(header.metadata)
    for home, tensors in parts:
        whole.tensors.update(tensors)
        whole.homes.update(dict.fromkeys(tensors, home))
    if not whole.tensors:
        raise ValueError(f"{path.name} holds no tensors.")
    return whole


def _factor_file(path: Path, tensors: Mapping[str, Tensor | TensorInfo]) -> Path | None:
    """The file with the factors of the fp8 weights of a .pt file that has none itself."""
    if path.suffix.lower() != ".pt" or any(name.endswith(SCALES) for name in tensors):
        return None
    if not any(value.dtype in FP8 for value in tensors.values()):
        return None
    factors = path.with_name(path.stem + _FP8_MAP)
    if not factors.is_file():
        raise FileNotFoundError(
            f"{path.name} holds fp8 weights, whose factors are in a second file: put {factors.name} beside it, or use a "
            "safetensors version of the model."
        )
    return factors


_Value = TypeVar("_Value", Tensor, TensorInfo)


def _factors(path: Path, by_layer: Mapping[str, _Value], weights: Mapping[str, _Value]) -> dict[str, _Value]:
    """The factors of a second file under names that stand beside the weights. ValueError when one is missing."""
    fp8 = (name for name, value in weights.items() if value.dtype in FP8)
    layers = [name.removesuffix(".weight") for name in fp8 if name.endswith(".weight")]
    missing = [layer for layer in layers if layer not in by_layer]
    if missing:
        raise ValueError(f"{path.name} lacks the factors of {len(missing)} of {len(layers)} fp8 weights ({missing[0]}, ...): get it "
                         "again, from where the model is from.")  # fmt: skip
    return {f"{layer}.weight_scale": by_layer[layer] for layer in layers}


def shards(path: Path) -> list[Path]:
    """All files a model file belongs to: itself, or all shards when it is one. FileNotFoundError when one is missing."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, count = match[1], int(match[2])
    files = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}.safetensors") for index in range(1, count + 1)]
    missing = [shard.name for shard in files if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{path.name} is one of {count} files, and these are missing: {', '.join(missing)}.")
    return files


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, whose tensors cannot take part in a backward pass
def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    keymap: KeyMap,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    device: torch.device | str | Callable[[str], torch.device | str] = "cpu",
    stored: Mapping[str, Storing] = MappingProxyType({}),
    kept: Callable[[Tensor], Tensor] = lambda whole: whole,
) -> nn.Module:
    """Fill a module that was built on the meta device, one tensor at a time; frozen, in inference behaviour.

    `dtype` and `device` are one for all, or chosen by the parameter's name. The weights named in `stored`, all of linear
    layers, are kept as the function behind their name makes them, with their factors as buffers `weight_scale`. `kept`
    makes of each tensor what this process keeps of it. Raises ValueError that lists what is missing, left over or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    sources = {keymap.to_model(name): name for name in checkpoint.tensors}
    check_names(wanted, {name: checkpoint.tensors[source].shape for name, source in sources.items()}, checkpoint.path)
    state, scales = {}, {}
    for name in wanted:
        target = dtype(name) if callable(dtype) else dtype
        home = device(name) if callable(device) else device
        if name in stored:
            whole, scales[name] = stored[name](Stored(*_moved(checkpoint.read_stored(sources[name]), home)))
        else:
            whole = checkpoint.read(sources[name], target).to(home)
        state[name] = kept(whole)
    module.load_state_dict(state, strict=True, assign=True)
    for name, scale in scales.items():
        module.get_submodule(name.removesuffix(".weight")).register_buffer("weight_scale", scale)
    return module.requires_grad_(False).train(False)


def _moved(stored: Stored, device: torch.device | str) -> Iterator[Tensor | None]:
    return (part if part is None else part.to(device) for part in stored)


def check_names(wanted: Mapping[str, tuple], found: Mapping[str, tuple], path: Path) -> None:
    """Raise ValueError unless `found` has exactly the names and shapes `wanted`."""
    problems = [
        *_listed("missing", wanted.keys() - found.keys()),
        *_listed("not part of this model", found.keys() - wanted.keys()),
        *_listed(
            "of another shape",
            [
                f"{n} {list(found[n])} instead of {list(wanted[n])}"
                for n in wanted
                if n in found and wanted[n] != found[n]
            ],
        ),
    ]
    if problems:
        raise ValueError(f"{path.name} does not fit the model it was recognised as: " + "; ".join(problems) + ".")


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    return [f"{len(names)} tensors {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"]
