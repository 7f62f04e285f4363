"""Text encoding for HunyuanVideo: LLaVA-Llama-3, whose states of the prompt the video tokens attend to, and CLIP-L's text
tower, whose pooled state enters as one vector.

Llama is asked to describe a video; the states of the question are left out. They are those three places before its end, so
the last two blocks and the last norm are not built. Modules are named as in transformers. Legend: B batch, L tokens, D width,
N heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...family import Part, TextEncoder, TextStates
from ...family import Tokenizer as AnyTokenizer
from ...modules.layers import Linear, RMSNorm
from ...modules.quantized import Storing, linear_weights
from ...weights import Checkpoint, load_into
from .defaults import CLIP_TOKENS, LLM, LLM_MASK, LLM_TOKENS, POOLED, POOLED_MASK

# What Llama is asked, as in training; there is no space between the points.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
TEMPLATE_TOKENS = 95  # before the prompt
LLAMA_HEAD_DIM = 128
CLIP_HEAD_DIM = 64
UNUSED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes, all read from the checkpoint. `depth` counts the blocks that are used. The rest is Llama 3's where nothing is
    said: what its norms add, the base of its rotary embedding, and whether queries, keys and values have a bias."""

    vocabulary: int
    dim: int
    ffn_dim: int
    kv_heads: int
    depth: int
    eps: float = 1e-5
    rotary_theta: float = 500000.0
    qkv_bias: bool = False


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        dim, of_kv = config.dim, config.kv_heads * LLAMA_HEAD_DIM
        self.q_proj, self.o_proj = _projection(dim, dim, config.qkv_bias), _projection(dim, dim)
        self.k_proj, self.v_proj = (_projection(dim, of_kv, config.qkv_bias) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (-1, LLAMA_HEAD_DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, N, L, 128)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        shared = q.shape[1] // k.shape[1]  # heads to one key and value
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (_projection(config.dim, config.ffn_dim) for _ in range(2))
        self.down_proj = _projection(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(config.dim, config.eps) for _ in range(2))
        self.self_attn, self.mlp = LlamaAttention(config), LlamaMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama 3 (arXiv 2407.21783), or a model of its kind, without its end."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.theta = config.rotary_theta
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.depth))

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers (B, L) -> states (B, L, D)."""
        x = self.embed_tokens(ids)
        frequencies = self.theta ** (-torch.arange(0, LLAMA_HEAD_DIM, 2, device=x.device).float() / LLAMA_HEAD_DIM)
        angles = torch.arange(ids.shape[1], device=x.device).float()[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=1)  # (L, 128)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def _projection(inputs: int, outputs: int, bias: bool = False) -> Linear:
    layer = Linear(inputs, outputs)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as Llama has it: a head's first half is turned with its second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes, all read from the checkpoint."""

    vocabulary: int
    dim: int
    ffn_dim: int
    depth: int


class CLIPAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (-1, CLIP_HEAD_DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CLIPBlock(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        dim = config.dim
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = CLIPAttention(dim)
        self.mlp = nn.ModuleDict({"fc1": Linear(dim, config.ffn_dim), "fc2": Linear(config.ffn_dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))  # CLIP's approximation of GELU


class CLIPText(nn.Module):
    """CLIP's text tower (arXiv 2103.00020)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(config.vocabulary, config.dim),
            "position_embedding": nn.Embedding(CLIP_TOKENS, config.dim),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CLIPBlock(config) for _ in range(config.depth))})
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers (B, L) -> states (B, L, D)."""
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"].weight[: ids.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class LlamaTokenizer:
    """Cuts the question with the prompt in it; 256 tokens are left for the prompt."""

    def __init__(self, folders: Iterable[Path]) -> None:
        import tokenizers

        self.tokenizer = tokenizer_in(
            folders, ("tokenizer.json",), "<|start_header_id|>", "LLaVA-Llama-3",
            lambda folder: tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json"))),
        )  # fmt: skip

    def _whole(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(TEMPLATE.format(prompt)).ids

    def __call__(self, prompt: str) -> list[int]:
        return self._whole(prompt)[: TEMPLATE_TOKENS + LLM_TOKENS]

    def too_long(self, prompt: str) -> int:
        return max(0, len(self._whole(prompt)) - TEMPLATE_TOKENS - LLM_TOKENS)


class CLIPTokenizer:
    def __init__(self, folders: Iterable[Path]) -> None:
        from transformers import CLIPTokenizer as Tokenizer

        self.tokenizer = tokenizer_in(
            folders, ("vocab.json", "merges.txt"), "<|startoftext|>", "CLIP-L",
            lambda folder: Tokenizer.from_pretrained(folder, local_files_only=True),
        )  # fmt: skip

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers between the marks of beginning and end; at most 77."""
        begin, *words, end = self.tokenizer(prompt)["input_ids"]
        return [begin, *words[: CLIP_TOKENS - 2], end]

    def too_long(self, prompt: str) -> int:
        return 0  # what is cut off here, Llama sees


class LlamaEncoder:
    """The loaded Llama and its tokenizer."""

    def __init__(self, model: Llama, tokenizer: LlamaTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        return [self._encode(self.tokenizer(prompt)) for prompt in prompts]

    def _encode(self, ids: list[int]) -> TextStates:
        device = self.model.embed_tokens.weight.device
        states = self.model(torch.tensor([ids], device=device))[0, TEMPLATE_TOKENS:].cpu()
        return {LLM: F.pad(states, (0, 0, 0, LLM_TOKENS - len(states))), LLM_MASK: _mask(len(states), LLM_TOKENS)}


class CLIPEncoder:
    """The loaded text tower and its tokenizer."""

    def __init__(self, model: CLIPText, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        return [self._encode(self.tokenizer(prompt)) for prompt in prompts]

    def _encode(self, ids: list[int]) -> TextStates:
        device = self.model.final_layer_norm.weight.device
        pooled = self.model(torch.tensor([ids], device=device))[0, -1].cpu()  # at the mark of the end
        return {POOLED: pooled, POOLED_MASK: _mask(len(ids), CLIP_TOKENS)}


def _mask(used: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) < used).long()


def tokenizer_in(
    folders: Iterable[Path], names: Sequence[str], token: str, title: str, make: Callable[[str], Any]
) -> Any:
    """What `make` makes of the first folder that holds all these files, the first of which knows `token`: others have files of
    the same names. ValueError when there is none, or its files are damaged."""
    folders = list(folders)
    for folder in folders:
        if all((folder / name).is_file() for name in names) and token in (folder / names[0]).read_text(
            encoding="utf-8", errors="replace"
        ):
            break
    else:
        raise ValueError(
            f"the tokenizer of {title} was not found: put {' and '.join(names)} of the model's repository into {folders[0]}."
        )
    try:
        return make(str(folder))
    except Exception as error:  # the libraries' own are of any kind
        raise ValueError(
            f"the tokenizer of {title} in {folder} cannot be read ({error}): get {' and '.join(names)} again."
        ) from error


_ENCODERS: dict[type, tuple[type, type, type]] = {
    LlamaConfig: (Llama, LlamaTokenizer, LlamaEncoder),
    CLIPTextConfig: (CLIPText, CLIPTokenizer, CLIPEncoder),
}


def build(config: Any) -> nn.Module:
    """The encoder of these sizes."""
    return _ENCODERS[type(config)][0](config)


def load_tokenizer(checkpoint: Checkpoint, part: Part, folders: Iterable[Path] = ()) -> AnyTokenizer:
    """The encoder's tokenizer, from the checkpoint's folder or one of `folders`."""
    return _ENCODERS[type(part.config)][1]((checkpoint.path.parent, *folders))


def load(checkpoint: Checkpoint, part: Part, dtype: torch.dtype, storing: Storing | None = None,
         folders: Iterable[Path] = ()) -> TextEncoder:  # fmt: skip
    """Load weights and tokenizer, on the CPU; the weights of linear layers as `storing` keeps them."""
    tokenizer = load_tokenizer(checkpoint, part, folders)
    with torch.device("meta"):
        model = build(part.config)
    stored = dict.fromkeys(linear_weights(model), storing) if storing else {}
    load_into(model, checkpoint, part.keymap, dtype, stored=stored)
    return _ENCODERS[type(part.config)][2](model, tokenizer)
