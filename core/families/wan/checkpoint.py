"""Recognising Wan checkpoints by tensor names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from ...family import Part
from ...keymap import KeyMap
from .defaults import TEXT
from .dit import CLIP_TOKENS, HEAD_DIM, PATCH, WanConfig
from .text import UMT5Config
from .vae import WanVAEConfig
from .vision import HEAD_DIM as VISION_HEAD_DIM
from .vision import OFFICIAL, TRANSFORMERS, CLIPVisionConfig

Shapes = Mapping[str, tuple[int, ...]]

NAME = "wan"
_DIT_ANCHOR = "head.modulation"
_VAE_ANCHOR = "decoder.middle.0.residual.0.gamma"
_T5_ANCHOR = "blocks.0.pos_embedding.embedding.weight"
_T5_HF_ANCHOR = (
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # plain T5 has it in block 0 only
)
_VISION_ANCHOR = "transformer.0.attn.to_qkv.weight"
_VISION_HF_ANCHOR = "vision_model.embeddings.class_embedding"
ANCHORS = (_DIT_ANCHOR, _VAE_ANCHOR, _T5_ANCHOR, _T5_HF_ANCHOR, _VISION_ANCHOR, _VISION_HF_ANCHOR)

_DIM_1_3B = 1536
# Relatives that share Wan's names but need further modules.
_RELATIVES = {
    "vace_": "Wan VACE", "control_adapter.": "Wan camera control", "ref_conv.": "Wan Fun-Control with reference",
    "face_adapter.": "Wan Animate", "patch_embedding_": "Wan pose control", "audio_proj.": "Wan speech-to-video",
}  # fmt: skip

_T5_OFFICIAL = KeyMap((
    ("token_embedding.weight", "encoder.embed_tokens.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
    ("blocks.{i}.norm1.weight", "encoder.block.{i}.layer.0.layer_norm.weight"),
    ("blocks.{i}.norm2.weight", "encoder.block.{i}.layer.1.layer_norm.weight"),
    ("blocks.{i}.pos_embedding.embedding.weight",
     "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("blocks.{i}.attn.", "encoder.block.{i}.layer.0.SelfAttention."),
    ("blocks.{i}.ffn.gate.0.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{i}.ffn.fc1.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{i}.ffn.fc2.weight", "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"),
))  # fmt: skip
_T5_HF = KeyMap((("shared.weight", "encoder.embed_tokens.weight"),))


def recognise(shapes: Shapes) -> Part | None:
    """A transformer, VAE, umT5 or CLIP image tower of Wan 2.1 / 2.2, or None. ValueError for a relative that is not supported."""
    if _DIT_ANCHOR in shapes and "patch_embedding.weight" in shapes:
        return _dit(shapes)
    if _VAE_ANCHOR in shapes:
        return _vae(shapes)
    if _T5_ANCHOR in shapes or _T5_HF_ANCHOR in shapes:
        return _umt5(shapes)
    if _VISION_ANCHOR in shapes or _VISION_HF_ANCHOR in shapes:
        return _clip_vision(shapes)
    return None


def _depth(shapes: Shapes, stem: str) -> int:
    """How many numbered blocks stand behind `stem`."""
    return 1 + max(int(name[len(stem) :].split(".")[0]) for name in shapes if name.startswith(stem))


def _dit(shapes: Shapes) -> Part:
    for prefix, title in _RELATIVES.items():
        if any(name.startswith(prefix) for name in shapes):
            raise ValueError(f"this is {title}, which is not supported. Supported: Wan 2.1 and 2.2 transformers.")
    dim, in_channels = shapes["patch_embedding.weight"][:2]
    clip = "img_emb.proj.1.weight" in shapes
    config = WanConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        depth=_depth(shapes, "blocks."),
        in_channels=in_channels,
        out_channels=shapes["head.head.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2]),
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        clip_dim=shapes["img_emb.proj.1.weight"][1] if clip else None,
        clip_images=shapes["img_emb.emb_pos"][1] // CLIP_TOKENS if "img_emb.emb_pos" in shapes else 1,
    )
    if dim % HEAD_DIM:
        raise ValueError(f"its width {dim} is no multiple of {HEAD_DIM}: this is no Wan transformer.")
    variants = _variants(config)
    size = f"{config.depth} blocks, width {dim}"
    return Part(family=NAME, kind="dit", title=f"Wan {' or '.join(variants)}, {size}", config=config, variants=variants,
                width=dim, text_width=config.text_dim)  # fmt: skip


def _variants(config: WanConfig) -> tuple[str, ...]:
    """The releases with these input channels; sizes do not decide, so that a small test model is one of them too."""
    inputs = (config.in_channels, config.out_channels, config.clip_dim is not None)
    if inputs == (16, 16, False):
        large = ("2.1-t2v-14B", "2.2-t2v-A14B-high", "2.2-t2v-A14B-low")
        if config.dim == _DIM_1_3B:
            return ("2.1-t2v-1.3B",)
        return large if config.dim > _DIM_1_3B else ("2.1-t2v-1.3B", *large)
    if inputs == (36, 16, True):
        return ("2.1-flf2v-14B",) if config.clip_images > 1 else ("2.1-i2v-14B",)
    if inputs == (36, 16, False):
        return ("2.2-i2v-A14B-high", "2.2-i2v-A14B-low")
    if inputs == (48, 48, False):
        return ("2.2-ti2v-5B",)
    raise ValueError(
        f"a Wan transformer with {config.in_channels} input and {config.out_channels} output channels is not supported "
        "(Fun-Control and others). Supported: text-to-video and image-to-video of Wan 2.1 and 2.2."
    )


def _vae(shapes: Shapes) -> Part:
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes:
        raise ValueError("this is the VAE of Wan 2.2 TI2V-5B; all other Wan models use the Wan 2.1 VAE.")
    widths = (
        shapes["encoder.conv1.weight"][0],
        shapes["encoder.downsamples.3.residual.2.weight"][0],
        shapes["encoder.downsamples.6.residual.2.weight"][0],
        shapes["encoder.head.0.gamma"][0],
    )
    config = WanVAEConfig(widths=widths, latent_channels=shapes["conv2.weight"][0])
    return Part(family=NAME, kind="vae", title="Wan 2.1 VAE", config=config)


def _umt5(shapes: Shapes) -> Part:
    keymap = _T5_OFFICIAL if _T5_ANCHOR in shapes else _T5_HF
    model = {keymap.to_model(name): shape for name, shape in shapes.items()}
    bias = model["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    inner, dim = model["encoder.block.0.layer.0.SelfAttention.q.weight"]
    config = UMT5Config(
        vocabulary=model["encoder.embed_tokens.weight"][0],
        dim=dim,
        ffn_dim=model["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        heads=bias[1],
        head_dim=inner // bias[1],
        depth=_depth(model, "encoder.block."),
        buckets=bias[0],
    )
    return Part(family=NAME, kind="text_encoder", title="umT5 encoder", config=config, keymap=keymap,
                gives=(TEXT,))  # fmt: skip


def _clip_vision(shapes: Shapes) -> Part:
    keymap = OFFICIAL if _VISION_ANCHOR in shapes else TRANSFORMERS
    model = {keymap.to_model(name): shape for name, shape in shapes.items()}
    ffn_dim, dim = model["encoder.layers.0.mlp.fc1.weight"]
    config = CLIPVisionConfig(dim=dim, ffn_dim=ffn_dim, depth=_depth(model, "encoder.layers.") - 1)
    if dim % VISION_HEAD_DIM or model["embeddings.position_embedding.weight"][-2] != config.tokens:
        raise ValueError(f"this is another CLIP image tower, of width {dim}; Wan 2.1 takes ViT-H/14 (clip_vision_h).")
    return Part(family=NAME, kind="vision_encoder", title="CLIP ViT-H image tower", config=config, keymap=keymap)
