"""Recognising HunyuanVideo and SkyReels V1 checkpoints by tensor names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from ...family import Part
from ...keymap import IDENTITY, KeyMap
from ...weights import View
from .defaults import I2V, LLM, LLM_MASK, POOLED, POOLED_MASK, SKYREELS_I2V, SKYREELS_T2V, T2V
from .dit import HEAD_DIM, PATCH, HunyuanVideoConfig
from .text import LLAMA_HEAD_DIM, UNUSED_BLOCKS, CLIPTextConfig, LlamaConfig
from .vae import HunyuanVAEConfig

Shapes = Mapping[str, tuple[int, ...]]

NAME = "hunyuan_video"
_DIT_ANCHOR = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_DIFFUSERS_ANCHOR = "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"
_VAE_ANCHOR = "decoder.up_blocks.0.resnets.0.conv1.conv.weight"
_VAE_LDM_ANCHOR = "decoder.up.0.block.0.conv1.conv.weight"
_LLAMA_ANCHOR = "layers.0.self_attn.k_proj.weight"
_CLIP_ANCHOR = "encoder.layers.0.mlp.fc1.weight"
_CLIP_TEXT = "embeddings.token_embedding.weight"
ANCHORS = (_DIT_ANCHOR, _DIFFUSERS_ANCHOR, _VAE_ANCHOR, _VAE_LDM_ANCHOR, _LLAMA_ANCHOR, _CLIP_TEXT)

_CLIP_DIM = 768
_LLAMA_VOCABULARY = 128320  # with the tokens that LLaVA added

_EMBEDDER = (("in_layer.", "mlp.0."), ("out_layer.", "mlp.2."))
_NORMS = tuple((f"norm.{long}_norm.{end}", f"{short}_norm.weight")
               for long, short in (("query", "q"), ("key", "k")) for end in ("scale", "weight"))  # fmt: skip
COMFYUI = KeyMap((
    *((f"{part}.{theirs}", f"{part}.{ours}") for part in ("time_in", "guidance_in", "txt_in.t_embedder") for theirs, ours in _EMBEDDER),
    ("txt_in.c_embedder.in_layer.", "txt_in.c_embedder.linear_1."), ("txt_in.c_embedder.out_layer.", "txt_in.c_embedder.linear_2."),
    *((f"{blocks}.{{i}}.{kind}_{theirs}", f"{blocks}.{{i}}.{kind}_{ours}")
      for blocks, kind in (("txt_in.individual_token_refiner.blocks", "self"), ("double_blocks", "img"), ("double_blocks", "txt"))
      for theirs, ours in (("attn.qkv.", "attn_qkv."), ("attn.proj.", "attn_proj."))),
    *((f"{mlp}.{theirs}", f"{mlp}.{ours}")
      for mlp in ("txt_in.individual_token_refiner.blocks.{i}.mlp", "double_blocks.{i}.img_mlp", "double_blocks.{i}.txt_mlp")
      for theirs, ours in (("0.", "fc1."), ("2.", "fc2."))),
    *((f"double_blocks.{{i}}.{kind}_mod.lin.", f"double_blocks.{{i}}.{kind}_mod.linear.") for kind in ("img", "txt")),
    *((f"double_blocks.{{i}}.{kind}_attn.{theirs}", f"double_blocks.{{i}}.{kind}_attn_{ours}")
      for kind in ("img", "txt") for theirs, ours in _NORMS),
    *((f"single_blocks.{{i}}.{theirs}", f"single_blocks.{{i}}.{ours}") for theirs, ours in _NORMS),
    ("single_blocks.{i}.modulation.lin.", "single_blocks.{i}.modulation.linear."),
))  # fmt: skip

# diffusers' layers, each made of several where these stand in one tensor. `norm_out` has its halves the other way round.
_DIFFUSERS = {
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_DIFFUSERS_REFINER = {
    "norm1": ("norm1",), "norm2": ("norm2",), "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn_proj": ("attn.to_out.0",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm_out.linear",),
}  # fmt: skip
_DIFFUSERS_DOUBLE = {
    "img_mod.linear": ("norm1.linear",), "txt_mod.linear": ("norm1_context.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_q_norm": ("attn.norm_q",), "img_attn_k_norm": ("attn.norm_k",),
    "txt_attn_q_norm": ("attn.norm_added_q",), "txt_attn_k_norm": ("attn.norm_added_k",),
    "img_attn_proj": ("attn.to_out.0",), "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp.fc1": ("ff.net.0.proj",), "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",), "txt_mlp.fc2": ("ff_context.net.2",),
}  # fmt: skip
_DIFFUSERS_SINGLE = {
    "modulation.linear": ("norm.linear",), "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "q_norm": ("attn.norm_q",), "k_norm": ("attn.norm_k",), "linear2": ("proj_out",),
}  # fmt: skip
_DIFFUSERS_BLOCKS = (
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _DIFFUSERS_REFINER),
    ("double_blocks", "transformer_blocks", _DIFFUSERS_DOUBLE),
    ("single_blocks", "single_transformer_blocks", _DIFFUSERS_SINGLE),
)

_LDM_LEVELS = {f"decoder.up.{3 - i}": f"decoder.up_blocks.{i}" for i in range(4)}
_VAE_LDM = KeyMap((
    *((f"{theirs}.block.{{i}}.nin_shortcut.", f"{ours}.resnets.{{i}}.conv_shortcut.") for theirs, ours in _LDM_LEVELS.items()),
    *((f"{theirs}.block.{{i}}.{layer}.", f"{ours}.resnets.{{i}}.{layer}.")
      for theirs, ours in _LDM_LEVELS.items() for layer in ("norm1", "norm2", "conv1", "conv2")),
    *((f"{theirs}.upsample.", f"{ours}.upsamplers.0.") for theirs, ours in _LDM_LEVELS.items()),
    ("encoder.down.{i}.block.{i}.nin_shortcut.", "encoder.down_blocks.{i}.resnets.{i}.conv_shortcut."),
    *((f"encoder.down.{{i}}.block.{{i}}.{layer}.", f"encoder.down_blocks.{{i}}.resnets.{{i}}.{layer}.")
      for layer in ("norm1", "norm2", "conv1", "conv2")),
    ("encoder.down.{i}.downsample.", "encoder.down_blocks.{i}.downsamplers.0."),
    *((f"{coder}.mid.{theirs}.", f"{coder}.mid_block.{ours}.") for coder in ("encoder", "decoder") for theirs, ours in (
        ("block_1", "resnets.0"), ("block_2", "resnets.1"), ("attn_1.norm", "attentions.0.group_norm"),
        ("attn_1.q", "attentions.0.to_q"), ("attn_1.k", "attentions.0.to_k"), ("attn_1.v", "attentions.0.to_v"),
        ("attn_1.proj_out", "attentions.0.to_out.0"))),
    *((f"{coder}.norm_out.", f"{coder}.conv_norm_out.") for coder in ("encoder", "decoder")),
))  # fmt: skip


def recognise(shapes: Shapes) -> Part | None:
    """A transformer, VAE, LLaVA-Llama-3 or CLIP-L text tower, or None. ValueError for a relative that is not supported."""
    if _DIT_ANCHOR in shapes:
        return _dit(shapes)
    if _DIFFUSERS_ANCHOR in shapes:
        views = _diffusers_views(shapes)
        part = _dit({name: view.shape for name, view in views.items()}, views)
        more = sorted(shapes.keys() - {source for view in views.values() for source, _ in view.pieces})
        if part and more:
            raise ValueError(f"it has {len(more)} tensors that HunyuanVideo and SkyReels V1 lack ({more[0]}, ...): it is a relative, "
                             "such as FramePack, which is not supported.")  # fmt: skip
        return part
    if _VAE_ANCHOR in shapes or _VAE_LDM_ANCHOR in shapes:
        return _vae(shapes)
    if _LLAMA_ANCHOR in shapes:
        return _llama(shapes)
    if _CLIP_ANCHOR in shapes and _CLIP_TEXT in shapes:
        return _clip(shapes)
    return None


def depth_of(shapes: Shapes, stem: str) -> int:
    """How many numbered blocks stand behind `stem`."""
    return 1 + max((int(name[len(stem) :].split(".")[0]) for name in shapes if name.startswith(stem)), default=-1)


def _dit(shapes: Shapes, views: Mapping[str, View] | None = None) -> Part | None:
    patches = shapes["img_in.proj.weight"]
    if "vector_in.in_layer.weight" not in shapes or patches[2:] != PATCH:
        return None  # another model with the same text refiner
    keymap = COMFYUI if "double_blocks.0.img_attn.qkv.weight" in shapes else IDENTITY
    shapes = {keymap.to_model(name): shape for name, shape in shapes.items()}
    config = HunyuanVideoConfig(
        dim=patches[0],
        ffn_dim=shapes["double_blocks.0.img_mlp.fc1.weight"][0],
        double_depth=depth_of(shapes, "double_blocks."),
        single_depth=depth_of(shapes, "single_blocks."),
        refiner_depth=depth_of(shapes, "txt_in.individual_token_refiner.blocks."),
        in_channels=patches[1],
        out_channels=shapes["final_layer.linear.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2]),
        text_dim=shapes["txt_in.input_embedder.weight"][1],
        pooled_dim=shapes["vector_in.in_layer.weight"][1],
        freq_dim=shapes["time_in.mlp.0.weight"][1],
        guidance="guidance_in.mlp.0.weight" in shapes,
    )
    if config.dim % HEAD_DIM:
        raise ValueError(f"its width {config.dim} is no multiple of {HEAD_DIM}: this is no HunyuanVideo transformer.")
    variants = _variants(config, of_diffusers=views is not None)
    size = f"{config.double_depth} + {config.single_depth} blocks, width {config.dim}"
    return Part(family=NAME, kind="dit", title=f"{' or '.join(variants)}, {size}", config=config, variants=variants,
                keymap=keymap, views=views or {}, width=config.dim, text_width=config.text_dim)  # fmt: skip


def _variants(config: HunyuanVideoConfig, of_diffusers: bool) -> tuple[str, ...]:
    """The releases with these input channels."""
    inputs = (config.in_channels, config.guidance)
    if inputs == (16, True):  # what is about in diffusers' layout is SkyReels
        return (SKYREELS_T2V, T2V) if of_diffusers else (T2V, SKYREELS_T2V)
    if inputs == (32, True):
        return (SKYREELS_I2V,)
    if inputs == (33, False):
        return (I2V,)
    raise ValueError(
        f"a HunyuanVideo transformer with {config.in_channels} input channels, {'with' if config.guidance else 'without'} "
        "embedded guidance, is not supported. Supported: HunyuanVideo text-to-video and SkyReels V1."
    )


def _diffusers_views(shapes: Shapes) -> dict[str, View]:
    """The model's tensors in a file of diffusers' layout."""
    layers = dict(_DIFFUSERS)
    for ours, theirs, table in _DIFFUSERS_BLOCKS:
        for number in range(depth_of(shapes, f"{theirs}.")):
            layers |= {f"{ours}.{number}.{layer}": tuple(f"{theirs}.{number}.{source}" for source in sources)
                       for layer, sources in table.items()}  # fmt: skip
    views = {}
    for layer, sources in layers.items():
        for kind in ("weight", "bias"):
            names = [f"{source}.{kind}" for source in sources]
            if names[0] in shapes:
                rows = sum(shapes[name][0] for name in names)
                views[f"{layer}.{kind}"] = View.of((rows, *shapes[names[0]][1:]), *names)
    for kind in ("weight", "bias"):
        source = f"norm_out.linear.{kind}"
        half = shapes[source][0] // 2
        pieces = ((source, slice(half, None)), (source, slice(0, half)))
        views[f"final_layer.adaLN_modulation.1.{kind}"] = View(shapes[source], pieces)
    return views


def _vae(shapes: Shapes) -> Part | None:
    keymap = IDENTITY if _VAE_ANCHOR in shapes else _VAE_LDM
    shapes_by_model = {keymap.to_model(name): (name, shape) for name, shape in shapes.items()}
    if "decoder.conv_in.conv.weight" not in shapes or "post_quant_conv.weight" not in shapes:
        return None
    levels = (f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight" for level in range(4))
    config = HunyuanVAEConfig(
        widths=tuple(shapes_by_model[name][1][0] for name in levels),
        latent_channels=shapes["post_quant_conv.weight"][0],
    )
    # ComfyUI's layout has the attention's matrices as convolutions of one pixel.
    views = {} if keymap is IDENTITY else {
        name: View.of(shape[:2] if ".attentions.0.to_" in name else shape, source)
        for name, (source, shape) in shapes_by_model.items()
    }  # fmt: skip
    return Part(family=NAME, kind="vae", title="HunyuanVideo VAE", config=config, views=views)


def _llama(shapes: Shapes) -> Part | None:
    if shapes["embed_tokens.weight"][0] != _LLAMA_VOCABULARY or "layers.0.self_attn.k_proj.bias" in shapes:
        return None  # another language model
    config = LlamaConfig(
        vocabulary=_LLAMA_VOCABULARY,
        dim=shapes["embed_tokens.weight"][1],
        ffn_dim=shapes["layers.0.mlp.gate_proj.weight"][0],
        kv_heads=shapes[_LLAMA_ANCHOR][0] // LLAMA_HEAD_DIM,
        depth=depth_of(shapes, "layers.") - UNUSED_BLOCKS,
    )
    return Part(family=NAME, kind="text_encoder", title="LLaVA-Llama-3", config=config,
                views=used(shapes, "embed_tokens.", *(f"layers.{i}." for i in range(config.depth))), gives=(LLM, LLM_MASK))  # fmt: skip


def _clip(shapes: Shapes) -> Part | None:
    vocabulary, dim = shapes[_CLIP_TEXT]
    if dim != _CLIP_DIM:
        raise ValueError(f"this is another CLIP text tower, of width {dim}; HunyuanVideo takes CLIP-L (clip_l).")
    config = CLIPTextConfig(vocabulary=vocabulary, dim=dim, ffn_dim=shapes[_CLIP_ANCHOR][0],
                            depth=depth_of(shapes, "encoder.layers."))  # fmt: skip
    return Part(family=NAME, kind="text_encoder", title="CLIP-L text tower", config=config,
                views=used(shapes, "embeddings.", "encoder.", "final_layer_norm."), gives=(POOLED, POOLED_MASK))  # fmt: skip


def used(shapes: Shapes, *stems: str) -> dict[str, View]:
    """Of a file those tensors whose names begin so."""
    return {name: View.of(shape, name) for name, shape in shapes.items() if name.startswith(stems)}
