import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.sampling.guidance import CFG_SKIP_MODES, cfg_plan, guided
from videolora.core.sampling.sample import sample, seeded_noise
from videolora.core.sampling.schedule import Schedule
from videolora.core.sampling.solvers import SOLVERS

FAMILY = FAMILIES["wan"]


def test_cfg_plans_are_the_published_ones(numerics):
    for row in numerics["cfg_plans"]:
        assert cfg_plan(row["mode"], row["steps"], row["ratio"]) == row["plan"], row


@pytest.mark.parametrize(
    ("mode", "plan"),
    [("early", "SSSSAAAAAA"), ("late", "AAAAAASSSS"), ("middle", "AAASSSSAAA"), ("early_late", "SSAAAAAASS"),
     ("alternate", "SASASAASAS"), ("none", "AAAAAAAAAA")],
)  # fmt: skip
def test_the_plan_of_every_mode_for_ten_steps(mode, plan):
    assert cfg_plan(mode, 10, 0.6) == plan


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="0 to 1"):
        cfg_plan("late", 10, ratio)


def test_all_modes_are_offered():
    assert set(CFG_SKIP_MODES) == {"none", "early", "late", "middle", "early_late", "alternate"}


def test_euler_follows_the_reference_trajectories(numerics):
    rows = [row for row in numerics["trajectories"]["items"] if row["solver"] == "euler"]
    assert rows
    for row in rows:
        schedule = Schedule(steps=row["steps"], shift=row["shift"])
        torch.testing.assert_close(schedule.sigmas, torch.tensor(row["sigmas"]), rtol=0, atol=1e-6)
        torch.testing.assert_close(schedule.sigmas[:-1] * 1000, torch.tensor(row["timesteps"]), rtol=1e-6, atol=1e-4)
        start = torch.tensor(row["start"], dtype=torch.float64)
        velocity = lambda x, s, index: torch.sin(3 * x + 2 * s) + 0.5 * x * s - 0.25  # noqa: E731
        *_, end = SOLVERS["euler"](velocity, start, schedule.sigmas)
        torch.testing.assert_close(end, torch.tensor(row["end"], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_solves_a_straight_flow_exactly(solver):
    data, noise = torch.randn(2, 5), torch.randn(2, 5)
    *_, end = SOLVERS[solver](lambda *_: noise - data, noise, Schedule(steps=4, shift=5.0).sigmas)
    torch.testing.assert_close(end, data)


def test_guidance_one_and_no_negative_make_one_pass():
    def never(*_):
        raise AssertionError("the second pass was run")

    def positive(x, sigma):
        return x

    x = torch.ones(2)
    assert guided(positive, never, 1.0)(x, 0.5) is x
    assert guided(positive, None, 5.0)(x, 0.5) is x


def test_guidance_leads_away_from_the_negative():
    result = guided(lambda x, s: x, lambda x, s: x - 1, 3.0)(torch.tensor([5.0]), 0.1)
    torch.testing.assert_close(result, torch.tensor([4.0 + 3 * 1.0]))


class CountingDiT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, latents, time, text_states):
        self.calls.append((float(time[0]), float(text_states[0, 0, 0])))
        return latents * 0.1


def run(schedule, guidance, seed=3, negative=True):
    dit = CountingDiT()
    states = [{"varlen_t5": torch.full((2, 4), value)} for value in (1.0, -1.0)]
    latents = torch.zeros(1, 16, 2, 4, 4)
    *_, end = sample(
        dit, FAMILY, latents, states[0], states[1] if negative else None, schedule, guidance, seed, torch.device("cpu")
    )
    return dit.calls, end


def test_skipped_steps_make_one_pass_and_the_others_two():
    schedule = Schedule(steps=4, shift=1.0, cfg_skip="late", cfg_ratio=0.5)
    calls, _ = run(schedule, 5.0)
    assert [value for _, value in calls] == [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    assert [time for time, _ in calls] == [1000.0, 1000.0, 750.0, 750.0, 500.0, 250.0]


def test_the_same_seed_gives_the_same_latents_and_another_does_not():
    schedule = Schedule(steps=2, shift=3.0)
    assert torch.equal(run(schedule, 1.0)[1], run(schedule, 1.0)[1])
    assert not torch.equal(run(schedule, 1.0)[1], run(schedule, 1.0, seed=4)[1])


def test_noise_is_that_of_comfyui():
    torch.manual_seed(7)
    assert torch.equal(seeded_noise((2, 3), 7), torch.randn(2, 3))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"shift": 0.0}, {"solver": "magic"}, {"cfg_skip": "sometimes"}])
def test_a_wrong_schedule_is_refused(settings):
    with pytest.raises(ValueError, match="use"):
        Schedule(**{"steps": 4, "shift": 3.0, **settings})
