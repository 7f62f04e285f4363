"""HunyuanVideo, and SkyReels V1, which was made of it."""

import torch

from ...family import BlockKind, Family
from ...shapes import Tiles
from . import checkpoint, conditioning, defaults, text
from .dit import HunyuanVideoDiT
from .lora_names import LORA_NAMES
from .vae import HunyuanVAE


def _no_vision(*_: object) -> None:
    raise AssertionError("no release of this family looks at images with an encoder")


FAMILY = Family(
    name=checkpoint.NAME,
    short="hv",
    title="HunyuanVideo / SkyReels V1",
    fps=24,
    latent=defaults.LATENT,
    cache_dtype=torch.float16,
    cache_scaled=False,
    base_model="hunyuan-video",
    variants=defaults.VARIANTS,
    blocks=(
        BlockKind(
            path="double_blocks.{i}",
            matrices=(
                "img_attn_qkv", "img_attn_proj", "img_mlp.fc1", "img_mlp.fc2",
                "txt_attn_qkv", "txt_attn_proj", "txt_mlp.fc1", "txt_mlp.fc2",
            ),
        ),
        BlockKind(path="single_blocks.{i}", matrices=("linear1", "linear2")),
    ),
    lora_names=LORA_NAMES,
    anchors=checkpoint.ANCHORS,
    recognise=checkpoint.recognise,
    build_dit=HunyuanVideoDiT,
    build_vae=HunyuanVAE,
    vae_elements=1300,
    vae_tiles=Tiles(frames=64, side=256),
    load_tokenizer=text.load_tokenizer,
    text_states=(defaults.LLM, defaults.LLM_MASK, defaults.POOLED, defaults.POOLED_MASK),
    load_text=text.load,
    load_vision=_no_vision,
    comfyui_vision="",
    image_states=conditioning.image_states,
    conditions=conditioning.conditions,
    blank_text=conditioning.blank_text,
    check_states=conditioning.check_states,
    comfyui_latents="HunyuanVideo",
    to_comfyui=conditioning.to_comfyui,
    image_options=conditioning.image_options,
    from_comfyui=conditioning.from_comfyui,
)  # fmt: skip
