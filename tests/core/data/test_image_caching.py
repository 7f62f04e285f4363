"""Latent caches for image-to-video: what the model is told of a clip's first (and last) frame stands beside the latents."""

from itertools import islice

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from videolora.core.data import cache_files
from videolora.core.data.caching import cache_latents, needed_bytes
from videolora.core.data.config import DatasetConfig
from videolora.core.data.planning import Dataset, ImagePlan, plan_latents
from videolora.core.families import FAMILIES
from videolora.core.shapes import VideoSize

WAN = FAMILIES["wan"]
START, SEEN, BOTH = (WAN.variants[name].images for name in ("2.2-i2v-A14B-low", "2.1-i2v-14B", "2.1-flf2v-14B"))
SIZE, LATENTS = VideoSize(9, 32, 48), VideoSize(3, 4, 6)


class PoolingVAE:
    def encode(self, video):
        grey = torch.nn.functional.avg_pool3d(video[:, :, ::4].mean(1, keepdim=True), (1, 8, 8))
        return grey * torch.linspace(0.5, 2, 16).view(1, 16, 1, 1, 1)


class MeanVision:
    def encode(self, pictures):
        return pictures.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 257, 1280)


@pytest.fixture
def dataset(tmp_path):
    """Two folders of frames that get brighter."""
    for clip in range(2):
        frames = tmp_path / "clips" / f"clip_{clip}"
        frames.mkdir(parents=True)
        for index in range(9):
            Image.new("RGB", (48, 32), (20 * index + 40 * clip, 80, 80)).save(frames / f"{index:03d}.png")
        (tmp_path / "clips" / f"clip_{clip}.txt").write_text("a clip")
    place = tmp_path / "clips"
    return Dataset.find(
        DatasetConfig(kind="video", folder=place, cache=place / "cache", resolution=(48, 32), target_frames=(9,))
    )


def cached(dataset, images=None, stop_after=None):
    plan = plan_latents(dataset, WAN, "the VAE", images=images)
    steps = cache_latents([plan], WAN, PoolingVAE, torch.device("cpu"), load_vision=lambda: MeanVision() if images.input.vision else None)  # fmt: skip
    outcomes = [step.outcome for step in islice(steps, stop_after)]
    steps.close()
    return plan, outcomes


def plan_of(images, encoder="the encoder"):
    return ImagePlan(input=images, encoder_identity=encoder if images.vision else "")


@pytest.mark.parametrize(("images", "tokens"), [(START, 0), (SEEN, 257), (BOTH, 514)])
def test_image_states_are_stored_with_the_names_of_the_shared_layout(dataset, images, tokens):
    plan, outcomes = cached(dataset, plan_of(images))
    assert outcomes == ["made", "made"]
    path = plan.windows[0].path
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    clip = {"clip_bfloat16": (tokens, 1280)} if tokens else {}
    assert shapes == {"latents_3x4x6_bfloat16": (16, 3, 4, 6), "latents_image_3x4x6_bfloat16": (20, 3, 4, 6), **clip}
    latents, states = cache_files.load_sample(path, WAN, images)
    assert {name: tuple(value.shape) for name, value in states.items()} == images.shapes(LATENTS)
    mask, image = states["latents_image"].float().split((4, 16))
    torch.testing.assert_close(image[:, 0], latents[:, 0], rtol=0.01, atol=0.01)
    last = image[:, -1] - latents[:, -1]
    assert mask[:, 0].eq(1).all() and mask[3, -1].eq(float(images.needs_end)).all() and mask[:3, 1:].eq(0).all()
    assert (last.abs() < 0.02).all() == images.needs_end, (
        "the last frame is given to models made for it, and to no other"
    )
    assert needed_bytes(plan.windows[:1], WAN)[path.parent] == sum(
        torch.Size(shape).numel() * 2 for shape in shapes.values()
    )


def test_a_cache_without_image_states_is_made_again_for_an_image_to_video_model_and_then_serves_both(dataset):
    plain = plan_latents(dataset, WAN, "the VAE")
    list(cache_latents([plain], WAN, PoolingVAE, torch.device("cpu")))
    assert all(window.is_cached for window in plain.windows)
    plan, outcomes = cached(dataset, plan_of(SEEN))
    assert outcomes == ["made", "made"] and cached(dataset, plan_of(SEEN))[1] == ["kept", "kept"]
    again = plan_latents(dataset, WAN, "the VAE")
    assert all(window.is_cached for window in again.windows), (
        "what was made for images serves a text-to-video model too"
    )
    assert cached(dataset, plan_of(SEEN, "another encoder"))[1] == ["made", "made"]
    assert plan.windows[0].content not in (again.windows[0].content, plan_latents(
        dataset, WAN, "the VAE", images=plan_of(SEEN, "another encoder")).windows[0].content)  # fmt: skip


def test_an_interrupted_run_keeps_what_it_made(dataset):
    assert cached(dataset, plan_of(START), stop_after=1)[1] == ["made"]
    assert sorted(cached(dataset, plan_of(START))[1]) == ["kept", "made"]


def test_caches_of_other_trainers_are_used_when_they_hold_the_image_states(dataset):
    plan = plan_latents(dataset, WAN, "the VAE", images=plan_of(START))
    tensors = {"latents_3x4x6_bfloat16": torch.zeros(16, *LATENTS).bfloat16()}
    image = {"latents_image_3x4x6_bfloat16": torch.zeros(20, *LATENTS).bfloat16()}
    plan.windows[0].path.parent.mkdir(exist_ok=True)
    for window, content in zip(plan.windows, (tensors, tensors | image), strict=True):
        save_file(content, window.path, {"architecture": "wan", "format_version": "1.0.1"})
    found = {window.item.key: window for window in plan_latents(dataset, WAN, "the VAE", images=plan_of(START)).windows}
    assert [found[key].foreign for key in ("clip_0", "clip_1")] == [False, True]
    assert found["clip_0"].path != plan.windows[0].path, "the other trainer's file is left alone"
    both = plan_latents(dataset, WAN, "the VAE", images=plan_of(BOTH)).windows
    assert not any(window.foreign for window in both), "nobody keeps the last frame"
