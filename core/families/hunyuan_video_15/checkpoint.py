"""Recognising HunyuanVideo 1.5 checkpoints by tensor names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from ...family import Part
from ...weights import View
from ..hunyuan_video.checkpoint import COMFYUI, depth_of, used
from ..hunyuan_video.text import LLAMA_HEAD_DIM, UNUSED_BLOCKS, LlamaConfig
from .defaults import (
    CHANNELS,
    GLYPH,
    GLYPH_DIM,
    MASK_CHANNELS,
    PLAIN,
    STEP_DISTILLED,
    SUPER_RESOLUTION,
    TEXT,
    VISION_DIM,
)
from .dit import HEAD_DIM, PATCH, HunyuanVideo15Config
from .text import ByT5Config
from .vae import HunyuanVideo15VAEConfig
from .vision import SigLIPConfig

Shapes = Mapping[str, tuple[int, ...]]

NAME = "hunyuan_video_1_5"
_DIT_ANCHOR = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_DIFFUSERS_ANCHOR = "cond_type_embed.weight"
_VAE_ANCHOR = "decoder.mid.block_1.norm1.gamma"
_QWEN_ANCHOR = "layers.0.self_attn.k_proj.bias"
_T5_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_BYT5_ANCHOR, _BYT5_OFFICIAL_ANCHOR = f"encoder.{_T5_BIAS}", f"text_tower.encoder.{_T5_BIAS}"
_SIGLIP_ANCHOR = "vision_model.embeddings.patch_embedding.bias"
ANCHORS = (
    _DIT_ANCHOR,
    _DIFFUSERS_ANCHOR,
    _VAE_ANCHOR,
    _QWEN_ANCHOR,
    _BYT5_ANCHOR,
    _BYT5_OFFICIAL_ANCHOR,
    _SIGLIP_ANCHOR,
)

_QWEN_3B_DIM = 2048
_GLYPH_VOCABULARY = 1510  # with the colours and fonts that were added
_INPUTS = 2 * CHANNELS + MASK_CHANNELS  # noise, the start image, where that is
_SUPER_RESOLUTION_INPUTS = _INPUTS + CHANNELS + MASK_CHANNELS
_FUSED = "_attn_qkv."  # of ComfyUI's layout, in double blocks


def recognise(shapes: Shapes) -> Part | None:
    """A transformer, VAE, Qwen2.5-VL, glyph ByT5 or SigLIP, or None. ValueError for a relative that is not supported."""
    if _DIT_ANCHOR in shapes:
        return _dit(shapes)
    if _DIFFUSERS_ANCHOR in shapes and "x_embedder.proj.weight" in shapes:
        raise ValueError("this is HunyuanVideo 1.5 in diffusers' layout, which is not supported: use ComfyUI's file or the official "
                         "one.")  # fmt: skip
    if _VAE_ANCHOR in shapes:
        return _vae(shapes)
    if _QWEN_ANCHOR in shapes:
        return _qwen(shapes)
    if _BYT5_ANCHOR in shapes or _BYT5_OFFICIAL_ANCHOR in shapes:
        return _byt5(shapes)
    if _SIGLIP_ANCHOR in shapes:
        return _siglip(shapes)
    return None


def _dit(shapes: Shapes) -> Part | None:
    patches = shapes["img_in.proj.weight"]
    if "cond_type_embedding.weight" not in shapes or patches[2:] != PATCH:
        return None  # another model with the same text refiner
    views = _fused_views(shapes)
    if views:
        shapes = {name: view.shape for name, view in views.items()}
    config = HunyuanVideo15Config(
        dim=patches[0],
        ffn_dim=shapes["double_blocks.0.img_mlp.fc1.weight"][0],
        double_depth=depth_of(shapes, "double_blocks."),
        refiner_depth=depth_of(shapes, "txt_in.individual_token_refiner.blocks."),
        in_channels=patches[1],
        out_channels=shapes["final_layer.linear.weight"][0],
        text_dim=shapes["txt_in.input_embedder.weight"][1],
        freq_dim=shapes["time_in.mlp.0.weight"][1],
        glyph_dim=shapes["byt5_in.layernorm.weight"][0],
        glyph_hidden=shapes["byt5_in.fc1.weight"][0],
        vision_dim=shapes["vision_in.proj.0.weight"][0],
        step_distilled="time_r_in.mlp.0.weight" in shapes,
    )
    if config.dim % HEAD_DIM:
        raise ValueError(
            f"its width {config.dim} is no multiple of {HEAD_DIM}: this is no HunyuanVideo 1.5 transformer."
        )
    title = f"HunyuanVideo 1.5, {config.double_depth} blocks, width {config.dim}"
    return Part(family=NAME, kind="dit", title=title, config=config, variants=_variants(config), views=views,
                width=config.dim, text_width=config.text_dim)  # fmt: skip


def _variants(config: HunyuanVideo15Config) -> tuple[str, ...]:
    """The releases with these inputs; neither text and image to video nor 480p and 720p can be told apart."""
    if config.in_channels == _SUPER_RESOLUTION_INPUTS:
        return SUPER_RESOLUTION
    if config.in_channels == _INPUTS:
        return STEP_DISTILLED if config.step_distilled else PLAIN
    raise ValueError(
        f"a HunyuanVideo 1.5 transformer with {config.in_channels} input channels is not supported. Supported: text-to-video and "
        f"image-to-video, which have {_INPUTS}."
    )


def _fused_views(shapes: Shapes) -> dict[str, View]:
    """The model's tensors in a file of ComfyUI's layout, with query, key and value in one; none for the official layout."""
    views: dict[str, View] = {}
    for source, shape in shapes.items():
        name = COMFYUI.to_model(source)
        if not (name.startswith("double_blocks.") and _FUSED in name):
            views[name] = View.of(shape, source)
            continue
        rows = shape[0] // 3
        for index, letter in enumerate("qkv"):
            part = slice(index * rows, (index + 1) * rows)
            views[name.replace(_FUSED, f"_attn_{letter}.")] = View((rows, *shape[1:]), ((source, part),))
    return views if views.keys() != shapes.keys() else {}


def _vae(shapes: Shapes) -> Part | None:
    channels = shapes.get("decoder.conv_in.conv.weight", (0, 0))[1]
    if channels != CHANNELS:
        return None  # a relative of other models
    config = HunyuanVideo15VAEConfig(
        widths=tuple(shapes[f"encoder.down.{level}.block.0.conv1.conv.weight"][0] for level in range(5)),
        latent_channels=channels,
    )
    # ComfyUI's own class names layers that nothing uses.
    views = {name: View.of(shape, name) for name, shape in shapes.items() if ".temb_proj." not in name}
    return Part(family=NAME, kind="vae", title="HunyuanVideo 1.5 VAE", config=config,
                views=views if len(views) < len(shapes) else {})  # fmt: skip


def _qwen(shapes: Shapes) -> Part:
    vocabulary, dim = shapes["embed_tokens.weight"]
    if dim == _QWEN_3B_DIM:
        raise ValueError("this is Qwen2.5-VL 3B; HunyuanVideo 1.5 takes the one of 7B (qwen_2.5_vl_7b).")
    config = LlamaConfig(
        vocabulary=vocabulary,
        dim=dim,
        ffn_dim=shapes["layers.0.mlp.gate_proj.weight"][0],
        kv_heads=shapes[_QWEN_ANCHOR][0] // LLAMA_HEAD_DIM,
        depth=depth_of(shapes, "layers.") - UNUSED_BLOCKS,
        eps=1e-6,
        rotary_theta=1000000.0,
        qkv_bias=True,
    )
    return Part(family=NAME, kind="text_encoder", title="Qwen2.5-VL", config=config,
                views=used(shapes, "embed_tokens.", *(f"layers.{i}." for i in range(config.depth))), gives=(TEXT,))  # fmt: skip


def _byt5(shapes: Shapes) -> Part | None:
    official = _BYT5_OFFICIAL_ANCHOR in shapes
    stem = "text_tower.encoder." if official else "encoder."
    if shapes[f"{stem}final_layer_norm.weight"] != (GLYPH_DIM,):
        return None  # another T5
    embedding = f"{stem}embed_tokens.weight" if official else "shared.weight"
    if shapes[embedding][0] != _GLYPH_VOCABULARY:
        raise ValueError(
            "this ByT5 was not trained on glyphs; HunyuanVideo 1.5 takes the one that was (byt5_small_glyphxl)."
        )
    buckets, heads = shapes[stem + _T5_BIAS]
    inner, dim = shapes[f"{stem}block.0.layer.0.SelfAttention.q.weight"]
    config = ByT5Config(
        vocabulary=shapes[embedding][0],
        dim=dim,
        ffn_dim=shapes[f"{stem}block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        heads=heads,
        head_dim=inner // heads,
        depth=depth_of(shapes, f"{stem}block."),
        buckets=buckets,
    )
    views = {f"encoder.{name.removeprefix(stem)}": View.of(shape, name)
             for name, shape in shapes.items() if name.startswith(stem)}  # fmt: skip
    views["encoder.embed_tokens.weight"] = View.of(shapes[embedding], embedding)
    return Part(family=NAME, kind="text_encoder", title="glyph ByT5", config=config, views=views, gives=(GLYPH,))


def _siglip(shapes: Shapes) -> Part:
    stem = "vision_model."
    dim, tokens = shapes[_SIGLIP_ANCHOR][0], shapes[f"{stem}embeddings.position_embedding.weight"][0]
    config = SigLIPConfig(dim=dim, ffn_dim=shapes[f"{stem}encoder.layers.0.mlp.fc1.weight"][0],
                          depth=depth_of(shapes, f"{stem}encoder.layers."))  # fmt: skip
    if (dim, tokens) != (VISION_DIM, config.tokens):
        raise ValueError(f"this is another SigLIP image tower, of width {dim} and {tokens} patches; HunyuanVideo 1.5 takes so400m of "
                         "384 pixels (sigclip_vision_patch14_384).")  # fmt: skip
    views = {name.removeprefix(stem): View.of(shape, name)
             for name, shape in shapes.items() if name.startswith(stem) and not name.startswith(f"{stem}head.")}  # fmt: skip
    return Part(family=NAME, kind="vision_encoder", title="SigLIP image tower", config=config, views=views)
