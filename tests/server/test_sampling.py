"""Sampling on a real server: the shipped workflows, and what its settings do to the latents."""

import re

import client
import clips
import demo
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import node
from .test_workflows import frames

QUICK = {"VideoLoRAFlowSchedule": {"steps": 4}}


def run(server, graph):
    outcome = client.run(server, graph)
    assert not outcome.error, outcome.error
    return outcome


def with_pictures(graph, prefix):
    """Its frames are saved as pictures too, which loses nothing."""
    inputs = {"images": [node(graph, "VideoLoRADecode"), 0], "filename_prefix": prefix}
    return {**graph, "pictures": {"class_type": "SaveImage", "inputs": inputs, "_meta": {"title": ""}}}


def latents(server, name):
    return load_file(server.base / "output" / "latents" / f"{name}_00001.latent")["latent_tensor"]


def sampled(server, name, **overrides):
    """The latents of the text-to-video workflow."""
    graph = demo.graph("wan_t2v_sample", **QUICK, VideoLoRASaveLatents={"name": name}, **overrides)
    last = {"VideoLoRADecode", "CreateVideo", "SaveVideo"}
    run(server, {number: entry for number, entry in graph.items() if entry["class_type"] not in last})
    return latents(server, name)


def test_latents_are_kept_with_what_they_were_sampled_with_and_decoded_later(server):
    run(
        server,
        with_pictures(
            demo.graph(
                "wan_t2v_sample",
                **QUICK,
                VideoLoRASample={"seed": 5, "guidance": 3.0},
                VideoLoRASaveLatents={"name": "kept"},
            ),
            "first",
        ),
    )
    path = server.base / "output" / "latents" / "kept_00001.latent"
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["seed"] == "5" and told["solver"] == "unipc" and told["size"] == "96 x 64 x 13" and told["steps"] == "4"
    assert told["prompt"] == "character_1, walking through a park" and told["guidance"] == "3"
    graph = with_pictures(demo.graph("wan_decode_latents", VideoLoRALoadLatents={"file": "kept_00001.latent"}), "again")
    again = run(server, graph)
    assert "seed: 5" in again.texts[node(graph, "VideoLoRALoadLatents")]
    for number in range(1, 14):
        one, other = (server.base / "output" / f"{name}_{number:05d}_.png" for name in ("first", "again"))
        assert np.array_equal(Image.open(one), Image.open(other))


def test_how_the_model_is_held_changes_the_latents_little_or_not_at_all(server):
    plain = sampled(server, "plain", VideoLoRASamplingMemory={"precision": "auto"})
    streamed = sampled(server, "streamed", VideoLoRASamplingMemory={"precision": "auto", "block_swap": 2})
    assert torch.equal(plain, streamed)
    for precision, most in (("fp8_scaled", 0.2), ("fp8_fast", 0.3)):
        changed = sampled(server, precision, VideoLoRASamplingMemory={"precision": precision, "block_swap": 1})
        assert 0 < (changed - plain).norm() / plain.norm() < most


def test_more_blocks_than_there_are_and_a_missing_attention_are_refused(server):
    for override, message in (({"block_swap": 50}, "this model has"), ({"attention": "sage"}, "use sdpa")):
        outcome = client.run(server, demo.graph("wan_t2v_sample", **QUICK, VideoLoRASamplingMemory=override))
        assert message in outcome.error


def test_how_a_model_is_sampled_is_no_setting_of_a_training(server):
    graph = demo.graph("wan_t2i_train")
    dit = node(graph, "VideoLoRALoadDiT")
    held = {"dit": [dit, 0], "precision": "fp8", "block_swap": 0, "attention": "sdpa", "compile": False}
    graph["held"] = {"class_type": "VideoLoRASamplingMemory", "inputs": held, "_meta": {"title": ""}}
    graph = client.with_overrides(graph, {"VideoLoRATrain": {"dit": ["held", 0]}})
    assert "Memory Settings to the training" in client.run(server, graph).error


def test_a_picture_is_sampled(server):
    outcome = run(server, demo.graph("wan_t2i_sample", **QUICK, VideoLoRAEmptyLatent={"frames": 1}))
    with Image.open(demo.saved_video(server, outcome)) as picture:
        assert picture.size == (96, 64)


def test_a_video_becomes_another_as_far_as_the_strength_says(server):
    graph = demo.graph("wan_v2v_sample", VideoLoRAFlowSchedule={"steps": 4, "solver": "euler"})
    encode, sample = node(graph, "VideoLoRAEncodeVideo"), node(graph, "VideoLoRASample")
    outcome = run(server, graph)
    assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)
    found = {}
    for name, strength in (("v2v_input", None), ("v2v_0", 0.0), ("v2v_half", 0.5), ("v2v_1", 1.0)):
        source = [encode, 0] if strength is None else [sample, 0]
        save = {
            "class_type": "VideoLoRASaveLatents",
            "inputs": {"latent": source, "name": name},
            "_meta": {"title": ""},
        }
        last = {"VideoLoRADecode", "CreateVideo", "SaveVideo", *({"VideoLoRASample"} if strength is None else ())}
        kept = {number: entry for number, entry in graph.items() if entry["class_type"] not in last}
        run(server, client.with_overrides({**kept, "save": save}, {"VideoLoRASample": {"strength": strength}}))
        found[name] = latents(server, name)
    video = found["v2v_input"]
    assert (found["v2v_0"] - video).norm() < 1e-4 * video.norm()
    near, far = ((found[name] - video).norm() for name in ("v2v_half", "v2v_1"))
    assert 0.01 * video.norm() < near < far


