"""torch.compile, block by block."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Compile each block, in place and when it first runs. ValueError when what compiles is not installed."""
    missing = _missing_compiler(device)
    if missing:
        raise ValueError(f"torch.compile needs {missing}: install it, or switch compile off.")
    for block in blocks:
        block.compile()


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
        return None if any(name and shutil.which(name) for name in compilers) else "a C++ compiler"
    return None if importlib.util.find_spec("triton") else "the package triton (on Windows triton-windows)"
