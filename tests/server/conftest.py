"""What the tests of the real ComfyUI share."""

import json

import client
import demo
import pytest

STEPS = 12  # enough to move a LoRA; what training can do is tested elsewhere


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
