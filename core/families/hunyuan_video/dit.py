"""The HunyuanVideo transformer (arXiv 2412.03603, section 4.2), which SkyReels V1 shares.

- tokens are latent patches of (1, 2, 2), and after them those of the prompt; all attend to all
- double blocks have weights of their own for each of the two kinds of tokens, single blocks the same for both
- the prompt's states are refined first, by two blocks of their own
- time, the pooled prompt and the embedded guidance enter as one vector, from which every block makes its modulation
- queries and keys are RMS-normalised per head; rotary embedding over (frame, row, column) for video tokens alone

Prompts of one batch may differ in length. They are filled up behind their end, and nothing attends to what is filled up, so
that no mask is needed.

Legend: B batch, C channels, F H W latent size, V video tokens, S text tokens, L = V + S, D width, N heads. Modules are
named as in the official checkpoints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...modules.attention import FullAttention, attention
from ...modules.checkpointing import BlockRunner
from ...modules.layers import Linear, RMSNorm, rotary, rotary_tables, sinusoids

HEAD_DIM = 128
ROTARY_DIMS = (16, 56, 56)  # of a head, for frame, row, column
ROTARY_THETA = 256.0
PATCH = (1, 2, 2)

Lengths = tuple[int, ...] | None
"""How many tokens of each sample there are to attend to; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Those that HunyuanVideo 1.5 has too; all are read from the checkpoint."""

    dim: int
    ffn_dim: int
    double_depth: int
    refiner_depth: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig(Sizes):
    """Sizes, all read from the checkpoint. `guidance`: the embedded guidance is one of its inputs."""

    single_depth: int
    pooled_dim: int
    guidance: bool


class TimeEmbedding(nn.Module):
    """(B,) on 0..1000 -> (B, D)."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(sinusoids(time, self.freq_dim).to(self.mlp[0].bias.dtype))


class VectorEmbedding(nn.Module):
    """The pooled prompt (B, pooled_dim) -> (B, D)."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.in_layer, self.out_layer = Linear(config.pooled_dim, config.dim), Linear(config.dim, config.dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(pooled)))


class ContextEmbedding(nn.Module):
    """The mean of a prompt's states (B, text_dim) -> (B, D)."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(config.text_dim, config.dim), Linear(config.dim, config.dim)

    def forward(self, mean: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean)))


class MLP(nn.Module):
    def __init__(self, config: Sizes, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(config.dim, config.ffn_dim), Linear(config.ffn_dim, config.dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Modulation(nn.Module):
    """The vector (B, D) -> so many vectors (B, 1, D)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = Linear(dim, dim * count)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vector)).unsqueeze(1).chunk(self.count, dim=2)


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward over the states of one prompt, each with a gate made of time and prompt."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attn_qkv, self.self_attn_proj = Linear(dim, dim * 3), Linear(dim, dim)
        self.mlp = MLP(config, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, dim * 2))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        gate1, gate2 = self.adaLN_modulation(vector).unsqueeze(1).chunk(2, dim=2)
        x = torch.addcmul(x, self.self_attn_proj(attention(*_heads(self.self_attn_qkv(self.norm1(x))))), gate1)
        return torch.addcmul(x, self.mlp(self.norm2(x)), gate2)


class TextRefiner(nn.Module):
    """The states of one prompt (1, S, text_dim) and time (1,) -> (1, S, D)."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.input_embedder = Linear(config.text_dim, config.dim)
        self.t_embedder, self.c_embedder = TimeEmbedding(config.freq_dim, config.dim), ContextEmbedding(config)
        blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_depth))
        self.individual_token_refiner = nn.ModuleDict({"blocks": blocks})

    def forward(self, states: Tensor, time: Tensor) -> Tensor:
        vector = self.t_embedder(time) + self.c_embedder(states.float().mean(dim=1).to(states.dtype))
        x = self.input_embedder(states)
        for block in self.individual_token_refiner["blocks"]:
            x = block(x, vector)
        return x


