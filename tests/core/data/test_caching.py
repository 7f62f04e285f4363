"""Making the caches of real clips, with a VAE and a text encoder small enough to be written here."""

import json
import shutil
import zlib

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from videolora.core.data import cache_files
from videolora.core.data.caching import cache_latents, cache_text, to_video
from videolora.core.data.config import DatasetConfig
from videolora.core.data.discovery import Item
from videolora.core.data.media import read_windows
from videolora.core.data.planning import Dataset, plan_latents, plan_text
from videolora.core.data.windows import Window
from videolora.core.families import FAMILIES
from videolora.core.shapes import VideoSize

WAN = FAMILIES["wan"]
CPU = torch.device("cpu")


class PoolingVAE:
    """Latents that follow from the pixels: means of 8 x 8 pixels of every fourth frame, in 16 strengths."""

    def encode(self, video):
        assert video.ndim == 5 and video.shape[1] == 3 and video.abs().max() <= 1
        grey = torch.nn.functional.avg_pool3d(video[:, :, ::4].mean(1, keepdim=True), (1, 8, 8))
        return grey * torch.linspace(0.5, 2, 16).view(1, 16, 1, 1, 1)


class HashingEncoder:
    """A state of 8 values for every word, and room for five words."""

    def __init__(self):
        self.encoded = []

    def encode(self, prompts):
        self.encoded += prompts
        return [{"varlen_t5": torch.stack([self.word(word) for word in prompt.split()])} for prompt in prompts]

    def word(self, word):
        return torch.randn(8, generator=torch.Generator().manual_seed(zlib.crc32(word.encode()))).bfloat16()

    @property
    def tokenizer(self):
        return self

    def too_long(self, prompt):
        return max(0, len(prompt.split()) - 5)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.render_clips(folder, "zarko", 3, frames=17, size=(64, 48))
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "clips")


def dataset(place, **settings):
    settings = {"kind": "video", "folder": place, "cache": place / "cache", "resolution": (48, 32),
                "target_frames": (9,), **settings}  # fmt: skip
    return Dataset.find(DatasetConfig(**settings))


class Latents:
    """A caching run that can be looked at step by step."""

    def __init__(self, found, identity="the VAE", vae=PoolingVAE):
        self.plan = plan_latents(found, WAN, identity)
        self.loads = 0
        self.vae = vae
        self.steps = cache_latents([self.plan], WAN, self.load, CPU)

    def load(self):
        self.loads += 1
        return self.vae()

    def run(self):
        """Name -> outcome of every file, after all steps."""
        steps = list(self.steps)
        assert [step.done for step in steps] == list(range(1, len(steps) + 1))
        assert all(step.total == len(steps) for step in steps)
        return {step.name: step.outcome for step in steps}


def left_out(plan):
    return {item.source.name: reason for item, reason in plan.left_out.items()}


def names(*numbers, frames="00000-009", size="0048x0032"):
    return {f"zarko_{number:02d}_{frames}_{size}_wan.safetensors" for number in numbers}


def files(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


def test_latents_are_stored_in_model_space_with_the_names_and_metadata_of_the_shared_layout(folder):
    assert set(Latents(dataset(folder)).run()) == names(0, 1, 2) == set(files(folder / "cache"))
    path = folder / "cache" / "zarko_01_00000-009_0048x0032_wan.safetensors"
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents_3x4x6_bfloat16"]
        stored, metadata = file.get_tensor("latents_3x4x6_bfloat16"), file.metadata()
    assert metadata["architecture"] == "wan"
    assert (metadata["width"], metadata["height"], metadata["frame_count"]) == ("48", "32", "9")
    assert metadata["format_version"] == "1.0.1"

    ((_, frames),) = read_windows(folder / "zarko_01.mp4", [Window(0, 9)], (48, 32), 16)
    expected = WAN.latent.to_model(PoolingVAE().encode(to_video([frames], CPU)))[0]
    assert stored.shape == (16, 3, 4, 6) and stored.dtype == torch.bfloat16
    torch.testing.assert_close(stored, expected.bfloat16(), rtol=0, atol=0)
    loaded = cache_files.load_latents(path, WAN)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, stored.float(), rtol=0, atol=0)


def test_pixels_reach_the_vae_from_minus_one_to_one_with_channels_first():
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[2, :, :, 1] = 255
    video = to_video([frames], CPU)
    assert video.shape == (1, 3, 5, 32, 48) and video.dtype == torch.float32
    assert (video[0, 1, 2] == 1).all() and video.sum() == (2 - 15) * 32 * 48


