"""Training an image-to-video model from its caches."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_job
import torch
from safetensors.torch import load_file
from videolora.core.data import cache_files
from videolora.core.training import batches
from videolora.core.training.run import Run

WAN = small_job.WAN
MODELS = {"2.1-i2v-14B": "wan21_i2v", "2.2-i2v-A14B-low": "wan22_i2v"}


@pytest.fixture(scope="module", params=MODELS)
def described(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    made = small_job.make(folder, MODELS[request.param], request.param)
    return small_job.job(made, folder / "loras", variant=request.param, steps=3)


def test_each_sample_is_told_of_its_own_image(described):
    (batch,) = next(batches.steps(described, WAN, 0))
    size = batch.latents.shape[2:]
    assert batch.conditions["image_condition"].shape == (len(batch.latents), 20, *size)
    assert ("clip_features" in batch.conditions) == WAN.variants[described.variant].images.vision
    stored = [
        cache_files.load_sample(Path(item.latents), WAN, WAN.variants[described.variant].images)[1]["latents_image"]
        for item in described.datasets[0].items
    ]
    for condition in batch.conditions["image_condition"]:
        assert sum(condition.shape == one.shape and torch.equal(condition, one) for one in stored) == 1


def test_a_text_to_video_model_is_told_nothing_of_images_that_its_caches_hold(described):
    other = replace(described, variant="2.1-t2v-1.3B")
    (batch,) = next(batches.steps(other, WAN, 0))
    assert batch.conditions.keys() == {"text_states"}


def test_training_runs_and_reaches_the_matrices_of_the_image_branch(described, tmp_path):
    this = Run.of(described, tmp_path / "runs")
    assert small_job.work(this) == 0, this.log_end()
    lora = load_file(described.final_path)
    branch = [name for name in lora if "k_img" in name and "up" in name]
    assert bool(branch) == WAN.variants[described.variant].images.vision
    assert all(lora[name].abs().max() > 0 for name in branch)
