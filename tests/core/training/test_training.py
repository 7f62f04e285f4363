"""Training: the worker in a process of its own, as ComfyUI starts it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_job import WAN, job, work
from videolora.core.data import cache_files
from videolora.core.families import open_part
from videolora.core.io import safetensors
from videolora.core.io.files import fingerprint
from videolora.core.lora import files
from videolora.core.lora.adapter import KINDS
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import allocate
from videolora.core.training import batches, loop, run
from videolora.core.training.job import (
    MemorySettings,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TimestepSettings,
    TrainingSet,
    read_job,
)
from videolora.core.training.optimizers import OPTIMIZERS
from videolora.core.training.run import Run

CORE = Path(__file__).resolve().parents[3] / "core"


def start(this, *, wait=True):
    with open(this.log, "a") as log:
        process = subprocess.Popen(
            [sys.executable, str(CORE), "train", str(this.folder), "cpu"], stdout=log, stderr=log
        )
    return process.wait(120) if wait else process


def trained(made, tmp_path, **changes):
    described = job(made, tmp_path / "loras", **changes)
    this = Run.of(described, tmp_path / "runs")
    assert start(this) == 0, this.log_end()
    return this, described


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def kill(process):
    os.kill(process.pid, signal.SIGKILL) if os.name != "nt" else process.kill()
    process.wait()


def test_a_job_makes_a_lora_file_of_its_loraid(made, tmp_path):
    this, described = trained(made, tmp_path)
    assert this.status() == {"state": "finished", "step": 6, "files": [str(described.final_path)]}
    checkpoint, _ = open_part(Path(described.dit), "dit")
    matrices = inventory(WAN, {name: info.shape for name, info in checkpoint.tensors.items()})
    lora = files.read(described.final_path, matrices, "")
    assert not lora.unmatched
    assert lora.metadata["ss_loraid"] == "1" and lora.metadata["ss_steps"] == "6"
    assert set(lora.factors) == {m.name for m in matrices}
    owned = allocate(matrices, described.loraid).rows
    for name, factors in lora.factors.items():
        assert factors.touched == owned[name]


def test_the_loss_falls(made, tmp_path):
    this, _ = trained(made, tmp_path, steps=40, optimizer=OptimizerSettings(learning_rate=3e-3), loraid=None)
    losses = [entry["loss"] for entry in this.metrics()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_every_step_is_reported(made, tmp_path):
    this, _ = trained(made, tmp_path, optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=4))
    metrics = this.metrics()
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4, 5, 6]
    assert [entry["learning_rate"] for entry in metrics] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert [entry["epoch"] for entry in metrics] == [1, 1, 1, 2, 2, 2]
    assert all(entry["seconds"] > 0 and entry["memory"] > 0 for entry in metrics)


DROPOUTS = {"dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}
RESUMED = {
    **{name: {"optimizer": OptimizerSettings(optimizer=name, learning_rate=1.0 if kind.least_rate else 1e-3)}
       for name, kind in OPTIMIZERS.items()},
    **{kind: {"network": NetworkSettings(kind=kind, rank=4, max_norm=1.0, **DROPOUTS)} for kind in KINDS},
    "LoRA+ on a schedule": {
        "network": NetworkSettings(rank=4, loraplus_lr_ratio=8.0, exclude=(".*ffn.*",), **DROPOUTS),
        "optimizer": OptimizerSettings(schedule="rex", warmup_steps=3, gradient_accumulation=2),
    },
    "buckets and weights": {
        "timesteps": TimestepSettings(sampling="qinglong_flux", buckets=6, weighting="cosmap", min_timestep=100,
                                      preserve_distribution_shape=True),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_twenty_steps_are_ten_and_ten_resumed_bit_for_bit_whatever_the_settings(made, tmp_path, name):
    save = SaveSettings(every_steps=10, precision="float32")
    small = (TrainingSet(title="pictures", batch_size=1, num_repeats=1, items=made[1][3:]),)
    described = job(made, tmp_path / "loras", steps=20, save=save, datasets=small, **RESUMED[name])
    this = Run.of(described, tmp_path / "runs")
    assert work(this) == 0, this.status()
    expected, losses = load_file(described.final_path), [entry["loss"] for entry in this.metrics()]
    this.state_path(20).unlink()
    described.final_path.unlink()
    torch.manual_seed(99)  # not that it matters
    assert work(this) == 0, this.status()
    found = load_file(described.final_path)
    assert expected.keys() == found.keys() and expected
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [entry["loss"] for entry in this.metrics()] == losses
    middle = load_file(described.final_path.with_name("lora-step00000010.safetensors"))
    assert not all(torch.equal(expected[key], middle[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_drops_the_same_and_gives_the_same_lora(made, tmp_path, kind):
    found = []
    for checkpointing in (False, True):
        described = job(made, tmp_path / str(checkpointing), steps=3, network=NetworkSettings(kind=kind, rank=4, **DROPOUTS),
                        memory=MemorySettings(mode="manual", gradient_checkpointing=checkpointing))  # fmt: skip
        this = Run.of(described, tmp_path / f"runs-{checkpointing}")
        assert work(this) == 0, this.status()
        found.append(load_file(described.final_path))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_run_goes_on_from_a_lora_and_says_so(made, tmp_path):
    first = job(made, tmp_path / "first", steps=3)
    assert work(Run.of(first, tmp_path / "runs")) == 0
    start = str(first.final_path)
    network = NetworkSettings(rank=4, alpha=4.0, start_from=start, start_fingerprint=fingerprint(first.final_path))
    second = job(
        made,
        tmp_path / "second",
        name="second",
        steps=1,
        network=network,
        optimizer=OptimizerSettings(learning_rate=1e-7),
    )
    this = Run.of(second, tmp_path / "runs")
    assert work(this) == 0, this.status()
    before, after = load_file(first.final_path), load_file(second.final_path)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-5)
    with safe_open(second.final_path, "pt") as file:
        assert file.metadata()["videolora_start"] == "lora.safetensors"
    wrong = replace(second, network=replace(network, rank=8))
    this = Run.of(wrong, tmp_path / "runs")
    assert work(this) == 1
    assert "it is of rank 4" in this.status()["error"]


def test_a_file_says_how_it_was_made(made, tmp_path):
    described = job(
        made, tmp_path / "loras", steps=8, save=SaveSettings(every_epochs=1),
        network=NetworkSettings(kind="lokr", rank=4, alpha=2.0, dropout=0.1, include=(".*attn.*",)),
        optimizer=OptimizerSettings(optimizer="lion", learning_rate=1e-4, schedule="cosine", gradient_accumulation=2),
        timesteps=TimestepSettings(sampling="logsnr", max_timestep=900, weighting="cosmap"),
    )  # fmt: skip
    this = Run.of(described, tmp_path / "runs")
    assert work(this) == 0, this.status()
    epochs = {}
    for path in Path(described.output_folder).iterdir():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        epochs[metadata["ss_steps"]] = metadata["ss_epoch"]
    # Of three batches an epoch and two batches a step, epochs end in steps 2 (the first), 3, 5, 6 and 8.
    assert epochs == {"2": "2", "3": "2", "5": "4", "6": "4", "8": "6"}
    with safe_open(described.final_path, "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_dropout": "0.1", "ss_lr_scheduler": "cosine",
        "ss_optimizer": "lion_pytorch.Lion(weight_decay=0.01,betas=[0.9, 0.99])", "ss_num_epochs": "6",
        "ss_timestep_sampling": "logsnr", "ss_discrete_flow_shift": "1.0", "ss_weighting_scheme": "cosmap",
        "modelspec.timestep_range": "0,900", "modelspec.resolution": "48x32", "modelspec.architecture": "wan2.1/lora",
        "ss_loraid": "1", "ss_loraid_unit": "row", "ss_num_batches_per_epoch": "3", "ss_num_train_items": "5",
        "ss_base_model_version": "wan", "ss_output_name": "lora",
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert json.loads(metadata["ss_network_args"])["include_patterns"] == [".*attn.*"]
    assert json.loads(metadata["ss_datasets"])[0]["batch_size_per_device"] == 2
    assert float(metadata["ss_training_started_at"]) < float(metadata["ss_training_finished_at"])


def test_a_file_carries_the_hashes_of_its_data(made, tmp_path):
    described = job(made, tmp_path, steps=1, network=NetworkSettings(rank=64, alpha=4.0))
    assert work(Run.of(described, tmp_path / "runs")) == 0
    raw = described.final_path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    with safe_open(described.final_path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert len(data) > (1 << 20) + (1 << 16), "large enough for the other hash"
    plain = tmp_path / "plain.safetensors"
    ours = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    safetensors.save(plain, safetensors.load(described.final_path)[0], ours)
    part = plain.read_bytes()[1 << 20 : (1 << 20) + (1 << 16)]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]


def test_impossible_combinations_are_refused_when_the_job_is_made(made, tmp_path):
    with pytest.raises(ValueError, match="Prodigy needs one learning rate"):
        job(made, tmp_path, network=NetworkSettings(loraplus_lr_ratio=4.0),
            optimizer=OptimizerSettings(optimizer="prodigy", learning_rate=1.0))  # fmt: skip
    with pytest.raises(ValueError, match="longer than the training of 6 steps"):
        job(made, tmp_path, optimizer=OptimizerSettings(warmup_steps=7))


def test_asking_to_stop_saves_after_the_running_step_and_the_rest_can_follow(made, tmp_path):
    this = Run.of(job(made, tmp_path / "loras", steps=2000), tmp_path / "runs")
    process = start(this, wait=False)
    until(lambda: len(this.metrics()) >= 3)
    this.ask(run.STOP)
    assert process.wait(60) == 0
    status = this.status()
    assert status["state"] == "stopped" and 3 <= status["step"] < 2000
    assert this.state_path(status["step"]).exists()
    assert not this.job().final_path.exists()
    process = start(this, wait=False)
    until(lambda: this.metrics()[-1]["step"] > status["step"])
    kill(process)
    assert f"going on after step {status['step']}" in this.log.read_text()


def test_files_on_the_way_are_written_and_only_so_many_kept(made, tmp_path):
    this, described = trained(made, tmp_path, steps=8, save=SaveSettings(every_steps=2, keep=2))
    names = sorted(path.name for path in Path(described.output_folder).iterdir())
    assert names == ["lora-step00000004.safetensors", "lora-step00000006.safetensors", "lora.safetensors"]
    assert [Path(path).name for path in this.status()["files"]] == names
    with safe_open(Path(described.output_folder) / names[0], "pt") as file:
        assert file.metadata()["ss_steps"] == "4"


def test_saving_every_epoch_counts_epochs(made, tmp_path):
    _, described = trained(made, tmp_path, steps=7, save=SaveSettings(every_epochs=1))
    names = sorted(path.name for path in Path(described.output_folder).iterdir())
    assert names == ["lora-step00000003.safetensors", "lora-step00000006.safetensors", "lora.safetensors"]


def test_a_damaged_newest_state_falls_back_to_the_one_before(made, tmp_path):
    this, _ = trained(made, tmp_path, steps=8, save=SaveSettings(every_steps=3, precision="float32"))
    expected = load_file(this.job().final_path)
    this.state_path(8).unlink()
    this.state_path(6).write_bytes(this.state_path(6).read_bytes()[:1000])
    assert start(this) == 0
    assert "state-00000006.safetensors is skipped" in this.log.read_text()
    found = load_file(this.job().final_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_only_meets_losses_that_are_not_finite_fails_and_writes_no_lora(made, tmp_path):
    _, items = made
    bad = tmp_path / "bad.safetensors"
    tensors = load_file(items[0].latents)
    save_file({name: value * torch.inf for name, value in tensors.items()}, bad)
    sets = (TrainingSet(title="bad", batch_size=1, num_repeats=1, items=(replace(items[0], latents=str(bad)),)),)
    this = Run.of(job(made, tmp_path / "loras", datasets=sets), tmp_path / "runs")
    assert start(this) == 1
    status = this.status()
    assert status["state"] == "failed" and "not finite in the last 6 steps" in status["error"]
    assert not list(tmp_path.glob("loras/*"))


def test_a_missing_cache_file_and_a_changed_checkpoint_are_named(made, tmp_path):
    _, items = made
    sets = (
        TrainingSet(title="gone", batch_size=1, num_repeats=1, items=(replace(items[0], latents="/gone.safetensors"),)),
    )
    this = Run.of(job(made, tmp_path / "loras", datasets=sets), tmp_path / "runs")
    assert start(this) == 1
    assert "/gone.safetensors" in this.status()["error"]
    this = Run.of(job(made, tmp_path / "loras", dit_fingerprint="other"), tmp_path / "runs")
    assert start(this) == 1
    assert "it was changed" in this.status()["error"]


def test_a_second_process_does_not_touch_a_run_at_work(made, tmp_path):
    this = Run.of(job(made, tmp_path / "loras", steps=2000), tmp_path / "runs")
    process = start(this, wait=False)
    try:
        until(lambda: len(this.metrics()) >= 1)
        assert start(this) != 0
        assert "already working" in this.log.read_text()
        assert this.is_alive() and this.status()["state"] == "running"
    finally:
        kill(process)
    assert not this.is_alive()


def test_saving_to_a_folder_that_cannot_be_made_fails_clearly_and_can_be_repeated(made, tmp_path):
    (tmp_path / "loras").write_text("a file where the folder should be")
    this = Run.of(job(made, tmp_path / "loras", steps=2), tmp_path / "runs")
    assert start(this) == 1
    assert "could not write" in this.status()["error"] and "lora.safetensors" in this.status()["error"]
    (tmp_path / "loras").unlink()
    assert start(this) == 0
    assert this.job().final_path.exists()


def test_the_same_job_has_the_same_folder_and_another_job_another(made, tmp_path):
    one, same, other = job(made, tmp_path), job(made, tmp_path), job(made, tmp_path, seed=2)
    runs = [Run.of(described, tmp_path / "runs").folder for described in (one, same, other)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_job_survives_its_file(made, tmp_path):
    described = job(made, tmp_path, network=NetworkSettings(include=(".*ffn.*",), exclude=("x",)))
    path = tmp_path / "job.json"
    path.write_text(json.dumps(described.to_json()))
    assert read_job(path) == described and read_job(path).digest == described.digest
    path.write_text(json.dumps({**described.to_json(), "stesp": 1}))
    with pytest.raises(ValueError, match="unknown entry 'stesp'"):
        read_job(path)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [(OptimizerSettings, {"learning_rate": -1e-4}), (OptimizerSettings, {"learning_rate": float("nan")}),
     (OptimizerSettings, {"learning_rate": float("inf")}), (OptimizerSettings, {"gradient_accumulation": 0}),
     (NetworkSettings, {"rank": 0}), (NetworkSettings, {"alpha": 0.0}), (TimestepSettings, {"sampling": "magic"}),
     (MemorySettings, {"precision": "int4"}), (MemorySettings, {"attention": "magic"}),
     (MemorySettings, {"block_swap": -1}),
     (MemorySettings, {"mode": "manual", "gradient_checkpointing": False, "offload_checkpoints": True}), (SaveSettings, {"every_steps": -1})],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_with_advice(settings, wrong):
    with pytest.raises(ValueError, match="use"):
        settings(**wrong)


def test_an_epoch_holds_every_item_as_often_as_asked_and_never_mixes_sizes(made):
    _, items = made
    sets = [TrainingSet(title="clips", batch_size=2, num_repeats=3, items=items)]
    order = batches.epoch(sets, seed=4, number=0)
    assert sorted(item.latents for batch in order for item in batch) == sorted([item.latents for item in items] * 3)
    assert all(len({item.size for item in batch}) == 1 for batch in order)
    assert order == batches.epoch(sets, seed=4, number=0)
    assert order != batches.epoch(sets, seed=4, number=1)


def test_a_batch_lies_on_the_path_from_data_to_noise(made):
    folder, items = made
    described = job(made, folder)
    (batch,) = next(batches.steps(described, WAN, first=3))
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    data = batch.latents - sigma * batch.target
    cached = {path.latents: cache_files.load_latents(Path(path.latents), WAN) for path in items}
    assert all(
        any(torch.allclose(one, other, atol=1e-5) for other in cached.values() if one.shape == other.shape)
        for one in data
    )
    assert batch.conditions["text_states"].shape[1:] == (512, 4096)


def test_accumulated_gradients_equal_those_of_the_larger_batch(made):
    _folder, _ = made
    weight = torch.nn.Parameter(torch.zeros(3))

    class Line(torch.nn.Module):
        def forward(self, latents, time):
            return latents * weight.view(1, 3)

    data = torch.randn(4, 3)
    whole = [batches.Batch(data, data, torch.rand(4), {})]
    parts = [batches.Batch(part, part, torch.rand(2), {}) for part in data.split(2)]
    results = []
    for given in (whole, parts):
        with torch.no_grad():
            weight.zero_()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        loss = loop.train_step(Line(), optimizer, given, 1.0, 0.0, torch.device("cpu")).loss
        results.append((loss, weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_process_id_that_was_given_out_again_is_not_taken_for_the_worker(tmp_path):
    this = Run(tmp_path)
    (tmp_path / "worker.json").write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))
    assert not this.is_alive()
    this.claim()
    assert this.is_alive()
    assert run.RUNNING == "running"


def line(step):
    """A line of metrics.jsonl."""
    return dict.fromkeys(("epoch", "loss", "loss_average", "learning_rate", "gradient_norm", "seconds", "seconds_left", "memory",
                          "timesteps", "losses")) | {"step": step}  # fmt: skip


def test_metrics_are_read_on_from_the_last_look_and_again_after_steps_were_cut_off(tmp_path):
    this = Run(tmp_path)
    reader = run.MetricsReader(this, keep=3)
    for step in range(1, 6):
        this.append_metrics(line(step))
    assert [entry["step"] for entry in reader.read()] == [3, 4, 5]
    with open(this.path("metrics.jsonl"), "a") as file:
        file.write('{"step": 6')
    assert [entry["step"] for entry in reader.read()] == [3, 4, 5], "a line that is being written is left"
    this.cut_metrics(2)
    assert [entry["step"] for entry in reader.read()] == [1, 2]


def test_a_line_torn_by_a_power_loss_does_not_stop_a_run(tmp_path):
    this = Run(tmp_path)
    this.append_metrics(line(1))
    with open(this.path("metrics.jsonl"), "a") as file:
        file.write("\0\0\0\n")
    this.append_metrics(line(2))
    this.cut_metrics(5)
    assert [entry["step"] for entry in this.metrics()] == [1]


@pytest.mark.parametrize("wrong", ["", '{"state": "run', "[]", "3", '{"step": 1}'])
def test_a_damaged_file_of_a_run_counts_as_not_being_there(tmp_path, wrong):
    this = Run(tmp_path)
    for name in ("status.json", "worker.json", "origin.json", "metrics.jsonl"):
        this.path(name).write_text(wrong + "\n")
    assert this.status() == {"state": "stopped", "step": 0} and this.origin() == {}
    assert not this.is_alive() and this.attempt() == 0 and this.metrics() == []
    this.path("job.json").write_text(wrong)
    with pytest.raises(ValueError, match="job"):
        this.job()


def test_where_files_lie_and_when_to_save_do_not_make_another_run(made, tmp_path):
    one = job(made, tmp_path / "here", save=SaveSettings(every_steps=1))
    moved = job(
        made,
        tmp_path / "there",
        save=SaveSettings(every_steps=2),
        memory=MemorySettings(mode="manual", gradient_checkpointing=False),
    )
    assert one.digest == moved.digest
    assert Run.of(one, tmp_path / "runs").folder == Run.of(moved, tmp_path / "runs").folder
    assert Run(Run.of(moved, tmp_path / "runs").folder).job() == moved
    assert one.digest != job(made, tmp_path, steps=7).digest


def test_stopping_at_a_step_that_is_due_publishes_its_lora(made, tmp_path):
    this = Run.of(
        job(made, tmp_path / "loras", steps=2000, save=SaveSettings(every_steps=1, keep=1)), tmp_path / "runs"
    )
    process = start(this, wait=False)
    until(lambda: len(this.metrics()) >= 3)
    this.ask(run.STOP)
    assert process.wait(60) == 0
    step = this.status()["step"]
    assert [path.name for path in (tmp_path / "loras").iterdir()] == [f"lora-step{step:08d}.safetensors"]
    assert [path.name for path in this.folder.glob("lora-*")] == [f"lora-{step:08d}.safetensors"], (
        "older ones are removed"
    )


def test_streaming_and_offloading_make_the_same_lora_bit_for_bit(made, tmp_path):
    loras = []
    for name, memory in {
        "plain": MemorySettings(mode="manual", gradient_checkpointing=False),
        "auto": MemorySettings(),
        "least": MemorySettings(mode="manual", offload_checkpoints=True, block_swap=2),
    }.items():
        this, described = trained(made, tmp_path / name, steps=3, memory=memory)
        assert "planned: precision auto" in this.log.read_text()
        loras.append(load_file(described.final_path))
    for other in loras[1:]:
        assert all(torch.equal(loras[0][name], other[name]) for name in loras[0])


def test_a_run_goes_on_in_the_precision_that_it_began_with(made, tmp_path):
    this = Run.of(job(made, tmp_path / "loras", steps=2), tmp_path / "runs")
    this.keep_precision("fp8_scaled")  # as auto would have chosen where memory was short
    assert start(this) == 0, this.log_end()
    assert "planned: precision fp8_scaled" in this.log.read_text()


def test_more_blocks_to_stream_than_there_are_is_an_error_that_says_how_many(made, tmp_path):
    memory = MemorySettings(mode="manual", block_swap=99)
    this = Run.of(job(made, tmp_path / "loras", memory=memory), tmp_path / "runs")
    assert start(this) == 1
    assert "block swap is 99, and this model has" in this.status()["error"]
