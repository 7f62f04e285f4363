"""Two transformers, one for high and one for low noise, sampled as if they were one."""

from itertools import pairwise

import pytest
import reference
import torch
from safetensors.torch import save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.sampling.experts import ExpertPair
from videolora.core.sampling.sample import sample
from videolora.core.sampling.schedule import Schedule
from videolora.core.weights import load_into

WAN = FAMILIES["wan"]
EMPTY = torch.zeros(1, 16, 1, 4, 4)
CPU = torch.device("cpu")
HIGH, LOW = (WAN.variants[f"2.2-t2v-A14B-{expert}"] for expert in ("high", "low"))


class Straight:
    """A transformer whose velocity is one number, and one more for each token of the prompt."""

    def __init__(self, value):
        self.value, self.times = value, []

    def __call__(self, latents, time, text_states):
        self.times.append(float(time[0]))
        return torch.full_like(latents, self.value * text_states.abs().sum())


def pair(high, low, boundary=HIGH.boundary, guidance=(1.0, 1.0)):
    used = []

    def use(name):
        used.append(name)
        return {"high": high, "low": low}[name]

    return ExpertPair(boundary, use, dict(zip(("high", "low"), guidance, strict=True))), used


def end_of(dit, schedule, guidance=1.0, negative=None):
    *_, end = sample(dit, WAN, EMPTY, {"varlen_t5": torch.ones(1, 1)}, negative, schedule, guidance, 1, CPU)
    return end


@pytest.mark.parametrize(
    ("variant", "steps", "high"),
    [("2.2-t2v-A14B-high", 40, 26), ("2.2-t2v-A14B-high", 20, 13), ("2.2-i2v-A14B-high", 40, 15),
     ("2.2-i2v-A14B-high", 20, 8)],
)  # fmt: skip
def test_the_experts_change_once_at_the_boundary(variant, steps, high):
    chosen = WAN.variants[variant]
    both, used = pair(Straight(1.0), Straight(2.0), chosen.boundary)
    end_of(both, Schedule(steps=steps, shift=chosen.sampling_shift), both.guidance_at)
    assert used == ["high"] * high + ["low"] * (steps - high)


def test_each_expert_has_its_own_guidance():
    negative = {"varlen_t5": torch.full((1, 1), 0.5)}
    high, low = Straight(1.0), Straight(1.0)
    schedule = Schedule(steps=4, shift=12.0)
    both, _ = pair(high, low, guidance=(4.0, 3.0))
    sigmas = schedule.sigmas
    steps = sum((b - a) * (0.5 + 0.5 * (4.0 if a >= HIGH.boundary else 3.0)) for a, b in pairwise(sigmas))
    start = end_of(Straight(0.0), schedule)
    torch.testing.assert_close(end_of(both, schedule, both.guidance_at, negative), start + steps)
    once, _ = pair(high, low, guidance=(1.0, 3.0))
    high.times.clear(), low.times.clear()
    end_of(once, schedule, once.guidance_at, negative)
    assert len(set(high.times)) == len(high.times) and len(low.times) == 2 * len(set(low.times)), "1 needs one pass"


def test_a_boundary_that_float32_cannot_hold_is_the_same_for_both_decisions():
    both, used = pair(Straight(1.0), Straight(1.0), 0.9, (4.0, 3.0))
    sigma = float(torch.tensor(0.9))
    both(EMPTY, 1000 * torch.tensor([sigma]), text_states=torch.ones(1, 1, 1))
    assert used == ["high"] and both.guidance_at(sigma) == 4.0


def test_a_pair_of_one_model_samples_as_the_model_itself(tmp_path):
    _, weights = reference.vector("wan22_t2v")
    save_file(weights, tmp_path / "dit.safetensors")
    checkpoint, part = open_part(tmp_path / "dit.safetensors", "dit")
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    both, used = pair(dit, dit)
    states = {"varlen_t5": torch.randn(5, 4096, generator=torch.Generator().manual_seed(0))}
    ends = [
        list(sample(model, WAN, EMPTY, states, None, Schedule(steps=3, shift=12.0), 1.0, 1, CPU))[-1]
        for model in (dit, both)
    ]
    assert torch.equal(*ends) and set(used) == {"high", "low"}
