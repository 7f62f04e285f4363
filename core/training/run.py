"""A run's folder, through which the process that trains and whoever watches it speak to each other.

    job.json             what is trained
    worker.json          which process works on it: id and start time
    gpus.json            which GPUs it was started on
    origin.json          the workflow and the node that queued it last
    started.json         when it was first worked on
    status.json          running, paused, stopped, finished or failed; the step reached; the error
    metrics.jsonl        one line per step (see `watching.py`)
    notes.txt            what went wrong without ending the run
    precision.txt        of the frozen weights, once chosen: a run that goes on must not choose another
    log.txt              what the process printed
    stop, save, pause    written to ask the process, after its step: to save and stop; to save and go on; to save and wait
                         until `pause` is gone
    state-00000100.safetensors   everything needed to go on after step 100
    lora-00000100.safetensors    the LoRA after step 100; of two experts -high and -low
    previews/step-00000100_00.*  what the first prompt gave after step 100: its latents, and a video or picture of them
    tensorboard/         TensorBoard's files

They are written atomically or line by line, so a reader never takes half of one for a whole, and nothing depends on either
side being alive.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ..io.files import atomic, inside, read_json, write_json
from .job import Job, read_job

RUNNING, PAUSED, STOPPED, FINISHED, FAILED = "running", "paused", "stopped", "finished", "failed"
STOP, SAVE, PAUSE = REQUESTS = "stop", "save", "pause"
PREVIEW_SUFFIXES = (".mp4", ".png")


class Run:
    """A run's folder; see the module for its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, job: Job, runs: Path) -> Run:
        """The folder of this job below `runs`, made if need be; the same job has the same folder."""
        run = cls(runs / f"{Path(job.name).name}-{job.digest}")
        run.folder.mkdir(parents=True, exist_ok=True)
        if not run.is_alive():  # where files lie and when to save may have changed
            write_json(run.path("job.json"), job.to_json())
        return run

    @classmethod
    def find(cls, runs: Path, name: str) -> Run:
        """The run whose folder below `runs` has this name. Raises ValueError when there is none, or when the name is not
        that of a folder directly below."""
        if "/" in name or "\\" in name:
            raise ValueError(f"'{name}' is not the name of a run.")
        run = cls(inside(runs, name))
        if not run.path("job.json").is_file():
            raise ValueError(f"there is no run '{name}' in {runs}.")
        return run

    @classmethod
    def all(cls, runs: Path) -> list[Run]:
        """All runs below `runs`, those that were queued last first."""
        found = [path for path in runs.glob("*/job.json") if path.is_file()]
        return [cls(path.parent) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def log(self) -> Path:
        return self.path("log.txt")

    def job(self) -> Job:
        return read_job(self.path("job.json"))

    def status(self) -> dict[str, Any]:
        """The last status written, with `state` corrected when the process behind a running one is gone."""
        if not self.path("status.json").exists():
            return {"state": STOPPED, "step": 0}
        status = read_json(self.path("status.json"))
        if status["state"] in (RUNNING, PAUSED) and not self.is_alive():
            status["state"] = STOPPED
        return status

    def precision(self) -> str | None:
        """The precision that was chosen when the run began, or None."""
        path = self.path("precision.txt")
        return path.read_text(encoding="utf-8") if path.exists() else None

    def keep_precision(self, precision: str) -> None:
        with atomic(self.path("precision.txt")) as temporary:
            temporary.write_text(precision, encoding="utf-8")

    def gpus(self) -> tuple[int, ...]:
        """Numbers of the GPUs that its process was started on; none where it was not said."""
        path = self.path("gpus.json")
        return tuple(read_json(path)) if path.exists() else ()

    def keep_gpus(self, numbers: Sequence[int]) -> None:
        write_json(self.path("gpus.json"), list(numbers))

    def origin(self) -> dict[str, str]:
        """`workflow` and `node` that queued the run last; nothing where that is not known."""
        path = self.path("origin.json")
        return read_json(path) if path.exists() else {}

    def keep_origin(self, workflow: str, node: str) -> None:
        write_json(self.path("origin.json"), {"workflow": workflow, "node": node})

    def write_status(self, state: str, step: int, **details: Any) -> None:
        write_json(self.path("status.json"), {"state": state, "step": step, **details})

    def claim(self) -> None:
        """Make this process the run's worker. Raises RuntimeError while another one is at work."""
        if self.is_alive():
            raise RuntimeError(f"another process is already working on {self.folder}.")
        if not self.path("started.json").exists():
            write_json(self.path("started.json"), time.time())
        write_json(self.path("worker.json"), {"pid": os.getpid(), "started": psutil.Process().create_time()})

    def is_alive(self) -> bool:
        """Whether the process that claimed the run still exists (a process id alone may have been given out again)."""
        if not self.path("worker.json").exists():
            return False
        worker = read_json(self.path("worker.json"))
        try:
            process = psutil.Process(worker["pid"])
            return abs(process.create_time() - worker["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def ask(self, request: str) -> None:
        """Ask the process to STOP, SAVE or PAUSE after its step."""
        self.path(request).touch()

    def is_asked(self, request: str) -> bool:
        return self.path(request).exists()

    def asked(self) -> list[str]:
        """The requests that are not followed yet."""
        return [request for request in REQUESTS if self.is_asked(request)]

    def forget(self, *requests: str) -> None:
        """Requests that were followed or taken back, or that are older than the process."""
        for request in requests:
            self.path(request).unlink(missing_ok=True)

    def note(self, text: str) -> None:
        """Write down what the user should know although the run goes on."""
        with open(self.path("notes.txt"), "a", encoding="utf-8") as file:
            file.write(" ".join(text.split()) + "\n")

    def notes(self) -> list[str]:
        path = self.path("notes.txt")
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []

    def append_metrics(self, entry: dict[str, Any]) -> None:
        with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All steps so far."""
        return list(MetricsReader(self, keep=None).read())

    def started(self) -> float:
        """When the run was first worked on, in seconds since 1970."""
        return read_json(self.path("started.json"))

    def attempt(self) -> float:
        """Which process wrote the last steps: changes whenever another one goes on, which may do some steps again."""
        path = self.path("worker.json")
        return read_json(path)["started"] if path.exists() else 0.0

    def cut_metrics(self, step: int) -> None:
        """Forget steps after `step`, which will be done again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        with atomic(self.path("metrics.jsonl")) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def state_path(self, step: int) -> Path:
        return self.path(f"state-{step:08d}.safetensors")

    def lora_path(self, step: int, expert: str = "") -> Path:
        return self.path("-".join(filter(None, [f"lora-{step:08d}", expert])) + ".safetensors")

    def preview_path(self, step: int, number: int, suffix: str) -> Path:
        return self.path("previews") / f"step-{step:08d}_{number:02d}{suffix}"

    def previews(self) -> list[Path]:
        """Videos and pictures, the newest last."""
        found = self.path("previews").glob("step-*")
        return sorted(path for path in found if path.suffix in PREVIEW_SUFFIXES)

    def states(self) -> Sequence[Path]:
        """State files, the newest first."""
        return sorted(self.folder.glob("state-*.safetensors"), reverse=True)

    def log_end(self, lines: int = 30) -> str:
        if not self.log.exists():
            return "(nothing was logged)"
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def last_message(self) -> str:
        """The last line of the log that begins with the time, as messages do; empty before the first."""
        lines = self.log_end(200).splitlines()
        return next((line for line in reversed(lines) if re.match(r"\d\d:\d\d:\d\d ", line)), "")


class MetricsReader:
    """The latest steps of a run, read on from where the last look ended (`position`, in bytes)."""

    def __init__(self, run: Run, keep: int | None = 50, position: int = 0) -> None:
        self.path = run.path("metrics.jsonl")
        self.position = position
        self.latest: deque[dict[str, Any]] = deque(maxlen=keep)

    def read(self) -> deque[dict[str, Any]]:
        """The latest steps, up to `keep`; a line that is still being written is left for the next time."""
        if not self.path.exists():
            return self.latest
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self.position:  # steps that are done again were cut off
                self.position = 0
                self.latest.clear()
            file.seek(self.position)
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            try:
                self.latest.append(json.loads(line))
            except ValueError:  # a power loss; the steps from here on are done again
                break
            self.position += len(line) + 1
        return self.latest
