"""What HunyuanVideo's transformer is told besides noise and time: the states of the prompt and of the image, to and from
ComfyUI.

An image-to-video model of SkyReels sees latents that hold the image in the first frame and zeros in all others. Legend: B
batch, F H W latents or pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...family import GUIDANCE, VAE, Conditions, ImageInput, States, TextStates, VisionEncoder, check_known
from ...shapes import VideoSize
from .defaults import CLIP_TOKENS, IMAGE, LATENT, LLM, LLM_MASK, LLM_TOKENS, POOLED, POOLED_MASK
from .dit import HunyuanVideoConfig

_NO_EFFECT = ("concat_mask",)
_KNOWN = ("pooled_output", "attention_mask", "guidance", "concat_latent_image", *_NO_EFFECT)
_TRAINED_GUIDANCE = 1.0  # what a LoRA is trained with: the model without what was distilled into it


def image_states(
    vae: VAE, vision: VisionEncoder | None, images: ImageInput, start: Tensor, end: Tensor | None, frames: int
) -> list[States]:
    """The states of clips of `frames` frames that begin with these pictures (B, 3, H, W) in -1..1. Raises ValueError for
    what the release lacks."""
    if end is not None:
        raise ValueError("this model takes a start image alone: take the link to the end image away.")
    if vision is not None:
        raise ValueError("this model takes no CLIP features: take the link to clip vision away.")
    first = LATENT.to_model(vae.encode(start.unsqueeze(2))).cpu()  # (B, 16, 1, h, w)
    more = LATENT.latents(VideoSize(frames, *start.shape[2:])).frames - 1
    return [{IMAGE: one} for one in F.pad(first, (0, 0, 0, 0, 0, more))]


def conditions(samples: Sequence[States]) -> Conditions:
    """Samples of one batch -> the transformer's arguments; a prompt's states without what is behind its end."""
    guidance = torch.tensor([1000 * float(sample.get(GUIDANCE, _TRAINED_GUIDANCE)) for sample in samples])
    found: Conditions = {
        "text_states": tuple(_valid(sample) for sample in samples),
        "pooled": torch.stack([sample[POOLED] for sample in samples]),
        "guidance": guidance,
    }
    if IMAGE in samples[0]:
        found["image_condition"] = torch.stack([sample[IMAGE] for sample in samples])
    return found


def _valid(states: States) -> Tensor:
    return states[LLM][states[LLM_MASK].bool()]


def blank_text(config: HunyuanVideoConfig) -> TextStates:
    """The states of the longest prompt, all zeros."""
    return _states(torch.zeros(LLM_TOKENS, config.text_dim), torch.zeros(config.pooled_dim))


def _states(llm: Tensor, pooled: Tensor) -> TextStates:
    return {LLM: llm, LLM_MASK: torch.ones(len(llm), dtype=torch.long), POOLED: pooled,
            POOLED_MASK: torch.ones(CLIP_TOKENS, dtype=torch.long)}  # fmt: skip


def check_states(
    config: HunyuanVideoConfig, images: ImageInput | None, shapes: Mapping[str, Sequence[int]], size: VideoSize
) -> None:
    """Raise ValueError unless a transformer takes states of these shapes with latents of this size."""
    if images and IMAGE not in shapes:
        raise ValueError(
            "this is an image-to-video model and there is no start image: sampling needs Encode Start Image before it, training a "
            "latent cache made with this model linked to Cache Latents."
        )
    if not images and IMAGE in shapes:
        raise ValueError("this is a text-to-video model and cannot use a start image: use an image-to-video model.")
    if images:
        LATENT.check_image(shapes[IMAGE], size)
    if POOLED in shapes and tuple(shapes[POOLED]) != (config.pooled_dim,):
        raise ValueError(f"the conditioning's pooled prompt has the shape {tuple(shapes[POOLED])}, and this model takes "
                         f"({config.pooled_dim},): it was made by the text encoder of another model.")  # fmt: skip


def to_comfyui(states: States) -> tuple[Tensor, dict[str, Any]]:
    """As ComfyUI's own encoders give it: (1, L, D) without what is behind the prompt's end; pooled (1, 768)."""
    options = {"pooled_output": states[POOLED][None].float(), **image_options(states)}
    if GUIDANCE in states:
        options["guidance"] = float(states[GUIDANCE])
    return _valid(states)[None].float(), options


def image_options(states: States) -> dict[str, Any]:
    """The image's latents in VAE space, where ComfyUI's model of SkyReels looks for them."""
    return {"concat_latent_image": LATENT.from_model(states[IMAGE][None].float())} if IMAGE in states else {}


def from_comfyui(cross_attn: Tensor, options: Mapping[str, Any]) -> States:
    """(1, L, D) -> states; those that the mask leaves out are no tokens. ValueError for what would have no effect."""
    check_known(options, _KNOWN)
    pooled, mask, image = (options.get(name) for name in ("pooled_output", "attention_mask", "concat_latent_image"))
    if pooled is None:
        raise ValueError("the conditioning has no pooled prompt: it was made by the text encoder of another model.")
    states = _states(tokens_in(cross_attn, mask), pooled[0])
    if options.get("guidance") is not None:
        states[GUIDANCE] = torch.tensor(float(options["guidance"]))
    if image is not None:
        LATENT.check_latents(image)
        states[IMAGE] = LATENT.to_model(image.cpu().float())[0]
    return states


def tokens_in(cross_attn: Tensor, mask: Tensor | None) -> Tensor:
    """(1, L, D) and ComfyUI's attention mask (1, L) -> the states of those tokens that it leaves in. ValueError when there are
    none, or when the mask is that of another prompt."""
    states = cross_attn[0]
    if mask is not None:
        if mask.shape != cross_attn.shape[:2]:
            raise ValueError(f"the conditioning has {cross_attn.shape[1]} tokens and an attention mask of shape {tuple(mask.shape)}: "
                             "link it as the text encoder gives it, not joined with another.")  # fmt: skip
        states = states[mask[0].to(states.device).bool()]
    if not len(states):
        raise ValueError("the conditioning holds no tokens: link the one of a prompt.")
    return states
