"""The Wan 2.1 and 2.2 transformer (arXiv 2503.20314, section 4.2).

- tokens are latent patches of (1, 2, 2); every block is self-attention, cross-attention to the text, feed-forward
- time enters through six modulation vectors per block, shared projection plus a learned offset in each block
- queries and keys are RMS-normalised over the full width; rotary embedding over (frame, row, column)
- image-to-video checkpoints of 2.1 also attend to CLIP features of the image, and all of them take the image latents
  and their mask as further input channels

Legend: B batch, C channels, F H W latent size, L video tokens, S text tokens, D width, N heads. Modules are named as in
the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modules.attention import FullAttention
from ...modules.checkpointing import BlockRunner
from ...modules.layers import Linear, RMSNorm, rotary, rotary_tables, sinusoids

HEAD_DIM = 128
ROTARY_DIMS = (44, 42, 42)  # of a head, for frame, row, column
PATCH = (1, 2, 2)
TEXT_TOKENS = 512  # shorter prompts are padded with zeros, which are attended to: that is how Wan was trained
CLIP_TOKENS = 257


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes, all read from the checkpoint. `clip_dim` is set for image-to-video 2.1, `clip_images` 2 for its
    first-last-frame version."""

    dim: int
    ffn_dim: int
    depth: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    clip_dim: int | None = None
    clip_images: int = 1

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


class Attention(nn.Module):
    """Self-attention, or cross-attention when called with text states."""

    def __init__(self, dim: int, clip: bool = False) -> None:
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.attend = FullAttention()
        if clip:
            self.k_img, self.v_img, self.norm_k_img = Linear(dim, dim), Linear(dim, dim), RMSNorm(dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, HEAD_DIM))  # (B, L, D) -> (B, L, N, 128)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotary(self._split(self.norm_q(self.q(x))), cos, sin)
        k = rotary(self._split(self.norm_k(self.k(x))), cos, sin)
        return self.o(self.attend(q, k, self._split(self.v(x))))

    def cross(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        q = self._split(self.norm_q(self.q(x)))
        y = self.attend(q, self._split(self.norm_k(self.k(text))), self._split(self.v(text)))
        if image is not None:
            k = self._split(self.norm_k_img(self.k_img(image)))
            y = y + self.attend(q, k, self._split(self.v_img(image)))
        return self.o(y)


class Block(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = Attention(dim)
        self.cross_attn = Attention(dim, clip=config.clip_dim is not None)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(Linear(dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D), time (B, 6, D) -> (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)  # (B, 1, D) each
        x = torch.addcmul(x, self.self_attn(_modulated(x, shift1, scale1), cos, sin), gate1)
        x = x + self.cross_attn.cross(self.norm3(x), text, image)
        return torch.addcmul(x, self.ffn(_modulated(x, shift2, scale2)), gate2)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = Linear(config.dim, config.out_channels * PATCH[0] * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, D) -> (B, L, C * 4)."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(_modulated(x, shift, scale))


class ImageEmbedding(nn.Module):
    """CLIP features (B, 257 per image, clip_dim) -> (B, the same, D)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        clip, dim = config.clip_dim, config.dim
        self.proj = nn.Sequential(nn.LayerNorm(clip), Linear(clip, clip), nn.GELU(), Linear(clip, dim),
                                  nn.LayerNorm(dim))  # fmt: skip
        if config.clip_images > 1:
            self.emb_pos = nn.Parameter(torch.empty(1, config.clip_images * CLIP_TOKENS, clip))

    def forward(self, features: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            features = features.reshape(-1, *self.emb_pos.shape[1:]) + self.emb_pos
        return self.proj(features)


class WanDiT(nn.Module):
    """Predicts the velocity noise - data."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        if config.clip_dim is not None:
            self.img_emb = ImageEmbedding(config)
        self.run_block = BlockRunner()

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text_states: Tensor,
        image_condition: Tensor | None = None,
        clip_features: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """latents (B, C, F, H, W) in model space, time (B,) on 0..1000, text_states (B, S <= 512, text_dim) ->
        velocity (B, C, F, H, W) in float32. `image_condition` (B, C', F, H, W) holds mask and image latents;
        C + C' must be the checkpoint's input channels. `clip_features` (B, 257 per image, clip_dim). Blocks of the numbers in
        `skip_layers` are left out."""
        x = latents if image_condition is None else torch.cat((latents, image_condition), dim=1)
        x = self.patch_embedding(x.to(self.dtype))  # (B, D, F, H / 2, W / 2)
        sizes = x.shape[2:]
        x = (
            x.flatten(2).transpose(1, 2).contiguous()
        )  # (B, L, D); torch 2.11 compiles a wrong gradient for other strides
        cos, sin = rotary_tables(sizes, ROTARY_DIMS, 10000.0, x.device)
        embedded_time = self.time_embedding(sinusoids(time, self.config.freq_dim).to(self.dtype))  # (B, D)
        time = self.time_projection(embedded_time).unflatten(1, (6, -1))
        text = self.text_embedding(F.pad(text_states.to(self.dtype), (0, 0, 0, TEXT_TOKENS - text_states.shape[1])))
        image = self.img_emb(clip_features.to(self.dtype)) if clip_features is not None else None
        for number, block in enumerate(self.blocks):
            if number not in skip_layers:
                x = self.run_block(block, x, time, text, image, cos, sin)
        return _unpatchified(self.head(x, embedded_time).float(), sizes)


def _unpatchified(x: Tensor, sizes: torch.Size) -> Tensor:
    """(B, L, 1 * 2 * 2 * C) -> (B, C, F, H, W)."""
    x = x.unflatten(1, sizes).unflatten(4, (*PATCH, -1))  # (B, F, H/2, W/2, 1, 2, 2, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, F, 1, H/2, 2, W/2, 2)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