def test_a_second_run_makes_nothing_and_does_not_load_the_vae(folder):
    first = Latents(dataset(folder))
    assert set(first.run().values()) == {"made"} and first.loads == 1
    before = files(folder / "cache")
    second = Latents(dataset(folder))
    assert second.run() == dict.fromkeys(names(0, 1, 2), "kept") and second.loads == 0
    assert files(folder / "cache") == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "settings", "identity", "made"),
    [
        (lambda folder: shutil.copy(folder / "zarko_02.mp4", folder / "zarko_00.mp4"), {}, "the VAE", names(0)),
        (lambda folder: None, {}, "another VAE", names(0, 1, 2)),
        (lambda folder: None, {"resolution": (32, 48)}, "the VAE", names(0, 1, 2, size="0032x0048")),
        (lambda folder: None, {"target_frames": (5,)}, "the VAE", names(0, 1, 2, frames="00000-005")),
        (lambda folder: None, {"source_fps": 16.0}, "the VAE", names(0, 1, 2)),
        (lambda folder: truncate(folder / "cache" / next(iter(names(1)))), {}, "the VAE", names(1)),
        (lambda folder: (folder / "cache" / next(iter(names(2)))).write_text("garbage"), {}, "the VAE", names(2)),
        (lambda folder: (folder / "cache" / next(iter(names(2)))).unlink(), {}, "the VAE", names(2)),
    ],
    ids=["clip", "VAE", "size", "frames", "rate", "truncated", "garbage", "gone"],
)
def test_only_what_a_change_touches_is_made_again(folder, change, settings, identity, made):
    complete = Latents(dataset(folder)).run()
    before = files(folder / "cache")
    change(folder)
    outcomes = Latents(dataset(folder, **settings), identity).run()
    assert {name for name, outcome in outcomes.items() if outcome == "made"} == made
    assert all(outcome == "kept" for name, outcome in outcomes.items() if name not in made)
    kept = set(complete) - made
    assert {name: files(folder / "cache")[name] for name in kept} == {name: before[name] for name in kept}
    assert set(Latents(dataset(folder, **settings), identity).run().values()) == {"kept"}


def test_cache_files_with_strange_metadata_are_made_again(folder):
    Latents(dataset(folder)).run()
    path = folder / "cache" / next(iter(names(0)))
    header = json.dumps({"__metadata__": ["not", "a", "table"]}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert Latents(dataset(folder)).run()[path.name] == "made"


def test_the_same_clips_give_the_same_bytes(folder):
    for cache in ("one", "two"):
        Latents(dataset(folder, cache=folder / cache)).run()
        list(cache_text(plan_text(dataset(folder, cache=folder / cache), WAN, "encoder"), WAN, HashingEncoder))
    assert len(files(folder / "one")) == 6
    assert files(folder / "one") == files(folder / "two")


def test_every_window_of_a_clip_gets_its_own_file(folder):
    found = dataset(folder, target_frames=(5, 17), frame_extraction="slide", frame_stride=6)
    windows = [(0, 5), (6, 5), (12, 5), (0, 17)]
    expected = set().union(*(names(0, 1, 2, frames=f"{start:05d}-{count:03d}") for start, count in windows))
    assert set(Latents(found).run()) == expected
    for start, count in windows:
        path = folder / "cache" / f"zarko_00_{start:05d}-{count:03d}_0048x0032_wan.safetensors"
        ((_, frames),) = read_windows(folder / "zarko_00.mp4", [Window(start, count)], (48, 32), 16)
        latents = WAN.latent.to_model(PoolingVAE().encode(to_video([frames], CPU)))[0]
        torch.testing.assert_close(cache_files.load_latents(path, WAN), latents.bfloat16().float(), rtol=0, atol=0)


def test_with_buckets_a_clip_keeps_its_shape(folder):
    outcomes = Latents(dataset(folder, resolution=(96, 96), enable_bucket=True)).run()
    assert set(outcomes) == names(0, 1, 2, size="0112x0080")
    smaller = dataset(folder, resolution=(96, 96), enable_bucket=True, bucket_no_upscale=True)
    assert set(Latents(smaller).run()) == names(0, 1, 2, size="0064x0048")


def test_a_size_that_the_model_cannot_take_is_refused_before_anything_is_made(folder):
    with pytest.raises(ValueError, match=r"width 50 .* use 48 or 64"):
        plan_latents(dataset(folder, resolution=(50, 32)), WAN, "the VAE")


def test_images_are_cached_as_single_frames(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (100, 100), (200, 100, 50)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a colour")
    outcomes = Latents(dataset(tmp_path, kind="image")).run()
    assert outcomes == dict.fromkeys([f"{name}_0048x0032_wan.safetensors" for name in ("a", "b")], "made")
    assert cache_files.load_latents(tmp_path / "cache" / "a_0048x0032_wan.safetensors", WAN).shape == (16, 1, 4, 6)


def test_a_folder_of_frames_is_cached_again_when_one_of_them_changes(tmp_path):
    (tmp_path / "frames").mkdir()
    for index in range(9):
        Image.new("RGB", (48, 32), (index * 20,) * 3).save(tmp_path / "frames" / f"{index}.png")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"video_path": str(tmp_path / "frames"), "caption": "it brightens"})
    )
    settings = {"folder": None, "jsonl": tmp_path / "rows.jsonl"}
    assert set(Latents(dataset(tmp_path, **settings)).run().values()) == {"made"}
    assert set(Latents(dataset(tmp_path, **settings)).run().values()) == {"kept"}
    Image.new("RGB", (48, 32)).save(tmp_path / "frames" / "8.png")
    assert set(Latents(dataset(tmp_path, **settings)).run().values()) == {"made"}


