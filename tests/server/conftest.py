"""One real ComfyUI server for all tests of this folder, with small models and clips of its own."""

import json
import shutil

import client
import demo
import pytest
import server as servers

STEPS = 12  # enough to move a LoRA; what training can do is tested elsewhere


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    made = servers.prepare()
    base = tmp_path_factory.mktemp("comfyui") / "base"
    shutil.copytree(made / "models", base / "models")
    servers.link_pack(base)
    demo.prepare_data(base)
    with servers.running(base) as running:
        yield running


@pytest.fixture(scope="session")
def info(server):
    return server.get("/object_info")


def training(folder, loraid, **train):
    graph = demo.training_graph(folder, loraid)
    return client.with_overrides(graph, {"VideoLoRATrain": {"steps": STEPS, **train}})


@pytest.fixture(scope="session")
def trained(server):
    """Both LORAIDs, trained by the shipped workflow: folder -> outcome."""
    outcomes = {}
    for loraid, folder in enumerate(demo.PROMPTS, start=1):
        outcomes[folder] = client.run(server, training(folder, loraid))
        assert not outcomes[folder].error, outcomes[folder].error
    return outcomes


def node(graph, kind):
    """The id of the first node of a class."""
    return next(node_id for node_id, entry in graph.items() if entry["class_type"] == kind)


def summary(outcome):
    return demo.shown(outcome, "videolora_run")


def messages(server, outcome):
    """Everything ComfyUI kept of a prompt."""
    return json.dumps(server.get(f"/history/{outcome.prompt_id}"))
