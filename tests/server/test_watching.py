"""Watching and controlling a training from outside: previews, validation, pause and save over HTTP."""

import threading
import time

import av
import client
import demo
import pytest

from .conftest import node, summary, training
from .test_workflows import frames


def watched(**train):
    """A training with a preview every 20 steps and validation every 10."""
    graph = training("character_1", 1, **train)
    dit, vae, text = (node(graph, kind) for kind in ("VideoLoRALoadDiT", "VideoLoRALoadVAE", "VideoLoRALoadT5"))
    graph["previews"] = {"class_type": "VideoLoRAPreviewSettings", "_meta": {"title": ""}, "inputs": {
        "dit": [dit, 0], "vae": [vae, 0], "text_encoder": [text, 0], "prompts": "a red disk --f 5\n5 --- dogs, I walk --f 1 --d 7",
        "every_steps": 20, "every_epochs": 0, "at_start": True, **demo.SIZE, "frames": 5, "steps": 3, "guidance": 1.0,
        "shift": 3.0, "seed": 1,
    }}  # fmt: skip
    graph["watch"] = {"class_type": "VideoLoRAWatchSettings", "_meta": {"title": ""}, "inputs": {
        "validation_share": 0.2, "validation_every_steps": 10, "skipped_in_a_row": 10, "tensorboard": False,
    }}  # fmt: skip
    graph[node(graph, "VideoLoRATrain")]["inputs"] |= {"previews": ["previews", 0], "watch": ["watch", 0]}
    return graph


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def followed(server, trained):
    """A training that was paused, asked to save and went on, all over HTTP: its outcome, and what was seen meanwhile."""
    graph, result, seen = watched(name="watched", steps=60), {}, {}
    thread = threading.Thread(target=lambda: result.update(outcome=client.run(server, graph)))
    thread.start()

    def mine():
        listed = server.get("/videolora/runs")["runs"]
        return next((run for run in listed if run.get("name") == "watched" and run["status"]["step"] >= 3), None)

    run = until(mine)["id"]
    seen["paused"] = server.post(f"/videolora/runs/{run}/pause", {})
    until(lambda: server.get(f"/videolora/runs/{run}")["status"]["state"] == "paused")
    step = server.get(f"/videolora/runs/{run}")["status"]["step"]
    time.sleep(1)
    seen["waited"] = server.get(f"/videolora/runs/{run}")["status"]["step"] == step
    server.post(f"/videolora/runs/{run}/save", {})
    server.post(f"/videolora/runs/{run}/resume", {})
    thread.join(180)
    return result["outcome"], seen, run


def test_a_training_is_paused_and_goes_on_over_http(server, followed):
    outcome, seen, run = followed
    assert not outcome.error and seen["paused"][0] == 200 and seen["waited"]
    details = server.get(f"/videolora/runs/{run}?tail=10")
    assert details["status"]["state"] == "finished" and len(details["metrics"]) == 10
    assert summary(outcome)["steps"] == 60


def test_previews_are_videos_and_pictures_of_their_prompts(server, followed):
    outcome, _, run = followed
    previews = sorted((server.base / "output" / "videolora" / "runs" / run / "previews").iterdir())
    names = {path.name for path in previews}
    for step in (0, 20, 40, 60):
        assert {f"step-{step:08d}_00.mp4", f"step-{step:08d}_01.png"} <= names
    video = next(path for path in previews if path.name == "step-00000060_00.mp4")
    assert frames(video).shape[1:] == (64, 96, 3)
    with av.open(str(video)) as container:
        assert container.streams.video[0].average_rate == 16
    assert {entry["filename"] for entry in summary(outcome)["previews"]} == {
        name for name in names if name.endswith(("mp4", "png"))
    }


def test_validation_losses_are_reported(server, followed):
    _, _, run = followed
    metrics = server.get(f"/videolora/runs/{run}?tail=1000")["metrics"]
    validated = [entry["step"] for entry in metrics if entry.get("validation_loss") is not None]
    assert validated == [10, 20, 30, 40, 50, 60]
