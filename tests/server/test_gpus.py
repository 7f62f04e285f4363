"""A workflow with two trainings on a machine with two GPUs; on one without any, the pack is told that there are two."""

import json
import shutil

import client
import demo
import pytest
import server as servers

from .conftest import training

PRETEND = """
import sys
from server import PromptServer

def two_gpus(data):
    for name, module in list(sys.modules.items()):
        if name.endswith("Video-LoRA.nodes.gpus"):
            module.count = lambda: 2
    return data

PromptServer.instance.add_on_prompt_handler(two_gpus)
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture
def machine(server, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(server.base / "models", base / "models")
    servers.link_pack(base)
    demo.prepare_data(base)
    (base / "custom_nodes" / "two_gpus.py").write_text(PRETEND)
    with servers.running(base) as running:
        yield running


def test_trainings_of_one_workflow_run_at_the_same_time_one_per_gpu(machine):
    graph = {}
    for loraid, folder in enumerate(demo.PROMPTS, start=1):
        for number, node in training(folder, loraid, steps=60).items():
            inputs = {
                name: [f"{loraid}.{value[0]}", value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            graph[f"{loraid}.{number}"] = {**node, "inputs": inputs}
    outcome = client.run(machine, graph)
    assert not outcome.error, outcome.error
    runs = sorted((machine.base / "output").glob("**/gpus.json"), key=lambda path: path.read_text())
    assert [json.loads(path.read_text()) for path in runs] == [[0], [1]]
    given = [path.stat().st_mtime for path in runs]
    ended = [path.with_name("status.json").stat().st_mtime for path in runs]
    assert [json.loads(path.with_name("status.json").read_text())["state"] for path in runs] == ["finished"] * 2
    assert max(given) < min(ended)  # neither waited for the other
    assert given[1] <= given[0]  # the GPU that ComfyUI does not use is given out first
