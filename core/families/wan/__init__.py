"""Wan 2.1 and the Wan 2.2 A14B pair."""

import torch

from ...family import BlockKind, Family
from ...shapes import Tiles
from . import checkpoint, conditioning, defaults, text, vision
from .dit import WanDiT
from .lora_names import LORA_NAMES
from .vae import WanVAE

FAMILY = Family(
    name=checkpoint.NAME,
    short="wan",
    title="Wan 2.1 / 2.2",
    fps=16,
    latent=defaults.LATENT,
    cache_dtype=torch.bfloat16,
    cache_scaled=True,
    base_model="wan2.1",
    variants=defaults.VARIANTS,
    blocks=(
        BlockKind(
            path="blocks.{i}",
            matrices=(
                "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "cross_attn.k_img", "cross_attn.v_img",
                "ffn.0", "ffn.2",
            ),
        ),
    ),
    lora_names=LORA_NAMES,
    anchors=checkpoint.ANCHORS,
    recognise=checkpoint.recognise,
    build_dit=WanDiT,
    build_vae=WanVAE,
    vae_elements=7000,  # as ComfyUI reckons for this VAE
    vae_tiles=Tiles(),
    load_tokenizer=text.load_tokenizer,
    text_states=(defaults.TEXT,),
    load_text=text.load,
    load_vision=vision.load,
    comfyui_vision="penultimate_hidden_states",
    image_states=conditioning.image_states,
    conditions=conditioning.conditions,
    blank_text=conditioning.blank_text,
    check_states=conditioning.check_states,
    comfyui_latents="Wan21",
    to_comfyui=conditioning.to_comfyui,
    image_options=conditioning.image_options,
    from_comfyui=conditioning.from_comfyui,
)  # fmt: skip
