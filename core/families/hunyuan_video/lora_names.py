"""Names of HunyuanVideo's matrices in LoRA files of other tools.

ComfyUI's own loader finds the official names behind `diffusion_model.`, and not all of them in the form that trainers write.
diffusers divides query, key, value and the single blocks' feed-forward, which has four times their width.
"""

from ...lora.names import LoRANames, Named, Share

_DOUBLE, _SINGLE = "double_blocks.{i}", "single_blocks.{i}"
_THEIR_DOUBLE, _THEIR_SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_DIFFUSERS = {
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
}  # fmt: skip
_COMFYUI = {
    f"{side}_{theirs}": f"{side}_{ours}" for side in ("img", "txt")
    for theirs, ours in {"attn.qkv": "attn_qkv", "attn.proj": "attn_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}.items()
}  # fmt: skip


def _third(theirs: str, ours: str, index: int) -> Named:
    return Named(f"{_THEIR_DOUBLE}.attn.{theirs}", f"{_DOUBLE}.{ours}", of_ours=Share(index, index + 1, 3))


LORA_NAMES = LoRANames(
    saved="comfyui",
    diffusers=(
        *(_third(f"to_{letter}", "img_attn_qkv", index) for index, letter in enumerate("qkv")),
        *(_third(f"add_{letter}_proj", "txt_attn_qkv", index) for index, letter in enumerate("qkv")),
        *(Named(f"{_THEIR_DOUBLE}.{theirs}", f"{_DOUBLE}.{ours}") for theirs, ours in _DIFFUSERS.items()),
        *(Named(f"{_THEIR_SINGLE}.attn.to_{letter}", f"{_SINGLE}.linear1", of_ours=Share(index, index + 1, 7))
          for index, letter in enumerate("qkv")),
        Named(f"{_THEIR_SINGLE}.proj_mlp", f"{_SINGLE}.linear1", of_ours=Share(3, 7, 7)),
        Named(f"{_THEIR_SINGLE}.proj_out", f"{_SINGLE}.linear2"),
    ),
    aliases=tuple(Named(f"{_DOUBLE}.{theirs}", f"{_DOUBLE}.{ours}") for theirs, ours in _COMFYUI.items()),
    prefixes=("Hunyuan_video_I2V_lora_",),
)  # fmt: skip
