"""Training two experts in one run, and one of them alone: who is trained when, at which noise levels, and what is written."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import reference
import small_job
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.families import open_part
from videolora.core.io.files import fingerprint
from videolora.core.lora.inventory import inventory
from videolora.core.lora.stack import StackEntry, load_stack
from videolora.core.training import batches
from videolora.core.training.job import Expert, SaveSettings, TimestepSettings, read_job
from videolora.core.training.loop import flow_losses
from videolora.core.training.run import STOP, Run
from videolora.core.weights import load_into

WAN = small_job.WAN
HIGH, LOW = "2.2-t2v-A14B-high", "2.2-t2v-A14B-low"
STEPS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two checkpoints of the same sizes and other weights."""
    folder = tmp_path_factory.mktemp("experts")
    made = small_job.make(folder, "wan22_t2v", HIGH)
    shapes = {name: tuple(value.shape) for name, value in reference.vector("wan22_t2v")[1].items()}
    save_file(reference.weights(shapes, seed=9), folder / "low.safetensors")
    return made


def both(made, output, **changes):
    low = made[0] / "low.safetensors"
    expert = Expert(name="low", variant=LOW, dit=str(low), dit_fingerprint=fingerprint(low))
    return small_job.job(made, output, **{"variant": HIGH, "low": expert, "boundary": 0.875, "steps": STEPS, **changes})


def sigmas(described, step):
    return torch.cat([batch.sigma for batch in next(batches.steps(described, WAN, step))])


@pytest.mark.parametrize("steps", [2, 3, 100, 101, 250, 1000])
def test_experts_take_turns_of_many_steps_in_the_share_of_their_noise_levels(made, tmp_path, steps):
    described = both(made, tmp_path, steps=steps)
    order = [batches.expert_at(described, WAN, step).name for step in range(steps)]
    turns = [name for name, _ in groupby(order)]
    assert len(turns) == -(-steps // 100) + 1, "each round but the first begins with the expert that is there"
    share = batches._share_of_high(described, WAN)
    assert 0.6 < share < 0.8 and abs(order.count("high") - share * steps) <= 1 + steps / 100 / 2
    assert set(order) == {"high", "low"}
    stretches = list(batches.stretches(described, WAN, steps // 2))
    assert stretches[0][1] == steps // 2 and stretches[-1][2] == steps
    assert [expert.name for expert, begin, end in stretches for _ in range(begin, end)] == order[steps // 2 :]


def test_every_step_draws_noise_levels_of_its_expert(made, tmp_path):
    described = both(made, tmp_path)
    for step in range(STEPS):
        drawn = sigmas(described, step)
        is_high = batches.expert_at(described, WAN, step).name == "high"
        assert (drawn >= 0.875).all() if is_high else (drawn <= 0.875).all()


@pytest.mark.parametrize(("variant", "low", "high"), [(HIGH, 0.875, 1), (LOW, 0, 0.875), ("2.2-i2v-A14B-low", 0, 0.9)])
def test_an_expert_that_is_trained_alone_sees_its_own_noise_levels_unless_a_range_is_chosen(variant, low, high):
    levels = TimestepSettings().levels(WAN.variants[variant])
    assert levels == (low, high)
    assert TimestepSettings(min_timestep=100).levels(WAN.variants[variant]) == (0, 1)
    assert TimestepSettings().levels(WAN.variants["2.1-t2v-14B"]) == (0, 1)


def test_a_range_without_levels_for_an_expert_is_refused(made, tmp_path):
    described = both(made, tmp_path, timesteps=TimestepSettings(max_timestep=800))
    this = Run.of(described, tmp_path / "runs")
    assert small_job.work(this) == 1
    assert "no timesteps between 875 and 1000" in this.status()["error"]


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    described = both(made, folder, save=SaveSettings(every_steps=3, precision="float32"))
    this = Run.of(described, folder / "runs")
    assert small_job.work(this) == 0, this.log_end()
    return this


def test_a_run_writes_a_lora_for_each_expert_that_fits_it_alone(straight):
    described = straight.job()
    assert described == read_job(straight.path("job.json"))
    assert [path.name for path in described.final_paths] == ["lora_high.safetensors", "lora_low.safetensors"]
    assert sorted(path.name for path in described.final_path.parent.glob("lora_low*")) == [
        "lora_low-step00000003.safetensors", "lora_low-step00000006.safetensors", "lora_low.safetensors",
    ]  # fmt: skip
    high, low = (load_file(path) for path in described.final_paths)
    assert high.keys() == low.keys() and any(not torch.equal(high[key], low[key]) for key in high)
    for expert, path, levels in zip(("high", "low"), described.final_paths, ("875,1000", "0,875"), strict=True):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_loraid_expert"] == expert and metadata["modelspec.timestep_range"] == levels
        assert metadata["videolora_variant"] == (HIGH if expert == "high" else LOW)
    checkpoint, _ = open_part(Path(described.dit), "dit")
    matrices = inventory(WAN, {name: info.shape for name, info in checkpoint.tensors.items()})
    with pytest.raises(ValueError, match="trained for the high-noise expert"):
        load_stack([StackEntry(described.final_path)], WAN, WAN.variants[LOW], matrices, allow_overlap=False)


def test_each_expert_learns_only_in_its_own_steps(made, straight, tmp_path):
    """The first steps are the high-noise expert's: until the low-noise one's turn its LoRA is what it began as."""
    published = {name: load_file(straight.job().path_of(name, 3)) for name in ("high", "low")}
    assert batches.expert_at(straight.job(), WAN, 2).name == "high"
    ups = {name: max(value.abs().max() for key, value in one.items() if "up" in key) for name, one in published.items()}
    assert ups["high"] > 0 and ups["low"] == 0


@pytest.mark.parametrize("stop_after", [2, 6])
def test_a_run_that_is_stopped_in_either_experts_turn_goes_on_to_the_same_loras(made, straight, tmp_path, stop_after):
    described = replace(straight.job(), output_folder=str(tmp_path))
    this = Run.of(described, tmp_path / "runs")
    original = Run.append_metrics

    def append(self, entry):
        original(self, entry)
        if entry["step"] == stop_after:
            self.ask(STOP)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_metrics", append)
        assert small_job.work(this) == 0
    assert this.status() == {"state": "stopped", "step": stop_after}
    assert small_job.work(this) == 0
    for expected, found in zip(straight.job().final_paths, described.final_paths, strict=True):
        expected, found = load_file(expected), load_file(found)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert [entry["losses"] for entry in this.metrics()] == [entry["losses"] for entry in straight.metrics()]


def test_the_base_of_each_step_is_its_experts(made, straight):
    """The first step after the change has the loss of the low-noise checkpoint, not of the other."""
    described = straight.job()
    step = next(begin for expert, begin, _ in batches.stretches(described, WAN, 0) if expert.name == "low")
    losses = []
    for expert in described.experts:
        checkpoint, part = open_part(Path(expert.dit), "dit")
        with torch.device("meta"):
            dit = WAN.build_dit(part.config)
        load_into(dit, checkpoint, part.keymap, torch.float32)
        (batch,) = next(batches.steps(described, WAN, step))
        with torch.no_grad():
            losses.append(flow_losses(dit, batch, torch.device("cpu")).tolist())
    assert straight.metrics()[step]["losses"] == pytest.approx(losses[1], rel=1e-4) != losses[0]
