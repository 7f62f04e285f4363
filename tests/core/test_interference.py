"""The interference report: its figures follow from losses and velocities of real trainings."""

from dataclasses import replace

import numpy as np
import pytest
import small_job
import torch
from videolora.core import commands, interference
from videolora.core.lora.loraid import Loraid
from videolora.core.training.job import NetworkSettings, WatchSettings
from videolora.core.training.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two LORAIDs of the small model, trained apart."""
    folder = tmp_path_factory.mktemp("interference")
    made = small_job.make(folder)
    found = []
    for number in (1, 2):
        described = small_job.job(made, folder, name=f"lora_{number}", steps=2, seed=number, loraid=Loraid(number=number, unit="row"),
                                  network=NetworkSettings(rank=2, alpha=2.0), watch=WatchSettings(validation_share=0.2, validation_every_steps=99))  # fmt: skip
        found.append(Run.of(described, folder / "runs"))
        assert small_job.work(found[-1]) == 0
    return found


def test_alone_a_lora_keeps_everything_and_the_figures_follow_from_the_losses(runs):
    dit, group = interference.subjects(runs)
    found = interference.measure("two", dit, group, torch.device("cpu"))
    assert found.names == ["lora_1", "lora_2"]
    for index in (0, 1):
        assert found.retention(index, (index,)) == 1
        none, alone, both = (found.losses[index, members] for members in ((), (index,), (0, 1)))
        assert alone != none
        assert found.retention(index, (0, 1)) == pytest.approx((none - both) / (none - alone))
        assert alone == pytest.approx(runs[index].metrics()[-1]["validation_loss"], rel=1e-4), (
            "as the training itself validated"
        )
    assert 0 < found.additivity[0, 1] < 1
    rows = interference.table([found, replace(found, additivity={(0, 1): 0.0})]).splitlines()
    assert [row for row in rows if f" (0.00 to {found.additivity[0, 1]:.2f}) |" in row] == [rows[2]], "one title, twice"


def test_a_lora_that_takes_nothing_away_alone_is_named():
    losses = {(0, ()): 1.0, (0, (0,)): 1.1, (0, (0, 1)): 0.9, (1, ()): 1.0, (1, (1,)): 0.5, (1, (0, 1)): 0.6}
    found = interference.Interference("two", ["idle", "busy"], [8, 8], losses, {(0, 1): 0.1})
    assert found.useless == ["idle"] and found.retention(1, (0, 1)) == pytest.approx(0.8)
    assert found.gain(together=False) == pytest.approx(0.2) and found.gain(together=True) == pytest.approx(0.25)
    assert "idle (two) took nothing away alone" in interference.table([found])


def test_a_lora_with_itself_is_not_additive_where_the_model_is_not_linear(runs):
    dit, (one, _) = interference.subjects(runs)
    same = interference.measure("same", dit, [one, one], torch.device("cpu"))
    assert same.losses[0, (0,)] == same.losses[1, (1,)]
    assert same.losses[0, (0, 1)] != same.losses[0, (0,)], "twice the delta"


def test_the_command_writes_a_table_and_a_picture(runs, tmp_path, capsys):
    folders = [str(run.folder) for run in runs]
    assert (
        commands.run(
            ["interference", *folders, "--plain", *folders, "--device", "cpu", "--output", str(tmp_path / "report.md")]
        )
        == 0
    )
    text = (tmp_path / "report.md").read_text()
    assert (
        "| these |" in text
        and "| plain |" in text
        and "![Retention](report.png)" in text
        and "python core interference" in text
    )
    picture = np.asarray(interference.Image.open(tmp_path / "report.png"))
    assert picture.std() > 10
    assert commands.run(["interference", folders[0]]) == 1
    assert "two trainings or more" in capsys.readouterr().err
