"""HunyuanVideo 1.5."""

import torch

from ...family import BlockKind, Family
from ...shapes import Tiles
from . import checkpoint, conditioning, defaults, text, vision
from .dit import HunyuanVideo15DiT
from .lora_names import LORA_NAMES
from .vae import HunyuanVideo15VAE

FAMILY = Family(
    name=checkpoint.NAME,
    short="hv15",
    title="HunyuanVideo 1.5",
    fps=24,
    latent=defaults.LATENT,
    cache_dtype=torch.float16,
    cache_scaled=False,
    base_model="hunyuan-video-1.5",
    variants=defaults.VARIANTS,
    blocks=(
        BlockKind(
            path="double_blocks.{i}",
            matrices=(
                "img_attn_q", "img_attn_k", "img_attn_v", "img_attn_proj", "img_mlp.fc1", "img_mlp.fc2",
                "txt_attn_q", "txt_attn_k", "txt_attn_v", "txt_attn_proj", "txt_mlp.fc1", "txt_mlp.fc2",
            ),
            modulation=("img_mod.linear", "txt_mod.linear"),
        ),
    ),
    lora_names=LORA_NAMES,
    anchors=checkpoint.ANCHORS,
    recognise=checkpoint.recognise,
    build_dit=HunyuanVideo15DiT,
    build_vae=HunyuanVideo15VAE,
    vae_elements=9000,
    vae_tiles=Tiles(side=256),
    load_tokenizer=text.load_tokenizer,
    text_states=(defaults.TEXT, defaults.GLYPH),
    load_text=text.load,
    load_vision=vision.load,
    comfyui_vision="last_hidden_state",
    image_states=conditioning.image_states,
    conditions=conditioning.conditions,
    blank_text=conditioning.blank_text,
    check_states=conditioning.check_states,
    comfyui_latents="HunyuanVideo15",
    to_comfyui=conditioning.to_comfyui,
    image_options=conditioning.image_options,
    from_comfyui=conditioning.from_comfyui,
)  # fmt: skip
