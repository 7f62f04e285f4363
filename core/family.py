"""The contract between the engine and a model family.

A family is a frozen value of data and functions; it lives in one folder of `families/`. Nothing outside that folder
knows a family's name: what differs between two families is a field or a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .keymap import IDENTITY, KeyMap
from .lora.names import LoRANames
from .modules.quantized import Storing
from .shapes import LatentSpec, VideoSize
from .weights import Checkpoint

Kind = Literal["dit", "vae", "text_encoder"]
KIND_TITLES: dict[str, str] = {"dit": "diffusion model", "vae": "VAE", "text_encoder": "text encoder"}

TextStates = dict[str, Tensor]
"""What a text encoder made of one prompt; the names are the stems of the text cache's tensors."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One release of a family, with the defaults its authors recommend. `expert` is high or low where a release is two
    models, one for each part of the noise levels."""

    name: str
    title: str
    size: VideoSize
    steps: int
    sampling_shift: float
    guidance: float
    training_shift: float
    negative_prompt: str = ""
    needs_image: bool = False
    expert: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a checkpoint was recognised as.

    `variants` are the releases that its tensors may belong to, the most likely first; `config` is what the family's
    builder takes; `keymap` leads from the file's names to the model's. Of a transformer, `width` is that of its
    activations and `text_width` that of the text states it takes.
    """

    family: str
    kind: Kind
    title: str
    config: Any
    variants: tuple[str, ...] = ()
    keymap: KeyMap = IDENTITY
    width: int = 0
    text_width: int = 0


class Tokenizer(Protocol):
    """What a family's text encoder cuts prompts with; loaded without the encoder's weights."""

    def too_long(self, prompt: str) -> int:
        """How many tokens of the prompt do not fit (0 when all do)."""


class TextEncoder(Protocol):
    """Loaded text encoder(s) of a family. `model` is the module to move between devices; `encode` follows it."""

    model: nn.Module
    tokenizer: Tokenizer

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """One TextStates per prompt, on the CPU."""


class VAE(Protocol):
    """A loaded video VAE. Pixels are (B, 3, F, H, W) in -1..1, latents (B, C, F, H, W) unscaled.
    `cache_on_cpu` keeps what it remembers of earlier frames in main memory."""

    cache_on_cpu: bool

    def encode(self, video: Tensor) -> Tensor:
        """The posterior's mean or mode: the same every time."""

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Chunks of consecutive frames."""


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """A kind of transformer block and its LoRA-able matrices, in canonical order.

    `path` holds `{i}` for the block's number; matrices a checkpoint does not have are passed over.
    """

    path: str
    matrices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything the engine needs to know of a family.

    name            as written in LoRA and cache metadata
    short           suffix of cache file names, without underscores
    fps             frame rate of its videos
    latent          latent geometry and scaling
    cache_dtype     dtype of cached latents
    cache_scaled    whether cached latents are in model space (else in VAE space)
    base_model      what LoRA metadata calls the architecture
    blocks          transformer blocks in canonical order, for LORAID and adapters
    lora_names      what LoRA files of other tools call their matrices
    recognise       (tensor name -> shape) -> Part or None; ValueError for a model that is known but not supported
    anchors         names one of which every checkpoint of the family holds, to find the file's prefix
    build_dit       config -> transformer; called as dit(latents, time, **conditions), its `run_block` is a BlockRunner
    build_vae       config -> VAE
    vae_elements    values the VAE holds at a time per pixel of a frame, to ask for enough memory
    load_tokenizer  checkpoint of a text encoder -> Tokenizer
    text_states     names of the states that its text encoder gives
    load_text       (checkpoint, part, dtype, storing of its large weights or None) -> TextEncoder, on the CPU
    conditions      one TextStates per sample -> keyword arguments of the transformer
    to_comfyui      TextStates -> (cross_attn (1, L, D), options) as in ComfyUI's CONDITIONING
    from_comfyui    the inverse, for conditioning made by ComfyUI's own encoders too
    """

    name: str
    short: str
    title: str
    fps: int
    latent: LatentSpec
    cache_dtype: torch.dtype
    cache_scaled: bool
    base_model: str
    variants: Mapping[str, Variant]
    blocks: tuple[BlockKind, ...]
    lora_names: LoRANames
    anchors: tuple[str, ...]
    recognise: Callable[[Mapping[str, tuple[int, ...]]], Part | None]
    build_dit: Callable[[Any], nn.Module]
    build_vae: Callable[[Any], nn.Module]
    vae_elements: int
    load_tokenizer: Callable[[Checkpoint], Tokenizer]
    text_states: tuple[str, ...]
    load_text: Callable[[Checkpoint, Part, torch.dtype, Storing | None], TextEncoder]
    conditions: Callable[[Sequence[TextStates]], dict[str, Tensor]]
    to_comfyui: Callable[[TextStates], tuple[Tensor, dict[str, Any]]]
    from_comfyui: Callable[[Tensor, Mapping[str, Any]], TextStates]
