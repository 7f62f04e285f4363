"""Which frames of a clip become training items."""

from itertools import pairwise
from pathlib import Path

import pytest
from videolora.core.data.config import EXTRACTIONS, DatasetConfig
from videolora.core.data.windows import Window, choose_windows
from videolora.core.families import FAMILIES

FRAMES_AT_MOST = FAMILIES["wan"].latent.frames_at_most


def choose(frames, **settings):
    config = DatasetConfig(kind="video", folder=Path("clips"), cache=Path("cache"), **settings)
    return choose_windows(config, frames, FRAMES_AT_MOST)


@pytest.mark.parametrize("extraction", EXTRACTIONS)
@pytest.mark.parametrize("targets", [(1,), (5,), (9, 5, 6), (17, 33)])
def test_every_window_lies_inside_its_clip_has_a_valid_length_and_occurs_once(extraction, targets):
    for frames in range(1, 45):
        windows = choose(
            frames, target_frames=targets, frame_extraction=extraction, frame_stride=3, frame_sample=4, max_frames=21
        )
        for start, count in windows:
            assert start >= 0 and count >= 1 and start + count <= frames
            assert count % 4 == 1
        assert len(set(windows)) == len(windows)


@pytest.mark.parametrize(
    ("settings", "frames", "expected"),
    [
        ({"target_frames": (9,)}, 20, [(0, 9)]),
        ({"target_frames": (9, 1, 17)}, 16, [(0, 1), (0, 9)]),
        ({"target_frames": (8, 6, 5)}, 20, [(0, 5)]),
        ({"target_frames": (5,), "frame_extraction": "chunk"}, 17, [(0, 5), (5, 5), (10, 5)]),
        ({"target_frames": (5, 9), "frame_extraction": "chunk"}, 10, [(0, 5), (5, 5), (0, 9)]),
        ({"target_frames": (5,), "frame_extraction": "slide", "frame_stride": 2}, 9, [(0, 5), (2, 5), (4, 5)]),
        ({"target_frames": (5,), "frame_extraction": "slide"}, 7, [(0, 5), (1, 5), (2, 5)]),
        ({"target_frames": (5,), "frame_extraction": "uniform", "frame_sample": 3}, 16, [(0, 5), (5, 5), (11, 5)]),
        ({"target_frames": (5,), "frame_extraction": "uniform", "frame_sample": 1}, 16, [(0, 5)]),
        ({"target_frames": (5,), "frame_extraction": "uniform", "frame_sample": 9}, 6, [(0, 5), (1, 5)]),
        ({"frame_extraction": "full"}, 20, [(0, 17)]),
        ({"frame_extraction": "full", "max_frames": 12}, 20, [(0, 9)]),
        ({"frame_extraction": "full", "target_frames": (33,)}, 3, [(0, 1)]),
    ],
)
def test_each_extraction_takes_the_frames_it_names(settings, frames, expected):
    assert choose(frames, **settings) == [Window(*window) for window in expected]


@pytest.mark.parametrize("extraction", sorted({*EXTRACTIONS} - {"full"}))
def test_a_clip_shorter_than_every_window_gives_none_and_one_frame_more_gives_one(extraction):
    settings = {"target_frames": (9, 17), "frame_extraction": extraction, "frame_sample": 2}
    assert choose(8, **settings) == []
    assert choose(9, **settings) == [Window(0, 9)]


def test_a_clip_without_frames_gives_no_window_at_all():
    assert choose(0, frame_extraction="full") == []


def test_uniform_windows_reach_from_the_first_frame_to_the_last_in_even_steps():
    windows = choose(101, target_frames=(5,), frame_extraction="uniform", frame_sample=7)
    assert windows[0].start == 0 and windows[-1].start + windows[-1].count == 101
    assert {later.start - earlier.start for earlier, later in pairwise(windows)} == {16}
