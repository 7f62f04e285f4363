"""Preparing data on a real server: 30 clips and 30 images, looked at, cached with an interruption, changed."""

import shutil

import client
import clips
import demo
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from .conftest import node
from .test_workflows import frames

ITEMS = 30


@pytest.fixture(scope="module")
def folder(server):
    """Clips and images in one folder; one of each is broken."""
    place = server.base / "input" / "mixed"
    first, second = clips.render_clips(place, "zarko", 2, frames=21)
    for index in range(2, ITEMS):
        source = (first, second)[index % 2]
        shutil.copy(source, place / f"zarko_{index:02d}.mp4")
        shutil.copy(source.with_suffix(".txt"), place / f"zarko_{index:02d}.txt")
    for index in range(ITEMS):
        Image.new("RGB", (150, 60 + 4 * index), (8 * index, 100, 255 - 8 * index)).save(
            place / f"still_{index:02d}.png"
        )
        (place / f"still_{index:02d}.txt").write_text("a flat colour")
    (place / "zarko_05.mp4").write_bytes((place / "zarko_05.mp4").read_bytes()[:300])
    (place / "still_07.png").write_bytes(b"")
    return place


def preparing(**settings):
    return demo.graph("wan_t2v_prepare_data", VideoLoRADatasetFolder={"folder": "mixed", **settings})


def report(outcome, graph, kind):
    return outcome.texts[node(graph, kind)]


def caches(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "videolora_cache").rglob("*.safetensors")}


def test_the_preview_shows_sheet_video_and_statistics_without_caching_anything(server, folder):
    graph = preparing()
    graph = {k: entry for k, entry in graph.items()
             if entry["_meta"]["title"] not in ("Latents", "Captions") and "Cache" not in entry["class_type"]}  # fmt: skip
    outcome = client.run(server, graph)
    assert not outcome.error
    text = report(outcome, graph, "VideoLoRADatasetPreview")
    assert "29 clips, 29 windows, 29 batches an epoch" in text and "29 images" in text
    assert "left out: zarko_05.mp4" in text and "left out: still_07.png" in text
    assert "the same content:" in text and "latent caches: 0 of 58 are there" in text
    shown = demo.shown(outcome, "videolora_data")
    picture = shown_picture(server, shown["sheet"])
    assert picture.shape[1] == 1280 and (np.abs(picture - np.array((235, 30, 30))) < 25).all(2).sum() > 500
    (video,) = outcome.outputs[node(graph, "SaveVideo")]["images"]
    assert len(frames(server.base / "output" / video["subfolder"] / video["filename"])) == demo.FRAMES
    assert not caches(folder)
    clips_set, stills = shown["sets"]
    window = clips_set["buckets"][0]["windows"][0]
    assert shown_picture(server, window["strip"]).shape == (window["height"], window["frames"] * window["width"], 3)
    assert window["window"] == [0, demo.FRAMES] and window["name"].startswith("zarko_") and "zarko" in window["caption"]
    assert clips_set["clips"][0] == {"name": "zarko_00.mp4", "frames": 21, "windows": [[0, demo.FRAMES]]}
    assert "zarko_05.mp4" in clips_set["left_out"][0] and not stills["clips"] and len(stills["buckets"]) > 1


def shown_picture(server, file):
    path = server.base / file["type"] / file["subfolder"] / file["filename"]
    return np.asarray(Image.open(path).convert("RGB"))


def test_an_interrupted_caching_goes_on_and_only_what_changes_is_done_again(server, folder):
    graph = preparing()
    latents = node(graph, "VideoLoRACacheLatents")

    asked = []

    def interrupt(kind, done, total):
        if kind == "VideoLoRACacheLatents" and total == 58 and done >= 5 and not asked:
            asked.append(server.post("/interrupt", {}))

    outcome = client.run(server, graph, interrupt)
    assert outcome.interrupted, (asked, outcome.seconds)
    first = caches(folder)
    made = sum(not name.endswith("_te.safetensors") for name in first)
    assert 5 <= made < 58
    outcome = client.run(server, graph)
    assert not outcome.error
    assert f"{58 - made} made, {made} up to date" in outcome.texts[latents]
    everything = caches(folder)
    assert len(everything) == 118 and {name: everything[name] for name in first} == first

    (folder / "still_03.txt").write_text("another caption")
    Image.new("RGB", (150, 80), "white").save(folder / "still_04.png")
    outcome = client.run(server, graph)
    assert "1 made, 57 up to date" in outcome.texts[latents]
    assert "1 made, 59 up to date" in report(outcome, graph, "VideoLoRACacheText")
    changed = {name for name, time in caches(folder).items() if everything.get(name) != time}
    assert {name[:8] for name in changed} == {"still_03", "still_04"} and len(changed) == 2


