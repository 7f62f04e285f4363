"""What is written down of a training, validation, and losses that are not finite."""

import csv
import importlib.util
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_job import WAN, job, work
from videolora.core.training import batches, loop
from videolora.core.training.job import (
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TrainingSet,
    WatchSettings,
)
from videolora.core.training.run import Run
from videolora.core.training.watching import band_losses, write_csv

OFTEN = WatchSettings(validation_share=0.4, validation_every_steps=3)


def small(made, tmp_path, name="loras", **changes):
    """A job, and its run."""
    sets = (TrainingSet(title="clips", batch_size=1, num_repeats=1, items=made[1]),)
    values = {"datasets": sets, "steps": 12, "save": SaveSettings(every_steps=6, precision="float32"), **changes}
    described = job(made, tmp_path / name, **values)
    return described, Run.of(described, tmp_path / name / "runs")


def lora(described):
    return load_file(described.final_path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def with_a_bad_clip(made, tmp_path):
    """Data sets of three clips, the last of which is damaged."""
    bad = tmp_path / "bad.safetensors"
    tensors = load_file(made[1][0].latents)
    save_file({name: value * math.nan for name, value in tensors.items()}, bad)
    items = (*made[1][1:3], replace(made[1][0], latents=str(bad), fingerprints=("bad", "")))
    return (TrainingSet(title="clips", batch_size=1, num_repeats=1, items=items),)


def test_a_step_is_written_down_with_all_that_is_worth_knowing(made, tmp_path):
    _, run = small(made, tmp_path, optimizer=OptimizerSettings(learning_rate=1e-2, gradient_accumulation=2))
    assert work(run) == 0, run.status()
    metrics = run.metrics()
    for entry in metrics:
        assert len(entry["timesteps"]) == len(entry["losses"]) == 2
        assert all(0 <= timestep <= 1000 for timestep in entry["timesteps"])
        assert entry["loss"] == pytest.approx(sum(entry["losses"]) / 2)
        assert entry["gradient_norm"] > 0 and entry["seconds"] > 0 and "validation_loss" not in entry
    losses = [entry["loss"] for entry in metrics]
    assert [entry["loss_average"] for entry in metrics] == pytest.approx(
        [sum(losses[: n + 1]) / (n + 1) for n in range(12)]
    )
    assert [entry["seconds_left"] > 0 for entry in metrics] == [True] * 11 + [False]


def test_the_average_goes_on_where_a_resumed_run_was(made, tmp_path):
    _, run = small(made, tmp_path)
    assert work(run) == 0
    expected = [entry["loss_average"] for entry in run.metrics()]
    run.state_path(12).unlink()
    assert work(run) == 0
    assert [entry["loss_average"] for entry in run.metrics()] == expected


def test_an_optimiser_that_finds_the_rate_itself_shows_it(made, tmp_path):
    prodigy = OptimizerSettings(optimizer="prodigy", learning_rate=1.0, warmup_steps=2)
    _, run = small(made, tmp_path, steps=3, optimizer=prodigy)
    assert work(run) == 0
    assert [entry["learning_rate"] for entry in run.metrics()] == [0.5, 1.0, 1.0]
    rates = [entry["effective_rate"] for entry in run.metrics()]
    assert rates[0] == pytest.approx(0.5e-6) and rates[2] >= rates[1] >= 1e-6, "it begins with 1e-6"


def test_losses_are_told_apart_by_their_timestep():
    entries = [{"timesteps": [0.0, 99.9, 1000.0], "losses": [1.0, 3.0, 5.0]}, {"timesteps": [250.0], "losses": [None]}]
    assert band_losses(entries) == [2.0, None, None, None, None, None, None, None, None, 5.0]


def test_metrics_become_a_table():
    file = io.StringIO()
    write_csv(
        [{"step": 1, "loss": None, "losses": [0.5]}, {"step": 2, "loss": 0.25, "losses": [], "validation_loss": 1}],
        file,
    )
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert rows[0] == {"step": "1", "loss": "", "losses": "[0.5]", "validation_loss": ""}
    assert rows[1] == {"step": "2", "loss": "0.25", "losses": "[]", "validation_loss": "1"}


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_is_counted(made, tmp_path):
    described, run = small(made, tmp_path, datasets=with_a_bad_clip(made, tmp_path), steps=12)
    assert work(run) == 0, run.status()
    metrics = run.metrics()
    skipped = [entry for entry in metrics if entry["loss"] is None]
    assert len(skipped) == 4, "the damaged clip comes once in each of four epochs"
    assert all(entry["losses"] == [None] and entry["gradient_norm"] is None for entry in skipped)
    assert all(math.isfinite(entry["loss_average"]) for entry in metrics if entry["step"] > 2)
    assert all(torch.isfinite(value).all() for value in lora(described).values())


def test_skipped_steps_do_not_break_exact_resume(made, tmp_path):
    sets = with_a_bad_clip(made, tmp_path)
    network = NetworkSettings(rank=4, dropout=0.1, max_norm=1.0)
    described, run = small(made, tmp_path, datasets=sets, steps=16, network=network, save=SaveSettings(every_steps=3, precision="float32"))  # fmt: skip
    assert work(run) == 0
    expected, losses = lora(described), [entry["loss"] for entry in run.metrics()]
    assert None in losses
    for state in run.states():
        state.unlink()
    assert work(run) == 0
    assert same(lora(described), expected)
    run.state_path(16).unlink()
    assert work(run) == 0
    assert same(lora(described), expected) and [entry["loss"] for entry in run.metrics()] == losses


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_reason(made, tmp_path, monkeypatch):
    real = loop.flow_losses
    calls = []

    def breaks(dit, batch, device):
        calls.extend([batch] * (not batch.latents.is_meta))  # the planner's do not count
        return real(dit, batch, device) * (math.inf if len(calls) > 7 else 1)

    monkeypatch.setattr(loop, "flow_losses", breaks)
    _, run = small(made, tmp_path, watch=WatchSettings(skipped_in_a_row=4))
    assert work(run) == 1
    assert "not finite in the last 4 steps, up to step 11" in run.status()["error"]
    assert [entry["loss"] is None for entry in run.metrics()] == [False] * 7 + [True] * 4
    assert run.states()[0] == run.state_path(6), "the weights from before them can still be had"


def test_weights_that_are_not_finite_are_never_saved(made, tmp_path):
    described, run = small(made, tmp_path, steps=4, save=SaveSettings(every_steps=1, precision="float16"))
    real = loop.train_step

    def grows(dit, optimizer, *args):
        outcome = real(dit, optimizer, *args)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(1e5)  # more than float16 can hold
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", grows)
        assert work(run) == 1
    assert "weights are not finite" in run.status()["error"]
    assert not run.states() and not list(run.folder.glob("lora-*")) and not described.final_path.exists()


def test_held_out_clips_are_never_trained_and_are_the_same_wherever_files_lie(made, tmp_path):
    described, _ = small(made, tmp_path, watch=OFTEN)
    kept, held_out = batches.split(described)
    assert len(held_out) == 2
    trained = {
        item.latents
        for sets in (batches.epoch(kept, 1, number) for number in range(3))
        for batch in sets
        for item in batch
    }
    assert trained == {item.latents for item in made[1]} - {item.latents for item in held_out}
    moved = tuple(replace(item, text=f"/elsewhere{item.text}") for item in described.datasets[0].items)[::-1]
    again = replace(described, datasets=(replace(described.datasets[0], items=moved),))
    assert {item.latents for item in batches.split(again)[1]} == {item.latents for item in held_out}


def test_all_windows_of_a_clip_are_held_out_together(made, tmp_path):
    items = tuple(replace(made[1][0], text=f"{index % 4}", fingerprints=(str(index), "")) for index in range(20))
    described, _ = small(made, tmp_path, datasets=(TrainingSet(title="clips", batch_size=1, num_repeats=1, items=items),),
                         watch=WatchSettings(validation_share=0.25))  # fmt: skip
    held_out = batches.split(described)[1]
    assert len(held_out) == 5 and len({item.text for item in held_out}) == 1


def test_a_share_that_leaves_nothing_to_train_is_refused_at_the_start(made, tmp_path):
    sets = (TrainingSet(title="one", batch_size=1, num_repeats=1, items=made[1][:1]),)
    _, run = small(made, tmp_path, datasets=sets, watch=OFTEN)
    assert work(run) == 1
    assert "leaves none to train on" in run.status()["error"]


def test_validation_is_repeated_exactly_and_training_does_not_notice_it(made, tmp_path):
    """With dropout, and an optimiser that validates with other weights than it trains."""
    settings = {
        "network": NetworkSettings(rank=4, dropout=0.3),
        "optimizer": OptimizerSettings(optimizer="adamw_schedulefree", learning_rate=1e-3),
    }
    described, run = small(made, tmp_path, watch=OFTEN, **settings)
    assert work(run) == 0, run.status()
    expected, found = (
        lora(described),
        {e["step"]: e["validation_loss"] for e in run.metrics() if "validation_loss" in e},
    )
    assert list(found) == [3, 6, 9, 12] and len(set(found.values())) == 4
    run.state_path(12).unlink()
    assert work(run) == 0
    assert {e["step"]: e["validation_loss"] for e in run.metrics() if "validation_loss" in e} == found
    assert same(lora(described), expected)
    rarely, other = small(made, tmp_path, "rarely", watch=replace(OFTEN, validation_every_steps=12), **settings)
    assert work(other) == 0 and rarely.digest == described.digest
    assert same(lora(rarely), expected)
    assert other.metrics()[-1]["validation_loss"] == found[12]


def test_tensorboard_shows_what_the_metrics_say(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = replace(OFTEN, tensorboard=True)
    _, run = small(made, tmp_path, watch=watch, optimizer=OptimizerSettings(optimizer="prodigy", learning_rate=1.0))
    assert work(run) == 0, run.status()
    run.state_path(12).unlink()
    assert work(run) == 0
    board = EventAccumulator(str(run.path("tensorboard"))).Reload()
    metrics = run.metrics()
    for tag, name in {"loss/current": "loss", "loss/average": "loss_average", "lr/unet": "learning_rate",
                      "lr/d*lr/unet": "effective_rate", "gradient/norm": "gradient_norm"}.items():  # fmt: skip
        events = board.Scalars(tag)
        assert [event.step for event in events] == list(range(1, 13)), tag
        assert [event.value for event in events] == pytest.approx([entry[name] for entry in metrics])
    assert [event.step for event in board.Scalars("val/loss")] == [3, 6, 9, 12]
    assert any(tag.startswith("loss_by_timestep/") for tag in board.Tags()["scalars"])


def test_a_missing_tensorboard_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    WatchSettings().check_installed()
    with pytest.raises(ValueError, match="pip install tensorboard"):
        WatchSettings(tensorboard=True).check_installed()


@pytest.mark.parametrize("wrong", [{"validation_share": 0.6}, {"validation_share": math.nan}, {"validation_every_steps": 0}, {"skipped_in_a_row": 0}])  # fmt: skip
def test_watch_settings_that_cannot_work_are_refused_with_advice(wrong):
    with pytest.raises(ValueError, match="use"):
        WatchSettings(**wrong)


def test_metrics_are_json_that_every_tool_reads(made, tmp_path):
    _, run = small(made, tmp_path, datasets=with_a_bad_clip(made, tmp_path), steps=6)
    assert work(run) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = Path(run.path("metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_validation_batch_covers_all_noise_levels(made, tmp_path):
    from videolora.core.training.validation import validation_batches

    described, _ = small(made, tmp_path, watch=OFTEN)
    sigmas = [batch.sigma.item() for batch in validation_batches(described, WAN, described.experts[0])]
    assert len(sigmas) == 8 and sigmas[:4] == sorted(sigmas[:4]) and sigmas[:4] == sigmas[4:]
    assert sigmas[0] < 0.7 < sigmas[3]
