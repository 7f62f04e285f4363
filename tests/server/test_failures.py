"""Bad input, cancelling and dying workers on a real server: clear errors, nothing lost, the queue goes on."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import client
import demo
import pytest
from safetensors.torch import load_file, save_file

from .conftest import node, summary, training


def outcome_of(server, graph):
    """What the user is told: the rejection before anything runs, or the error of the run."""
    try:
        outcome = client.run(server, graph)
    except client.Rejected as rejected:
        return str(rejected), None
    return outcome.error, outcome


def models(server):
    return server.base / "models"


def changed(kind, **inputs):
    return client.with_overrides(training("character_1", 1), {kind: inputs})


REJECTED = {
    "a missing checkpoint": (
        "VideoLoRALoadDiT",
        {"model": "gone.safetensors"},
        "'gone.safetensors' is not in ComfyUI's folder",
    ),
    "a missing folder": ("VideoLoRADatasetFolder", {"folder": "gone"}, "does not exist"),
    "a folder outside": (
        "VideoLoRADatasetFolder",
        {"folder": "../../../etc"},
        "outside the folders that data sets may lie in",
    ),
    "an absolute folder": ("VideoLoRADatasetFolder", {"folder": "/etc"}, "outside the folders"),
    "a frame count": ("VideoLoRADatasetFolder", {"frames": "12"}, "must be 4n+1, use 9 or 13"),
    "frames that are no number": ("VideoLoRADatasetFolder", {"frames": "many"}, "whole numbers"),
    "a latent's frame count": ("VideoLoRAEmptyLatent", {"frames": 12}, "must be 4n+1, use 9 or 13"),
    "a latent's size": ("VideoLoRAEmptyLatent", {"width": 100}, "use 96 or 112"),
    "a data set's size": ("VideoLoRADatasetFolder", {"width": 100, "buckets": False}, "width 100 does not fit"),
    "LORAID 0": ("VideoLoRASelectLORAID", {"loraid": 0}, "numbered from 1"),
    "a negative learning rate": ("VideoLoRAOptimizerSettings", {"learning_rate": -1e-4}, "use a number above 0"),
    "a learning rate that is no number": (
        "VideoLoRAOptimizerSettings",
        {"learning_rate": float("nan")},
        "use a number above 0",
    ),
    "a name that leads out": ("VideoLoRATrain", {"name": "../../evil"}, "not a usable name"),
    "a drive": ("VideoLoRATrain", {"name": "C:\\evil"}, "not a usable name"),
    "rank 0": ("VideoLoRANetworkSettings", {"rank": 0}, "use 1 or more"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_input_is_refused_before_anything_runs(server, case):
    kind, inputs, message = REJECTED[case]
    error, outcome = outcome_of(server, changed(kind, **inputs))
    assert message in error
    assert outcome is None, "it was found only while running"


def test_a_loraid_out_of_range_is_refused_before_the_caches_are_made(server):
    graph = changed("VideoLoRASelectLORAID", loraid=3)
    error, outcome = outcome_of(server, graph)
    assert "LORAIDs 1 to 2 at 120 per LORAID" in error and "It would fit with" in error
    assert node(graph, "VideoLoRACacheLatents") not in outcome.seconds


@pytest.fixture
def odd_models(server):
    """Files that are not what they seem, in ComfyUI's model folders."""
    folder = models(server) / "diffusion_models"
    whole = (folder / "wan2.1_t2v_1.3B_bf16.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("hello, I am no model")
    shutil.copy(models(server) / "vae" / "wan_2.1_vae.safetensors", folder / "really_a_vae.safetensors")
    save_file({"double_blocks.0.img_attn_qkv.weight": load_file(models(server) / "vae" / "wan_2.1_vae.safetensors")["conv1.bias"]},
              folder / "other_family.safetensors")  # fmt: skip
    yield
    for name in ("truncated", "text", "really_a_vae", "other_family"):
        (folder / f"{name}.safetensors").unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [("truncated", "is truncated: it should have"), ("text", "not a safetensors file"),
     ("really_a_vae", "is a VAE (Wan 2.1 VAE), not a diffusion model"), ("other_family", "not a model this pack knows")],
)  # fmt: skip
def test_a_file_that_is_no_such_model_is_refused_before_anything_runs(server, odd_models, name, message):
    error, outcome = outcome_of(server, changed("VideoLoRALoadDiT", model=f"{name}.safetensors"))
    assert message in error and outcome is None


@pytest.fixture
def data(server):
    """A folder for clips below ComfyUI's input, removed afterwards."""
    folder = server.base / "input" / "odd"
    shutil.copytree(server.base / "input" / "character_1", folder, ignore=shutil.ignore_patterns("videolora_cache"))
    yield folder
    shutil.rmtree(folder)


def odd_training(**train):
    graph = training("character_1", 1, **{"name": "odd", **train})
    graph = client.with_overrides(graph, {"VideoLoRADatasetFolder": {"folder": "odd"}})
    return {k: v for k, v in graph.items() if v["class_type"] not in LATER}


LATER = {"VideoLoRAApplyLoRA", "VideoLoRAEncodeText", "VideoLoRAEmptyLatent", "VideoLoRAFlowSchedule", "VideoLoRASample",
         "VideoLoRADecode", "CreateVideo", "SaveVideo"}  # fmt: skip