def spoil(path, how):
    """A clip that cannot even be opened, or that breaks where its second half begins."""
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 4
    end = start + int.from_bytes(whole[start - 8 : start - 4]) - 8
    half = start + (end - start) // 2
    path.write_bytes(b"not a video" if how == "text" else whole[:half] + bytes(end - half) + whole[end:])


def test_a_clip_that_cannot_be_opened_is_named_and_the_others_are_cached(folder):
    spoil(folder / "zarko_01.mp4", "text")
    run = Latents(dataset(folder))
    assert list(left_out(run.plan)) == ["zarko_01.mp4"] and "opened" in left_out(run.plan)["zarko_01.mp4"]
    assert run.run() == dict.fromkeys(names(0, 2), "made")


def test_a_clip_that_breaks_half_way_is_named_and_the_others_are_cached(folder):
    spoil(folder / "zarko_01.mp4", "half")
    run = Latents(dataset(folder, target_frames=(17,)))
    assert not run.plan.left_out
    steps = list(run.steps)
    assert sorted(step.outcome for step in steps) == ["failed", "made", "made"]
    (failed,) = (step for step in steps if step.outcome == "failed")
    assert failed.reason
    assert left_out(run.plan) == {"zarko_01.mp4": failed.reason}
    assert {window.item.source.name for window in run.plan.windows} == {"zarko_00.mp4", "zarko_02.mp4"}
    assert set(files(folder / "cache")) == names(0, 2, frames="00000-017")


def test_a_clip_that_is_too_short_is_named_with_its_length(folder):
    clips.render_clips(folder / "short", "mivel", 1, frames=6, size=(64, 48))
    for path in (folder / "short").iterdir():
        shutil.move(path, folder / path.name)
    run = Latents(dataset(folder, target_frames=(9, 13)))
    assert set(left_out(run.plan)) == {"mivel_00.mp4"}
    assert all(part in left_out(run.plan)["mivel_00.mp4"] for part in ("6 frames", "16 fps", "target_frames 9"))
    assert len(run.run()) == 6


@pytest.mark.parametrize("how", ["text", "half"])
def test_when_nothing_can_be_used_the_error_names_the_clips(folder, how):
    for path in folder.glob("*.mp4"):
        spoil(path, how)
    with pytest.raises(ValueError, match=r"nothing in clips can be used: zarko_00\.mp4 \(.+\), zarko_01\.mp4 \(.+\)"):
        Latents(dataset(folder, target_frames=(17,))).run()


