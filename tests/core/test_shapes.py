"""The arithmetic between pixels and latents."""

from itertools import product

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.shapes import LatentSpec, VideoSize

TOY = LatentSpec(
    channels=3, stride=VideoSize(8, 4, 4), patch=VideoSize(1, 1, 1), mean=(0.5, -1.0, 2.0), std=(2.0, 0.25, 3.0)
)
SPECS = {"toy": TOY, **{name: family.latent for name, family in FAMILIES.items()}}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@every_spec
def test_latents_and_pixels_are_inverse_for_every_valid_size(spec):
    frames = [1 + spec.stride.frames * index for index in range(4)]
    sides = [spec.multiple * index for index in (1, 2, 5, 30)]
    for pixels in (VideoSize(*size) for size in product(frames, sides, sides)):
        spec.check(pixels)
        latents = spec.latents(pixels)
        assert spec.pixels(latents) == pixels
        assert all(side % patch == 0 for side, patch in zip(latents, spec.patch, strict=True))
        tokens = spec.tokens(latents)
        assert tokens * spec.patch.frames * spec.patch.height * spec.patch.width == latents[0] * latents[1] * latents[2]


def test_wan_divides_a_video_like_this():
    wan = FAMILIES["wan"].latent
    assert wan.multiple == 16
    assert wan.latents(VideoSize(81, 480, 832)) == VideoSize(21, 60, 104)
    assert wan.tokens(VideoSize(21, 60, 104)) == 32760
    assert str(VideoSize(81, 480, 832)) == "832x480, 81 frames" and str(VideoSize(1, 480, 832)) == "832x480, 1 frame"


@every_spec
def test_frame_counts_are_rounded_down_to_the_nearest_valid_one(spec):
    step = spec.stride.frames
    for frames in range(-2, 40):
        lower = spec.frames_at_most(frames)
        assert lower % step == 1 % step and lower >= 1
        assert lower <= max(frames, 1) < lower + step
        spec.check_frames(lower)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((50, 480, 832), ["50 frames", "4n+1", "49", "53"]),
        ((0, 480, 832), ["0 frames", "use 1 or 5"]),
        ((-3, 480, 832), ["-3 frames", "use 1 or 5"]),
        ((49, 480, 850), ["width 850", "multiple of 16", "848", "864"]),
        ((49, 471, 832), ["height 471", "multiple of 16", "464", "480"]),
        ((1, 16, 8), ["width 8", "use 16 or 32"]),
        ((1, 0, 16), ["height 0", "use 16 or 32"]),
        ((1, 16, -16), ["width -16", "use 16 or 32"]),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_do(size, named):
    wan = FAMILIES["wan"].latent
    for check in (wan.check, wan.latents):
        with pytest.raises(ValueError) as error:
            check(VideoSize(*size))
        assert all(part in str(error.value) for part in named), str(error.value)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_model_and_from_model_are_inverse(spec, dtype):
    latents = torch.randn(2, spec.channels, 3, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    there = spec.to_model(latents)
    assert there.shape == latents.shape and there.dtype == dtype
    torch.testing.assert_close(spec.from_model(there), latents)
    torch.testing.assert_close(spec.to_model(spec.from_model(latents)), latents)


@every_spec
def test_latents_with_the_statistics_of_the_spec_become_standard_ones(spec):
    latents = torch.empty(1, spec.channels, 2, 1, 1, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        latents[0, channel, :, 0, 0] = torch.tensor([mean - std, mean + std], dtype=torch.float64)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1, 1).expand_as(latents)
    torch.testing.assert_close(spec.to_model(latents), expected)


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 5), (3, 3, 4, 5), (1, 2, 3, 4)])
def test_latents_of_another_model_are_refused(shape):
    for convert in (TOY.to_model, TOY.from_model):
        with pytest.raises(ValueError, match=r"expected \(B, 3, F, H, W\).*VAE of another model"):
            convert(torch.zeros(shape))


def test_the_largest_size_within_a_video_is_cut_to_whole_latents_and_needs_a_frame():
    latent = FAMILIES["hunyuan_video_1_5"].latent
    assert latent.largest_within(VideoSize(7, 33, 70)) == (5, 32, 64)
    for size, message in ((VideoSize(0, 32, 32), "no frames"), (VideoSize(1, 15, 32), "height 15 does not fit")):
        with pytest.raises(ValueError, match=message):
            latent.largest_within(size)
