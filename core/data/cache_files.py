"""Names and contents of cache files, readable by the trainers whose layout they follow (facts of that layout: one
tensor per file named with its size and dtype, `varlen_` for per-sample lengths)."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..family import Family, ImageInput, States, TextStates
from ..io import safetensors
from ..shapes import VideoSize
from .windows import Window

_FORMAT_VERSION = "1.0.1"
_FINGERPRINT, _IMAGES = "videolora_fingerprint", "videolora_images"
_SIZE = re.compile(r"_\d+x\d+x\d+$")
_DTYPE_NAMES = [str(dtype).removeprefix("torch.") for dtype in safetensors.DTYPES.values()]


def latent_path(cache: Path, key: str, window: Window | None, size: tuple[int, int], family: Family) -> Path:
    """`size` is the (width, height) in pixels that the latents were made at; `window` is None for an image."""
    frames = "" if window is None else f"_{window.start:05d}-{window.count:03d}"
    return cache / f"{key}{frames}_{size[0]:04d}x{size[1]:04d}_{family.short}.safetensors"


def text_path(cache: Path, key: str, family: Family) -> Path:
    return cache / f"{key}_{family.short}_te.safetensors"


def _header(path: Path) -> safetensors.Header | None:
    try:
        return safetensors.read_header(path)
    except (OSError, ValueError):
        return None


def is_current(path: Path, fingerprint: str, images: str = "") -> bool:
    """Whether the file is whole and was made from exactly what `fingerprint` stands for, and with the image states that
    `images` stands for, if it does for any."""
    header = _header(path)
    if header is None or header.metadata.get(_FINGERPRINT) != fingerprint:
        return False
    return not images or header.metadata.get(_IMAGES) == images


def is_foreign_latents(path: Path, size: VideoSize, family: Family, images: ImageInput | None = None) -> bool:
    """Whether another trainer left whole latents of this size (of latents) here, and the image states that are asked for.
    From which clip and VAE they were made is not written in such a file. None keeps those of a clip's last frame."""
    header = _foreign(path, family)
    if header is None or (images and images.needs_end):
        return False
    found = {_stem(name): info.shape for name, info in header.tensors.items()}
    wanted = {"latents": (family.latent.channels, *size), **(images.shapes(size) if images else {})}
    return all(found.get(name) == shape for name, shape in wanted.items())


def is_foreign_text(path: Path, caption: str, family: Family) -> bool:
    """Whether another trainer left the whole text states of this caption here."""
    header = _foreign(path, family)
    return (
        header is not None
        and header.metadata.get("caption1") == caption
        and {_without_dtype(name) for name in header.tensors} == set(family.text_states)
    )


def is_foreign(path: Path) -> bool:
    """Whether a whole file stands here that this pack did not write."""
    header = _header(path)
    return header is not None and _FINGERPRINT not in header.metadata


def _foreign(path: Path, family: Family) -> safetensors.Header | None:
    header = _header(path)
    if header is None or _FINGERPRINT in header.metadata or header.metadata.get("architecture") != family.name:
        return None
    return header


def ours(cache: Path, family: Family) -> list[Path]:
    """All files in a cache folder that this pack made for this family, latents and text."""
    endings = (f"_{family.short}.safetensors", f"_{family.short}_te.safetensors")
    found = [path for path in sorted(cache.glob("*.safetensors")) if path.name.endswith(endings)]
    return [path for path in found if (header := _header(path)) and _FINGERPRINT in header.metadata]


def is_text(path: Path) -> bool:
    return path.stem.endswith("_te")


def latent_bytes(size: VideoSize, family: Family, images: ImageInput | None = None) -> int:
    """Bytes of a latent file's data for latents of this size, with image states if there are to be any."""
    shapes = [(family.latent.channels, *size), *(images.shapes(size).values() if images else ())]
    return sum(map(prod, shapes)) * family.cache_dtype.itemsize


def save_latents(path: Path, latents: Tensor, size: VideoSize, family: Family, fingerprint: str,
                 states: States = MappingProxyType({}), images: str = "") -> None:  # fmt: skip
    """Write latents (C, F, H, W), given in VAE space, as the family caches them, and image states beside them; what these
    were made from `images` stands for."""
    if family.cache_scaled:
        latents = family.latent.to_model(latents[None])[0]
    values = {name: value.to(family.cache_dtype) for name, value in {"latents": latents, **states}.items()}
    if not all(torch.isfinite(value).all() for value in values.values()):
        raise ValueError(
            f"the VAE or image encoder gave values that are not finite for {path.name}: its file may be damaged, get it again, "
            "or choose another precision in its loader."
        )
    metadata = {
        "architecture": family.name, "width": str(size.width), "height": str(size.height),
        "frame_count": str(size.frames), "format_version": _FORMAT_VERSION, _FINGERPRINT: fingerprint,
        **({_IMAGES: images} if images else {}),
    }  # fmt: skip
    safetensors.save(path, {_full_name(name, value): value for name, value in values.items()}, metadata)


def load_latents(path: Path, family: Family) -> Tensor:
    """Latents (C, F, H, W) in model space, float32."""
    return load_sample(path, family, None)[0]


def load_sample(path: Path, family: Family, images: ImageInput | None) -> tuple[Tensor, States]:
    """Latents (C, F, H, W) in model space, float32, and the image states that are asked for."""
    tensors, _ = safetensors.load(path)
    found = {_stem(name): value for name, value in tensors.items()}
    latents = found["latents"].float()
    states = {name: found[name] for name, _ in images.states} if images else {}
    return latents if family.cache_scaled else family.latent.to_model(latents[None])[0], states


def save_text(path: Path, states: TextStates, caption: str, family: Family, fingerprint: str) -> None:
    if not all(torch.isfinite(value).all() for value in states.values() if value.dtype.itemsize > 1):
        raise ValueError(
            f"the text encoder gave values that are not finite for {path.name}: choose another precision in its loader, such as "
            "bfloat16; where that does not help its file may be damaged, get it again."
        )
    metadata = {
        "architecture": family.name, "caption1": caption, "format_version": _FORMAT_VERSION, _FINGERPRINT: fingerprint,
    }  # fmt: skip
    safetensors.save(path, {f"{name}_{_dtype_name(value)}": value for name, value in states.items()}, metadata)


def load_text(path: Path) -> TextStates:
    tensors, _ = safetensors.load(path)
    return {_without_dtype(name): value for name, value in tensors.items()}


def _full_name(name: str, value: Tensor) -> str:
    """Frames, height and width of what is shaped as latents, and the dtype of all, stand in the tensor's name."""
    size = f"_{'x'.join(map(str, value.shape[1:]))}" if value.ndim == 4 else ""
    return f"{name}{size}_{_dtype_name(value)}"


def _stem(name: str) -> str:
    return _SIZE.sub("", _without_dtype(name))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _without_dtype(name: str) -> str:
    return next((name.removesuffix(f"_{dtype}") for dtype in _DTYPE_NAMES if name.endswith(f"_{dtype}")), name)
