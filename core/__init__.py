"""The engine of VideoLoRA: plain PyTorch, knows nothing of ComfyUI.

Where to look first: `family.py` (what a model family offers), `families/` (the registry and one folder per family),
`data/` (clips -> caches), `training/` (caches -> LoRA), `sampling/` (LoRA -> latents), `lora/` (LORAID, files, merge).
"""
