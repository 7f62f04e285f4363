"""The releases of HunyuanVideo 1.5 and the settings their authors recommend."""

from __future__ import annotations

from ...family import ImageInput, Variant
from ...shapes import LatentSpec, VideoSize
from .dit import PATCH

CHANNELS = 32
LATENT = LatentSpec(
    channels=CHANNELS,
    stride=VideoSize(4, 16, 16),
    patch=VideoSize(*PATCH),
    mean=(0.0,) * CHANNELS,
    std=(1 / 1.03682,) * CHANNELS,
)
# Names in the caches: `varlen_` because prompts differ in length.
TEXT, GLYPH, IMAGE, VISION = "varlen_vl_embed", "varlen_byt5_embed", "latents_image", "siglip"
TEXT_TOKENS, GLYPH_TOKENS = 1024, 128  # at most
MASK_CHANNELS, GLYPH_DIM = 1, 1472
VISION_TOKENS, VISION_DIM = 729, 1152

START = ImageInput(states=((IMAGE, (CHANNELS + MASK_CHANNELS,)), (VISION, (VISION_TOKENS, VISION_DIM))), vision=True)

_480P, _720P = VideoSize(121, 480, 848), VideoSize(121, 720, 1280)


def _variant(name: str, title: str, size: VideoSize, *, images: ImageInput | None = None, steps: int = 50,
             guidance: float = 6.0, unusable: str = "", file_word: str = "") -> Variant:  # fmt: skip
    return Variant(name=f"hunyuan-1.5-{name}", title=f"HunyuanVideo 1.5 {title}", size=size, steps=steps, sampling_shift=7.0,
                   guidance=guidance, training_shift=2.0, training_sampling="flux_shift", images=images, unusable=unusable,
                   file_word=file_word)  # fmt: skip


_TASKS = {f"{task}-{side}": (f"{task.upper()} {side}", size, images, f"{side}_{task}")
          for task, images in (("t2v", None), ("i2v", START)) for side, size in (("720p", _720P), ("480p", _480P))}  # fmt: skip
_PLAIN = [
    _variant(name, title, size, images=images, file_word=word) for name, (title, size, images, word) in _TASKS.items()
]
# What guidance would do was distilled into these.
_GUIDANCE_DISTILLED = [
    _variant(f"{name}-cfg-distilled", f"{title}, guidance-distilled", size, images=images, guidance=1.0, file_word=f"{word}_cfg_distilled")
    for name, (title, size, images, word) in _TASKS.items()
]  # fmt: skip
_STEP_DISTILLED = _variant("i2v-480p-distilled", "I2V 480p, step-distilled", _480P, images=START, steps=8, guidance=1.0)
_SUPER_RESOLUTION = _variant("sr", "super-resolution", _720P, unusable="it enlarges videos that another model has made, which is not "
                             "supported; use ComfyUI's own nodes for it")  # fmt: skip

VARIANTS = {variant.name: variant for variant in (*_PLAIN, *_GUIDANCE_DISTILLED, _STEP_DISTILLED, _SUPER_RESOLUTION)}
# The releases of files with the same tensors, the most likely first.
PLAIN, STEP_DISTILLED, SUPER_RESOLUTION = (
    tuple(variant.name for variant in some)
    for some in ((*_PLAIN, *_GUIDANCE_DISTILLED), (_STEP_DISTILLED,), (_SUPER_RESOLUTION,))
)
