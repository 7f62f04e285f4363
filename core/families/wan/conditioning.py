"""What Wan's transformer is told besides noise and time: the states of the prompt and of images, to and from ComfyUI.

An image-to-video model sees the clip as its VAE has it where all frames but those given are grey, and a mask of what is
given: four channels, one for each frame of a latent frame. Legend: B batch, F H W latents or pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...family import VAE, ImageInput, States, TextStates, VisionEncoder, check_known
from ...shapes import VideoSize
from .defaults import CLIP, IMAGE, LATENT, MASK_CHANNELS, TEXT
from .dit import CLIP_TOKENS, TEXT_TOKENS, WanConfig

_NO_EFFECT = ("pooled_output", "attention_mask")  # ComfyUI's encoders add them, and Wan does not use them
_OF_IMAGES = ("concat_latent_image", "concat_mask", "clip_vision_output")


def image_states(
    vae: VAE, vision: VisionEncoder | None, images: ImageInput, start: Tensor, end: Tensor | None, frames: int
) -> list[States]:
    """The states of clips of `frames` frames that begin (and end) with these pictures (B, 3, H, W) in -1..1.

    An end image that comes after the clip makes it a latent frame longer. Raises ValueError for what the release lacks.
    """
    if images.needs_end and end is None:
        raise ValueError("this model makes what lies between two images: give it an end image too.")
    if images.vision != (vision is not None):
        raise ValueError(
            "this model also looks at the start image with CLIP: link Load CLIP Image Encoder."
            if images.vision
            else "this model takes no CLIP features: take the link to clip vision away."
        )
    clip = start.new_zeros(*start.shape[:2], frames, *start.shape[2:])
    clip[:, :, 0] = start
    if images.end == "inside" and end is not None:
        clip[:, :, -1] = end
    latents = LATENT.to_model(vae.encode(clip))
    mask = torch.zeros_like(latents[:, :MASK_CHANNELS])
    mask[:, :, 0] = 1
    if end is not None and images.end == "inside":
        mask[:, -1, -1] = 1
    elif end is not None:
        latents = torch.cat((latents, LATENT.to_model(vae.encode(end.unsqueeze(2)))), dim=2)
        mask = F.pad(mask, (0, 0, 0, 0, 0, 1), value=1)
    states = [{IMAGE: one} for one in torch.cat((mask, latents), dim=1).cpu()]
    if vision is not None:
        pictures = [start] if end is None or images.end == "after" else [start, end]
        features = torch.cat([vision.encode(one) for one in pictures], dim=1)
        states = [one | {CLIP: seen} for one, seen in zip(states, features, strict=True)]
    return states


def conditions(samples: Sequence[States]) -> dict[str, Tensor]:
    """Samples of one batch -> the transformer's arguments: prompts padded with zeros to (B, 512, D), image states."""
    padded = [F.pad(sample[TEXT], (0, 0, 0, TEXT_TOKENS - sample[TEXT].shape[0])) for sample in samples]
    found = {"text_states": torch.stack(padded)}
    for name, argument in ((IMAGE, "image_condition"), (CLIP, "clip_features")):
        if name in samples[0]:
            found[argument] = torch.stack([sample[name] for sample in samples])
    return found


def blank_text(config: WanConfig) -> TextStates:
    """The states of the longest prompt, all zeros."""
    return {TEXT: torch.zeros(TEXT_TOKENS, config.text_dim)}


def check_states(
    config: WanConfig, images: ImageInput | None, shapes: Mapping[str, Sequence[int]], size: VideoSize
) -> None:
    """Raise ValueError unless a transformer takes states of these shapes with latents of this size."""
    if images and IMAGE not in shapes:
        raise ValueError(
            "this is an image-to-video model and there is no start image: sampling needs Encode Start Image (or ComfyUI's "
            "WanImageToVideo) before it, training a latent cache made with this model linked to Cache Latents."
        )
    if not images and (IMAGE in shapes or CLIP in shapes):
        raise ValueError("this is a text-to-video model and cannot use a start image: use an image-to-video model.")
    if images:
        LATENT.check_image(shapes[IMAGE], size)
    takes = config.clip_images if config.clip_dim else 0
    given = shapes[CLIP][0] // CLIP_TOKENS if CLIP in shapes else 0
    if given != takes:
        raise ValueError(
            f"the conditioning has the CLIP features of {given} images, and this model takes those of {takes}: give the node that "
            "encodes the images as many (ComfyUI's clip_vision_output, or our clip_vision)."
        )


@dataclass(frozen=True)
class ClipVisionOutput:
    """The part of ComfyUI's CLIP_VISION_OUTPUT that Wan uses: (1, L, D)."""

    penultimate_hidden_states: Tensor


def to_comfyui(states: States) -> tuple[Tensor, dict[str, Any]]:
    """As ComfyUI's own umT5 gives it: (1, 512, dim), zeros behind the prompt; and the options of `image_options`."""
    return conditions([{TEXT: states[TEXT]}])["text_states"].float(), image_options(states)


def image_options(states: States) -> dict[str, Any]:
    """The image states as ComfyUI's WanImageToVideo puts them into CONDITIONING: latents in VAE space, mask inverted."""
    options: dict[str, Any] = {}
    if IMAGE in states:
        mask, latents = states[IMAGE][None].float().split((MASK_CHANNELS, LATENT.channels), dim=1)
        options |= {"concat_latent_image": LATENT.from_model(latents), "concat_mask": 1 - mask}
    if CLIP in states:
        options["clip_vision_output"] = ClipVisionOutput(states[CLIP][None].float())
    return options


def from_comfyui(cross_attn: Tensor, options: Mapping[str, Any]) -> States:
    """(1, L, dim) -> states; zeros behind the prompt are no tokens. ValueError for what would have no effect."""
    check_known(options, (*_NO_EFFECT, *_OF_IMAGES))
    states = cross_attn[0]
    used = states.abs().sum(dim=1).nonzero()
    length = int(used.max()) + 1 if len(used) else 1
    if length > TEXT_TOKENS:
        raise ValueError(
            f"the conditioning has {length} tokens, and this model takes {TEXT_TOKENS}: shorten the prompt."
        )
    return {TEXT: states[:length], **_images(options)}


def _images(options: Mapping[str, Any]) -> States:
    found = {}
    latents, mask, seen = (options.get(name) for name in _OF_IMAGES)
    if latents is not None:
        LATENT.check_latents(latents)
        given = (
            torch.zeros(MASK_CHANNELS, *latents.shape[2:])
            if mask is None
            else _given(mask, VideoSize(*latents.shape[2:]))
        )
        found[IMAGE] = torch.cat((given, LATENT.to_model(latents.cpu().float())[0]))
    if seen is not None:
        found[CLIP] = seen.penultimate_hidden_states[0]
    return found


def _given(mask: Tensor, size: VideoSize) -> Tensor:
    """ComfyUI's mask (1, 1 or 4, F, H, W), 0 where the image is given -> ours (4, F, H, W), 1 where it is."""
    if mask.ndim != 5 or mask.shape[1] not in (1, MASK_CHANNELS) or tuple(mask.shape[3:]) != size[1:]:
        raise ValueError(
            f"the conditioning's mask of shape {tuple(mask.shape)} does not fit its image of {tuple(size)}."
        )
    given = (1 - mask[0].cpu().float()).expand(MASK_CHANNELS, *mask.shape[2:])[:, : size.frames]
    return F.pad(given, (0, 0, 0, 0, 0, size.frames - given.shape[1]))
