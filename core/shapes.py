"""The only arithmetic between pixels and latents. Legend: B batch, C channels, F frames, H height, W width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class VideoSize(NamedTuple):
    """A size in frames, height, width: of pixels or of latents, as the name of the variable says."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frame{'s' if self.frames != 1 else ''}"


class Tiles(NamedTuple):
    """How much of a video a VAE works on at a time: so many frames, of squares of so many pixels a side; 0: all of it."""

    frames: int = 0
    side: int = 0

    def or_else(self, default: Tiles) -> Tiles:
        """With what is chosen in `default` where nothing is chosen here."""
        return Tiles(*(mine or other for mine, other in zip(self, default, strict=True)))


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """How a family's VAE and transformer divide a video.

    `stride` is pixels per latent and `patch` latents per token, both over (frames, height, width). The transformer
    works on (z - mean) / std per channel; outside of it latents stay in VAE space, as in ComfyUI.
    """

    channels: int
    stride: VideoSize
    patch: VideoSize
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def multiple(self) -> int:
        """Width and height must be a multiple of this many pixels."""
        return self.stride.height * self.patch.height

    def frames_at_most(self, frames: int) -> int:
        """The largest valid frame count that is not above `frames` (at least 1)."""
        return (max(frames, 1) - 1) // self.stride.frames * self.stride.frames + 1

    def check_frames(self, frames: int) -> None:
        """Raise ValueError when a video cannot have this many frames, with the nearest counts that it can."""
        lower = self.frames_at_most(frames)
        if frames != lower:
            step = self.stride.frames
            raise ValueError(
                f"{frames} frames do not fit: the frame count must be {step}n+1, use {lower} or {lower + step}."
            )

    def check(self, pixels: VideoSize) -> None:
        """Raise ValueError when the model cannot take a video of this size, with the nearest sizes that it can."""
        self.check_frames(pixels.frames)
        for side, value in (("width", pixels.width), ("height", pixels.height)):
            if value < self.multiple or value % self.multiple:
                lower = max(self.multiple, value // self.multiple * self.multiple)
                raise ValueError(
                    f"{side} {value} does not fit: it must be a multiple of {self.multiple}, "
                    f"use {lower} or {lower + self.multiple}."
                )

    def largest_within(self, pixels: VideoSize) -> VideoSize:
        """The largest size that the model can take and that is not above `pixels`. ValueError where there is none."""
        if not pixels.frames:
            raise ValueError("the video has no frames: give it at least one.")
        height, width = (side // self.multiple * self.multiple or side for side in pixels[1:])
        size = VideoSize(self.frames_at_most(pixels.frames), height, width)
        self.check(size)
        return size

    def latents(self, pixels: VideoSize) -> VideoSize:
        """The latent size of a video of `pixels`."""
        self.check(pixels)
        frames, height, width = pixels
        return VideoSize(
            (frames - 1) // self.stride.frames + 1, height // self.stride.height, width // self.stride.width
        )

    def pixels(self, latents: VideoSize) -> VideoSize:
        """The video size that latents of this size decode to."""
        frames, height, width = latents
        return VideoSize((frames - 1) * self.stride.frames + 1, height * self.stride.height, width * self.stride.width)

    def tokens(self, latents: VideoSize) -> int:
        """How many tokens the transformer sees for latents of this size."""
        return prod(latents) // prod(self.patch)

    def to_model(self, latents: Tensor) -> Tensor:
        """VAE-space latents (B, C, F, H, W) -> what the transformer works on."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def from_model(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless these are latents of this kind."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not fit: expected (B, {self.channels}, F, H, W). "
                "They were made by the VAE of another model."
            )

    def check_image(self, image: Sequence[int], latents: VideoSize) -> None:
        """Raise ValueError unless the latents (C, F, H, W) of a start image are as large as those of the video."""
        made, wanted = (self.pixels(VideoSize(*size)) for size in (image[1:], latents))
        if made != wanted:
            raise ValueError(
                f"the start image was encoded for {made}, and the video is {wanted}: use the same size for both."
            )

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        self.check_latents(latents)
        shape = (1, self.channels, 1, 1, 1)
        return (
            torch.tensor(self.mean, dtype=latents.dtype, device=latents.device).view(shape),
            torch.tensor(self.std, dtype=latents.dtype, device=latents.device).view(shape),
        )