def test_a_long_list_of_reasons_is_cut_short(tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.mp4").write_bytes(b"")
        (tmp_path / f"{index}.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"0\.mp4 \(.*4\.mp4 \([^,]*\) and 3 more$"):
        plan_latents(dataset(tmp_path), WAN, "the VAE")


def test_stopping_half_way_keeps_what_was_reported_and_the_next_run_makes_only_the_rest(folder):
    run = Latents(dataset(folder))
    first = next(run.steps)
    run.steps.close()
    assert first.outcome == "made" and set(files(folder / "cache")) == {first.name}
    again = Latents(dataset(folder))
    outcomes = again.run()
    assert outcomes.pop(first.name) == "kept" and set(outcomes.values()) == {"made"} and again.loads == 1


def test_values_that_are_not_finite_are_never_stored(folder):
    class Overflowing(PoolingVAE):
        def encode(self, video):
            return super().encode(video) * torch.inf

    with pytest.raises(ValueError, match="not finite"):
        Latents(dataset(folder), vae=Overflowing).run()
    assert not list((folder / "cache").glob("*"))


def items(folder, *captions):
    config = DatasetConfig(kind="video", folder=folder, cache=folder)
    return Dataset(config, tuple(Item(folder / f"{i}.mp4", caption, str(i)) for i, caption in enumerate(captions)))


def encode(found, identity="the encoder"):
    """Outcome of every file, the steps, and what the encoder was asked for (None when it was not loaded)."""
    encoders = []

    def load():
        encoders.append(HashingEncoder())
        return encoders[-1]

    steps = list(cache_text(plan_text(found, WAN, identity), WAN, load))
    assert [(step.done, step.total) for step in steps] == [(n, len(steps)) for n in range(1, len(steps) + 1)]
    return (
        {step.name: step.outcome for step in steps},
        steps,
        encoders[0].encoded if encoders else None,
    )


def test_text_states_are_stored_with_the_names_and_metadata_of_the_shared_layout(tmp_path):
    outcomes, _, _ = encode(items(tmp_path, "a red disk", "“schön” 光"))
    assert outcomes == {"0_wan_te.safetensors": "made", "1_wan_te.safetensors": "made"}
    for name, caption in (("0", "a red disk"), ("1", "“schön” 光")):
        path = tmp_path / f"{name}_wan_te.safetensors"
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == ["varlen_t5_bfloat16"]
            assert file.metadata()["architecture"] == "wan"
            assert file.metadata()["caption1"] == caption
            assert file.metadata()["format_version"] == "1.0.1"
        (states,) = HashingEncoder().encode([caption])
        torch.testing.assert_close(cache_files.load_text(path), states, rtol=0, atol=0)


def test_every_caption_is_encoded_alone_and_keeps_its_own_states(tmp_path):
    captions = [f"caption number {index}" for index in range(19)]
    _, _, encoded = encode(items(tmp_path, *captions))
    assert encoded == captions
    for index, caption in enumerate(captions):
        (states,) = HashingEncoder().encode([caption])
        loaded = cache_files.load_text(tmp_path / f"{index}_wan_te.safetensors")
        torch.testing.assert_close(loaded, states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "captions", "identity", "made"),
    [
        (lambda folder: None, "a b c", "the encoder", ""),
        (lambda folder: None, "a x c", "the encoder", "1"),
        (lambda folder: None, "a b c", "another encoder", "012"),
        (lambda folder: truncate(folder / "2_wan_te.safetensors"), "a b c", "the encoder", "2"),
        (lambda folder: (folder / "0_wan_te.safetensors").unlink(), "a b c", "the encoder", "0"),
    ],
    ids=["nothing", "caption", "encoder", "truncated", "gone"],
)
def test_only_text_that_a_change_touches_is_encoded_again(tmp_path, change, captions, identity, made):
    encode(items(tmp_path, "a", "b", "c"))
    change(tmp_path)
    outcomes, _, encoded = encode(items(tmp_path, *captions.split()), identity)
    assert {name[0] for name, outcome in outcomes.items() if outcome == "made"} == set(made)
    assert list(outcomes.values()).count("kept") == 3 - len(made)
    assert encoded == ([captions.split()[int(index)] for index in made] if made else None)


def test_stopping_half_way_keeps_the_text_that_was_reported(tmp_path):
    found = items(tmp_path, "a", "b", "c")
    steps = cache_text(plan_text(found, WAN, "the encoder"), WAN, HashingEncoder)
    first = next(steps)
    steps.close()
    assert set(files(tmp_path)) == {first.name}
    outcomes, _, encoded = encode(found)
    assert outcomes.pop(first.name) == "kept" and set(outcomes.values()) == {"made"}
    assert encoded == ["b", "c"]


def test_a_caption_that_is_too_long_is_reported_and_cached(tmp_path):
    _, steps, _ = encode(items(tmp_path, "a short one", "one two three four five six seven"))
    assert steps[0].reason == ""
    assert steps[1].outcome == "made" and "2 tokens too long" in steps[1].reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int64"])
def test_text_states_of_every_dtype_come_back_under_their_names(tmp_path, dtype):
    states = {
        "varlen_t5": torch.arange(12).view(3, 4).to(getattr(torch, dtype)),
        "llm_mask": torch.ones(3, dtype=torch.int64),
    }
    cache_files.save_text(tmp_path / "text.safetensors", states, "a disk", WAN, "fingerprint")
    loaded = cache_files.load_text(tmp_path / "text.safetensors")
    assert loaded.keys() == states.keys()
    for name, value in states.items():
        assert loaded[name].dtype == value.dtype
        assert (loaded[name].float() == value.float()).all()


def test_latents_survive_saving_within_the_precision_of_the_cache(tmp_path):
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    path = cache_files.latent_path(tmp_path, "a", Window(8, 9), (48, 32), WAN)
    cache_files.save_latents(path, latents, VideoSize(9, 32, 48), WAN, "fingerprint")
    assert cache_files.is_current(path, "fingerprint") and not cache_files.is_current(path, "another")
    assert not cache_files.is_current(tmp_path / "absent.safetensors", "fingerprint")
    loaded = WAN.latent.from_model(cache_files.load_latents(path, WAN)[None])[0]
    torch.testing.assert_close(loaded, latents, rtol=0.02, atol=0.02)
