"""What is planned: caches of other trainers, files that nothing needs any more, room on the disk, batches."""

import os
import shutil
from collections import namedtuple

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from videolora.core.data import caching
from videolora.core.data.cache_files import load_latents
from videolora.core.data.caching import cache_latents, cache_text
from videolora.core.data.config import DatasetConfig
from videolora.core.data.planning import Dataset, plan_latents, plan_text, stale_files
from videolora.core.data.statistics import buckets, describe, statistics
from videolora.core.families import FAMILIES
from videolora.core.shapes import VideoSize

WAN = FAMILIES["wan"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.render_clips(folder, "zarko", 2, frames=17, size=(64, 48))
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "clips")


@pytest.fixture
def images(tmp_path):
    place = tmp_path / "images"
    place.mkdir()
    for index in range(5):
        Image.new("RGB", (100, 64), (50 * index, 100, 50)).save(place / f"im_{index}.png")
        (place / f"im_{index}.txt").write_text(f"colour {index}")
    return place


def dataset(place, **settings):
    settings = {"kind": "video", "folder": place, "cache": place / "cache", "resolution": (48, 32),
                "target_frames": (9,), **settings}  # fmt: skip
    return Dataset.find(DatasetConfig(**settings))


class MeanVAE:
    """Latents of one value: the mean of the pixels. Remembers how many clips it was given at a time."""

    def __init__(self):
        self.calls = []

    def encode(self, video):
        self.calls.append(len(video))
        batch, _, frames, height, width = video.shape
        mean = video.mean((1, 2, 3, 4)).view(batch, 1, 1, 1, 1)
        return mean.expand(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)


def cache(found, batch_size=1, vae=None):
    plan = plan_latents(found, WAN, "the VAE")
    steps = list(cache_latents([plan], WAN, lambda: vae or MeanVAE(), CPU, batch_size))
    return plan, {step.name: step.outcome for step in steps}


def foreign_latents(path, shape, dtype=torch.bfloat16, architecture="wan"):
    """A latent file as another trainer writes it: no fingerprint."""
    path.parent.mkdir(exist_ok=True)
    name = f"latents_{'x'.join(map(str, shape[1:]))}_{str(dtype).removeprefix('torch.')}"
    metadata = {"architecture": architecture, "width": "100", "height": "64", "format_version": "1.0.1"}
    save_file({name: torch.full(shape, 0.5, dtype=dtype)}, path, metadata)
    return path


def test_latents_that_another_trainer_made_are_used_as_they_are(folder):
    path = foreign_latents(folder / "cache" / "zarko_00_00000-009_0048x0032_wan.safetensors", (16, 3, 4, 6))
    before = path.read_bytes()
    plan, outcomes = cache(dataset(folder))
    assert outcomes == {path.name: "kept", "zarko_01_00000-009_0048x0032_wan.safetensors": "made"}
    assert [window.foreign for window in plan.windows] == [True, False] and path.read_bytes() == before


def test_latents_of_images_that_another_trainer_made_are_found_by_the_size_of_the_image(images):
    path = foreign_latents(images / "cache" / "im_3_0100x0064_wan.safetensors", (16, 1, 4, 6))
    plan, outcomes = cache(dataset(images, kind="image"))
    assert outcomes.pop(path.name) == "kept" and set(outcomes.values()) == {"made"} and len(outcomes) == 4
    assert [window.path for window in plan.windows if window.foreign] == [path]


@pytest.mark.parametrize("how", ["another size", "another family", "older than the clip"])
def test_latents_of_another_trainer_that_do_not_fit_are_left_alone_and_made_beside_them(folder, how):
    shape = (16, 3, 4, 4) if how == "another size" else (16, 3, 4, 6)
    architecture = "hunyuan_video" if how == "another family" else "wan"
    path = foreign_latents(
        folder / "cache" / "zarko_00_00000-009_0048x0032_wan.safetensors", shape, architecture=architecture
    )
    if how == "older than the clip":
        os.utime(path, (1, 1))
    before = path.read_bytes()
    for outcome in ("made", "kept"):
        plan, outcomes = cache(dataset(folder))
        assert set(outcomes.values()) == {outcome} and not any(window.foreign for window in plan.windows)
    assert path.read_bytes() == before and path not in {window.path for window in plan.windows}


