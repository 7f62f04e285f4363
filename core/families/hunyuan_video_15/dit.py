"""The HunyuanVideo 1.5 transformer (arXiv 2511.18870).

- a latent is a token, of 32 channels of noise, 32 of the start image's latents and one that says where these are
- before the prompt's tokens there may be those of words to be written (glyphs), and before these those of the start image;
  each kind is marked by an embedding of its own
- double blocks alone, as HunyuanVideo has them, with query, key and value in three matrices
- a step-distilled model is also told the time that the step leads to (MeanFlow, arXiv 2505.13447)

Legend: B batch, C channels, F H W latent size, S tokens, D width. Modules are named as in the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...modules.checkpointing import BlockRunner
from ...modules.layers import Linear
from ..hunyuan_video.dit import (
    HEAD_DIM,
    FinalLayer,
    Sizes,
    TextRefiner,
    TimeEmbedding,
    TwoStreamBlock,
    refined,
    through_blocks,
)

PATCH = (1, 1, 1)
TEXT, GLYPH, VISION = range(3)  # rows of the embedding of a token's kind


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo15Config(Sizes):
    """Sizes, all read from the checkpoint. `step_distilled`: the time that a step leads to is one of its inputs."""

    glyph_dim: int
    glyph_hidden: int
    vision_dim: int
    step_distilled: bool


class DoubleBlock(TwoStreamBlock):
    """Query, key and value in three matrices."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__(config)
        for stream in ("img", "txt"):
            for letter in "qkv":
                self.add_module(f"{stream}_attn_{letter}", Linear(config.dim, config.dim))

    def _heads(self, stream: str, x: Tensor) -> tuple[Tensor, ...]:
        layers = (getattr(self, f"{stream}_attn_{letter}") for letter in "qkv")
        return tuple(layer(x).unflatten(2, (-1, HEAD_DIM)) for layer in layers)


class GlyphEmbedding(nn.Module):
    """The states of words to be written (S, glyph_dim) -> (S, D)."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__()
        hidden = config.glyph_hidden
        self.layernorm = nn.LayerNorm(config.glyph_dim)
        self.fc1, self.fc2, self.fc3 = (
            Linear(config.glyph_dim, hidden),
            Linear(hidden, hidden),
            Linear(hidden, config.dim),
        )
        self.activation = nn.GELU()

    def forward(self, states: Tensor) -> Tensor:
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(self.layernorm(states))))))


class VisionEmbedding(nn.Module):
    """The features of the start image (S, vision_dim) -> (S, D)."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__()
        inner = config.vision_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(inner), Linear(inner, inner), nn.GELU(), Linear(inner, config.dim), nn.LayerNorm(config.dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class HunyuanVideo15DiT(nn.Module):
    """Predicts the velocity noise - data."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__()
        self.config = config
        self.takes_end = config.step_distilled
        dim = config.dim
        self.img_in = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, dim, PATCH, stride=PATCH)})
        self.txt_in = TextRefiner(config)
        self.byt5_in, self.vision_in = GlyphEmbedding(config), VisionEmbedding(config)
        self.cond_type_embedding = nn.Embedding(3, dim)
        self.time_in = TimeEmbedding(config.freq_dim, dim)
        if config.step_distilled:
            self.time_r_in = TimeEmbedding(config.freq_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_depth))
        self.final_layer = FinalLayer(dim, config.out_channels)
        self.run_block = BlockRunner()

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in["proj"].weight.dtype

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text_states: Sequence[Tensor],
        glyph_states: Sequence[Tensor],
        vision_states: Tensor | None = None,
        image_condition: Tensor | None = None,
        end: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """latents (B, C, F, H, W) in model space, time (B,) on 0..1000, of each sample text_states (S, text_dim) and
        glyph_states (0 or more, glyph_dim) -> velocity (B, C, F, H, W) in float32. `vision_states` (B, S, vision_dim) and
        `image_condition` (B, C', F, H, W) are those of the start image, and zeros stand for none of the latter. `end` (B,) is
        the time that a step-distilled model's step leads to, without which it predicts the velocity at `time`. Blocks of the
        numbers in `skip_layers` are left out."""
        if image_condition is None:
            missing = self.config.in_channels - latents.shape[1]
            image_condition = latents.new_zeros(len(latents), missing, *latents.shape[2:])
        x = self.img_in["proj"](torch.cat((latents, image_condition), dim=1).to(self.dtype))  # (B, D, F, H, W)
        vector = self.time_in(time)
        if self.config.step_distilled:
            vector = vector + self.time_r_in(time if end is None else end)
        text = self._tokens(refined(self.txt_in, text_states, time), glyph_states, vision_states)
        blocks = (block for number, block in enumerate(self.double_blocks) if number not in skip_layers)
        tokens = through_blocks(self.run_block, blocks, x, text, vector)
        velocity = self.final_layer(tokens, vector).float()
        return velocity.transpose(1, 2).unflatten(2, x.shape[2:])

    def _tokens(
        self, prompts: Sequence[Tensor], glyph_states: Sequence[Tensor], vision_states: Tensor | None
    ) -> list[Tensor]:
        """(S, D) of each sample: the image's, the glyphs' and the prompt's."""
        kinds = self.cond_type_embedding.weight.to(self.dtype)
        samples = []
        for index, (prompt, glyphs) in enumerate(zip(prompts, glyph_states, strict=True)):
            tokens = [prompt + kinds[TEXT]]
            if len(glyphs):
                tokens.insert(0, self.byt5_in(glyphs.to(self.dtype)) + kinds[GLYPH])
            if vision_states is not None:
                tokens.insert(0, self.vision_in(vision_states[index].to(self.dtype)) + kinds[VISION])
            samples.append(torch.cat(tokens))
        return samples
