"""CLIP's image tower (ViT-H/14, arXiv 2103.00020), with which Wan 2.1 looks at the start image.

Wan takes the input of the last block, so neither that block nor what follows it is built. Modules are named as in
transformers' CLIPVisionModel. Legend: B batch, L tokens (one for the class, one per patch), D width, N heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...family import Part
from ...keymap import KeyMap
from ...modules.attention import attention
from ...modules.layers import Linear
from ...vision import ImageEncoder
from ...weights import Checkpoint, View, load_into

HEAD_DIM = 80
PATCH, SIDE = 14, 224  # pixels
# What CLIP's training subtracted and divided by, of colours in 0..1.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

OFFICIAL = KeyMap((
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding.", "embeddings.patch_embedding."),
    ("pre_norm.", "pre_layrnorm."),
    ("transformer.{i}.norm1.", "encoder.layers.{i}.layer_norm1."),
    ("transformer.{i}.norm2.", "encoder.layers.{i}.layer_norm2."),
    ("transformer.{i}.attn.to_qkv.", "encoder.layers.{i}.self_attn.qkv."),
    ("transformer.{i}.attn.proj.", "encoder.layers.{i}.self_attn.out_proj."),
    ("transformer.{i}.mlp.0.", "encoder.layers.{i}.mlp.fc1."),
    ("transformer.{i}.mlp.2.", "encoder.layers.{i}.mlp.fc2."),
))  # fmt: skip
TRANSFORMERS = KeyMap((("vision_model.", ""),))
_PACKED, _APART = ".self_attn.qkv.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Sizes, all read from the checkpoint. `depth` counts the blocks that are used: all but the last."""

    dim: int
    ffn_dim: int
    depth: int

    @property
    def tokens(self) -> int:
        return 1 + (SIDE // PATCH) ** 2


class Embeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.dim))
        self.patch_embedding = nn.Conv2d(3, config.dim, PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(config.tokens, config.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (layer(x).unflatten(2, (-1, HEAD_DIM)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(*heads))


class Layer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.self_attn = SelfAttention(config.dim)
        self.mlp = nn.ModuleDict({"fc1": Linear(config.dim, config.ffn_dim), "fc2": Linear(config.ffn_dim, config.dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPVision(nn.Module):
    """Pictures -> features of each patch. `pre_layrnorm` is spelled so in the files."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.depth))})

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224), normalised -> (B, 257, D)."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"]:
            x = layer(x)
        return x


def normalised(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 -> (B, 3, 224, 224) as CLIP knows them; squashed, not cropped, as in Wan's own code."""
    small = F.interpolate(pictures.float(), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=small.device).view(3, 1, 1) for values in (MEAN, STD))
    return (small * 0.5 + 0.5 - mean) / std


def views(shapes: Mapping[str, tuple[int, ...]], keymap: KeyMap, config: CLIPVisionConfig) -> dict[str, View]:
    """Where the model's tensors are in a file of either layout; the official one has query, key and value in one."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in CLIPVision(config).state_dict().items()}
    found = {}
    for source in shapes:
        name = keymap.to_model(source)
        parts = [name.replace(_PACKED, apart) for apart in _APART] if _PACKED in name else [name]
        for index, part in enumerate(parts):
            if part in wanted:
                rows = shapes[source][0] // len(parts)
                found[part] = View(wanted[part], ((source, slice(index * rows, (index + 1) * rows)),))
    return found


def load(checkpoint: Checkpoint, part: Part, dtype: torch.dtype) -> ImageEncoder:
    """Load the tower on the CPU."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    with torch.device("meta"):
        model = CLIPVision(part.config)
    seen = checkpoint.viewed(views(shapes, part.keymap, part.config))
    return ImageEncoder(load_into(model, seen, KeyMap(), dtype), normalised)
