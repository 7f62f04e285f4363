"""Text encoding for HunyuanVideo 1.5: Qwen2.5-VL, whose states of the prompt become tokens, and a ByT5 that was trained on
glyphs, for words that are to be written in the video: those in quotes.

Qwen is asked to describe a video; the states of the question are left out. They are those three places before its end, so
the last two blocks and the last norm are not built, and neither is what looks at images. Template, quotes and what is left
out are those of ComfyUI's own encoder. Modules are named as in transformers. Legend: B batch, L tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...family import Part, TextEncoder, TextStates
from ...family import Tokenizer as AnyTokenizer
from ...modules.quantized import Storing, linear_weights, restore_on_call
from ...weights import Checkpoint, load_into
from ..hunyuan_video.text import Llama, LlamaConfig, tokenizer_in
from .defaults import GLYPH, GLYPH_TOKENS, TEXT, TEXT_TOKENS

# What Qwen is asked, as in ComfyUI, and what stands behind the prompt.
QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects:\n"
    "1. The main content and theme of the video.\n"
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.\n"
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.\n"
    "4. background environment, light, style and atmosphere.\n"
    "5. camera angles, movements, and transitions used in the video.<|im_end|>\n<|im_start|>user\n"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
QUOTES = (r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”")
_BYTE, _END = 3, 1  # ByT5's number of byte 0, and of the mark of the end


@dataclass(frozen=True, kw_only=True)
class ByT5Config:
    """Sizes, all read from the checkpoint."""

    vocabulary: int
    dim: int
    ffn_dim: int
    heads: int
    head_dim: int
    depth: int
    buckets: int


class QwenTokenizer:
    """Cuts prompts; 1024 tokens are for the prompt and what stands behind it."""

    def __init__(self, folders: Iterable[Path]) -> None:
        from transformers import Qwen2Tokenizer

        self.tokenizer = tokenizer_in(
            folders, ("tokenizer_config.json", "vocab.json", "merges.txt"), "<|im_start|>", "Qwen2.5-VL",
            lambda folder: Qwen2Tokenizer.from_pretrained(folder, local_files_only=True),
        )  # fmt: skip
        self.question = self._cut(QUESTION)

    def _cut(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _whole(self, prompt: str) -> list[int]:
        return self._cut((prompt or " ") + ANSWER)

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers of all but the question."""
        return self._whole(prompt)[:TEXT_TOKENS]

    def too_long(self, prompt: str) -> int:
        return max(0, len(self._whole(prompt)) - TEXT_TOKENS)


class GlyphTokenizer:
    """The bytes of what is in quotes; it needs no files."""

    def _whole(self, prompt: str) -> list[int]:
        quoted = [text for quotes in QUOTES for text in re.findall(quotes, prompt)]
        return [_BYTE + byte for byte in "".join(f'Text "{text}". ' for text in quoted).encode()]

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers, the mark of the end last; none where there are no quotes."""
        tokens = self._whole(prompt)[: GLYPH_TOKENS - 1]
        return [*tokens, _END] if tokens else []

    def too_long(self, prompt: str) -> int:
        return max(0, len(self._whole(prompt)) + 1 - GLYPH_TOKENS)


class QwenEncoder:
    """The loaded Qwen and its tokenizer."""

    def __init__(self, model: Llama, tokenizer: QwenTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        return [{TEXT: self._encode(prompt)} for prompt in prompts]

    def _encode(self, prompt: str) -> Tensor:
        """(L, D), at most 1024 tokens."""
        question = self.tokenizer.question
        ids = torch.tensor([[*question, *self.tokenizer(prompt)]], device=self.model.embed_tokens.weight.device)
        return self.model(ids)[0, len(question) :].cpu()


class GlyphEncoder:
    """The loaded ByT5 and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: GlyphTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        return [{GLYPH: self._encode(self.tokenizer(prompt))} for prompt in prompts]

    def _encode(self, tokens: list[int]) -> Tensor:
        """(L, D), at most 128 tokens."""
        encoder = self.model["encoder"]
        if not tokens:
            return torch.zeros(0, encoder.config.d_model)
        return encoder(input_ids=torch.tensor([tokens], device=encoder.device)).last_hidden_state[0].cpu()


def build(config: LlamaConfig | ByT5Config) -> nn.Module:
    """The encoder of these sizes; ByT5's is that of transformers, as a module's part `encoder`."""
    if isinstance(config, LlamaConfig):
        return Llama(config)
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=config.vocabulary, d_model=config.dim, d_ff=config.ffn_dim, num_heads=config.heads,
            d_kv=config.head_dim, num_layers=config.depth, relative_attention_num_buckets=config.buckets,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip
    return nn.ModuleDict({"encoder": model.encoder})  # not `model`, which names its embedding twice


def load_tokenizer(checkpoint: Checkpoint, part: Part, folders: Iterable[Path] = ()) -> AnyTokenizer:
    """The encoder's tokenizer, Qwen's from the checkpoint's folder or one of `folders`."""
    if isinstance(part.config, LlamaConfig):
        return QwenTokenizer((checkpoint.path.parent, *folders))
    return GlyphTokenizer()


def load(checkpoint: Checkpoint, part: Part, dtype: torch.dtype, storing: Storing | None = None,
         folders: Iterable[Path] = ()) -> TextEncoder:  # fmt: skip
    """Load weights and tokenizer, on the CPU; the weights of linear layers as `storing` keeps them."""
    tokenizer = load_tokenizer(checkpoint, part, folders)
    with torch.device("meta"):
        model = build(part.config)
    stored = dict.fromkeys(linear_weights(model), storing) if storing else {}
    load_into(model, checkpoint, part.keymap, dtype, stored=stored)
    if isinstance(part.config, LlamaConfig):
        return QwenEncoder(model, tokenizer)
    return GlyphEncoder(restore_on_call(model), tokenizer)
