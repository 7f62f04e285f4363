"""The shipped workflows on a real server."""

import av
import client
import demo
import generate
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from server import ROOT

import locales
import workflows

from .conftest import STEPS, node, summary, training


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_training_writes_the_lora_and_samples_a_video(server, trained):
    for loraid, (folder, outcome) in enumerate(trained.items(), start=1):
        run = summary(outcome)
        assert run["loraid"] == loraid and run["steps"] == STEPS
        (path,) = run["files"]
        assert path == str(server.base / "output" / "loras" / f"{folder}.safetensors")
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_loraid"] == str(loraid)
        video = frames(demo.saved_video(server, outcome))
        assert video.shape == (13, 64, 96, 3)
        assert video.std() > 5, "the video is one flat colour"


def test_caches_are_made_once(server, trained):
    again = client.run(server, training("character_1", 1, steps=2, name="again"))
    reports = [text.splitlines()[0] for text in again.texts.values() if "made" in text]
    assert sorted(reports) == ["captions: 0 made, 6 up to date", "latents: 0 made, 6 up to date"]


def test_a_finished_training_is_found_again_at_once(server, trained):
    graph = training("character_1", 1)
    again = client.run(server, graph)
    assert not again.error
    assert summary(again)["run"] == summary(trained["character_1"])["run"]
    assert again.seconds[node(graph, "VideoLoRATrain")] < 2


def test_two_processes_train_together(server, trained):
    outcome = client.run(server, training("character_1", 1, steps=3, name="together", gpus=2))
    assert not outcome.error
    run = summary(outcome)
    assert run["steps"] == 3 and run["files"] == [str(server.base / "output" / "loras" / "together.safetensors")]


def test_the_allocation_is_shown_before_training(server):
    graph = training("character_1", 1)
    select = node(graph, "VideoLoRASelectLORAID")
    graph = {k: v for k, v in graph.items() if k == select or v["class_type"] == "VideoLoRALoadDiT"}
    graph[select]["inputs"]["loraid"] = 2
    graph["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [select, 1]}, "_meta": {"title": ""}}
    text = client.run(server, graph).texts[select]
    assert text.startswith("LORAID 2: rows 120 to 239 of 240, 60 matrices")
    assert "blocks.5: self_attn.q[128:256]" in text


def test_two_loraids_sample_together_and_the_plan_is_shown(server, trained):
    graph = demo.sampling_graph()
    outcome = client.run(server, graph)
    assert not outcome.error
    assert outcome.texts[node(graph, "VideoLoRACFGSkip")] == "A" * 10 + "S" * 10
    report = outcome.texts[node(graph, "VideoLoRAApplyLoRA")]
    assert "character_1.safetensors (LORAID 1) x 1" in report and "no parameter is touched twice" in report
    both = frames(demo.saved_video(server, outcome))
    off = client.with_overrides(graph, {node(graph, "VideoLoRALoadLoRA"): {"multiplier": 0.0}})
    outcome = client.run(server, off)
    assert "1 switched off" in outcome.texts[node(graph, "VideoLoRAApplyLoRA")]
    assert not np.array_equal(both, frames(demo.saved_video(server, outcome)))


def test_merging_gives_a_checkpoint_that_samples_as_the_stack_does(server, trained):
    graph = demo.graph("wan_t2v_merge")
    outcome = client.run(server, graph)
    assert not outcome.error
    path = demo.shown(outcome, "videolora_merge")["path"]
    assert path == str(server.base / "output" / "diffusion_models" / "wan2.1_t2v_character_1_2.safetensors")
    assert not client.run(server, graph).error, "the same merge again is the same file"
    stacked = demo.sampling_graph()
    merged = {
        node_id: entry
        for node_id, entry in stacked.items()
        if entry["class_type"] not in ("VideoLoRALoadLoRA", "VideoLoRAApplyLoRA")
    }
    merged = client.with_overrides(merged, {
        "VideoLoRALoadDiT": {"model": "wan2.1_t2v_character_1_2.safetensors"},
        "VideoLoRASample": {"dit": [node(stacked, "VideoLoRALoadDiT"), 0]},
    })  # fmt: skip
    videos = [frames(demo.saved_video(server, client.run(server, one))).astype(float) for one in (stacked, merged)]
    assert np.abs(videos[0] - videos[1]).mean() < 3, "of 255; the merged weights are rounded to bfloat16"


def test_the_shipped_files_are_those_of_their_description(info):
    made = generate.files(info)
    for path, content in made.items():
        assert (ROOT / path).read_text(encoding="utf-8") == content, f"run: python dev.py generate ({path})"
    for folder in ("workflows", "workflows/api", "web/docs", "locales/ja", "locales/zh"):
        for path in (ROOT / folder).iterdir():
            known = f"{folder}/{path.name}" in made or path.is_dir() or path.suffix == ".jpg"
            assert known, f"nothing makes {folder}/{path.name}"


def test_every_text_of_the_nodes_is_translated(info):
    ours = {name: node for name, node in info.items() if name.startswith("VideoLoRA")}
    known = locales.translations()
    assert not locales.texts(ours) - known.keys(), "put these into devtools/translations.json"
    assert all(len(others) == len(locales.LANGUAGES) and all(others) for others in known.values())


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
def test_the_editor_shows_the_workflows_as_templates(server, name):
    listed = server.get("/api/workflow_templates")
    assert name in listed["Video-LoRA"]


def test_the_api_form_asks_for_nothing_that_the_nodes_lack(info):
    for make in workflows.WORKFLOWS.values():
        for entry in make().api(info).values():
            spec = info[entry["class_type"]]["input"]
            known = {**spec.get("required", {}), **spec.get("optional", {})}
            assert entry["inputs"].keys() <= known.keys()
            assert spec.get("required", {}).keys() <= entry["inputs"].keys()


def test_every_input_has_a_tooltip_and_every_node_a_description(info):
    ours = {name: entry for name, entry in info.items() if name.startswith("VideoLoRA")}
    assert len(ours) == 51
    for name, entry in ours.items():
        assert entry["description"], name
        for group in entry["input"].values():
            for key, spec in group.items():
                assert key in ("unique_id", "prompt", "extra_pnginfo") or spec[1].get("tooltip"), f"{name}.{key}"


def test_a_merged_tensor_of_the_server_equals_base_plus_both(server, trained):
    client.run(server, demo.graph("wan_t2v_merge"))
    base = load_file(server.base / "models" / "diffusion_models" / workflows.DIT)
    merged = load_file(server.base / "output" / "diffusion_models" / "wan2.1_t2v_character_1_2.safetensors")
    name = "blocks.3.ffn.0"
    exact = base[f"{name}.weight"].float()
    for folder in trained:
        lora = load_file(server.base / "output" / "loras" / f"{folder}.safetensors")
        stem = "lora_unet_" + name.replace(".", "_")
        rank = lora[f"{stem}.lora_down.weight"].shape[0]
        scale = float(lora[f"{stem}.alpha"]) / rank
        exact += scale * lora[f"{stem}.lora_up.weight"].float() @ lora[f"{stem}.lora_down.weight"].float()
    assert (merged[f"{name}.weight"] == exact.bfloat16()).float().mean() > 0.999
