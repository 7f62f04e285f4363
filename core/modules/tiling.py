"""Spatial tiles for VAEs: a fraction of the memory, at the price of faint differences where tiles meet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ..family import VAE
from ..shapes import LatentSpec

_OVERLAP = 4  # a quarter of a tile is shared with its neighbour, and blended

Span = tuple[int, int]


class TiledVAE:
    """A VAE that works on square tiles of `tile` pixels, blended in a line where they overlap."""

    def __init__(self, vae: VAE, tile: int, latent: LatentSpec) -> None:
        self.vae, self.latent = vae, latent
        self.tile = check_tile(tile, latent) // latent.stride.height  # in latents

    def encode(self, video: Tensor) -> Tensor:
        """As the VAE's own; (B, 3, F, H, W) -> (B, C, f, h, w)."""
        height, width = video.shape[3] // self.latent.stride.height, video.shape[4] // self.latent.stride.width
        places = self._places(height, width)
        pieces = (self.vae.encode(self._pixels(video, place)) for place in places)
        return _blended(pieces, places, (height, width))

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """As the VAE's own; each chunk is decoded tile by tile."""
        height, width = latents.shape[3:]
        stride = self.latent.stride
        places = self._places(height, width)
        tiles = [self.vae.decode(latents[..., y[0] : y[1], x[0] : x[1]]) for y, x in places]
        pixels = [(_scaled(y, stride.height), _scaled(x, stride.width)) for y, x in places]
        for pieces in zip(*tiles, strict=True):
            yield _blended(iter(pieces), pixels, (height * stride.height, width * stride.width))

    def _places(self, height: int, width: int) -> list[tuple[Span, Span]]:
        return list(product(_spans(height, self.tile), _spans(width, self.tile)))

    def _pixels(self, video: Tensor, place: tuple[Span, Span]) -> Tensor:
        y, x = _scaled(place[0], self.latent.stride.height), _scaled(place[1], self.latent.stride.width)
        return video[..., y[0] : y[1], x[0] : x[1]]


def check_tile(tile: int, latent: LatentSpec) -> int:
    """`tile`, or ValueError when the VAE cannot work on tiles of this many pixels."""
    step = latent.stride.height * _OVERLAP
    if tile < 2 * step or tile % step:
        raise ValueError(
            f"tile size is {tile}: use a multiple of {step} from {2 * step} on, such as 256, or 0 for no tiles."
        )
    return tile


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _spans(length: int, tile: int) -> list[Span]:
    """Overlapping spans of `tile` that cover 0..length; the last one is moved back to end with it."""
    if tile >= length:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - tile // _OVERLAP), length - tile]
    return [(start, start + tile) for start in starts]


def _blended(pieces: Iterator[Tensor], places: list[tuple[Span, Span]], size: tuple[int, int]) -> Tensor:
    """The pieces (..., h, w) laid over each other, each weighted less towards its inner edges."""
    total = weights = None
    for piece, (y, x) in zip(pieces, places, strict=True):
        weight = _ramp(y, size[0], piece)[:, None] * _ramp(x, size[1], piece)  # (h, w)
        if total is None:
            total, weights = piece.new_zeros(*piece.shape[:-2], *size), piece.new_zeros(size)
        total[..., y[0] : y[1], x[0] : x[1]] += piece * weight
        weights[y[0] : y[1], x[0] : x[1]] += weight
    return total / weights


def _ramp(span: Span, length: int, like: Tensor) -> Tensor:
    """1 in the middle, falling towards the ends at which another tile goes on."""
    size = span[1] - span[0]
    rise = torch.arange(1, size + 1, device=like.device, dtype=like.dtype) / (size // _OVERLAP + 1)
    weight = torch.ones_like(rise)
    if span[0] > 0:
        weight = weight.minimum(rise)
    if span[1] < length:
        weight = weight.minimum(rise.flip(0))
    return weight