def test_half_a_file_is_made_whole(folder):
    path = foreign_latents(folder / "cache" / "zarko_00_00000-009_0048x0032_wan.safetensors", (16, 3, 4, 6))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert cache(dataset(folder))[1][path.name] == "made"


def test_text_states_that_another_trainer_made_are_used_while_the_caption_is_the_same(images):
    (images / "cache").mkdir()
    path = images / "cache" / "im_1_wan_te.safetensors"
    save_file({"varlen_t5_bfloat16": torch.ones(3, 8, dtype=torch.bfloat16)}, path,
              {"architecture": "wan", "caption1": "colour 1", "format_version": "1.0.1"})  # fmt: skip
    planned = plan_text(dataset(images, kind="image"), WAN, "the encoder")
    assert [one.foreign for one in planned] == [False, True, False, False, False]
    (images / "im_1.txt").write_text("another caption")
    assert not any(one.foreign for one in plan_text(dataset(images, kind="image"), WAN, "the encoder"))


def test_text_of_another_trainer_that_lacks_a_part_is_made_again(images):
    (images / "cache").mkdir()
    path = images / "cache" / "im_1_wan_te.safetensors"
    save_file({"llm_float16": torch.ones(3)}, path, {"architecture": "wan", "caption1": "colour 1"})
    assert not any(one.foreign for one in plan_text(dataset(images, kind="image"), WAN, "the encoder"))


class Encoder:
    tokenizer = None

    def __init__(self):
        self.tokenizer = self

    def encode(self, prompts):
        return [{"varlen_t5": torch.zeros(2, 8)} for _ in prompts]

    def too_long(self, prompt):
        return max(0, len(prompt.split()) - 5)


def test_files_that_nothing_needs_any_more_are_found_and_those_of_others_are_not(images):
    found = dataset(images, kind="image")
    cache(found)
    list(cache_text(plan_text(found, WAN, "the encoder"), WAN, Encoder))
    foreign = foreign_latents(images / "cache" / "old_0100x0064_wan.safetensors", (16, 1, 4, 6))
    smaller = dataset(images, kind="image", resolution=(32, 32))
    plan, _ = cache(smaller)
    stale = stale_files(plan.windows, WAN)
    assert {path.name for path in stale} == {f"im_{index}_0048x0032_wan.safetensors" for index in range(5)}
    assert foreign not in stale and stale_files(plan_text(smaller, WAN, "another encoder"), WAN) == []
    (images / "im_4.png").unlink()
    texts = plan_text(dataset(images, kind="image"), WAN, "the encoder")
    assert [path.name for path in stale_files(texts, WAN)] == ["im_4_wan_te.safetensors"]


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_made(images, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage(10, 9, 16 * 4 * 6 * 2 * 5 - 1))
    with pytest.raises(OSError, match=r"will need 0\.0 GiB more, and 0\.0 GiB are free"):
        cache(dataset(images, kind="image"))
    assert not list((images / "cache").glob("*"))
    monkeypatch.undo()
    assert set(cache(dataset(images, kind="image"))[1].values()) == {"made"}


def test_windows_of_one_size_are_encoded_together_and_the_batches_do_not_depend_on_what_is_cached(images):
    found = dataset(images, kind="image")
    vae = MeanVAE()
    cache(found, batch_size=2, vae=vae)
    assert sorted(vae.calls) == [1, 2, 2]
    before = {path.name: path.read_bytes() for path in (images / "cache").iterdir()}
    alone = shutil.copytree(images, images.with_name("alone"), ignore=shutil.ignore_patterns("cache"))
    cache(dataset(alone, kind="image"))
    assert {path.name: path.read_bytes() for path in (alone / "cache").iterdir()} == before
    (images / "cache" / "im_2_0048x0032_wan.safetensors").unlink()
    again = MeanVAE()
    _, outcomes = cache(found, batch_size=2, vae=again)
    assert again.calls == [2] and list(outcomes.values()).count("made") == 1
    assert {path.name: path.read_bytes() for path in (images / "cache").iterdir()} == before


def test_an_image_that_breaks_leaves_the_rest_of_its_batch_whole(images):
    whole = (images / "im_1.png").read_bytes()
    data = whole.index(b"IDAT")
    (images / "im_1.png").write_bytes(whole[: data + 8])  # its header is fine, its pixels are not there
    plan, outcomes = cache(dataset(images, kind="image"), batch_size=5)
    made = [name for name, outcome in outcomes.items() if outcome == "made"]
    assert len(made) == 4 and len(plan.windows) == 4
    assert [item.source.name for item in plan.left_out] == ["im_1.png"]


