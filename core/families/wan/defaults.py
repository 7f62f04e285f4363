"""Wan's releases and the settings their authors recommend."""

from __future__ import annotations

from collections.abc import Mapping

from ...family import ImageInput, Variant
from ...shapes import LatentSpec, VideoSize
from .dit import CLIP_TOKENS, PATCH

LATENT = LatentSpec(
    channels=16,
    stride=VideoSize(4, 8, 8),
    patch=VideoSize(*PATCH),
    mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)  # fmt: skip

# The official negative prompt, on which the recommended guidance was tuned.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# Names in the caches: `varlen_` because prompts differ in length.
TEXT, IMAGE, CLIP = "varlen_t5", "latents_image", "clip"
MASK_CHANNELS, CLIP_DIM = 4, 1280
_IMAGE = (IMAGE, (MASK_CHANNELS + LATENT.channels,))

START = ImageInput(states=(_IMAGE,))
START_SEEN = ImageInput(states=(_IMAGE, (CLIP, (CLIP_TOKENS, CLIP_DIM))), vision=True)
START_END_SEEN = ImageInput(
    states=(_IMAGE, (CLIP, (2 * CLIP_TOKENS, CLIP_DIM))), vision=True, end="inside", needs_end=True
)

_480P = VideoSize(81, 480, 832)
_720P = VideoSize(81, 720, 1280)


def _variant(name: str, title: str, size: VideoSize = _720P, *, steps: int = 50, shift: float = 5.0,
             guidance: float = 5.0, training_shift: float = 3.0, images: ImageInput | None = None, expert: str = "",
             boundary: float = 0.0, shift_at: Mapping[tuple[int, int], float] | None = None, unusable: str = "") -> Variant:  # fmt: skip
    return Variant(name=name, title=title, size=size, steps=steps, sampling_shift=shift, guidance=guidance,
                   training_shift=training_shift, negative_prompt=NEGATIVE, images=images, expert=expert, boundary=boundary,
                   shift_at=shift_at or {}, unusable=unusable, file_word=f"{expert}_noise" if expert else "")  # fmt: skip


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("2.1-t2v-1.3B", "Wan 2.1 T2V 1.3B", _480P),
        _variant("2.1-t2v-14B", "Wan 2.1 T2V 14B"),
        _variant("2.2-t2v-A14B-high", "Wan 2.2 T2V A14B, high noise", expert="high", steps=40, shift=12.0, guidance=4.0,
                 boundary=0.875, training_shift=12.0),
        _variant("2.2-t2v-A14B-low", "Wan 2.2 T2V A14B, low noise", expert="low", steps=40, shift=12.0, guidance=3.0,
                 boundary=0.875, training_shift=12.0),
        _variant("2.1-i2v-14B", "Wan 2.1 I2V 14B", steps=40, images=START_SEEN, shift_at={(832, 480): 3.0, (480, 832): 3.0}),
        _variant("2.1-flf2v-14B", "Wan 2.1 first-last-frame 14B", steps=40, images=START_END_SEEN),
        _variant("2.2-i2v-A14B-high", "Wan 2.2 I2V A14B, high noise", expert="high", steps=40, guidance=3.5, training_shift=5.0,
                 boundary=0.9, images=START),
        _variant("2.2-i2v-A14B-low", "Wan 2.2 I2V A14B, low noise", expert="low", steps=40, guidance=3.5, training_shift=5.0,
                 boundary=0.9, images=START),
        _variant("2.2-ti2v-5B", "Wan 2.2 TI2V 5B", unusable="its VAE is not supported; use Wan 2.1 or the 14B models of Wan 2.2"),
    )
}  # fmt: skip
