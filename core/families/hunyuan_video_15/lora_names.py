"""Names of HunyuanVideo 1.5's matrices in LoRA files of other tools.

ComfyUI has query, key and value in one matrix, and finds the other official names behind `diffusion_model.`.
"""

from ...lora.names import LoRANames, Named, Share

_BLOCK, _THEIRS = "double_blocks.{i}", "transformer_blocks.{i}"
_DIFFUSERS = {
    "attn.to_q": "img_attn_q", "attn.to_k": "img_attn_k", "attn.to_v": "img_attn_v",
    "attn.add_q_proj": "txt_attn_q", "attn.add_k_proj": "txt_attn_k", "attn.add_v_proj": "txt_attn_v",
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
    "norm1.linear": "img_mod.linear", "norm1_context.linear": "txt_mod.linear",
}  # fmt: skip
_COMFYUI = {"attn.proj": "attn_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "mod.lin": "mod.linear"}


def _fused(name: str) -> tuple[Named, ...]:
    """Query, key and value as the rows of one matrix of that name."""
    return tuple(
        Named(f"{_BLOCK}.{side}_{name}", f"{_BLOCK}.{side}_attn_{letter}", of_theirs=Share(index, index + 1, 3))
        for side in ("img", "txt")
        for index, letter in enumerate("qkv")
    )


LORA_NAMES = LoRANames(
    saved="comfyui",
    comfyui=_fused("attn_qkv"),
    diffusers=tuple(Named(f"{_THEIRS}.{theirs}", f"{_BLOCK}.{ours}") for theirs, ours in _DIFFUSERS.items()),
    aliases=(
        *_fused("attn.qkv"),
        *(Named(f"{_BLOCK}.{side}_{theirs}", f"{_BLOCK}.{side}_{ours}")
          for side in ("img", "txt") for theirs, ours in _COMFYUI.items()),
    ),
)  # fmt: skip
