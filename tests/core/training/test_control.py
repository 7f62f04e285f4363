"""Control from outside: saving now, pausing, and finding runs by the names that a client gives."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from small_job import job, work
from videolora.core.training import run as runs
from videolora.core.training import state, worker
from videolora.core.training.job import SaveSettings
from videolora.core.training.run import PAUSE, SAVE, STOP, Run


@pytest.fixture
def made_to_ask(made, tmp_path, monkeypatch):
    """A run, and a function that has something asked of it after a step."""
    run = Run.of(
        job(made, tmp_path / "loras", save=SaveSettings(precision="float32", keep_states=3)), tmp_path / "runs"
    )
    append = Run.append_metrics

    def ask(step, request):
        def appended(self, entry):
            append(self, entry)
            if entry["step"] == step:
                run.ask(request)

        monkeypatch.setattr(Run, "append_metrics", appended)

    return run, ask


def test_save_now_writes_a_lora_and_a_state_and_goes_on(made_to_ask):
    run, ask = made_to_ask
    ask(3, SAVE)
    assert work(run) == 0, run.status()
    published = run.job().final_path.with_name("lora-step00000003.safetensors")
    assert published.exists() and str(published) in run.status()["files"]
    assert run.state_path(3).exists() and run.status()["state"] == "finished" and not run.is_asked(SAVE)


def test_a_paused_run_waits_with_everything_saved_until_it_is_resumed(made_to_ask):
    run, ask = made_to_ask
    ask(2, PAUSE)
    thread = threading.Thread(target=worker.work, args=(run.folder, "cpu"))
    thread.start()
    while run.status()["state"] != runs.PAUSED:
        assert thread.is_alive(), run.status()
    assert run.state_path(2).exists() and run.lora_path(2).exists() and len(run.metrics()) == 2
    thread.join(0.5)
    assert thread.is_alive() and len(run.metrics()) == 2
    run.forget(PAUSE)
    thread.join(60)
    assert run.status()["state"] == "finished" and len(run.metrics()) == 6


def test_a_paused_run_can_be_stopped_and_gone_on_with(made_to_ask):
    run, ask = made_to_ask
    ask(2, PAUSE)
    thread = threading.Thread(target=work, args=(run,))
    thread.start()
    while run.status()["state"] != runs.PAUSED:
        assert thread.is_alive(), run.status()
    run.ask(STOP)
    thread.join(60)
    assert run.status()["state"] == "stopped" and run.status()["step"] == 2
    assert not any(run.is_asked(request) for request in runs.REQUESTS)
    ask(99, STOP)
    assert work(run) == 0 and run.status()["state"] == "finished"


def test_as_many_states_are_kept_as_asked_and_a_damaged_one_is_noted(made, tmp_path):
    save = SaveSettings(every_steps=1, precision="float32", keep_states=3)
    run = Run.of(job(made, tmp_path / "loras", save=save), tmp_path / "runs")
    assert work(run) == 0
    assert [path.name for path in run.states()] == [f"state-{step:08d}.safetensors" for step in (6, 5, 4)]
    expected = load_file(run.job().final_path)
    for step in (6, 5):
        run.state_path(step).write_bytes(run.state_path(step).read_bytes()[:-5])
    assert work(run) == 0
    assert [note.split(" is skipped")[0] for note in run.notes()] == [
        "state-00000006.safetensors",
        "state-00000005.safetensors",
    ]
    assert all(torch.equal(value, expected[key]) for key, value in load_file(run.job().final_path).items())


def test_a_damaged_newer_state_does_not_push_out_the_good_one(made, tmp_path):
    described = job(made, tmp_path / "loras", save=SaveSettings(keep_states=1))
    run = Run.of(described, tmp_path / "runs")
    run.state_path(9).write_bytes(b"damaged")
    empty = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    state.save_state(run, 4, {}, empty, described)
    assert run.states() == [run.state_path(4)]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../runs/one", "one/", "one/../one", "/etc", "..\\one", "one\\", "C:one", "~", "other", "one.", "con", "file\x00"],
)  # fmt: skip
def test_only_runs_that_exist_are_found_and_only_by_their_plain_names(tmp_path, name):
    folder = tmp_path / "runs"
    for parent in (folder / "one", tmp_path / "outside"):
        parent.mkdir(parents=True)
        (parent / "job.json").write_text("{}")
    (folder / "empty").mkdir()
    assert Run.find(folder, "one").folder == folder / "one"
    assert [run.folder.name for run in Run.all(folder)] == ["one"]
    for wrong in (name, "empty"):
        with pytest.raises(ValueError):
            Run.find(folder, wrong)


def test_a_link_that_leads_out_is_no_run(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "job.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="through a link"):
        Run.find(tmp_path / "runs", "link")
