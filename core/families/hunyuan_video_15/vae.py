"""The HunyuanVideo 1.5 causal video VAE (arXiv 2511.18870): 32 channels, 4 x 16 x 16 pixels per latent.

Sizes change by moving pixels into channels and back, beside a shortcut without weights that takes the mean of channels, or
repeats them. A frame sees itself and those before it; what is before the first and beyond the borders is what is there.

Convolutions take a clip a few frames at a time: the first frame alone, then four at a time (one latent frame at a time when
decoding), with the last frames they have seen kept in a `Stream`. So memory hardly grows with the clip's length, and the
result is that of the whole clip at once. Only the middle, at the size of the latents, sees all frames. Legend: B batch, C
channels, F frames, H W pixels or latents. Modules are named as in the official checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modules.attention import attention
from ...modules.clip_stream import ChannelRMSNorm, Stream

_ENCODER_TIME = (False, False, True, True)  # which of the four downsamplings halve time as well
_ENCODER_BLOCKS, _DECODER_BLOCKS = 2, 3
_CHUNK = 4  # pixel frames per latent frame


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo15VAEConfig:
    """Channel counts of the five levels, from full to a sixteenth of the size, and of the latents."""

    widths: tuple[int, int, int, int, int]
    latent_channels: int


class CausalConv3d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        history = stream.recall(self, x.device)
        if history is None:
            history = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat((history, x), dim=2)
        stream.keep(self, x[:, :, -2:])
        return self.conv(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelRMSNorm(channels, 3), ChannelRMSNorm(channels, 3)
        self.conv1, self.conv2 = CausalConv3d(channels, channels), CausalConv3d(channels, channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True), stream)
        return self.conv2(F.silu(self.norm2(y), inplace=True), stream).add_(x)


class Attention(nn.Module):
    """One head over the pixels of a frame and of those before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, 3)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y, per_frame = self.norm(x), x.shape[3] * x.shape[4]
        q, k, v = (layer(y).flatten(2).transpose(1, 2).unsqueeze(2) for layer in (self.q, self.k, self.v))
        # Frame by frame, so that no mask of all pixels by all pixels is needed.
        ends = range(per_frame, q.shape[1] + 1, per_frame)
        seen = [attention(q[:, end - per_frame : end], k[:, :end], v[:, :end]) for end in ends]
        return x + self.proj_out(torch.cat(seen, dim=1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels), ResidualBlock(channels)
        self.attn_1 = Attention(channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, stream)), stream)


class Downsample(nn.Module):
    """Halves the size, and the frames after the clip's first when `time`."""

    def __init__(self, in_channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.time, self.out_channels = time, out_channels
        self.conv = CausalConv3d(in_channels, out_channels // (8 if time else 4))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = 2 if self.time and not stream.first else 1
        y, x = _into_channels(self.conv(x, stream), frames), _into_channels(x, frames)
        if self.time and stream.first:
            y = torch.cat((y, y), dim=1)  # the first frame stands for two
        return y.add_(x.unflatten(1, (self.out_channels, -1)).mean(dim=2))


class Upsample(nn.Module):
    """Doubles the size, and the frames after the clip's first when `time`."""

    def __init__(self, in_channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.time, self.out_channels = time, out_channels
        self.conv = CausalConv3d(in_channels, out_channels * (8 if time else 4))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = 2 if self.time and not stream.first else 1
        y = _out_of_channels(self.conv(x, stream), frames)[:, : self.out_channels]
        repeats = self.out_channels * 4 * frames // x.shape[1]
        return y + _out_of_channels(x.repeat_interleave(repeats, dim=1), frames)


def _into_channels(x: Tensor, frames: int) -> Tensor:
    """(B, C, F * frames, H * 2, W * 2) -> (B, frames * 4 * C, F, H, W)."""
    x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, frames))  # (B, C, F, f, H, 2, W, 2)
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)