def test_frames_are_loaded_from_videos_and_folders_at_the_models_size_and_rate(server):
    inputs = server.base / "input"
    (inputs / "frames of a clip").mkdir(exist_ok=True)
    (inputs / "nothing").mkdir(exist_ok=True)
    for index in range(7):
        Image.new("RGB", (120, 80), (30 * index, 0, 0)).save(inputs / "frames of a clip" / f"{index}.png")
    clips.write_video(inputs / "slow.mp4", np.zeros((12, 80, 120, 3), np.uint8), fps=8)
    graph = demo.graph("wan_v2v_sample")
    load = node(graph, "VideoLoRALoadFrames")
    graph = {number: graph[number] for number in (load, node(graph, "VideoLoRALoadDiT"))}
    graph["seen"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [load, 0], "filename_prefix": "seen"},
        "_meta": {"title": ""},
    }

    def loaded(**inputs):
        return client.run(server, client.with_overrides(graph, {"VideoLoRALoadFrames": inputs}))

    outcome = loaded(source="frames of a clip", start=1)
    assert "5 frames: the clip is no longer" in outcome.texts[load]
    files = [server.base / "output" / image["filename"] for image in outcome.outputs["seen"]["images"]]
    seen = [np.asarray(Image.open(file)) for file in files]
    assert [image.shape for image in seen] == [(64, 96, 3)] * 5
    assert [int(image[0, 0, 0]) for image in seen] == [30, 60, 90, 120, 150]
    outcome = loaded(source="slow.mp4", frames=81)  # 24 frames at the model's 16 per second
    assert "21 frames: the clip is no longer" in outcome.texts[load]
    assert "start below that" in loaded(source="slow.mp4", start=24).error
    assert "'nothing': the folder holds no images" in loaded(source="nothing").error
    for outside in ("../../secret.mp4", "absent.mp4"):
        with pytest.raises(client.Rejected, match=re.escape(outside)):
            loaded(source=outside)


def test_guidance_is_left_out_as_planned(server):
    graph = demo.graph("wan_cfg_skip", **QUICK)
    outcome = run(server, graph)
    plans = {
        entry["inputs"]["mode"]: outcome.texts[number]
        for number, entry in graph.items()
        if entry["class_type"] == "VideoLoRACFGSkip"
    }
    assert plans == {"none": "AAAA", "late": "AASS", "early_late": "SAAS"}
    videos = [frames(server.base / "output" / "video" / f"cfg_{mode}_00001_.mp4") for mode in plans]
    assert all(video.shape == (13, 64, 96, 3) for video in videos) and (videos[0] != videos[1]).any()


def test_layers_are_skipped_where_there_is_guidance_and_only_layers_there_are(server):
    graph = demo.graph("wan_t2v_sample", **QUICK, VideoLoRASaveLatents={"name": "skipped"})
    schedule = node(graph, "VideoLoRAFlowSchedule")
    inputs = {"schedule": [schedule, 0], "layers": "1", "mode": "original", "scale": 3.0, "start": 0.0, "end": 0.5}
    graph["skip"] = {"class_type": "VideoLoRASkipLayerGuidance", "inputs": inputs, "_meta": {"title": ""}}
    graph = client.with_overrides(graph, {"VideoLoRASample": {"schedule": ["skip", 0]}})
    run(server, graph)
    assert not torch.equal(latents(server, "skipped"), sampled(server, "unskipped"))
    wrong = client.with_overrides(graph, {"skip": {"layers": "40"}})
    assert "this model has layers 0 to" in client.run(server, wrong).error
    alone = client.with_overrides(graph, {"VideoLoRASample": {"guidance": 1.0}})
    assert "guidance above 1" in client.run(server, alone).error
    with pytest.raises(client.Rejected, match="give numbers with commas"):
        client.run(server, client.with_overrides(graph, {"skip": {"layers": "first"}}))


def test_a_list_of_prompts_is_sampled_one_by_one(server):
    graph = demo.graph("wan_t2v_sample", **QUICK, VideoLoRASaveLatents={"name": "listed"})
    text = "a red disk --d 7\n\na green square --d 8 --n blurry"
    graph["list"] = {
        "class_type": "VideoLoRAPromptList", "_meta": {"title": ""},
        "inputs": {"dit": [node(graph, "VideoLoRALoadDiT"), 0], "prompts": text, "seed": 1},
    }  # fmt: skip
    for entry in graph.values():
        if entry["_meta"]["title"] == "Prompt":
            entry["inputs"]["prompt"] = ["list", 0]
        elif entry["_meta"]["title"] == "Negative prompt":
            entry["inputs"]["prompt"] = ["list", 1]
    run(server, client.with_overrides(graph, {"VideoLoRASample": {"seed": ["list", 2]}}))
    told = []
    for number in (1, 2):
        with safe_open(server.base / "output" / "latents" / f"listed_0000{number}.latent", "pt") as file:
            told.append(file.metadata())
    assert [entry["prompt"] for entry in told] == ["a red disk", "a green square"]
    assert [entry["seed"] for entry in told] == ["7", "8"] and told[1]["negative_prompt"] == "blurry"
