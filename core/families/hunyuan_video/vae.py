"""The HunyuanVideo causal video VAE (arXiv 2412.03603, section 4.1): 16 channels, 4 x 8 x 8 pixels per latent.

A frame sees itself and those before it; what is before the first and beyond the borders is what is there. The norms look at
all frames of a clip at once, so a clip cannot be streamed: long ones are worked on in tiles (`modules/tiling.py`). Legend: B
batch, C channels, F frames, H W pixels or latents. Modules are named as in the official checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modules.attention import attention

_GROUPS = 32
_RESIZES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))  # of the three downsamplings, and of the three upsamplings
_ENCODER_RESNETS, _DECODER_RESNETS = 2, 3
_CHUNK = 1 << 27  # values of a convolution's input at a time


@dataclass(frozen=True, kw_only=True)
class HunyuanVAEConfig:
    """Channel counts of the four levels, from full to an eighth of the size, and of the latents."""

    widths: tuple[int, int, int, int]
    latent_channels: int


class CausalConv3d(nn.Module):
    """Convolves a clip a few frames at a time: the same result, and only those are copied to be padded."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        past, side, stride = self.conv.kernel_size[0] - 1, self.conv.kernel_size[1] // 2, self.conv.stride[0]
        frames = -(-x.shape[2] // stride)
        step = max(1, _CHUNK // (x[:, :, 0].numel() * stride))
        out = None
        for first in range(0, frames, step):
            last = min(first + step, frames)
            begin, end = first * stride - past, (last - 1) * stride + 1
            piece = x[:, :, max(begin, 0) : end]
            if past or side:
                piece = F.pad(piece, (side, side, side, side, max(-begin, 0), 0), mode="replicate")
            y = self.conv(piece)
            if out is None:
                out = y.new_empty(*y.shape[:2], frames, *y.shape[3:])
            out[:, :, first:last] = y
        return out


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(in_channels), _norm(out_channels)
        self.conv1, self.conv2 = CausalConv3d(in_channels, out_channels, 3), CausalConv3d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """One head over the pixels of a frame and of those before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = _norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        sizes, per_frame = x.shape[2:], x.shape[3] * x.shape[4]
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, F * H * W, C)
        q, k, v = (layer(y).unsqueeze(2) for layer in (self.to_q, self.to_k, self.to_v))
        # Frame by frame, so that no mask of all pixels by all pixels is needed.
        ends = range(per_frame, q.shape[1] + 1, per_frame)
        seen = [attention(q[:, end - per_frame : end], k[:, :end], v[:, :end]) for end in ends]
        return x + self.to_out[0](torch.cat(seen, dim=1)).transpose(1, 2).unflatten(2, sizes)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample(nn.Module):
    """Enlarges each frame, and doubles those after the clip's first where the factor says so."""

    def __init__(self, channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        enlarged = [F.interpolate(x[:, :, :1], scale_factor=(1, *self.factor[1:]), mode="nearest")]
        if x.shape[2] > 1:
            enlarged.append(F.interpolate(x[:, :, 1:], scale_factor=self.factor, mode="nearest"))
        return self.conv(torch.cat(enlarged, dim=2))


class Level(nn.Module):
    """Residual blocks, and what changes the size after them."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, **resize: nn.Module) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * resnets]
        self.resnets = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        for name, layer in resize.items():
            self.add_module(name, nn.ModuleList([layer]))
        self.resize = tuple(resize)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *(self.get_submodule(f"{name}.0") for name in self.resize)):
            x = layer(x)
        return x


class Downsample(nn.Module):
    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Encoder(nn.Module):
    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths, before = config.widths, config.widths[0]
        self.conv_in = CausalConv3d(3, widths[0], 3)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            resize = {"downsamplers": Downsample(width, _RESIZES[level])} if level < len(_RESIZES) else {}
            self.down_blocks.append(Level(before, width, _ENCODER_RESNETS, **resize))
            before = width
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)), inplace=True))


class Decoder(nn.Module):
    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths, before = config.widths[::-1], config.widths[-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            resize = {"upsamplers": Upsample(width, _RESIZES[level])} if level < len(_RESIZES) else {}
            self.up_blocks.append(Level(before, width, _DECODER_RESNETS, **resize))
            before = width
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class HunyuanVAE(nn.Module):
    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        self.cache_on_cpu = False  # it remembers nothing
        z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv3d(z * 2, z * 2, 1), nn.Conv3d(z, z, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, 4n + 1, H, W) in -1..1 -> the posterior's mean (B, 16, n + 1, H / 8, W / 8), float32, unscaled."""
        return self.quant_conv(self.encoder(video.to(self.dtype))).chunk(2, dim=1)[0].float()

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, 16, n + 1, h, w) unscaled -> (B, 3, 4n + 1, 8h, 8w), float32, about -1..1, in one."""
        yield self._decoded(latents.to(self.dtype))

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents)).float()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)