@pytest.mark.parametrize(("size", "reason"), [((1, 1), "1x1 pixels"), ((8, 300), "8x300 pixels")])
def test_images_that_are_hardly_there_are_left_out(images, size, reason):
    Image.new("RGB", size).save(images / "im_0.png")
    plan, _ = cache(dataset(images, kind="image"))
    assert [(item.source.name, reason in why) for item, why in plan.left_out.items()] == [("im_0.png", True)]


def test_an_image_of_too_many_pixels_is_left_out_and_named(images):
    Image.new("1", (20000, 20000)).save(images / "im_0.png")
    plan, outcomes = cache(dataset(images, kind="image"))
    ((item, why),) = plan.left_out.items()
    assert item.source.name == "im_0.png" and "pixels" in why and len(outcomes) == 4


def test_the_table_of_buckets_counts_windows_items_and_batches(folder):
    found = dataset(folder, target_frames=(5, 9), frame_extraction="chunk", num_repeats=3, batch_size=2)
    plan = plan_latents(found, WAN, "the VAE")
    table = {bucket.size: (bucket.windows, bucket.items, bucket.batches) for bucket in buckets(plan)}
    assert table == {VideoSize(5, 32, 48): (6, 2, 9), VideoSize(9, 32, 48): (2, 2, 3)}
    report = describe(plan)
    assert "2 clips, 8 windows, 12 batches an epoch (batch size 2, 3 repeats)" in report
    assert "48x32, 5 frames: 6 windows of 2 clips, 9 batches an epoch" in report


def test_the_batches_of_the_table_are_those_that_training_makes(folder):
    from videolora.core.training.batches import epoch
    from videolora.core.training.job import TrainingItem, TrainingSet

    found = dataset(folder, target_frames=(5, 9), frame_extraction="chunk", num_repeats=3, batch_size=2)
    plan = plan_latents(found, WAN, "the VAE")
    items = tuple(
        TrainingItem(latents=str(w.path), text="", size=tuple(w.size), fingerprints=("", "")) for w in plan.windows
    )
    trained = epoch([TrainingSet(title="", batch_size=2, num_repeats=3, items=items)], 0, 0)
    assert len(trained) == sum(bucket.batches for bucket in buckets(plan))


def test_statistics_name_copies_long_captions_and_what_is_still_to_be_written(images):
    shutil.copy(images / "im_0.png", images / "im_9.png")
    (images / "im_9.txt").write_text("this caption has far too many words")
    (images / "im_8.png").write_bytes(b"")
    (images / "im_8.txt").write_text("nothing")
    found = dataset(images, kind="image")
    plan = plan_latents(found, WAN, "the VAE")
    report = statistics([plan], WAN, Encoder())
    assert f"the same content: {images / 'im_0.png'}, {images / 'im_9.png'}" in report
    assert "caption too long: im_9.png, its last 2 tokens will be cut off" in report
    assert "latent caches: 0 of 6 are there" in report and "left out: im_8.png" in report
    assert f"to be written to {images / 'cache'}" in report
    cache(found)
    assert "latent caches: 6 of 6 are there" in statistics([plan_latents(found, WAN, "the VAE")], WAN)


def test_what_is_still_to_be_written_is_what_the_files_hold(folder):
    plan = plan_latents(dataset(folder), WAN, "the VAE")
    ((place, needed),) = caching.needed_bytes(plan.windows, WAN).items()
    cache(dataset(folder))
    sizes = [path.stat().st_size for path in place.iterdir()]
    assert 0 <= sum(sizes) - needed <= 1024 * len(sizes)  # headers


def test_two_data_sets_of_the_same_clips_share_their_files(folder):
    plans = [plan_latents(dataset(folder), WAN, "the VAE") for _ in range(2)]
    steps = list(cache_latents(plans, WAN, MeanVAE, CPU))
    assert [step.outcome for step in steps] == ["made"] * 2 and steps[-1].total == 2
    texts = plan_text(dataset(folder), WAN, "the encoder") * 2
    assert len(list(cache_text(texts, WAN, Encoder))) == 2