class TwoStreamBlock(nn.Module, ABC):
    """Attention of video and text together, with weights of their own for each but for what a subclass has: how queries,
    keys and values are made, `_heads(img or txt, tokens)`."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        dim = config.dim
        self.img_mod, self.txt_mod = Modulation(dim, 6), Modulation(dim, 6)
        self.img_attn_q_norm, self.img_attn_k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.txt_attn_q_norm, self.txt_attn_k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.img_attn_proj, self.txt_attn_proj = Linear(dim, dim), Linear(dim, dim)
        self.img_mlp, self.txt_mlp = MLP(config, nn.GELU("tanh")), MLP(config, nn.GELU("tanh"))
        self.attend = FullAttention()

    def forward(
        self, x: Tensor, vector: Tensor, cos: Tensor, sin: Tensor, text_tokens: int, lengths: Lengths
    ) -> Tensor:
        """x (B, L, D), vector (B, D) -> (B, L, D)."""
        sizes = (x.shape[1] - text_tokens, text_tokens)
        img, txt = x.split(sizes, dim=1)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vector)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vector)
        img_q, img_k, img_v = self._heads("img", _modulated(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self._heads("txt", _modulated(txt, txt_shift1, txt_scale1))
        q = rotary(torch.cat((self.img_attn_q_norm(img_q), self.txt_attn_q_norm(txt_q)), dim=1), cos, sin)
        k = rotary(torch.cat((self.img_attn_k_norm(img_k), self.txt_attn_k_norm(txt_k)), dim=1), cos, sin)
        y = _attended(self.attend, q, k, torch.cat((img_v, txt_v), dim=1), lengths)
        img_y, txt_y = y.split(sizes, dim=1)
        img = torch.addcmul(img, self.img_attn_proj(img_y), img_gate1)
        txt = torch.addcmul(txt, self.txt_attn_proj(txt_y), txt_gate1)
        img = torch.addcmul(img, self.img_mlp(_modulated(img, img_shift2, img_scale2)), img_gate2)
        txt = torch.addcmul(txt, self.txt_mlp(_modulated(txt, txt_shift2, txt_scale2)), txt_gate2)
        return torch.cat((img, txt), dim=1)

    @abstractmethod
    def _heads(self, stream: str, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, D) -> query, key, value (B, L, N, 128) each."""


class DoubleBlock(TwoStreamBlock):
    """Query, key and value in one matrix."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__(config)
        self.img_attn_qkv, self.txt_attn_qkv = (Linear(config.dim, config.dim * 3) for _ in range(2))

    def _heads(self, stream: str, x: Tensor) -> tuple[Tensor, ...]:
        return _heads(getattr(self, f"{stream}_attn_qkv")(x))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        dim = config.dim
        self.sizes = (dim * 3, config.ffn_dim)
        self.modulation = Modulation(dim, 3)
        self.linear1 = Linear(dim, sum(self.sizes))
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.linear2 = Linear(dim + config.ffn_dim, dim)
        self.attend = FullAttention()

    def forward(
        self, x: Tensor, vector: Tensor, cos: Tensor, sin: Tensor, text_tokens: int, lengths: Lengths
    ) -> Tensor:
        """x (B, L, D), vector (B, D) -> (B, L, D)."""
        shift, scale, gate = self.modulation(vector)
        qkv, y = self.linear1(_modulated(x, shift, scale)).split(self.sizes, dim=2)
        q, k, v = _heads(qkv)
        q, k = rotary(self.q_norm(q), cos, sin), rotary(self.k_norm(k), cos, sin)
        y = torch.cat((_attended(self.attend, q, k, v, lengths), F.gelu(y, approximate="tanh")), dim=2)
        return torch.addcmul(x, self.linear2(y), gate)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.linear = Linear(dim, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, dim * 2))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x (B, V, D), vector (B, D) -> (B, V, values of a patch)."""
        shift, scale = self.adaLN_modulation(vector).unsqueeze(1).chunk(2, dim=2)
        return self.linear(_modulated(x, shift, scale))


