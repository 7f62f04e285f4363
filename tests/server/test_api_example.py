"""The example client of docs/api.md against a real server."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import demo

from .conftest import STEPS
from .test_watching import until

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "train_over_api.py"


def started(server, folder, **train):
    values = {**demo.SMALL, "VideoLoRATrain": {"steps": STEPS, **train}}
    values["VideoLoRADatasetFolder"] = {**values["VideoLoRADatasetFolder"], "folder": "character_1"}
    settings = [f"{kind}.{name}={value}" for kind, inputs in values.items() for name, value in inputs.items()]
    used = (
        "VideoLoRADatasetFolder",
        "VideoLoRAOptimizerSettings",
        "VideoLoRASelectLORAID",
        "VideoLoRATrain",
        "VideoLoRAEmptyLatent",
    )
    settings = [setting for setting in settings if setting.startswith(used)]
    words = [sys.executable, EXAMPLE, "--server", server.url, "--to", folder, "--set", *settings]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_lora_is_trained_and_fetched(server, tmp_path):
    with started(server, tmp_path, name="people/fetched", seed=5) as client:
        said = client.communicate(timeout=300)[0]
    assert client.returncode == 0, said
    assert f"fetched {tmp_path / 'fetched.safetensors'}" in said
    made = server.base / "output" / "loras" / "people" / "fetched.safetensors"
    assert (tmp_path / "fetched.safetensors").read_bytes() == made.read_bytes()


def test_a_training_is_cancelled_and_keeps_what_it_has(server, tmp_path):
    with started(server, tmp_path, name="cancelled", steps=100000) as client:
        assert any(re.match(r"cancelled: step [1-9]\d* of 100000$", line) for line in client.stdout)
        client.send_signal(signal.SIGINT)
        said = client.communicate(timeout=60)[0]
    assert client.returncode == 130 and "cancelled: it is saved" in said

    def stopped():
        runs = server.get("/videolora/runs")["runs"]
        return next(
            (run for run in runs if run.get("name") == "cancelled" and run["status"]["state"] == "stopped"), None
        )

    folder = server.base / "output" / "videolora" / "runs" / until(stopped)["id"]
    assert list(folder.glob("state-*.safetensors"))


def test_what_comfyui_refuses_is_said(server, tmp_path):
    with started(server, tmp_path, name="../outside") as client:
        said = client.communicate(timeout=60)[0]
    assert client.returncode == 1 and "ComfyUI refused" in said and "../outside" in said
