"""Loads the pack by its path, as ComfyUI does, under the name `videolora`."""

import importlib.util
import json
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


@pytest.fixture(scope="session")
def numerics():
    return json.loads((VECTORS / "numerics.json").read_text())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All that shares the server runs in one process, and first: it takes longest."""
    for item in items:
        if "server" in item.path.parts[-2:-1]:
            item.add_marker(pytest.mark.xdist_group("server"))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