class HunyuanVideoDiT(nn.Module):
    """Predicts the velocity noise - data."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.img_in = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, dim, PATCH, stride=PATCH)})
        self.txt_in = TextRefiner(config)
        self.time_in = TimeEmbedding(config.freq_dim, dim)
        self.vector_in = VectorEmbedding(config)
        if config.guidance:
            self.guidance_in = TimeEmbedding(config.freq_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.final_layer = FinalLayer(dim, config.out_channels * math.prod(PATCH))
        self.run_block = BlockRunner()

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in["proj"].weight.dtype

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text_states: Sequence[Tensor],
        pooled: Tensor,
        guidance: Tensor | None = None,
        image_condition: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """latents (B, C, F, H, W) in model space, time (B,) on 0..1000, each sample's text_states (S, text_dim), pooled
        (B, pooled_dim) -> velocity (B, C, F, H, W) in float32. `guidance` (B,) is 1000 times the embedded guidance, for
        a checkpoint that takes it. `image_condition` (B, C', F, H, W): C + C' must be the checkpoint's input channels.
        Blocks of the numbers in `skip_layers` are left out, single ones being numbered after the double ones."""
        x = latents if image_condition is None else torch.cat((latents, image_condition), dim=1)
        x = self.img_in["proj"](x.to(self.dtype))  # (B, D, F, H / 2, W / 2)
        sizes = x.shape[2:]
        text = refined(self.txt_in, text_states, time)
        vector = self.time_in(time) + self.vector_in(pooled.to(self.dtype))
        if self.config.guidance:
            vector = vector + self.guidance_in(guidance)
        blocks = (
            block
            for number, block in enumerate((*self.double_blocks, *self.single_blocks))
            if number not in skip_layers
        )
        x = through_blocks(self.run_block, blocks, x, text, vector)
        return _unpatchified(self.final_layer(x, vector).float(), sizes)


def refined(txt_in: TextRefiner, text_states: Sequence[Tensor], time: Tensor) -> list[Tensor]:
    """Prompts (S, text_dim) -> (S, D) each, refined alone."""
    dtype = txt_in.input_embedder.bias.dtype
    return [txt_in(states.to(dtype)[None], at)[0] for states, at in zip(text_states, time.split(1), strict=True)]


def through_blocks(
    run_block: BlockRunner, blocks: Iterable[nn.Module], x: Tensor, text: Sequence[Tensor], vector: Tensor
) -> Tensor:
    """Video (B, D, F, H, W) in patches and the text tokens (S, D) of each sample -> video tokens (B, V, D)."""
    text_lengths, padded = [len(tokens) for tokens in text], pad_sequence(text, batch_first=True)
    cos, sin = rotary_tables(x.shape[2:], ROTARY_DIMS, ROTARY_THETA, x.device)
    x = torch.cat((x.flatten(2).transpose(1, 2), padded), dim=1)
    text_tokens = padded.shape[1]
    video_tokens = x.shape[1] - text_tokens
    lengths = tuple(video_tokens + length for length in text_lengths) if len(set(text_lengths)) > 1 else None
    cos, sin = (F.pad(table, (0, 0, 0, 0, 0, text_tokens), value=rest) for table, rest in ((cos, 1), (sin, 0)))
    for block in blocks:
        x = run_block(block, x, vector, cos, sin, text_tokens, lengths)
    return x[:, :video_tokens]


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, L, 3 * D) -> query, key, value (B, L, N, 128) each."""
    return qkv.unflatten(2, (3, -1, HEAD_DIM)).unbind(2)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _attended(attend: FullAttention, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """(B, L, N, 128) each -> (B, L, D); what is filled up behind `lengths` is attended to by nothing."""
    if lengths is None:
        return attend(q, k, v)
    samples = (attend(q[i : i + 1], k[i : i + 1, :end], v[i : i + 1, :end]) for i, end in enumerate(lengths))
    return torch.cat(list(samples))


def _unpatchified(x: Tensor, sizes: torch.Size) -> Tensor:
    """(B, V, C * 1 * 2 * 2) -> (B, C, F, H, W)."""
    x = x.unflatten(1, sizes).unflatten(4, (-1, *PATCH))  # (B, F, H/2, W/2, C, 1, 2, 2)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # (B, C, F, 1, H/2, 2, W/2, 2)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
