"""Reading `.pt`, `.pth` and `.bin` files without running any code from them."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor

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
    AssertionError,
)


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, whose tensors cannot become parameters
def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file by name, mapped from disk where its format allows it.

    Raises ValueError when the file is damaged, holds anything but tensors, or this torch is too old to read it safely.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH:
        raise ValueError(
            f"{path.name}: this torch ({torch.__version__}) can be made to run code from such a file. "
            "Update torch to 2.6 or newer, or use the safetensors version of the model."
        )
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format from before torch 1.6
    except _DAMAGE as error:
        raise ValueError(
            f"{path.name} cannot be read: it is truncated, is no model file, or holds more than tensors. Get the file again, "
            "or use the safetensors version of the model."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not the tensors of a model.")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors.")
    return tensors