def test_two_data_sets_may_read_the_same_clips_in_two_ways_into_two_places(folder):
    settings = [{"cache": folder / "a"}, {"cache": folder / "b", "source_fps": 8.0}]
    together = [plan_latents(dataset(folder, **one), WAN, "the VAE") for one in settings]
    list(cache_latents(together, WAN, FirstAndLast, CPU))
    for plan, one in zip(together, settings, strict=True):
        (alone,) = [
            plan_latents(dataset(folder, **{**one, "cache": folder / "alone" / one["cache"].name}), WAN, "the VAE")
        ]
        list(cache_latents([alone], WAN, FirstAndLast, CPU))
        for window, other in zip(plan.windows, alone.windows, strict=True):
            assert window.path.read_bytes() == other.path.read_bytes()


class FirstAndLast(MeanVAE):
    """Latents that tell a clip read at one rate from the same clip read at another."""

    def encode(self, video):
        return super().encode(video) * 0 + (video[:, :, 0] - video[:, :, -1]).abs().mean()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_windows_that_two_data_sets_share_are_made_or_left_out_in_both(folder, batch_size, broken):
    plans = [plan_latents(dataset(folder, frame_extraction=how, target_frames=frames), WAN, "the VAE")
             for how, frames in (("head", (9,)), ("chunk", (5, 9)))]  # fmt: skip
    if broken:
        (folder / "zarko_00.mp4").write_bytes(b"broken since")
    list(cache_latents(plans, WAN, MeanVAE, CPU, batch_size))
    for plan in plans:
        assert plan.windows and all(window.is_cached for window in plan.windows)
        assert [item.source.name for item in plan.left_out] == (["zarko_00.mp4"] if broken else [])


def test_text_states_that_are_not_finite_are_never_stored(images):
    class Overflowing(Encoder):
        def encode(self, prompts):
            return [{"varlen_t5": torch.full((2, 8), torch.nan)} for _ in prompts]

    with pytest.raises(ValueError, match="not finite"):
        list(cache_text(plan_text(dataset(images, kind="image"), WAN, "the encoder"), WAN, Overflowing))
    assert not list(images.glob("cache/*"))


def test_latents_beside_those_of_an_image_condition_are_told_apart(images):
    path = images / "cache" / "im_3_0100x0064_wan.safetensors"
    path.parent.mkdir()
    save_file({"latents_image_1x4x6_float32": torch.zeros(20, 1, 4, 6), "latents_1x4x6_bfloat16": torch.ones(16, 1, 4, 6).bfloat16()},
              path, {"architecture": "wan"})  # fmt: skip
    plan = plan_latents(dataset(images, kind="image"), WAN, "the VAE")
    assert [window.path for window in plan.windows if window.foreign] == [path]
    assert load_latents(path, WAN).shape == (16, 1, 4, 6)


def test_names_of_any_length_are_cached(images):
    name = "光" * 70
    for suffix in (".png", ".txt"):
        (images / f"im_0{suffix}").rename(images / f"{name}{suffix}")
    found = dataset(images, kind="image")
    assert set(cache(found)[1].values()) == {"made"} and set(cache(found)[1].values()) == {"kept"}
    list(cache_text(plan_text(found, WAN, "the encoder"), WAN, Encoder))
    assert all(one.is_cached for one in plan_text(found, WAN, "the encoder"))


def test_caches_of_an_item_that_cannot_be_read_today_are_not_stale(images):
    found = dataset(images, kind="image")
    cache(found)
    (images / "im_2.png").write_bytes(b"")
    plan = plan_latents(found, WAN, "the VAE")
    assert [item.source.name for item in plan.left_out] == ["im_2.png"]
    assert stale_files(plan.windows, WAN, plan.left_out) == []
    assert len(stale_files(plan.windows, WAN)) == 1


def test_what_lies_beside_the_images_of_a_clip_does_not_change_it(tmp_path):
    (tmp_path / "walk").mkdir()
    for index in range(9):
        Image.new("RGB", (48, 32), (index * 20,) * 3).save(tmp_path / "walk" / f"{index}.png")
    (tmp_path / "walk.txt").write_text("it brightens")
    assert set(cache(dataset(tmp_path))[1].values()) == {"made"}
    (tmp_path / "walk" / "Thumbs.db").write_bytes(b"made by looking")
    assert set(cache(dataset(tmp_path))[1].values()) == {"kept"}


def test_numpy_frames_survive(folder):
    video = caching.to_video([np.full((5, 8, 8, 3), value, np.uint8) for value in (0, 255)], CPU)
    assert video.shape == (2, 3, 5, 8, 8) and (video[0] == -1).all() and (video[1] == 1).all()
