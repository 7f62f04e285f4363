"""The pack's entry point outside of ComfyUI and inside one that is too old."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import importlib.util, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(folder, folder + "/__init__.py", submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules[folder] = module
spec.loader.exec_module(module)
print("nodes:", getattr(module, "NODE_CLASS_MAPPINGS", "from the entry point"))
"""


def load(tmp_path, version=None):
    """What is printed when the pack is loaded as ComfyUI does it, by path, from a folder with an odd name."""
    folder = tmp_path / "my-video lora"
    folder.symlink_to(ROOT, target_is_directory=True)
    if version is not None:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"')
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("version", ["0.3.64", "0.29.9"])
def test_an_older_comfyui_gets_one_log_line_and_no_nodes(tmp_path, version):
    message, nodes = load(tmp_path, version)
    assert (
        message
        == f"ERROR VideoLoRA is disabled: it needs ComfyUI 0.30.0 or newer and this is {version}. Update ComfyUI."
    )
    assert nodes == "nodes: {}"


@pytest.mark.parametrize("version", ["0.30.0", "0.31", "1.0.0", None])
def test_a_newer_comfyui_and_none_at_all_import_the_pack(tmp_path, version):
    assert load(tmp_path, version) == ["nodes: from the entry point"]


def test_importing_the_pack_does_not_import_torch(tmp_path):
    folder = tmp_path / "pack"
    folder.symlink_to(ROOT, target_is_directory=True)
    code = LOAD + "\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_requirements_name_nothing_that_comfyui_brings():
    brought = {
        "torch",
        "torchvision",
        "torchaudio",
        "numpy",
        "transformers",
        "safetensors",
        "av",
        "pillow",
        "einops",
        "psutil",
    }
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    names = {line.split(";")[0].strip().split("=")[0].split(">")[0].lower() for line in lines if line.strip()}
    assert names == {"ftfy", "tomli"} and not names & brought


def test_requirements_equal_the_projects_dependencies():
    project = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", project, re.M)
    assert [part.replace("'", '"') for part in re.findall(r'"([^"]*)"', listed)] == (
        ROOT / "requirements.txt"
    ).read_text().split("\n")[:-1]


def test_installing_into_a_complete_comfyui_changes_nothing():
    words = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--dry-run",
        "--python",
        sys.executable,
        "-r",
        ROOT / "requirements.txt",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "Would make no changes" in done.stderr, done.stderr


def test_installing_brings_the_missing_packages_and_touches_no_other(tmp_path):
    """Into an environment that has exactly what ComfyUI lists; nothing is downloaded but the packages' descriptions."""
    frozen = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "freeze", "--python", sys.executable], capture_output=True, text=True
    )
    (tmp_path / "has.txt").write_text(frozen.stdout)
    words = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "-q",
        ROOT / "requirements.txt",
        "-c",
        tmp_path / "has.txt",
        "--no-header",
        "--no-annotate",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = set(done.stdout.split())
    assert needed and needed <= set(frozen.stdout.split())
