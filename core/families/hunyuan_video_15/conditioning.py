"""What HunyuanVideo 1.5's transformer is told besides noise and time: the states of the prompt, of words to be written and
of the start image, to and from ComfyUI.

An image-to-video model sees latents that hold the image in the first frame and zeros in all others, and a channel that is 1
where the image is. Both are kept in the VAE's space, as other trainers cache them, and scaled for the transformer here, for
training and sampling alike. Legend: B batch, F H W latents or pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...family import VAE, Conditions, ImageInput, States, TextStates, VisionEncoder, check_known
from ...shapes import VideoSize
from ..hunyuan_video.conditioning import tokens_in
from .defaults import CHANNELS, GLYPH, GLYPH_DIM, GLYPH_TOKENS, IMAGE, LATENT, MASK_CHANNELS, TEXT, TEXT_TOKENS, VISION
from .dit import HunyuanVideo15Config

_NO_EFFECT = ("pooled_output",)
_KNOWN = ("attention_mask", "conditioning_byt5small", "concat_latent_image", "concat_mask", "clip_vision_output", *_NO_EFFECT)  # fmt: skip


def image_states(
    vae: VAE, vision: VisionEncoder | None, images: ImageInput, start: Tensor, end: Tensor | None, frames: int
) -> list[States]:
    """The states of clips of `frames` frames that begin with these pictures (B, 3, H, W) in -1..1. Raises ValueError for
    what the release lacks."""
    if end is not None:
        raise ValueError("this model takes a start image alone: take the link to the end image away.")
    if vision is None:
        raise ValueError("this model also looks at the start image with SigLIP: link Load SigLIP Image Encoder.")
    first = vae.encode(start.unsqueeze(2)).cpu()  # (B, 32, 1, h, w)
    given = F.pad(first, (0, 0, 0, 0, 0, 0, 0, MASK_CHANNELS), value=1)
    more = LATENT.latents(VideoSize(frames, *start.shape[2:])).frames - 1
    clips = F.pad(given, (0, 0, 0, 0, 0, more))
    return [{IMAGE: clip, VISION: seen} for clip, seen in zip(clips, vision.encode(start), strict=True)]


def conditions(samples: Sequence[States]) -> Conditions:
    """Samples of one batch -> the transformer's arguments."""
    found: Conditions = {
        "text_states": tuple(sample[TEXT] for sample in samples),
        "glyph_states": tuple(sample[GLYPH] for sample in samples),
    }
    if IMAGE in samples[0]:
        latents, mask = (
            torch.stack([sample[IMAGE] for sample in samples]).float().split((CHANNELS, MASK_CHANNELS), dim=1)
        )
        found["image_condition"] = torch.cat((LATENT.to_model(latents), mask), dim=1)
    if VISION in samples[0]:
        found["vision_states"] = torch.stack([sample[VISION] for sample in samples])
    return found


def blank_text(config: HunyuanVideo15Config) -> TextStates:
    """The states of the longest prompt, all zeros."""
    return {TEXT: torch.zeros(TEXT_TOKENS, config.text_dim), GLYPH: torch.zeros(GLYPH_TOKENS, config.glyph_dim)}


def check_states(
    config: HunyuanVideo15Config, images: ImageInput | None, shapes: Mapping[str, Sequence[int]], size: VideoSize
) -> None:
    """Raise ValueError unless a transformer takes states of these shapes with latents of this size."""
    if images and IMAGE not in shapes:
        raise ValueError(
            "this is an image-to-video model and there is no start image: sampling needs Encode Start Image (or ComfyUI's "
            "HunyuanVideo15ImageToVideo) before it, training a latent cache made with this model linked to Cache Latents."
        )
    if not images and (IMAGE in shapes or VISION in shapes):
        raise ValueError("this is a text-to-video model and cannot use a start image: use an image-to-video model. If the file is "
                         "one, say so in its loader: text and image to video look alike in the files.")  # fmt: skip
    if images and VISION not in shapes:
        raise ValueError(
            "the conditioning has no SigLIP features of the start image, which this model takes: give the node that encodes the "
            "image ComfyUI's clip_vision_output (of sigclip_vision_patch14_384), or our clip_vision."
        )
    if images:
        LATENT.check_image(shapes[IMAGE], size)
    widths = {GLYPH: config.glyph_dim, VISION: config.vision_dim}
    if any(name in shapes and shapes[name][-1] != width for name, width in widths.items()):
        raise ValueError("the conditioning's quoted words or image features are those of another model's encoders.")


@dataclass(frozen=True)
class ClipVisionOutput:
    """The part of ComfyUI's CLIP_VISION_OUTPUT that HunyuanVideo 1.5 uses: (1, L, D)."""

    last_hidden_state: Tensor


def to_comfyui(states: States) -> tuple[Tensor, dict[str, Any]]:
    """As ComfyUI's own encoders give it: (1, L, D), and the states of quoted words where there are any. ComfyUI asks for a
    pooled prompt too, which there is none of."""
    options = {"pooled_output": None, **image_options(states)}
    if len(states[GLYPH]):
        options["conditioning_byt5small"] = states[GLYPH][None].float()
    return states[TEXT][None].float(), options


def image_options(states: States) -> dict[str, Any]:
    """The image states as ComfyUI's HunyuanVideo15ImageToVideo puts them into CONDITIONING: latents in VAE space, mask
    inverted."""
    options: dict[str, Any] = {}
    if IMAGE in states:
        latents, mask = states[IMAGE][None].float().split((CHANNELS, MASK_CHANNELS), dim=1)
        options |= {"concat_latent_image": latents, "concat_mask": 1 - mask}
    if VISION in states:
        options["clip_vision_output"] = ClipVisionOutput(states[VISION][None].float())
    return options


def from_comfyui(cross_attn: Tensor, options: Mapping[str, Any]) -> States:
    """(1, L, D) -> states; those that the mask leaves out are no tokens. ValueError for what would have no effect."""
    check_known(options, _KNOWN)
    mask, glyphs, latents, given, seen = (options.get(name) for name in _KNOWN[:5])
    states = {TEXT: tokens_in(cross_attn, mask), GLYPH: torch.zeros(0, GLYPH_DIM) if glyphs is None else glyphs[0]}
    if latents is not None:
        LATENT.check_latents(latents)
        where = _given(given, VideoSize(*latents.shape[2:]))
        states[IMAGE] = torch.cat((latents[0].cpu().float(), where))
    if seen is not None:
        states[VISION] = seen.last_hidden_state[0]
    return states


def _given(mask: Tensor | None, size: VideoSize) -> Tensor:
    """ComfyUI's mask (1, 1, F, H, W), 0 where the image is given -> ours (1, F, H, W), 1 where it is; without one nothing is."""
    if mask is None:
        return torch.zeros(MASK_CHANNELS, *size)
    if mask.ndim != 5 or tuple(mask.shape[3:]) != size[1:] or mask.shape[2] > size.frames:
        raise ValueError(
            f"the conditioning's mask of shape {tuple(mask.shape)} does not fit its image of {tuple(size)}."
        )
    return F.pad(1 - mask[0, :MASK_CHANNELS].cpu().float(), (0, 0, 0, 0, 0, size.frames - mask.shape[2]))
