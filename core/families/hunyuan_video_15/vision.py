"""SigLIP's image tower (so400m, arXiv 2303.15343), with which HunyuanVideo 1.5 looks at the start image.

The features are those of its end, before they would be pooled. Modules are named as in transformers' SiglipVisionModel.
Legend: B batch, L tokens (one per patch), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...family import Part
from ...modules.attention import attention
from ...modules.layers import Linear
from ...vision import ImageEncoder
from ...weights import Checkpoint, load_into

HEAD_DIM = 72
PATCH, SIDE = 14, 384  # pixels
MEAN = STD = 0.5  # what was subtracted and divided by in training, of colours in 0..1


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """Sizes, all read from the checkpoint."""

    dim: int
    ffn_dim: int
    depth: int

    @property
    def tokens(self) -> int:
        return (SIDE // PATCH) ** 2


class Embeddings(nn.Module):
    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.dim, PATCH, stride=PATCH)
        self.position_embedding = nn.Embedding(config.tokens, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (layer(x).unflatten(2, (-1, HEAD_DIM)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(*heads))


class Layer(nn.Module):
    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.dim, eps=1e-6) for _ in range(2))
        self.self_attn = SelfAttention(config.dim)
        self.mlp = nn.ModuleDict({"fc1": Linear(config.dim, config.ffn_dim), "fc2": Linear(config.ffn_dim, config.dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class SigLIP(nn.Module):
    """Pictures -> features of each patch."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.depth))})
        self.post_layernorm = nn.LayerNorm(config.dim, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 384, 384), normalised -> (B, 729, D)."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)


def normalised(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 -> (B, 3, 384, 384) as SigLIP knows them; squashed, and rounded to 256 steps as a file would be."""
    small = F.interpolate(pictures.float() * 0.5 + 0.5, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return (small.clamp(0, 1).mul(255).round() / 255 - MEAN) / STD


def load(checkpoint: Checkpoint, part: Part, dtype: torch.dtype) -> ImageEncoder:
    """Load the tower on the CPU."""
    with torch.device("meta"):
        model = SigLIP(part.config)
    return ImageEncoder(load_into(model, checkpoint, part.keymap, dtype), normalised)
