"""What the tests of the real ComfyUI share."""

import json

import demo
import pytest

from ..conftest import TRAINED_STEPS as STEPS
from ..conftest import training

__all__ = ["STEPS", "messages", "node", "summary", "training"]


@pytest.fixture(scope="session")
def info(server):
    return server.get("/object_info")


def node(graph, kind):
    """The id of the first node of a class."""
    return next(node_id for node_id, entry in graph.items() if entry["class_type"] == kind)


def summary(outcome):
    return demo.shown(outcome, "videolora_run")


def messages(server, outcome):
    """Everything ComfyUI kept of a prompt."""
    return json.dumps(server.get(f"/history/{outcome.prompt_id}"))
