"""A real ComfyUI with the pack and the small models.

python devtools/server.py [words for ComfyUI]
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = ROOT / ".dev" / "ComfyUI"
BASE = ROOT / ".dev" / "base"
_START_SECONDS = 400  # a busy machine with two cores may need minutes


def prepare(base: Path = BASE) -> Path:
    """ComfyUI's base folder with the pack and the small models."""
    link_pack(base)
    subprocess.run([sys.executable, str(ROOT / "devtools" / "small_models.py"), str(base / "models")], check=True)
    return base


def link_pack(base: Path) -> None:
    """The pack among the custom nodes of a base folder, under a name that is no Python name."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    link = nodes / "Video-LoRA"
    if not link.exists():
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)


def command(base: Path, port: int, *words: str) -> list[str]:
    return [
        sys.executable, str(COMFYUI / "main.py"), "--port", str(port), "--listen", "127.0.0.1",
        "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *words,
    ]  # fmt: skip


class Server:
    """A running server."""

    def __init__(self, port: int, base: Path, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.base = base
        self.log = log

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, value: dict) -> tuple[int, dict]:
        """Status and answer of a POST, whatever the status is."""
        request = urllib.request.Request(
            self.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else {}
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextmanager
def running(base: Path, *words: str) -> Iterator[Server]:
    """Start a server on a free port; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = base / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command(base, port, "--cpu", *words), stdout=output, stderr=subprocess.STDOUT, cwd=base,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    server = Server(port, base, log)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(
                f"ComfyUI ended while starting. {server.log} ends with:\n{server.log.read_text()[-3000:]}"
            )
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"ComfyUI did not start within {_START_SECONDS} s; see {server.log}")


if __name__ == "__main__":
    import torch

    cpu = [] if torch.accelerator.is_available() else ["--cpu"]
    raise SystemExit(subprocess.run([*command(prepare(), 8188), *cpu, *sys.argv[1:]], cwd=BASE).returncode)
