"""Several processes that train one job."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_job import WAN, job, work
from videolora.core.lora.network import NetworkSettings
from videolora.core.training import batches
from videolora.core.training.job import MemorySettings, OptimizerSettings, SaveSettings, WatchSettings
from videolora.core.training.prompts import Preview, PreviewSettings
from videolora.core.training.run import STOP, Run
from videolora.core.training.team import ALONE, Team

CORE = Path(__file__).resolve().parents[3] / "core"


def together(this, processes, *, wait=True):
    with open(this.log, "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             str(CORE), "train", str(this.folder), "cpu"], stdout=log, stderr=log,
        )  # fmt: skip
    return process.wait(180) if wait else process


def described(made, folder, **changes):
    return job(made, folder / "loras", gpus=2, optimizer=OptimizerSettings(learning_rate=1e-3), **changes)


def test_two_processes_train_what_one_does_with_twice_the_batches(made, tmp_path):
    runs = {}
    for name in ("alone", "together"):
        runs[name] = Run.of(described(made, tmp_path / name), tmp_path / name)
    assert work(runs["alone"]) == 0
    assert together(runs["together"], 2) == 0, runs["together"].log_end()
    one, two = (load_file(tmp_path / name / "loras" / "lora.safetensors") for name in runs)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    losses = [[entry["loss"] for entry in this.metrics()] for this in runs.values()]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "fp8_scaled"])
def test_processes_that_divide_the_weights_train_what_one_does(made, tmp_path, precision):
    states = tmp_path / "states.safetensors"
    save_file({"varlen_t5": torch.randn(3, 4096)}, states)
    previews = PreviewSettings(
        prompts=(
            Preview(
                prompt="a",
                width=32,
                height=32,
                frames=5,
                steps=2,
                guidance=1.0,
                seed=1,
                shift=5.0,
                states=str(states),
                negative_states="",
            ),
        ),
        every_steps=3,
    )
    about = {"network": NetworkSettings(rank=4, alpha=4.0, dropout=0.1), "watch": WatchSettings(validation_share=0.2, validation_every_steps=2),
             "previews": previews}  # fmt: skip
    memory = MemorySettings(mode="manual", precision=precision)
    alone = Run.of(described(made, tmp_path / "alone", memory=memory, **about), tmp_path / "alone")
    divided = Run.of(
        described(made, tmp_path / "divided", memory=replace(memory, shard=True), **about), tmp_path / "divided"
    )
    assert work(alone) == 0, alone.notes()
    assert together(divided, 2) == 0, divided.log_end()
    one, two = (load_file(tmp_path / name / "loras" / "lora.safetensors") for name in ("alone", "divided"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-4)  # of steps of 1e-3
    validated = [[e["validation_loss"] for e in this.metrics() if "validation_loss" in e] for this in (alone, divided)]
    assert len(validated[0]) == 3 and validated[1] == pytest.approx(validated[0], rel=1e-4)
    sampled = [sorted(this.folder.rglob("*.latent")) for this in (alone, divided)]
    assert len(sampled[0]) == len(sampled[1]) == 2
    for first, second in zip(*sampled, strict=True):
        torch.testing.assert_close(
            load_file(second)["latent_tensor"], load_file(first)["latent_tensor"], rtol=1e-3, atol=1e-4
        )


def test_weights_are_divided_only_among_several(made, tmp_path):
    with pytest.raises(ValueError, match="gpus is 1: use 2 or more, or switch shard off"):
        job(made, tmp_path, memory=MemorySettings(shard=True))
    with pytest.raises(ValueError, match="set block swap to 0, or switch shard off"):
        MemorySettings(shard=True, block_swap=3)


def test_a_team_is_stopped_as_a_whole_and_goes_on_alone(made, tmp_path):
    this = Run.of(described(made, tmp_path, steps=400, save=SaveSettings(precision="float32")), tmp_path / "runs")
    process = together(this, 2, wait=False)
    end = time.monotonic() + 120
    while len(this.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < end, this.log_end()
        time.sleep(0.02)
    this.ask(STOP)
    assert process.wait(60) == 0, this.log_end()
    status = this.status()
    assert status["state"] == "stopped" and 3 <= status["step"] < 400
    assert len(this.metrics()) == status["step"] and this.states()


def test_the_batches_of_a_step_are_dealt_to_all_processes(made, tmp_path):
    about = described(made, tmp_path)
    whole = [[batch.seed for batch in step] for step in batches.steps(about, WAN, 0)]
    dealt = [
        [[batch.seed for batch in step] for step in batches.steps(about, WAN, 0, Team(place, 2))] for place in (0, 1)
    ]
    assert whole == [first + second for first, second in zip(*dealt, strict=True)]
    assert all(len(step) == 2 for step in whole)


def test_batches_that_cannot_be_dealt_evenly_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"2 batches of a step cannot be dealt to 3 processes: start 2"):
        next(batches.steps(described(made, tmp_path), WAN, 0, Team(0, 3)))


def test_alone_nothing_is_exchanged():
    tensor, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(2))
    ALONE.add_up([parameter], tensor)
    assert tensor.tolist() == [1, 1, 1] and parameter.grad is None
    assert ALONE.leads and ALONE.agree(True, tensor.device) and ALONE.least(7, tensor.device) == 7
