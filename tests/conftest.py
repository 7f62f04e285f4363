"""Loads the pack by its path, as ComfyUI does, under the name `videolora`."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location(
    "videolora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
sys.modules["videolora"] = _module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

VECTORS = Path(__file__).parent / "vectors"
MANIFESTS = Path(__file__).parent / "manifests"
TRAINED_STEPS = 12  # enough to move a LoRA; what training can do is tested elsewhere


@pytest.fixture(scope="session")
def numerics():
    return json.loads((VECTORS / "numerics.json").read_text())


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One real ComfyUI for all tests that need it, with small models and clips of its own."""
    import demo
    import server as servers

    made = servers.prepare()
    base = tmp_path_factory.mktemp("comfyui") / "base"
    shutil.copytree(made / "models", base / "models")
    servers.link_pack(base)
    demo.prepare_data(base)
    with servers.running(base) as running:
        yield running


def training(folder, loraid, **train):
    """The shipped workflow that trains a LORAID, as it is submitted."""
    import client
    import demo

    return client.with_overrides(
        demo.training_graph(folder, loraid), {"VideoLoRATrain": {"steps": TRAINED_STEPS, **train}}
    )


@pytest.fixture(scope="session")
def trained(server):
    """Both LORAIDs, trained by the shipped workflow: folder -> outcome."""
    import client
    import demo

    outcomes = {}
    for loraid, folder in enumerate(demo.PROMPTS, start=1):
        outcomes[folder] = client.run(server, training(folder, loraid))
        assert not outcomes[folder].error, outcomes[folder].error
    return outcomes


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All that shares the server runs in one process, and first: it takes longest."""
    for item in items:
        if item.path.parent.name in ("server", "browser"):
            item.add_marker(pytest.mark.xdist_group("server"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