def _out_of_channels(x: Tensor, frames: int) -> Tensor:
    """The inverse."""
    x = x.unflatten(1, (frames, 2, 2, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)  # (B, C, F, f, H, 2, W, 2)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Level(nn.Module):
    """Residual blocks, and what changes the size after them."""

    def __init__(self, channels: int, blocks: int, **resize: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        for name, layer in resize.items():
            self.add_module(name, layer)
        self.resize = tuple(resize)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for layer in (*self.block, *(getattr(self, name) for name in self.resize)):
            x = layer(x, stream)
        return x


class Encoder(nn.Module):
    def __init__(self, config: HunyuanVideo15VAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(3, widths[0])
        resizes = [{"downsample": Downsample(*some)} for some in zip(widths, widths[1:], _ENCODER_TIME, strict=False)]
        self.down = nn.ModuleList(
            Level(width, _ENCODER_BLOCKS, **resize) for width, resize in zip(widths, [*resizes, {}], strict=True)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = ChannelRMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels * 2)
        self.moments = config.latent_channels * 2

    def forward(self, video: Tensor, on_cpu: bool) -> Tensor:
        """(B, 3, 4n + 1, H, W) -> mean and logarithm of the variance, (B, 2 * 32, n + 1, H / 16, W / 16)."""
        stream, small = Stream(on_cpu), []
        for chunk in (video[:, :, :1], *video[:, :, 1:].split(_CHUNK, dim=2)):
            if chunk.shape[2]:
                x = self.conv_in(chunk, stream)
                for level in self.down:
                    x = level(x, stream)
                small.append(x)
                stream.first = False
        x = self.mid(torch.cat(small, dim=2), stream)
        return self.conv_out(F.silu(self.norm_out(x)), stream).add_(x.unflatten(1, (self.moments, -1)).mean(dim=2))


class Decoder(nn.Module):
    def __init__(self, config: HunyuanVideo15VAEConfig) -> None:
        super().__init__()
        widths, time = config.widths[::-1], _ENCODER_TIME[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.repeats = widths[0] // config.latent_channels
        self.mid = Middle(widths[0])
        resizes = [{"upsample": Upsample(*some)} for some in zip(widths, widths[1:], time, strict=False)]
        self.up = nn.ModuleList(
            Level(width, _DECODER_BLOCKS, **resize) for width, resize in zip(widths, [*resizes, {}], strict=True)
        )
        self.norm_out = ChannelRMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def middle(self, latents: Tensor, stream: Stream) -> Tensor:
        return self.mid(self.conv_in(latents, stream).add_(latents.repeat_interleave(self.repeats, dim=1)), stream)

    def enlarged(self, x: Tensor, stream: Stream) -> Tensor:
        """What `middle` gives of one latent frame -> its frames (B, 3, F, H, W)."""
        for level in self.up:
            x = level(x, stream)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True), stream)
        stream.first = False
        return x


class HunyuanVideo15VAE(nn.Module):
    """`cache_on_cpu` keeps what the layers remember of earlier frames in main memory: slower, and less on the device."""

    def __init__(self, config: HunyuanVideo15VAEConfig) -> None:
        super().__init__()
        self.cache_on_cpu = False
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, 4n + 1, H, W) in -1..1 -> the posterior's mode (B, 32, n + 1, H / 16, W / 16), float32, unscaled."""
        return self.encoder(video.to(self.dtype), self.cache_on_cpu).chunk(2, dim=1)[0].float()

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, 32, n + 1, h, w) unscaled -> chunks (B, 3, F, 16h, 16w), float32, about -1..1: 1 frame, then n times 4."""
        stream = Stream(self.cache_on_cpu)
        for one in self._middle(latents.to(self.dtype), stream).split(1, dim=2):
            yield self._enlarged(one, stream)

    @torch.no_grad()
    def _middle(self, latents: Tensor, stream: Stream) -> Tensor:
        return self.decoder.middle(latents, stream)

    @torch.no_grad()
    def _enlarged(self, x: Tensor, stream: Stream) -> Tensor:
        return self.decoder.enlarged(x, stream).float()
