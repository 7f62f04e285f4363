from dataclasses import replace

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.sampling.guidance import CFG_SKIP_MODES, SkipLayers, cfg_plan, guided
from videolora.core.sampling.sample import sample, seeded_noise
from videolora.core.sampling.schedule import Schedule
from videolora.core.sampling.solvers import SOLVERS

FAMILY = FAMILIES["wan"]
EMPTY = torch.zeros(1, 16, 2, 4, 4)


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


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_follows_the_reference_trajectories(numerics, solver):
    rows = [row for row in numerics["trajectories"]["items"] if row["solver"] == solver]
    assert len(rows) == 4
    for row in rows:
        schedule = Schedule(steps=row["steps"], shift=row["shift"], solver=solver)
        torch.testing.assert_close(schedule.sigmas, torch.tensor(row["sigmas"]), rtol=0, atol=1e-6)
        torch.testing.assert_close(schedule.times, torch.tensor(row["timesteps"]), rtol=1e-6, atol=1e-4)
        start = torch.tensor(row["start"], dtype=torch.float64)

        times = (schedule.times.double() / 1000).tolist()

        def velocity(x, _, index, times=times):
            s = times[index]
            return torch.sin(3 * x + 2 * s) + 0.5 * x * s - 0.25

        *_, (end, _) = SOLVERS[solver].steps(velocity, start, schedule.sigmas)
        torch.testing.assert_close(end, torch.tensor(row["end"], dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_solver_solves_a_straight_flow_exactly(solver, steps):
    data, noise = torch.randn(2, 5), torch.randn(2, 5)
    sigmas = Schedule(steps=steps, shift=5.0, solver=solver).sigmas
    start = noise.lerp(data, 1 - float(sigmas[0]))
    *_, (end, denoised) = SOLVERS[solver].steps(lambda *_: noise - data, start, sigmas)
    torch.testing.assert_close(end, data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoised, data, rtol=1e-4, atol=1e-5)


def test_guidance_one_and_no_negative_make_one_pass():
    def never(*_):
        raise AssertionError("the second pass was run")

    def positive(x, time):
        return x

    x = torch.ones(2)
    assert guided(positive, never, 1.0)(x, 0.5) is x
    assert guided(positive, None, 5.0)(x, 0.5) is x


def test_guidance_leads_away_from_the_negative():
    result = guided(lambda x, t: x, lambda x, t, left_out: x - 1, 3.0)(torch.tensor([5.0]), 0.1)
    torch.testing.assert_close(result, torch.tensor([4.0 + 3 * 1.0]))


class CountingDiT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, latents, time, text_states, skip_layers=()):
        self.calls.append((float(time[0]), float(text_states[0, 0, 0]), tuple(skip_layers)))
        return latents * 0.1 - len(skip_layers)


def run(schedule, guidance, seed=3, negative=True, latents=EMPTY, strength=1.0):
    dit = CountingDiT()
    states = [{"varlen_t5": torch.full((2, 4), value)} for value in (1.0, -1.0)]
    *_, (end, _) = sample(
        dit,
        FAMILY,
        latents,
        states[0],
        states[1] if negative else None,
        schedule,
        guidance,
        seed,
        torch.device("cpu"),
        strength,
    )
    return dit.calls, end


def test_skipped_steps_make_one_pass_and_the_others_two():
    schedule = Schedule(steps=4, shift=1.0, cfg_skip="late", cfg_ratio=0.5)
    calls, _ = run(schedule, 5.0)
    assert [value for _, value, _ in calls] == [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    assert [time for time, _, _ in calls] == [1000.0, 1000.0, 750.0, 750.0, 500.0, 250.0]


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


def test_a_video_is_noised_as_far_as_the_strength_says_and_no_further():
    video = torch.randn(1, 16, 2, 4, 4)
    schedule = Schedule(steps=10, shift=3.0)
    calls, _ = run(schedule, 1.0, latents=video, strength=0.35)
    assert [time for time, _, _ in calls] == pytest.approx((1000 * schedule.sigmas[7:10]).tolist())
    steps = sample(
        CountingDiT(), FAMILY, video, {"varlen_t5": torch.ones(2, 4)}, None, schedule, 1.0, 3, torch.device("cpu"), 0.35
    )
    first = next(steps).latents
    noise, sigma = seeded_noise(tuple(video.shape), 3), schedule.sigmas[7]
    start = (1 - sigma) * video + sigma * noise
    torch.testing.assert_close(first, start + (schedule.sigmas[8] - sigma) * 0.1 * start)


def test_at_strength_0_nothing_is_done_and_at_1_nothing_of_the_video_is_left():
    video, schedule = torch.randn(1, 16, 2, 4, 4), Schedule(steps=4, shift=3.0, solver="unipc")
    states = {"varlen_t5": torch.ones(2, 4)}
    none = sample(CountingDiT(), FAMILY, video, states, None, schedule, 1.0, 3, torch.device("cpu"), 0.0)
    assert list(none) == []
    assert torch.equal(run(schedule, 1.0, latents=video)[1], run(schedule, 1.0)[1])


def test_skip_layers_change_the_negative_pass_or_add_one_in_their_part_of_the_steps():
    skip = SkipLayers(layers=(1, 3), end=0.5)
    calls, _ = run(Schedule(steps=4, shift=1.0, skip_layers=skip), 5.0)
    assert [left_out for *_, left_out in calls] == [(1, 3), (), (1, 3), (), (), (), (), ()]
    original = replace(skip, mode="original")
    calls, _ = run(Schedule(steps=4, shift=1.0, skip_layers=original, cfg_skip="early", cfg_ratio=0.75), 5.0)
    assert [left_out for *_, left_out in calls] == [(), (), (), (1, 3), (), (), (), ()]  # no guidance in the first step


def test_skip_layer_guidance_leads_away_from_what_is_made_without_them():
    def negative(x, time, left_out=()):
        return x - 1 - len(left_out)

    x = torch.tensor([5.0])
    uncond = guided(lambda x, t: x, negative, 3.0, SkipLayers(layers=(1, 2)))(x, 0.1)
    torch.testing.assert_close(uncond, torch.tensor([2.0 + 3 * 3.0]))
    original = guided(lambda x, t: x, negative, 3.0, SkipLayers(layers=(1, 2), mode="original", scale=2.0))(x, 0.1)
    torch.testing.assert_close(original, torch.tensor([4.0 + 3 * 1.0 + 2 * 3.0]))


@pytest.mark.parametrize("settings", [{"layers": ()}, {"layers": (-1,)}, {"mode": "all"}, {"start": 0.5, "end": 0.5}])
def test_wrong_skip_layers_are_refused(settings):
    with pytest.raises(ValueError, match=r"name some|from 0|use"):
        SkipLayers(**{"layers": (1,), **settings})
