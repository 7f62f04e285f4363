"""The Wan 2.1 causal video VAE (arXiv 2503.20314, section 4.1): 16 channels, 4 x 8 x 8 pixels per latent.

A clip is streamed: the first frame alone, then four at a time (one latent frame at a time when decoding). Every causal
convolution keeps the last frames it has seen in a `Stream`, so memory does not grow with the clip's length and the
result is that of the whole clip at once. Legend: B batch, C channels, F frames, H W pixels or latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modules.attention import attention
from ...modules.clip_stream import ChannelRMSNorm, Stream

_ENCODER_TIME = (False, True, True)  # which of the three downsamplings halve time as well
_CHUNK = 4  # pixel frames per latent frame


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Channel counts of the four levels, from full to an eighth of the size, and of the latents."""

    widths: tuple[int, int, int, int]
    latent_channels: int


class CausalConv3d(nn.Conv3d):
    """Sees the current frame and those before it; before the clip's first frame there are zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        past = self.kernel_size[0] - 1
        if past:
            history = stream.recall(self, x.device)
            x = F.pad(x, (0, 0, 0, 0, past, 0)) if history is None else torch.cat((history, x), dim=2)
            stream.keep(self, x[:, :, -past:])
        return super().forward(x)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict({
            "0": ChannelRMSNorm(in_channels, 3), "2": CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            "3": ChannelRMSNorm(out_channels, 3), "6": CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        })  # fmt: skip
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        layers = self.residual
        y = layers["2"](F.silu(layers["0"](x)), stream)
        y = layers["6"](F.silu(layers["3"](y)), stream)
        return y + (self.shortcut(x, stream) if hasattr(self, "shortcut") else x)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        batch, _, _, height, width = x.shape
        y = x.transpose(1, 2).flatten(0, 1)  # (B * F, C, H, W)
        qkv = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2)  # (B * F, H * W, 3C)
        y = attention(*(part.unsqueeze(2) for part in qkv.chunk(3, dim=-1)))
        y = self.proj(y.transpose(1, 2).unflatten(2, (height, width)))
        return x + y.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves the size, and the frames after the clip's first when `time`."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        if time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = _per_frame(self.resample["1"], F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "time_conv"):
            last = stream.recall(self, x.device)
            stream.keep(self, x[:, :, -1:])
            if last is not None:  # the clip's first frame stays a frame of its own
                x = self.time_conv(torch.cat((last, x), dim=2))
        return x


class Upsample(nn.Module):
    """Doubles the size and halves the channels; doubles the frames after the clip's first when `time`."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        if time:
            self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if hasattr(self, "time_conv"):
            if stream.recall(self, x.device) is not None:
                # (B, 2C, F, ...) -> (B, C, 2F, ...): the first half of the channels is the earlier frame
                x = self.time_conv(x, stream).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            stream.keep(self, x.new_empty(0))  # only a mark: the first frame has passed
        return _per_frame(
            lambda frame: self.resample["1"](F.interpolate(frame, scale_factor=2, mode="nearest-exact")), x
        )


def _per_frame(layer, x: Tensor) -> Tensor:
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class _Coder(nn.Module):
    """What encoder and decoder share: `middle`, and a head that normalises."""

    def __init__(self, middle: int, head_in: int, head_out: int) -> None:
        super().__init__()
        self.middle = nn.ModuleList(
            (ResidualBlock(middle, middle), AttentionBlock(middle), ResidualBlock(middle, middle))
        )
        self.head = nn.ModuleDict({"0": ChannelRMSNorm(head_in, 3), "2": CausalConv3d(head_in, head_out, (3, 3, 3))})

    def _head(self, x: Tensor, stream: Stream) -> Tensor:
        return self.head["2"](F.silu(self.head["0"](x)), stream)


class Encoder(_Coder):
    def __init__(self, config: WanVAEConfig) -> None:
        widths = config.widths
        super().__init__(widths[3], widths[3], config.latent_channels * 2)
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3))
        layers, before = [], widths[0]
        for level, width in enumerate(widths):
            layers += [ResidualBlock(before, width), ResidualBlock(width, width)]
            before = width
            if level < len(_ENCODER_TIME):
                layers.append(Downsample(width, _ENCODER_TIME[level]))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return self._head(x, stream)


class Decoder(_Coder):
    def __init__(self, config: WanVAEConfig) -> None:
        widths = config.widths[::-1]
        super().__init__(widths[0], widths[3], 3)
        self.conv1 = CausalConv3d(config.latent_channels, widths[0], (3, 3, 3))
        layers, before = [], widths[0]
        for level, width in enumerate(widths):
            layers += [ResidualBlock(before, width), ResidualBlock(width, width), ResidualBlock(width, width)]
            if level < len(_ENCODER_TIME):
                layers.append(Upsample(width, _ENCODER_TIME[::-1][level]))
                before = width // 2
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return self._head(x, stream)


class WanVAE(nn.Module):
    """`cache_on_cpu` keeps what the layers remember of earlier frames in main memory: slower, and less on the device."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.cache_on_cpu = False
        z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1 = CausalConv3d(z * 2, z * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, 4n + 1, H, W) in -1..1 -> the posterior's mean (B, 16, n + 1, H / 8, W / 8), float32, unscaled."""
        stream = Stream(self.cache_on_cpu)
        latents = []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(_CHUNK, dim=2)):
            if chunk.shape[2]:
                moments = self.conv1(self.encoder(chunk.to(self.dtype), stream), stream)
                latents.append(moments.chunk(2, dim=1)[0].float())
        return torch.cat(latents, dim=2)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, 16, n + 1, h, w) unscaled -> chunks (B, 3, F, 8h, 8w), float32, about -1..1: 1 frame, then n times 4."""
        stream = Stream(self.cache_on_cpu)
        for latent in latents.to(self.dtype).split(1, dim=2):
            yield self._decoded(latent, stream)

    @torch.no_grad()
    def _decoded(self, latent: Tensor, stream: Stream) -> Tensor:
        return self.decoder(self.conv2(latent, stream), stream).float()
