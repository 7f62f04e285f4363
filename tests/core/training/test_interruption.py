"""A training is killed at any moment and goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import torch
from safetensors.torch import load_file
from small_job import job, work
from videolora.core.training.job import (
    MemorySettings,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TrainingSet,
    WatchSettings,
)
from videolora.core.training.run import STOPPED, Run

KILLS = 10  # of each of three trainings
STEPS = 24
SETTINGS = [
    {"optimizer": OptimizerSettings(learning_rate=1e-2, gradient_accumulation=2), "network": NetworkSettings(rank=4, dropout=0.2)},
    {"optimizer": OptimizerSettings(optimizer="adamw_schedulefree", learning_rate=1e-3),
     "memory": MemorySettings(mode="manual", gradient_checkpointing=True)},
    {"optimizer": OptimizerSettings(optimizer="prodigy", learning_rate=1.0, schedule="cosine"),
     "network": NetworkSettings(kind="lokr", rank=4, max_norm=1.0), "watch": WatchSettings(validation_share=0.5, validation_every_steps=3)},
]  # fmt: skip


def length(run):
    path = run.path("metrics.jsonl")
    return path.stat().st_size if path.exists() else 0


MOMENTS = {
    "in a step": lambda run, before: length(run) > before,
    "in a save": lambda run, before: length(run) > before and any(run.folder.glob(".*.tmp")),
    "in a preview": lambda run, before: b"previews" in run.path("status.json").read_bytes(),
}


def kill_at(moment, run, child, rng):
    """Whether the process was killed, and not done before."""
    before = length(run)
    while not MOMENTS[moment](run, before):
        if any(state in run.path("status.json").read_bytes() for state in (b"finished", b"failed")):
            return False
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.002 if moment == "in a save" else 0.02))
    os.kill(child, signal.SIGKILL)
    return True


def test_trainings_that_were_killed_thirty_times_give_the_same_loras_to_the_bit(made, shown, tmp_path):
    rng, killed = random.Random(0), []
    data = (TrainingSet(title="clips", batch_size=1, num_repeats=1, items=made[1][3:]),)
    preview = replace(shown.prompts[0], steps=1, guidance=1.0, negative_states="")
    common = {
        "steps": STEPS, "datasets": data, "save": SaveSettings(every_steps=1, keep=2, precision="float32"),
        "previews": replace(shown, every_steps=4, prompts=(preview,)),
    }  # fmt: skip
    command = [sys.executable, Path(__file__).parent / "training_process.py"]
    runs = [
        [Run.of(job(made, tmp_path / f"{name}-{number}", **common, **settings), tmp_path / f"{name}-{number}")
         for number, settings in enumerate(SETTINGS)]
        for name in ("straight", "broken")
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:

        def begin(run):
            forker.stdin.write(f"{run.folder}\n")
            forker.stdin.flush()

        begin(runs[0][0])
        for straight, broken in zip(*runs, strict=True):
            for kill in range(KILLS):
                broken.write_status(STOPPED, 0)
                begin(broken)
                child, moment = int(forker.stdout.readline()), list(MOMENTS)[kill % len(MOMENTS)]
                if kill_at(moment, broken, child, rng):
                    killed.append((moment, len(broken.metrics())))
                forker.stdout.readline()
            for run in (straight, broken):
                assert run.status()["state"] == "finished" or work(run) == 0, run.status()
            assert_same(straight, broken)
        forker.stdin.close()
    assert len(killed) == KILLS * len(SETTINGS), killed
    assert {moment for moment, _ in killed} == set(MOMENTS)


def assert_same(straight, broken):
    """LoRAs, metrics and previews; and nothing is left lying about."""
    expected, found = (load_file(run.job().final_path) for run in (straight, broken))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    told = [[(e["loss"], e["losses"], e.get("validation_loss")) for e in run.metrics()] for run in (straight, broken)]
    assert told[0] == told[1] and len(told[0]) == STEPS
    names = [
        {str(path.relative_to(run.folder)) for path in run.folder.rglob("*")} - {"worker.json"}
        for run in (straight, broken)
    ]
    assert names[0] == names[1]
    for path in straight.path("previews").glob("*.latent"):
        assert path.read_bytes() == (broken.path("previews") / path.name).read_bytes(), path.name
    for path in broken.previews():
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == (48, 32)
