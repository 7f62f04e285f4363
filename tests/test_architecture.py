"""The rules that keep the parts apart, checked on the source itself."""

import ast
import re
from pathlib import Path

import pytest
from videolora.core.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
OUTSIDE_FAMILIES = [path for path in CORE + NODES if "families" not in path.parts]


def imported(path):
    """(level, module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_knows_nothing_of_comfyui_or_the_nodes(path):
    depth = len(path.relative_to(ROOT / "core").parts)
    for level, module in imported(path):
        top = module.split(".")[0]
        assert level <= depth, f"{module} lies outside of core"
        assert level or top not in {"comfy", "comfy_api", "nodes", "server", "folder_paths", "execution", "core"}


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_import_the_engine_relatively(path):
    assert all(level or not module.startswith(("core", "nodes")) for level, module in imported(path))


@pytest.mark.parametrize("path", OUTSIDE_FAMILIES, ids=name)
def test_no_code_outside_the_families_decides_by_a_family(path):
    names = set(FAMILIES)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in names
        if isinstance(node, ast.ImportFrom):
            assert not set((node.module or "").split(".")) & names


@pytest.mark.parametrize("path", CORE + NODES, ids=name)
def test_only_shapes_computes_latent_frames(path):
    if path.name == "shapes.py":
        return
    assert not re.search(r"frames\s*-\s*1\)\s*//|\*\s*4\s*\+\s*1\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CORE + NODES, ids=name)
def test_nothing_runs_code_from_files_or_reaches_the_network(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {module.split(".")[0] for module in modules} & {
                "requests",
                "urllib",
                "http",
                "socket",
                "huggingface_hub",
            }
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError("no shell")
