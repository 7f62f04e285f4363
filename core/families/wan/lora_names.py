"""Names of Wan's matrices in LoRA files of other tools. ComfyUI has the official ones."""

from ...lora.names import LoRANames, Named

_DIFFUSERS = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o", "attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip

LORA_NAMES = LoRANames(
    diffusers=tuple(Named(f"blocks.{{i}}.{theirs}", f"blocks.{{i}}.{ours}") for theirs, ours in _DIFFUSERS.items())
)
