"""The contract between the engine and a model family.

A family is a frozen value of data and functions; it lives in one folder of `families/`. Nothing outside that folder
knows a family's name: what differs between two families is a field or a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .keymap import IDENTITY, KeyMap
from .lora.names import LoRANames
from .modules.quantized import Storing
from .shapes import LatentSpec, Tiles, VideoSize
from .weights import Checkpoint, View

Kind = Literal["dit", "vae", "text_encoder", "vision_encoder"]
KIND_TITLES: dict[str, str] = {
    "dit": "diffusion model", "vae": "VAE", "text_encoder": "text encoder", "vision_encoder": "image encoder",
}  # fmt: skip

States = dict[str, Tensor]
"""What a transformer is told of one sample besides noise and time; the names are the stems of the caches' tensors."""

GUIDANCE = "guidance"
"""Name of the state, a single number, that holds the guidance which is told to the model instead of being computed."""

TextStates = States
"""Those that a text encoder made of one prompt."""

Conditions = dict[str, Tensor | tuple[Tensor, ...]]
"""What a transformer is told of a batch, by the names of its arguments: one tensor for all samples, or one for each where
these differ in length."""


def moved(conditions: Conditions, device: torch.device) -> Conditions:
    """The same on a device."""

    def to(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    return {
        name: tuple(map(to, value)) if isinstance(value, tuple) else to(value) for name, value in conditions.items()
    }


def check_known(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError when the options of a CONDITIONING hold what would have no effect."""
    ignored = sorted(name for name, value in options.items() if value is not None and name not in known)
    if ignored:
        raise ValueError(
            f"the conditioning carries {', '.join(ignored)}, which this model cannot use: link it without."
        )


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """How an image-to-video release takes its images.

    states     name and shape of each of the States made of them; behind a single number stands the latents' size
    vision     features of an image encoder are among them
    end        where an end image goes: inside (it is the clip's last frame) or after (an extra latent frame behind it)
    needs_end  it cannot do without one
    """

    states: tuple[tuple[str, tuple[int, ...]], ...]
    vision: bool = False
    end: Literal["inside", "after"] = "after"
    needs_end: bool = False

    def shapes(self, size: VideoSize) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of the States with latents of this size."""
        return {name: (*shape, *size) if len(shape) == 1 else shape for name, shape in self.states}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One release of a family, with the defaults its authors recommend. `expert` is high or low where a release is two
    models, one for the sigmas from `boundary` on and one for those below; `unusable` says why one that is recognised
    cannot be used; `shift_at` names sizes (width, height) with a flow shift of their own, `few_steps_shift` is that of
    samplings of less than `few_steps` steps. `embedded_guidance` is told to the model and costs nothing; 0 where it takes
    none. `training_sampling` is how noise levels are best drawn in training (see `training/timesteps.py`). `file_word`
    stands in the names of its files, for releases that have the same tensors."""

    name: str
    title: str
    size: VideoSize
    steps: int
    sampling_shift: float
    guidance: float
    training_shift: float
    shift_at: Mapping[tuple[int, int], float] = field(default_factory=dict)
    few_steps: int = 0
    few_steps_shift: float = 0.0
    embedded_guidance: float = 0.0
    training_sampling: str = "shift"
    negative_prompt: str = ""
    images: ImageInput | None = None
    expert: str = ""
    boundary: float = 0.0
    unusable: str = ""
    file_word: str = ""

    def shift_for(self, width: int, height: int, steps: int) -> float:
        """The flow shift for videos of this size in pixels, made in so many steps."""
        if steps < self.few_steps:
            return self.few_steps_shift
        return self.shift_at.get((width, height), self.sampling_shift)

    def guidance_states(self, chosen: float = 0.0) -> States:
        """What the model is told of its embedded guidance; 0 is what its authors recommend. Raises ValueError when it takes
        none."""
        if chosen and not self.embedded_guidance:
            raise ValueError(f"{self.title} takes no embedded guidance: set it to 0.")
        value = chosen or self.embedded_guidance
        return {GUIDANCE: torch.tensor(value)} if value else {}

    def levels(self, boundary: float = 0.0) -> tuple[float, float]:
        """The sigmas that the release is used for; `boundary` where it is not its authors'."""
        at = boundary or self.boundary
        return {"high": (at, 1.0), "low": (0.0, at)}.get(self.expert, (0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a checkpoint was recognised as.

    `variants` are the releases that its tensors may belong to, the most likely first; `config` is what the family's
    builder takes; `keymap` leads from the file's names to the model's. Where the file divides the model's tensors otherwise,
    `views` says how it is to be seen before that. Of a transformer, `width` is that of its activations and `text_width` that
    of the text states it takes; of a text encoder, `gives` are the names of the states that it makes.
    """

    family: str
    kind: Kind
    title: str
    config: Any
    variants: tuple[str, ...] = ()
    keymap: KeyMap = IDENTITY
    views: Mapping[str, View] = field(default_factory=dict)
    width: int = 0
    text_width: int = 0
    gives: tuple[str, ...] = ()


class Tokenizer(Protocol):
    """What a family's text encoder cuts prompts with; loaded without the encoder's weights."""

    def too_long(self, prompt: str) -> int:
        """How many tokens of the prompt do not fit (0 when all do)."""


class TextEncoder(Protocol):
    """A loaded text encoder. `model` is the module to move between devices; `encode` follows it."""

    model: nn.Module
    tokenizer: Tokenizer

    def encode(self, prompts: Sequence[str]) -> list[TextStates]:
        """One TextStates per prompt, on the CPU."""


class VisionEncoder(Protocol):
    """A loaded image encoder. `model` is the module to move between devices; `encode` follows it."""

    model: nn.Module

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 -> features (B, L, D) on the CPU."""


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

    `path` holds `{i}` for the block's number; matrices a checkpoint does not have are passed over. Those of `modulation`,
    which make shifts, scales and gates of the time, are trained where that is wished, and no LORAID owns them.
    """

    path: str
    matrices: tuple[str, ...]
    modulation: tuple[str, ...] = ()


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
    build_dit       config -> transformer; called as dit(latents, time, skip_layers=numbers of blocks, **conditions), its
                    `run_block` is a BlockRunner. One that says `takes_end` is also told `end` in sampling, (B,) on 0..1000: the
                    time that the step leads to
    build_vae       config -> VAE
    vae_elements    values the VAE holds at a time per pixel, to ask for enough memory
    vae_tiles       how much of a video the VAE works on at a time where nobody chooses; no frames: it takes one frame
                    after the other whatever the clip's length, and needs no tiles in time
    load_tokenizer  (checkpoint of a text encoder, part, folders where a tokenizer may lie that is not with it) -> Tokenizer
    text_states     names of the states that its text encoder gives, or its text encoders together
    load_text       (checkpoint, part, dtype, storing of its large weights or None, folders as above) -> TextEncoder, on the CPU
    load_vision     (checkpoint, part, dtype) -> VisionEncoder, on the CPU
    comfyui_vision  the field of ComfyUI's CLIP_VISION_OUTPUT that holds what the VisionEncoder gives
    image_states    (VAE, VisionEncoder or None, ImageInput, start and end (B, 3, H, W) in -1..1 or None, frames) ->
                    States per clip
    conditions      one States per sample -> Conditions, keyword arguments of the transformer
    blank_text      config of a transformer -> the states of the longest prompt, without its content
    check_states    (config, ImageInput of the release or None, name -> shape of States, latent size) raises ValueError when
                    the transformer cannot take them
    comfyui_latents name of ComfyUI's own description of these latents, by which it previews them while they are sampled
    to_comfyui      States -> (cross_attn (1, L, D), options) as in ComfyUI's CONDITIONING
    image_options   the options alone, of States without a prompt
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
    vae_tiles: Tiles
    load_tokenizer: Callable[[Checkpoint, Part, Sequence[Path]], Tokenizer]
    text_states: tuple[str, ...]
    load_text: Callable[[Checkpoint, Part, torch.dtype, Storing | None, Sequence[Path]], TextEncoder]
    load_vision: Callable[[Checkpoint, Part, torch.dtype], VisionEncoder]
    comfyui_vision: str
    image_states: Callable[[VAE, VisionEncoder | None, ImageInput, Tensor, Tensor | None, int], list[States]]
    conditions: Callable[[Sequence[States]], Conditions]
    blank_text: Callable[[Any], TextStates]
    check_states: Callable[[Any, ImageInput | None, Mapping[str, Sequence[int]], VideoSize], None]
    comfyui_latents: str
    to_comfyui: Callable[[States], tuple[Tensor, dict[str, Any]]]
    image_options: Callable[[States], dict[str, Any]]
    from_comfyui: Callable[[Tensor, Mapping[str, Any]], States]

    def vae_values(self, pixels: VideoSize, tiles: Tiles) -> int:
        """How many values the VAE holds at a time for a video of this size."""
        height, width = (min(side, tiles.side or side) for side in pixels[1:])
        frames = min(pixels.frames, tiles.frames or pixels.frames) if self.vae_tiles.frames else 1
        return frames * height * width * self.vae_elements