def test_stale_files_are_reported_and_deleted_when_wished(server, folder):
    client.run(server, preparing())
    before = len(caches(folder))
    smaller = client.with_overrides(preparing(width=64, height=64), {"VideoLoRACacheText": {"delete_stale": True}})
    outcome = client.run(server, smaller)
    assert "files that are no longer needed are kept" in report(outcome, smaller, "VideoLoRACacheLatents")
    assert len(caches(folder)) > before
    smaller = client.with_overrides(smaller, {"VideoLoRACacheLatents": {"delete_stale": True}})
    outcome = client.run(server, smaller)
    assert "files that are no longer needed were deleted" in report(outcome, smaller, "VideoLoRACacheLatents")
    assert len(caches(folder)) == 118


def test_a_jsonl_file_and_a_toml_file_are_data_sets_too(server, folder):
    inputs = server.base / "input"
    rows = [f'{{"video_path": "mixed/zarko_{index:02d}.mp4", "caption": "clip {index}"}}' for index in range(3)]
    (inputs / "rows.jsonl").write_text("\n".join(rows))
    (inputs / "sets.toml").write_text(
        '[general]\nresolution = [96, 64]\nenable_bucket = true\ncaption_extension = ".txt"\n'
        '[[datasets]]\nimage_directory = "mixed"\ncache_directory = "mixed_cache"\nnum_repeats = 2\n'
    )
    graph = preparing()
    settings = {k: v for k, v in graph[node(graph, "VideoLoRADatasetFolder")]["inputs"].items()
                if k not in ("folder", "caption_extension")}  # fmt: skip
    graph["toml"] = {"class_type": "VideoLoRADatasetTOML", "inputs": {"file": "sets.toml"}, "_meta": {"title": ""}}
    graph["jsonl"] = {"class_type": "VideoLoRADatasetJSONL", "_meta": {"title": ""},
                      "inputs": {**settings, "file": "rows.jsonl", "kind": "video", "datasets": ["toml", 0]}}  # fmt: skip
    for entry in graph.values():
        if "datasets" in entry["inputs"] and entry["class_type"] != "VideoLoRADatasetJSONL":
            entry["inputs"]["datasets"] = ["jsonl", 0]
    outcome = client.run(server, graph)
    assert not outcome.error
    text = report(outcome, graph, "VideoLoRADatasetPreview")
    assert "mixed: 29 images, 29 windows" in text and "2 repeats" in text and "rows.jsonl: 3 clips" in text
    assert len(list((inputs / "mixed_cache").glob("*_wan.safetensors"))) == 29
    assert len(list((inputs / "videolora_cache" / "rows").glob("*_wan.safetensors"))) == 3


@pytest.mark.parametrize(("settings", "close"), [({"tile_size": 64}, 0.3), ({"cache_on_cpu": True}, 0.0)])
def test_tiles_make_other_latents_and_the_cache_on_the_cpu_the_same(server, settings, close):
    folder = server.base / "input" / "few"
    if not folder.exists():
        clips.render_clips(folder, "zarko", 2, frames=21)
    graph = preparing(folder="few")
    client.run(server, graph)
    path = folder / "videolora_cache" / "videos" / "zarko_00_00000-013_0096x0064_wan.safetensors"
    whole = next(iter(load_file(path).values())).float()
    outcome = client.run(server, client.with_overrides(graph, {"VideoLoRALoadVAE": settings}))
    changed = next(iter(load_file(path).values())).float()
    assert not outcome.error and ("0 made" in report(outcome, graph, "VideoLoRACacheLatents")) == (not close)
    assert (whole - changed).abs().mean() <= close
