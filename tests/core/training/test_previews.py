"""Previews while training: what they are, and that nothing else depends on them."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_job import WAN, job, work
from videolora.core.data import cache_files
from videolora.core.families import open_part
from videolora.core.lora.adapter import attached
from videolora.core.lora.inventory import inventory
from videolora.core.lora.stack import StackEntry, adapters, load_stack
from videolora.core.sampling.sample import decode, sample
from videolora.core.sampling.schedule import Schedule
from videolora.core.shapes import VideoSize
from videolora.core.training import previews as previews_module
from videolora.core.training import run as runs
from videolora.core.training.job import MemorySettings, NetworkSettings, OptimizerSettings, SaveSettings, TrainingSet
from videolora.core.training.prompts import PreviewSettings
from videolora.core.training.run import Run
from videolora.core.weights import load_into


def small(made, tmp_path, name="loras", **changes):
    sets = (TrainingSet(title="clips", batch_size=1, num_repeats=1, items=made[1]),)
    values = {"datasets": sets, "steps": 4, "save": SaveSettings(every_steps=2, precision="float32"), **changes}
    described = job(made, tmp_path / name, **values)
    return described, Run.of(described, tmp_path / name / "runs")


def names(run):
    return sorted(path.name for path in run.path("previews").iterdir())


def test_previews_are_made_at_the_start_and_on_the_way(made, shown, tmp_path):
    _, run = small(made, tmp_path, previews=shown)
    assert work(run) == 0, run.status()
    assert run.notes() == []
    kinds = [f"step-{step:08d}_{number:02d}.{kind}" for step in (0, 2, 4) for number, kind in ((0, "latent"), (0, "mp4"), (1, "latent"), (1, "png"))]  # fmt: skip
    assert names(run) == sorted(kinds)
    assert [path.name for path in run.previews()] == sorted(name for name in kinds if not name.endswith("latent"))
    with av.open(str(run.preview_path(2, 0, ".mp4"))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == WAN.fps
    assert len(frames) == 5 and frames[0].shape == (32, 48, 3)
    with Image.open(run.preview_path(2, 1, ".png")) as picture:
        assert picture.size == (48, 32)


def test_a_preview_is_what_the_sampling_nodes_give_with_the_saved_lora(made, shown, tmp_path):
    described, run = small(made, tmp_path, previews=shown)
    assert work(run) == 0, run.status()
    checkpoint, part = open_part(made[0] / "dit.safetensors", "dit")
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    matrices = inventory(WAN, {name: info.shape for name, info in checkpoint.tensors.items()})
    stack = load_stack((StackEntry(described.final_path, 1.0, 1),), WAN, WAN.variants[described.variant], matrices,
                       allow_overlap=False)  # fmt: skip
    preview = shown.prompts[0]
    states, negative = (cache_files.load_text(made[0] / f"{name}.safetensors") for name in ("positive", "negative"))
    empty = torch.zeros(1, 16, *WAN.latent.latents(VideoSize(5, 32, 48)))
    with attached(dit, adapters(stack, torch.device("cpu"), torch.float32)):
        *_, (expected, _) = sample(
            dit, WAN, empty, states, negative, Schedule(steps=2, shift=3.0), 4.0, 5, torch.device("cpu")
        )
    expected = WAN.latent.from_model(expected)
    found = load_file(run.preview_path(4, 0, ".latent"))["latent_tensor"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = load_file(run.preview_path(0, 0, ".latent"))["latent_tensor"]
    assert not torch.allclose(found, before, atol=1e-3), "the LoRA shows"
    picture = load_file(run.preview_path(4, 1, ".latent"))["latent_tensor"]
    checkpoint, part = open_part(made[0] / "vae.safetensors", "vae")
    with torch.device("meta"):
        vae = WAN.build_vae(part.config)
    ((_, frames),) = decode(load_into(vae, checkpoint, part.keymap, torch.float32), WAN, picture)
    with Image.open(run.preview_path(4, 1, ".png")) as image:
        shown_pixels = torch.from_numpy(np.array(image))
    torch.testing.assert_close(shown_pixels.float() / 255, frames[0], rtol=0, atol=0.003)
    assert preview.frames == 5


SETTINGS = {
    "dropout and accumulation": {
        "network": NetworkSettings(rank=4, dropout=0.2, module_dropout=0.2),
        "optimizer": OptimizerSettings(learning_rate=1e-2, gradient_accumulation=2),
    },
    "weights that are averaged": {"optimizer": OptimizerSettings(optimizer="adamw_schedulefree", learning_rate=1e-3)},
    "streamed blocks": {"memory": MemorySettings(mode="manual", block_swap=2)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_the_same_to_the_bit_with_and_without_previews(made, shown, tmp_path, name):
    found = []
    for index, previews in enumerate((PreviewSettings(), shown)):
        described, run = small(made, tmp_path, str(index), previews=previews, **SETTINGS[name])
        assert work(run) == 0, run.status()
        found.append((load_file(described.final_path), [entry["losses"] for entry in run.metrics()], described.digest))
    assert all(torch.equal(found[0][0][key], found[1][0][key]) for key in found[0][0])
    assert found[0][1:] == found[1][1:]


def test_previews_of_a_schedule_free_optimizer_show_the_average_that_is_saved(made, shown, tmp_path):
    settings = {"optimizer": OptimizerSettings(optimizer="adamw_schedulefree", learning_rate=3e-2)}
    _, run = small(made, tmp_path, previews=shown, steps=6, **settings)
    assert work(run) == 0, run.status()
    assert not torch.equal(*(load_file(run.preview_path(step, 0, ".latent"))["latent_tensor"] for step in (4, 6)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("a preview is too large"), RuntimeError("no")])
def test_a_preview_that_fails_is_noted_and_the_run_goes_on(made, shown, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error
        yield

    monkeypatch.setattr(previews_module, "sample", fails)
    described, run = small(made, tmp_path, previews=shown)
    assert work(run) == 0, run.status()
    assert described.final_path.exists() and len(run.metrics()) == 4
    assert len(run.notes()) == 6 and run.notes()[0] == f"preview 0 of step 0 failed: {type(error).__name__}: {error}"


def test_a_vae_that_is_gone_or_another_model_leaves_the_latents(made, shown, tmp_path):
    for index, vae in enumerate((tmp_path / "gone.safetensors", made[0] / "dit.safetensors")):
        _, run = small(made, tmp_path, str(index), previews=replace(shown, vae=str(vae)), steps=2)
        assert work(run) == 0, run.status()
        assert names(run) == [f"step-{step:08d}_{number:02d}.latent" for step in (0, 2) for number in (0, 1)]
        assert len(run.notes()) == 2 and "decoding the previews of step 0 failed" in run.notes()[0]


def test_without_a_vae_only_latents_are_kept(made, shown, tmp_path):
    _, run = small(
        made, tmp_path, previews=replace(shown, vae="", at_start=False, every_steps=0, every_epochs=1), steps=6
    )
    assert work(run) == 0, run.status()
    assert names(run) == [f"step-00000005_{number:02d}.latent" for number in (0, 1)] and run.notes() == []


def test_tiles_are_used_when_asked_for(made, shown, tmp_path):
    large = tuple(replace(preview, width=96, height=64) for preview in shown.prompts)
    _, run = small(made, tmp_path, previews=replace(shown, prompts=large, tile_size=64, at_start=False), steps=2)
    assert work(run) == 0, run.status()
    assert run.notes() == []
    with Image.open(run.preview_path(2, 1, ".png")) as picture:
        assert picture.size == (96, 64)


def test_a_stop_does_not_wait_for_previews_and_they_follow_when_the_run_goes_on(made, shown, tmp_path, monkeypatch):
    described, run = small(made, tmp_path, previews=shown)
    real = previews_module.sample

    def asked_meanwhile(*args):
        for latents in real(*args):
            if len(run.metrics()) == 2:
                run.ask(runs.STOP)
            yield latents

    monkeypatch.setattr(previews_module, "sample", asked_meanwhile)
    assert work(run) == 0
    assert run.status()["state"] == "stopped" and run.status()["step"] == 2
    assert "step-00000002_00.mp4" not in names(run)
    monkeypatch.setattr(previews_module, "sample", real)
    assert work(run) == 0
    assert {"step-00000002_00.mp4", "step-00000004_01.png"} <= set(names(run))
    assert described.final_path.exists() and run.notes() == []
