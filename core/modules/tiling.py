"""Tiles for VAEs, in space and in time: a fraction of the memory, at the price of faint differences where tiles meet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ..family import VAE
from ..shapes import LatentSpec, Tiles

_OVERLAP = 4  # a quarter of a tile is shared with its neighbour, and blended

Span = tuple[int, int]


def tiled(vae: VAE, tiles: Tiles, latent: LatentSpec) -> VAE:
    """The VAE, working on such tiles."""
    if tiles.side:
        vae = TiledVAE(vae, tiles.side, latent)
    return TimeTiledVAE(vae, tiles.frames, latent) if tiles.frames else vae


class TimeTiledVAE:
    """A VAE that works on `tile` frames at a time and the one before them, blended in a line where these overlap.

    A latent frame stands for `stride` frames, the clip's first for one: so every tile but the first begins with a frame that
    only leads in, and is left out again.
    """

    def __init__(self, vae: VAE, tile: int, latent: LatentSpec) -> None:
        self.vae, self.stride = vae, latent.stride.frames
        self.tile = check_tile_frames(tile, latent) // self.stride  # in latents

    def encode(self, video: Tensor) -> Tensor:
        """As the VAE's own; (B, 3, F, H, W) -> (B, C, f, h, w)."""
        spans = _spans(video.shape[2] // self.stride, self.tile)
        pieces = (self.vae.encode(video[:, :, begin * self.stride : end * self.stride + 1]) for begin, end in spans)
        return torch.cat(list(_in_turn(pieces, spans, 1)), dim=2)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """As the VAE's own, in chunks of the tiles' frames."""
        spans = _spans(latents.shape[2] - 1, self.tile)
        pieces = (torch.cat(list(self.vae.decode(latents[:, :, begin : end + 1])), dim=2) for begin, end in spans)
        return _in_turn(pieces, spans, self.stride)


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


def check_tiles(tiles: Tiles, latent: LatentSpec) -> None:
    """Raise ValueError when the VAE cannot work on such tiles."""
    if tiles.side:
        check_tile(tiles.side, latent)
    if tiles.frames:
        check_tile_frames(tiles.frames, latent)


def check_tile_frames(tile: int, latent: LatentSpec) -> int:
    """`tile`, or ValueError when the VAE cannot work on so many frames at a time."""
    step = latent.stride.frames * _OVERLAP
    if tile < 2 * step or tile % step:
        raise ValueError(f"tile frames is {tile}: use a multiple of {step} from {2 * step} on, such as 64.")
    return tile


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


def _in_turn(pieces: Iterator[Tensor], spans: list[Span], unit: int) -> Iterator[Tensor]:
    """Pieces (B, C, F, H, W) of the spans, `unit` frames for each number in them after one frame that leads in, one after
    the other; where two overlap the later one comes in as the earlier one goes out."""
    going = None
    for number, (piece, (begin, end)) in enumerate(zip(pieces, spans, strict=True)):
        lead, piece = piece[:, :, :1], piece[:, :, 1:]
        if going is None:
            yield lead
        else:
            overlap = going.shape[2]
            coming = torch.arange(1, overlap + 1, device=piece.device, dtype=piece.dtype).view(-1, 1, 1) / (overlap + 1)
            piece = torch.cat((going.lerp(piece[:, :, :overlap], coming), piece[:, :, overlap:]), dim=2)
        following = spans[number + 1][0] if number + 1 < len(spans) else end
        done = (following - begin) * unit
        if done:
            yield piece[:, :, :done]
        going = piece[:, :, done:]
