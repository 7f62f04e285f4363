"""The releases of HunyuanVideo and SkyReels V1 and the settings their authors recommend."""

from __future__ import annotations

from ...family import ImageInput, Variant
from ...shapes import LatentSpec, VideoSize
from .dit import PATCH

_CHANNELS = 16
LATENT = LatentSpec(
    channels=_CHANNELS,
    stride=VideoSize(4, 8, 8),
    patch=VideoSize(*PATCH),
    mean=(0.0,) * _CHANNELS,
    std=(1 / 0.476986,) * _CHANNELS,
)
# Names in the caches.
LLM, LLM_MASK, POOLED, POOLED_MASK, IMAGE = "llm", "llm_mask", "clipL", "clipL_mask", "latents_image"
LLM_TOKENS, CLIP_TOKENS = 256, 77  # at most

START = ImageInput(states=((IMAGE, (_CHANNELS,)),))

_720P = VideoSize(129, 720, 1280)
_SKYREELS = VideoSize(97, 544, 960)
# The official negative prompt of SkyReels V1, which needs guidance.
_SKYREELS_NEGATIVE = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes, "
    "bad limbs, distortion"
)


def _variant(name: str, title: str, size: VideoSize = _720P, *, guidance: float = 1.0, embedded_guidance: float = 6.0,
             negative_prompt: str = "", images: ImageInput | None = None, unusable: str = "",
             file_word: str = "") -> Variant:  # fmt: skip
    return Variant(name=name, title=title, size=size, steps=50, sampling_shift=7.0, few_steps=20, few_steps_shift=17.0,
                   guidance=guidance, embedded_guidance=embedded_guidance, training_shift=7.0,
                   negative_prompt=negative_prompt, images=images, unusable=unusable, file_word=file_word)  # fmt: skip


def _skyreels(name: str, title: str, images: ImageInput | None = None) -> Variant:
    return _variant(name, title, _SKYREELS, guidance=6.0, embedded_guidance=1.0, negative_prompt=_SKYREELS_NEGATIVE,
                    images=images, file_word="skyreels")  # fmt: skip


T2V, I2V, SKYREELS_T2V, SKYREELS_I2V = "hunyuan-t2v", "hunyuan-i2v-v1", "skyreels-v1-t2v", "skyreels-v1-i2v"
VARIANTS = {
    variant.name: variant
    for variant in (
        _variant(T2V, "HunyuanVideo T2V"),
        _skyreels(SKYREELS_T2V, "SkyReels V1 T2V"),
        _skyreels(SKYREELS_I2V, "SkyReels V1 I2V", START),
        _variant(I2V, "HunyuanVideo I2V v1", embedded_guidance=0.0,
                 unusable="its prompts are encoded together with the image by LLaVA's image tower, which is not supported"),
    )
}  # fmt: skip
