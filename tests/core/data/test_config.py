"""The description of a data set."""

import json
import re
from pathlib import Path

import pytest
from videolora.core.data import config
from videolora.core.data.config import DatasetConfig, describe, read_toml

EVERYTHING = """
[general]
resolution = [832, 480]
caption_extension = ".caption"
batch_size = 2
num_repeats = 3
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache/clips"
resolution = 512
caption_extension = ".txt"
batch_size = 4
num_repeats = 5
enable_bucket = false
bucket_no_upscale = false
target_frames = [1, 17, 33]
frame_extraction = "slide"
frame_stride = 8
frame_sample = 6
max_frames = 65
source_fps = 30

[[datasets]]
video_jsonl_file = "clips.jsonl"
cache_directory = "cache/rows"

[[datasets]]
image_directory = "stills"

[[datasets]]
image_jsonl_file = "stills.jsonl"
cache_directory = "cache/stills"
"""
UNSUPPORTED = [
    "control_directory", "multiple_target", "no_resize_control", "control_resolution", "fp_latent_window_size",
    "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post",
]  # fmt: skip


def read(folder, text, name="data.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_toml(path, lambda written: folder / written)


def test_every_key_of_the_schema_is_read(tmp_path):
    clips, rows, stills, still_rows = read(tmp_path, EVERYTHING)
    assert clips == DatasetConfig(
        kind="video", folder=tmp_path / "clips", cache=tmp_path / "cache/clips", resolution=(512, 512),
        caption_extension=".txt", batch_size=4, num_repeats=5, enable_bucket=False, bucket_no_upscale=False,
        target_frames=(1, 17, 33), frame_extraction="slide", frame_stride=8, frame_sample=6, max_frames=65,
        source_fps=30.0,
    )  # fmt: skip
    assert isinstance(clips.source_fps, float)
    assert (rows.kind, rows.folder, rows.jsonl) == ("video", None, tmp_path / "clips.jsonl")
    assert (stills.kind, stills.folder, stills.jsonl) == ("image", tmp_path / "stills", None)
    assert (still_rows.kind, still_rows.jsonl) == ("image", tmp_path / "stills.jsonl")


def test_general_fills_in_what_a_data_set_leaves_out(tmp_path):
    _, rows, stills, _ = read(tmp_path, EVERYTHING)
    for each in (rows, stills):
        assert each.resolution == (832, 480)
        assert each.caption_extension == ".caption"
        assert (each.batch_size, each.num_repeats) == (2, 3)
        assert each.enable_bucket and each.bucket_no_upscale


def test_what_nobody_says_has_the_defaults_of_the_field(tmp_path):
    (clips,) = read(tmp_path, "[[datasets]]\nvideo_directory = 'clips'\n")
    assert describe(clips) == {
        "kind": "video", "resolution": (960, 544), "caption_extension": ".txt", "batch_size": 1, "num_repeats": 1,
        "enable_bucket": False, "bucket_no_upscale": False, "target_frames": (1,), "frame_extraction": "head",
        "frame_stride": 1, "frame_sample": 1, "max_frames": 129, "source_fps": None,
    }  # fmt: skip
    assert clips.cache == clips.folder


def test_the_json_form_means_the_same(tmp_path):
    as_json = read(tmp_path, json.dumps(config.tomllib.loads(EVERYTHING)), "data.JSON")
    assert as_json == read(tmp_path, EVERYTHING)


VIDEO = "[[datasets]]\nvideo_directory = 'clips'\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[genral]\nbatch_size = 1\n" + VIDEO, ["genral"]),
        ("[general]\nbatchsize = 1\n" + VIDEO, ["[general]", "batchsize"]),
        ("[general]\ntarget_frames = [1]\n" + VIDEO, ["[general]", "target_frames"]),
        ("[general]\ncache_directory = 'a'\n" + VIDEO, ["[general]", "cache_directory"]),
        (VIDEO + VIDEO + "frames = 3\n", ["number 2", "frames"]),
        ("[[datasets]]\nimage_directory = 'a'\ntarget_frames = [1]\n", ["number 1", "target_frames"]),
        ("[general]\nresolution = 'big'\n" + VIDEO, ["[general]", "resolution", "big"]),
        (VIDEO + "resolution = [1, 2, 3]\n", ["number 1", "resolution", "[1, 2, 3]"]),
        (VIDEO + "resolution = true\n", ["number 1", "resolution"]),
        (VIDEO + "resolution = [512, 512.5]\n", ["number 1", "resolution"]),
        (VIDEO + "batch_size = 1.0\n", ["number 1", "batch_size", "whole number"]),
        (VIDEO + "num_repeats = true\n", ["number 1", "num_repeats", "whole number"]),
        (VIDEO + "enable_bucket = 1\n", ["number 1", "enable_bucket", "true or false"]),
        (VIDEO + "caption_extension = 1\n", ["number 1", "caption_extension", "text"]),
        (VIDEO + "target_frames = 17\n", ["number 1", "target_frames", "list"]),
        (VIDEO + "target_frames = [17, '33']\n", ["number 1", "target_frames"]),
        (VIDEO + "source_fps = '30'\n", ["number 1", "source_fps", "number"]),
        (VIDEO + "source_fps = true\n", ["number 1", "source_fps", "number"]),
        (VIDEO + "cache_directory = 3\n", ["number 1", "cache_directory"]),
        (VIDEO + "frame_extraction = 'tail'\n", ["number 1", "frame_extraction", "tail", "uniform"]),
        (VIDEO + "target_frames = []\n", ["number 1", "target_frames"]),
        (VIDEO + "target_frames = [0]\n", ["number 1", "target_frames"]),
        (VIDEO + "batch_size = 0\n", ["number 1", "batch_size"]),
        (VIDEO + "frame_stride = 0\n", ["number 1", "frame_stride"]),
        (VIDEO + "frame_sample = 0\n", ["number 1", "frame_sample"]),
        (VIDEO + "max_frames = 0\n", ["number 1", "max_frames"]),
        (VIDEO + "num_repeats = -1\n", ["number 1", "num_repeats"]),
        (VIDEO + "resolution = 15\n", ["number 1", "resolution"]),
        (VIDEO + "source_fps = 0\n", ["number 1", "source_fps"]),
        (VIDEO + "source_fps = nan\n", ["number 1", "source_fps"]),
        (VIDEO + "image_directory = 'stills'\n", ["number 1", "video_directory", "image_directory"]),
        ("[[datasets]]\nresolution = 512\n", ["number 1", "exactly one"]),
        ("[[datasets]]\nvideo_jsonl_file = 'a.jsonl'\n", ["number 1", "cache_directory"]),
        ("[general]\nresolution = 512\n", ["[[datasets]]"]),
        ("datasets = []\n", ["[[datasets]]"]),
        ("datasets = [3]\n", ["number 1", "table"]),
        ("general = 3\n" + VIDEO, ["[general]", "table"]),
        ("[[datasets]\n", ["cannot be read"]),
    ],
)
def test_an_error_names_the_file_the_table_and_the_key(tmp_path, text, named):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    for part in ["data.toml", *named]:
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["[]", '"datasets"', "{", '{"datasets": {}}'])
def test_json_that_is_no_description_is_refused_by_name(tmp_path, text):
    with pytest.raises(ValueError, match=re.escape("data.json")):
        read(tmp_path, text, "data.json")


