"""Reading `.pt`, `.pth` and `.bin` files without running any code from them."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .safetensors import DTYPES, TensorInfo

# torch.load(weights_only=True) could still be made to run code before this version (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
_WRAPPERS = ("module", "model", "state_dict")


# What torch raises for files that are cut off or damaged, depending on where.
_DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, whose tensors cannot become parameters
def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by name, mapped from disk where its format allows it.

    Raises ValueError when the file is damaged, holds anything but tensors, or this torch is too old to read it safely.
    """
    try:
        return _tensors(path, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return _tensors(path)  # the format from before torch 1.6


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a torch file lie in it, in the order of their data.

    Raises ValueError as `load` does, and when the file does not hold the values of each tensor one after the other.
    """
    with FakeTensorMode():  # torch then tells where the values are instead of reading them
        tensors = _tensors(path)
    infos = {}
    for name, value in tensors.items():
        begin = _offset(value)
        if begin is None or value.dtype not in DTYPES.values():
            raise ValueError(
                f"{path.name}: '{name}' is stored in a way that cannot be copied. Use the safetensors version of the model."
            )
        start = begin + value.storage_offset() * value.element_size()
        infos[name] = TensorInfo(tuple(value.shape), value.dtype, start, start + value.numel() * value.element_size())
    return dict(sorted(infos.items(), key=lambda item: item[1].start))


def _offset(value: Tensor) -> int | None:
    """Where the storage of a tensor lies in its file; None where that does not hold the values one after the other, or torch
    does not tell, as of files from before torch 1.6."""
    if value.layout is not torch.strided or not value.is_contiguous():
        return None
    return getattr(value.untyped_storage(), "_checkpoint_offset", None)


def _tensors(path: Path, **how: bool) -> dict[str, Tensor]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH:
        raise ValueError(
            f"{path.name}: this torch ({torch.__version__}) can be made to run code from such a file. "
            "Update torch to 2.6 or newer, or use the safetensors version of the model."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, **how)
    except _DAMAGE as error:
        if "mmap" in str(error) and how:
            raise
        raise ValueError(
            f"{path.name} cannot be read: it is truncated, is no model file, or holds more than tensors. Get the file again, "
            "or use the safetensors version of the model."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not the tensors of a model.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors.")
    return tensors
