"""umT5 text encoding for Wan: cleaning, tokens, the encoder itself from transformers."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...family import Part, TextStates
from ...modules.quantized import Storing, linear_weights, restore_on_call
from ...weights import Checkpoint, load_into
from .defaults import TEXT
from .dit import TEXT_TOKENS

_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Sizes of the encoder, all read from the checkpoint."""

    vocabulary: int
    dim: int
    ffn_dim: int
    heads: int
    head_dim: int
    depth: int
    buckets: int


def cleaned(prompt: str) -> str:
    """The official clean-up: mojibake mended, HTML entities resolved, runs of white space made one space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's tokenizer. ComfyUI's file carries it; for the official `.pth` the file `spiece.model` of google/umt5-xxl
    must stand beside it. Raises ValueError when it is not there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor(model_proto=_tokenizer_model(checkpoint), add_eos=True)

    def __call__(self, prompt: str) -> list[int]:
        """Token numbers, the end mark last; at most 512."""
        ids = self.processor.encode(cleaned(prompt))
        return ids if len(ids) <= TEXT_TOKENS else [*ids[: TEXT_TOKENS - 1], ids[-1]]

    def too_long(self, prompt: str) -> int:
        return max(0, len(self.processor.encode(cleaned(prompt))) - TEXT_TOKENS)


class UMT5:
    """The loaded encoder and its tokenizer."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """One (tokens, dim) tensor per prompt; at most 512 tokens, the last of them the end mark."""
        states: list[TextStates] = []
        for start in range(0, len(prompts), _BATCH):
            states += self._encode_batch(prompts[start : start + _BATCH])
        return states

    def _encode_batch(self, prompts: Sequence[str]) -> list[TextStates]:
        tokens = [self.tokenizer(prompt) for prompt in prompts]
        length = max(map(len, tokens))
        ids = torch.zeros(len(tokens), length, dtype=torch.long)  # 0 is the padding token
        mask = torch.zeros_like(ids)
        for row, values in enumerate(tokens):
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        encoder = self.model["encoder"]
        output = encoder(input_ids=ids.to(encoder.device), attention_mask=mask.to(encoder.device)).last_hidden_state
        return [{TEXT: output[row, : len(values)].to("cpu", copy=True)} for row, values in enumerate(tokens)]


def build(config: UMT5Config) -> torch.nn.Module:
    """The encoder from transformers with the sizes of the checkpoint, as a module's part `encoder`."""
    from transformers import UMT5Config as Config
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel(
        Config(
            vocab_size=config.vocabulary, d_model=config.dim, d_ff=config.ffn_dim, num_heads=config.heads,
            d_kv=config.head_dim, num_layers=config.depth, relative_attention_num_buckets=config.buckets,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip
    return torch.nn.ModuleDict({"encoder": model.encoder})  # not `model`, which names its embedding twice


def load_tokenizer(checkpoint: Checkpoint, part: Part, folders: Sequence[Path] = ()) -> Tokenizer:
    """The encoder's tokenizer; it is in the checkpoint or beside it, not in `folders`."""
    return Tokenizer(checkpoint)


def load(checkpoint: Checkpoint, part: Part, dtype: torch.dtype, storing: Storing | None = None,
         folders: Sequence[Path] = ()) -> UMT5:  # fmt: skip
    """Load weights and tokenizer, on the CPU; the weights of linear layers as `storing` keeps them."""
    tokenizer = Tokenizer(checkpoint)
    with torch.device("meta"):
        model = build(part.config)
    stored = dict.fromkeys(linear_weights(model), storing) if storing else {}
    load_into(model, checkpoint, part.keymap, dtype, stored=stored)
    return UMT5(restore_on_call(model), tokenizer)


def _tokenizer_model(checkpoint: Checkpoint) -> bytes:
    embedded = checkpoint.extra("spiece_model")
    if embedded is not None:
        return bytes(embedded.to(torch.uint8).numpy())
    folder = checkpoint.path.parent
    candidates: list[Path] = [folder / "spiece.model", folder / "google" / "umt5-xxl" / "spiece.model",
                              checkpoint.path.with_suffix(".spiece.model")]  # fmt: skip
    for path in candidates:
        if path.is_file():
            return path.read_bytes()
    raise ValueError(
        f"{checkpoint.path.name} carries no tokenizer: put the file spiece.model of google/umt5-xxl into {folder}, "
        "or use ComfyUI's umt5_xxl file, which has it inside."
    )