@pytest.mark.parametrize("key", UNSUPPORTED)
@pytest.mark.parametrize("table", ["[[datasets]] number 1", "[general]"])
def test_what_is_not_supported_is_refused_with_the_reason(tmp_path, key, table):
    text = VIDEO + f"{key} = 1\n" if table != "[general]" else f"[general]\n{key} = 1\n" + VIDEO
    with pytest.raises(ValueError, match=rf"{re.escape(table)}: '{key}' cannot be used, .*(not supported|belongs to)"):
        read(tmp_path, text)


@pytest.mark.parametrize("second", ["cache_directory = 'cache'\n", "cache_directory = 'cache/'\n"])
def test_two_data_sets_cannot_share_a_cache_folder(tmp_path, second):
    with pytest.raises(ValueError, match="two data sets use the cache folder"):
        read(tmp_path, VIDEO + "cache_directory = 'cache'\n[[datasets]]\nimage_directory = 'stills'\n" + second)


def test_two_data_sets_in_one_folder_cannot_share_its_default_cache(tmp_path):
    with pytest.raises(ValueError, match=r"cache_directory"):
        read(tmp_path, VIDEO + "[[datasets]]\nimage_directory = 'clips'\n")


def test_a_missing_description_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        read_toml(tmp_path / "absent.toml", Path)


def test_a_path_that_is_refused_is_reported_with_its_table(tmp_path):
    def refuse(written):
        raise ValueError(f"'{written}' is outside of the input folder.")

    path = tmp_path / "data.toml"
    path.write_text(VIDEO)
    with pytest.raises(ValueError, match=r"data\.toml, \[\[datasets\]\] number 1: 'clips' is outside"):
        read_toml(path, refuse)


@pytest.mark.parametrize("sources", [{}, {"folder": Path("a"), "jsonl": Path("b")}])
def test_a_data_set_has_exactly_one_source(sources):
    with pytest.raises(ValueError, match="either a folder or a JSONL"):
        DatasetConfig(kind="video", cache=Path("cache"), **sources)
