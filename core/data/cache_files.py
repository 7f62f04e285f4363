"""Names and contents of cache files, readable by the trainers whose layout they follow (facts of that layout: one
tensor per file named with its size and dtype, `varlen_` for per-sample lengths)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..family import Family, TextStates
from ..io import safetensors
from ..shapes import VideoSize
from .windows import Window

_FORMAT_VERSION = "1.0.1"
_FINGERPRINT = "videolora_fingerprint"
_DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in safetensors.DTYPES.values()]


def latent_path(cache: Path, key: str, window: Window | None, size: tuple[int, int], family: Family) -> Path:
    """`size` is the (width, height) in pixels that the latents were made at; `window` is None for an image."""
    frames = "" if window is None else f"_{window.start:05d}-{window.count:03d}"
    return cache / f"{key}{frames}_{size[0]:04d}x{size[1]:04d}_{family.short}.safetensors"


def text_path(cache: Path, key: str, family: Family) -> Path:
    return cache / f"{key}_{family.short}_te.safetensors"


def is_current(path: Path, fingerprint: str) -> bool:
    """Whether the file is whole and was made from exactly what `fingerprint` stands for."""
    try:
        return safetensors.read_header(path).metadata.get(_FINGERPRINT) == fingerprint
    except (OSError, ValueError):
        return False


def save_latents(path: Path, latents: Tensor, size: VideoSize, family: Family, fingerprint: str) -> None:
    """Write latents (C, F, H, W), given in VAE space, as the family caches them."""
    if family.cache_scaled:
        latents = family.latent.to_model(latents[None])[0]
    latents = latents.to(family.cache_dtype)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"the VAE gave values that are not finite for {path.name}: the VAE file may be damaged, get it again."
        )
    shape = "x".join(str(side) for side in latents.shape[1:])
    metadata = {
        "architecture": family.name, "width": str(size.width), "height": str(size.height),
        "frame_count": str(size.frames), "format_version": _FORMAT_VERSION, _FINGERPRINT: fingerprint,
    }  # fmt: skip
    safetensors.save(path, {f"latents_{shape}_{_dtype_name(latents)}": latents}, metadata)


def load_latents(path: Path, family: Family) -> Tensor:
    """Latents (C, F, H, W) in model space, float32."""
    tensors, _ = safetensors.load(path)
    latents = next(value for name, value in tensors.items() if name.startswith("latents_")).float()
    return latents if family.cache_scaled else family.latent.to_model(latents[None])[0]


def save_text(path: Path, states: TextStates, caption: str, family: Family, fingerprint: str) -> None:
    metadata = {
        "architecture": family.name, "caption1": caption, "format_version": _FORMAT_VERSION, _FINGERPRINT: fingerprint,
    }  # fmt: skip
    safetensors.save(path, {f"{name}_{_dtype_name(value)}": value for name, value in states.items()}, metadata)


def load_text(path: Path) -> TextStates:
    tensors, _ = safetensors.load(path)
    return {_without_dtype(name): value for name, value in tensors.items()}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _without_dtype(name: str) -> str:
    return next((name.removesuffix(f"_{dtype}") for dtype in _DTYPE_NAMES if name.endswith(f"_{dtype}")), name)