def test_an_empty_folder_and_missing_captions_are_refused(server, data):
    for caption in data.glob("*.txt"):
        caption.unlink()
    error, outcome = outcome_of(server, odd_training())
    assert "6 of 6 videos" in error and "have no usable caption: zarko_00.mp4" in error and outcome is None
    for clip in data.glob("*.mp4"):
        clip.unlink()
    error, outcome = outcome_of(server, odd_training())
    assert "holds no videos" in error and outcome is None


def test_a_video_that_cannot_be_read_is_named_and_the_rest_is_trained(server, data):
    (data / "zarko_02.mp4").write_bytes(b"this is no video")
    graph = odd_training(steps=2)
    outcome = client.run(server, graph)
    assert not outcome.error
    report = outcome.texts[node(graph, "VideoLoRACacheLatents")]
    assert report.startswith("latents: 5 made") and "left out: zarko_02.mp4" in report


def test_only_unreadable_videos_are_an_error(server, data):
    for clip in data.glob("*.mp4"):
        clip.write_bytes(b"this is no video")
    error, _ = outcome_of(server, odd_training())
    assert "nothing in odd can be used" in error and "zarko_00.mp4" in error


def test_an_edited_caption_is_cached_and_trained_anew(server, data):
    first = client.run(server, odd_training(steps=2))
    (data / "zarko_00.txt").write_text("zarko is somewhere else")
    graph = odd_training(steps=2)
    second = client.run(server, graph)
    assert second.texts[node(graph, "VideoLoRACacheText")].startswith("captions: 1 made, 5 up to date")
    assert summary(first)["run"] != summary(second)["run"]


def test_a_lora_of_another_model_is_refused_when_it_is_applied(server, trained):
    loras = server.base / "output" / "loras"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": next(iter(load_file(loras / "character_1.safetensors").values())).reshape(1, 1)},
              loras / "foreign.safetensors")  # fmt: skip
    graph = client.with_overrides(demo.sampling_graph(), {})
    graph[node(graph, "VideoLoRALoadLoRA")]["inputs"] |= {"lora": "foreign.safetensors", "loraid": 0}
    error, _ = outcome_of(server, graph)
    assert "foreign.safetensors does not belong to this model" in error and "none of its 1 keys match" in error


def test_the_same_loraid_twice_is_refused(server, trained):
    graph = client.with_overrides(
        demo.sampling_graph(), {"VideoLoRALoadLoRA": {"lora": "character_1.safetensors", "loraid": 1}}
    )
    error, _ = outcome_of(server, graph)
    assert "change the same parameters in 60 matrices" in error


def test_a_disk_that_cannot_be_written_fails_clearly_and_loses_nothing(server, data):
    blocked = server.base / "output" / "loras" / "blocked"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("a file where a folder should be")
    graph = odd_training(name="blocked/lora", steps=3)
    error, _ = outcome_of(server, graph)
    assert "could not write" in error
    blocked.unlink()
    outcome = client.run(server, graph)
    assert not outcome.error and Path(summary(outcome)["files"][0]).exists()


def follow_until(server, graph, condition, action):
    """Run a graph; `action` is done once `condition` holds of the run's folders."""
    result = {}
    thread = threading.Thread(target=lambda: result.update(outcome=client.run(server, graph)))
    thread.start()
    runs = server.base / "output" / "videolora" / "runs"
    end = time.monotonic() + 120
    while not (found := [run for run in runs.glob("odd-*") if condition(run)]):
        assert time.monotonic() < end and thread.is_alive(), result
        time.sleep(0.05)
    action(found[0])
    thread.join(120)
    return result["outcome"], found[0]


def steps_done(run):
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_cancel_stops_after_the_running_step_with_everything_saved_and_queueing_again_goes_on(server, data):
    graph = odd_training(steps=60)
    outcome, run = follow_until(
        server, graph, lambda run: 3 <= steps_done(run) < 50, lambda _: server.post("/interrupt", {}),
    )  # fmt: skip
    assert outcome.interrupted
    done = steps_done(run)
    assert (run / f"state-{done:08d}.safetensors").exists() and (run / f"lora-{done:08d}.safetensors").exists()
    again = client.run(server, graph)
    assert not again.error and summary(again)["run"] == str(run)
    assert f"going on after step {done}" in (run / "log.txt").read_text()
    assert steps_done(run) == 60


def test_a_killed_worker_is_one_clear_error_and_the_queue_goes_on(server, data):
    graph = odd_training(steps=61)
    graph[node(graph, "VideoLoRASaveSettings")]["inputs"]["every_steps"] = 5

    def kill(run):
        os.kill(json.loads((run / "worker.json").read_text())["pid"], signal.SIGKILL)

    outcome, run = follow_until(
        server, graph, lambda run: (run / "state-00000005.safetensors").exists() and steps_done(run) < 50, kill
    )
    assert "The training process ended unexpectedly (exit code -9)" in outcome.error
    assert "training 60 matrices" in outcome.error, "the end of the log is shown"
    again = client.run(server, graph)
    assert not again.error and steps_done(run) == 61
