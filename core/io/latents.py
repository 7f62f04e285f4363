"""Latents in files, as ComfyUI's own nodes save and open them: VAE-space latents of a few videos, and what they were sampled
with as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import safetensors

SUFFIX = ".latent"
_TENSOR, _VERSION = "latent_tensor", "latent_format_version_0"


def save(path: Path, latents: Tensor, sampled_with: Mapping[str, str]) -> None:
    """Write latents (B, C, F, H, W) atomically."""
    safetensors.save(path, {_TENSOR: latents.cpu().contiguous(), _VERSION: torch.tensor([])}, sampled_with)


def save_numbered(stem: Path, latents: Tensor, sampled_with: Mapping[str, str]) -> Path:
    """Write them beside what is there, as `<stem>_00001.latent` and so on."""
    taken = [path.stem.rpartition("_")[2] for path in stem.parent.glob(f"{stem.name}_*{SUFFIX}")]
    number = 1 + max((int(end) for end in taken if end.isdecimal()), default=0)
    path = stem.with_name(f"{stem.name}_{number:05d}{SUFFIX}")
    save(path, latents, sampled_with)
    return path


def load(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Latents (B, C, F, H, W) in float32, and what they were sampled with. ValueError for another file."""
    tensors, metadata = safetensors.load(path)
    if _TENSOR not in tensors or _VERSION not in tensors or tensors[_TENSOR].ndim != 5:
        raise ValueError(f"{path.name} holds no video latents (it has {', '.join(sorted(tensors)[:3])}): choose a file that Save "
                         "Video Latents or ComfyUI's Save Latent wrote.")  # fmt: skip
    return tensors[_TENSOR].float(), metadata
