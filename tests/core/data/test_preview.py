"""Pictures of what training will see."""

import clips
import numpy as np
import pytest
from PIL import Image
from videolora.core.data import preview
from videolora.core.data.config import DatasetConfig
from videolora.core.data.media import read_windows
from videolora.core.data.planning import Dataset, plan_latents
from videolora.core.data.preview import WIDTH, choose, contact_sheet, mosaic, sights
from videolora.core.families import FAMILIES

WAN = FAMILIES["wan"]


@pytest.fixture
def plans(tmp_path):
    videos, images = tmp_path / "videos", tmp_path / "images"
    clips.render_clips(videos, "zarko", 3, frames=17, size=(64, 48))
    images.mkdir()
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (64, 64), colour).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(f"all {colour} " * 30)
    (videos / "broken.mp4").write_bytes(b"no video")
    (videos / "broken.txt").write_text("nothing")
    common = {"resolution": (64, 64), "enable_bucket": True}
    video = DatasetConfig(kind="video", folder=videos, cache=videos / "cache", target_frames=(5, 9),
                          frame_extraction="chunk", **common)  # fmt: skip
    image = DatasetConfig(kind="image", folder=images, cache=images / "cache", **common)
    return [plan_latents(Dataset.find(config), WAN, "the VAE") for config in (video, image)]


def test_windows_of_every_bucket_are_shown_as_training_crops_them(plans):
    seen = list(sights(choose(plans, 2), WAN, height=64))
    by_size = {}
    for sight in seen:
        by_size.setdefault(sight.planned.size, []).append(sight)
    assert {size: len(shown) for size, shown in by_size.items()} == {
        window.size: 2 for plan in plans for window in plan.windows
    }
    for sight in seen:
        assert len(sight.frames) == sight.planned.size.frames and sight.moves == (sight.planned.window is not None)
        if sight.planned.window:
            size = (sight.planned.size.width, sight.planned.size.height)
            ((_, frames),) = read_windows(sight.planned.item.source, [sight.planned.window], size, WAN.fps)
            assert frames.shape[1] == sight.frames.shape[1] == 64  # nothing to make smaller: the very pixels
            np.testing.assert_array_equal(sight.frames, frames)


def test_what_is_shown_of_a_bucket_is_spread_over_its_clips(plans):
    seen = list(sights(choose(plans[:1], 3), WAN))
    assert {sight.planned.item.source.stem for sight in seen} == {"zarko_00", "zarko_01", "zarko_02"}


def test_the_contact_sheet_shows_every_window_and_changes_with_captions_and_left_out_files(plans):
    seen = list(sights(choose(plans, 2), WAN))
    sheet = contact_sheet(plans, seen)
    assert sheet.shape[1:] == (WIDTH, 3) and sheet.dtype == np.uint8
    for colour in ((255, 0, 0), (0, 255, 0)):  # first and second of the images shown
        assert (sheet == colour).all(2).sum() > 5000
    plans[0].left_out.clear()
    assert contact_sheet(plans, seen).shape[0] < sheet.shape[0]


def test_the_mosaic_holds_every_window_to_its_end_and_shorter_ones_stand_still(plans):
    seen = list(sights(choose(plans, 1), WAN, height=48))
    frames = mosaic(seen, columns=2)
    seen = [sight for sight in seen if sight.moves]
    assert len(frames) == 9 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    width = max(sight.frames.shape[2] for sight in seen)
    for index, sight in enumerate(seen):
        top, left = index // 2 * 48, index % 2 * width
        tile = frames[:, top : top + 48, left : left + sight.frames.shape[2]]
        for frame in range(9):
            np.testing.assert_array_equal(tile[frame], sight.frames[min(frame, len(sight.frames) - 1)])


def test_a_clip_that_breaks_while_it_is_shown_is_named_and_the_rest_is_shown(plans):
    path = plans[0].windows[0].item.source
    path.write_bytes(b"changed since")
    seen = list(sights(choose(plans, 9), WAN))
    assert path.name in " ".join(plans[0].problems)
    assert all(sight.planned.item.source != path for sight in seen) and seen


def test_of_many_windows_a_few_move_and_the_others_are_kept_as_three_frames(plans, monkeypatch):
    monkeypatch.setattr(preview, "_MOVING", 2)
    seen = list(sights(choose(plans[:1], 99), WAN, height=16))
    assert sum(sight.moves for sight in seen) == 2 < len(seen)
    assert all(len(sight.frames) == 3 for sight in seen if not sight.moves)


def test_there_is_a_mosaic_even_of_nothing():
    assert mosaic([]).shape == (1, 16, 16, 3)
