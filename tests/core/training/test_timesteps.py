"""Timesteps and loss: each sampling against its formula, ranges, buckets, weights."""

import math

import pytest
import torch
from videolora.core.training import batches, chart
from videolora.core.training.job import TimestepSettings
from videolora.core.training.loss import WEIGHTINGS, weighted_errors
from videolora.core.training.timesteps import SAMPLINGS, distribution, draw

DRAWS = 200_000
TOKENS = 1560  # of a frame of 832x480
QUANTILES = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])


def uniform(count=DRAWS, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(recommended=3.0, tokens=TOKENS, count=DRAWS, **settings):
    return draw(distribution(TimestepSettings(**settings), recommended, tokens), uniform(count))


def normal(count=DRAWS):
    return torch.randn(count, generator=torch.Generator().manual_seed(1))


def moved(t, shift):
    return shift * t / (1 + (shift - 1) * t)


def line(x, x0, y0, x1, y1):
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def mixed(*parts):
    """Each draw from the part its own random number names."""
    d, result, passed = uniform(seed=2), torch.zeros(DRAWS), 0.0
    for weight, values in parts:
        chosen = (d >= passed) & (d < passed + weight)
        result[chosen] = values.float()[chosen]
        passed += weight
    return result


def mode(u, scale):
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


FLUX = line(TOKENS, 256, 0.5, 4096, 1.15)
QWEN = line(TOKENS, 256, 0.5, 8192, 0.9)
# Settings, and the draws as the formula says, from random numbers of its own.
FORMULAS = {
    "uniform": ({"sampling": "uniform"}, lambda: uniform(seed=3)),
    "uniform, shifted": ({"sampling": "uniform", "shift": 3.0}, lambda: moved(uniform(seed=3), 3)),
    "sigmoid": ({"sampling": "sigmoid", "sigmoid_scale": 1.5}, lambda: torch.sigmoid(1.5 * normal())),
    "shift": ({"sampling": "shift", "shift": 5.0}, lambda: moved(torch.sigmoid(normal()), 5)),
    "shift, recommended": ({"sampling": "shift"}, lambda: moved(torch.sigmoid(normal()), 3)),
    "flux_shift": ({"sampling": "flux_shift"}, lambda: moved(torch.sigmoid(normal()), FLUX)),
    "qwen_shift": ({"sampling": "qwen_shift"}, lambda: moved(torch.sigmoid(normal()), QWEN)),
    "logsnr": ({"sampling": "logsnr", "logit_mean": 0.5, "logit_std": 2.0},
               lambda: torch.sigmoid(-(0.5 + 2 * normal()) / 2)),
    "logsnr, shifted": ({"sampling": "logsnr", "shift": 2.0}, lambda: moved(torch.sigmoid(-normal() / 2), 2)),
    "qinglong_flux": ({"sampling": "qinglong_flux"},
                      lambda: mixed((0.79, moved(torch.sigmoid(normal()), FLUX)), (0.11, torch.sigmoid(-normal() / 2)),
                                    (0.10, torch.sigmoid(-(5.36 + normal()) / 2)))),
    "qinglong_qwen": ({"sampling": "qinglong_qwen"},
                      lambda: mixed((0.95, moved(torch.sigmoid(normal()), QWEN)),
                                    (0.05, torch.sigmoid(-(5.36 + normal()) / 2)))),
    "sigma": ({"sampling": "sigma", "shift": 1.0}, lambda: torch.ceil(1000 * uniform(seed=3)) / 1000),
    "sigma, shifted": ({"sampling": "sigma"}, lambda: moved(torch.ceil(1000 * uniform(seed=3)) / 1000, 3)),
    "sigma, logit_normal": ({"sampling": "sigma", "density": "logit_normal", "shift": 1.0, "logit_mean": -0.5},
                            lambda: torch.ceil(1000 * torch.sigmoid(normal() - 0.5)) / 1000),
    "sigma, mode": ({"sampling": "sigma", "density": "mode", "shift": 1.0},
                    lambda: torch.ceil(1000 * mode(uniform(seed=3), 1.29)) / 1000),
    "sigma, mode at the ends": ({"sampling": "sigma", "density": "mode", "mode_scale": -0.8, "shift": 1.0},
                                lambda: torch.ceil(1000 * mode(uniform(seed=3), -0.8)) / 1000),
}  # fmt: skip


def test_every_sampling_is_tested_against_its_formula():
    assert {settings["sampling"] for settings, _ in FORMULAS.values()} == set(SAMPLINGS)


@pytest.mark.parametrize("name", FORMULAS)
def test_draws_have_the_quantiles_of_their_formula(name):
    settings, formula = FORMULAS[name]
    found, expected = (x.double().quantile(QUANTILES.double()) for x in (drawn(**settings), formula()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("given", [(0, 1000), (0, 500), (875, 1000), (300, 310), (500, 900)])
@pytest.mark.parametrize("preserve", [False, True])
def test_no_draw_leaves_the_range(name, given, preserve):
    settings, _ = FORMULAS[name]
    low, high = given
    timesteps = 1000 * drawn(
        count=20_000, min_timestep=low, max_timestep=high, preserve_distribution_shape=preserve, **settings
    )
    assert timesteps.min() >= low - 1e-4 and timesteps.max() <= high + 1e-4


@pytest.mark.parametrize("name", FORMULAS)
def test_a_range_is_pressed_into_or_cut_out_as_asked(name):
    settings, formula = FORMULAS[name]
    expected = formula().double()
    pressed = drawn(min_timestep=200, max_timestep=700, **settings).double()
    torch.testing.assert_close(pressed.quantile(QUANTILES.double()), 0.2 + 0.5 * expected.quantile(QUANTILES.double()),
                               rtol=0, atol=0.01)  # fmt: skip
    cut = drawn(min_timestep=200, max_timestep=700, preserve_distribution_shape=True, **settings).double()
    inside = expected[(expected >= 0.2) & (expected <= 0.7)]
    torch.testing.assert_close(cut.quantile(QUANTILES.double()), inside.quantile(QUANTILES.double()), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_two_functions_of_a_distribution_are_each_others_inverse(name):
    made = distribution(TimestepSettings(**FORMULAS[name][0]), 3.0, TOKENS)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    back = made.cdf(made.quantile(u))
    steps = 0.004 if name.startswith("sigma") else 1e-9  # of a discrete schedule
    assert ((back - u) > -1e-9).all() and ((back - u) < steps).all()


def test_low_timesteps_are_little_noise():
    assert drawn(sampling="sigma", min_timestep=0, max_timestep=500).max() <= 0.5


def test_more_tokens_move_the_size_dependent_samplings_towards_noise():
    for sampling in ("flux_shift", "qwen_shift", "qinglong_flux", "qinglong_qwen"):
        assert (
            drawn(sampling=sampling, tokens=4096, count=20_000).mean()
            > drawn(sampling=sampling, tokens=256, count=20_000).mean() + 0.03
        )
    assert math.log(FLUX) == pytest.approx(0.7207, rel=1e-3)  # as published for latents of 60 x 104


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sampling": "magic"}, "use one of uniform, sigmoid"), ({"shift": -1.0}, "use 0 for the model's own"),
     ({"sigmoid_scale": 0.0}, "use 0.1"), ({"min_timestep": 500.0, "max_timestep": 500.0}, "the smaller first"),
     ({"max_timestep": 1001.0}, "inside 0 to 1000"), ({"buckets": -1}, "use 0"), ({"weighting": "x"}, "use one of none"),
     ({"sampling": "flux_shift", "shift": 3.0}, "takes its shift from the size"),
     ({"sampling": "uniform", "sigmoid_scale": 2.0}, "has no sigmoid_scale"),
     ({"sampling": "sigma", "density": "uniform", "mode_scale": 1.0}, "density 'uniform' has no mode_scale"),
     ({"sampling": "shift", "density": "mode"}, "has no density"), ({"mode_scale": 1.8}, "use -1 to 1.75"),
     ({"min_timestep": float("nan")}, "use a range"), ({"logit_std": float("nan")}, "use 0.1")],
)  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused_with_advice(settings, message):
    with pytest.raises(ValueError, match=message):
        TimestepSettings(**settings)


def test_a_range_that_the_sampling_never_reaches_is_refused():
    settings = TimestepSettings(
        sampling="sigmoid", sigmoid_scale=0.1, max_timestep=100, preserve_distribution_shape=True
    )
    with pytest.raises(ValueError, match="Widen the range"):
        distribution(settings, 3.0, TOKENS)


class Job:
    """What `batches.uniform` asks of a job."""

    seed = 3
    timesteps = TimestepSettings(buckets=8)


def test_each_run_of_as_many_samples_as_buckets_has_one_in_each_wherever_it_is_entered():
    rng = torch.Generator().manual_seed(0)
    whole = torch.cat([batches.uniform(Job, before, 2, rng) for before in range(0, 64, 2)])
    for run in whole.split(8):
        assert sorted((run * 8).floor().int().tolist()) == list(range(8))
    orders = {tuple((run * 8).floor().int().tolist()) for run in whole.split(8)}
    assert len(orders) == 8, "each run has an order of its own"
    later = batches.uniform(Job, 21, 6, rng)
    assert torch.equal((later * 8).floor(), (whole[21:27] * 8).floor())


def test_weights_are_those_of_their_formulas():
    sigma = torch.tensor([0.0, 0.001, 0.25, 0.5, 1.0])
    assert WEIGHTINGS["none"](sigma).tolist() == [1.0] * 5
    torch.testing.assert_close(WEIGHTINGS["sigma_sqrt"](sigma), torch.tensor([1e6, 1e6, 16.0, 4.0, 1.0]))
    expected = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in sigma.tolist()]
    torch.testing.assert_close(WEIGHTINGS["cosmap"](sigma), torch.tensor(expected))


def test_the_loss_weighs_each_sample():
    predicted, target = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    error = ((predicted - target) ** 2).mean((1, 2, 3, 4))
    found = weighted_errors(predicted, target, torch.tensor([2.0, 0.5])).mean()
    torch.testing.assert_close(found, (2 * error[0] + 0.5 * error[1]) / 2)
    torch.testing.assert_close(
        weighted_errors(predicted, target, torch.ones(2)).mean(), ((predicted - target) ** 2).mean()
    )


def test_the_picture_shows_the_range_and_the_report_the_shares():
    settings = TimestepSettings(sampling="uniform", max_timestep=500, weighting="cosmap")
    picture, report = chart.show(settings, 3.0, TOKENS, "832x480")
    assert picture.mode == "RGB" and picture.size == (1280, 860)
    row = [picture.getpixel((x, 480)) for x in range(120, 1220)]
    bars = [red < 100 and blue > 150 for red, _, blue in row]
    assert sum(bars[:540]) > 400 and not any(bars[560:]), "bars up to 500, none above"
    lines = report.splitlines()
    assert lines[1] == "flow shift 1, pressed into 0 to 500, 200,000 draws"
    shares = [float(line.split()[3]) for line in lines if " to " in line and line.endswith("%")]
    assert shares == pytest.approx([20] * 5 + [0] * 5, abs=0.5)
    assert "5 / 25 / 50 / 75 / 95 % of draws below 25, 125, 250, 375, 475" in report


@pytest.mark.parametrize("name", FORMULAS)
def test_every_setting_can_be_drawn(name, monkeypatch):
    monkeypatch.setattr(chart, "DRAWS", 1000)
    weighting = list(WEIGHTINGS)[len(name) % len(WEIGHTINGS)]
    settings = TimestepSettings(weighting=weighting, **FORMULAS[name][0])
    picture, report = chart.show(settings, 3.0, TOKENS, "832x480")
    assert picture.size == (1280, 860) and f"loss weights: {weighting}" in report
