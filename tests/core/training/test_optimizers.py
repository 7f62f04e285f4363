"""Optimisers and schedules: formulas, exact states, and the errors before anything is trained."""

import importlib.util
import math
from itertools import pairwise

import pytest
import torch
from videolora.core.training.job import OptimizerSettings
from videolora.core.training.optimizers import OPTIMIZERS, given_out, make_optimizer, restore_state, state_of
from videolora.core.training.schedules import SCHEDULES, ScheduleSettings, rate_factor


def rates(steps, **settings):
    return [rate_factor(ScheduleSettings(**settings), step, steps) for step in range(steps)]


def test_every_schedule_is_its_formula():
    done = [step / 10 for step in range(10)]
    assert rates(10) == [1.0] * 10
    assert rates(10, schedule="linear") == pytest.approx([1 - p for p in done])
    assert rates(10, schedule="cosine") == pytest.approx([(1 + math.cos(math.pi * p)) / 2 for p in done])
    assert rates(10, schedule="polynomial", power=2.0) == pytest.approx([(1 - p) ** 2 for p in done])
    waves = [(1 + math.cos(math.pi * (2 * p % 1))) / 2 for p in done]
    assert rates(10, schedule="cosine_with_restarts", cycles=2) == pytest.approx(waves)
    stable = rates(10, schedule="warmup_stable_decay", decay_steps=4)
    assert stable == pytest.approx([1.0] * 6 + [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_rex_is_as_published_and_starts_its_warm_up_at_the_bottom():
    expected = [1, 0.9891, 0.9759, 0.9593, 0.9381, 0.91, 0.8709, 0.8127, 0.7171, 0.5311]
    assert rates(10, schedule="rex", min_lr_ratio=0.01) == pytest.approx(expected, abs=5e-5)
    warm = rates(10, schedule="rex", warmup_steps=3)
    assert warm[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_warm_up_a_schedule_goes_from_all_to_the_least_in_the_steps_that_are_left(schedule):
    only = {"warmup_stable_decay": {"decay_steps": 10}}.get(schedule, {})
    least = {} if schedule == "constant" else {"min_lr_ratio": 0.1}
    found = rates(1000, schedule=schedule, warmup_steps=50, **only, **least)
    assert found[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert found[50] == 1.0
    assert all(later <= before for before, later in pairwise(found[50:]))
    if least:
        assert 0.1 < found[-1] < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"schedule": "magic"}, "use one of constant"), ({"warmup_steps": -1}, "use 0 or more"),
     ({"schedule": "cosine", "power": 2.0}, "has no power.*use polynomial"), ({"min_lr_ratio": 0.1}, "has no min_lr_ratio"),
     ({"schedule": "linear", "cycles": 2}, "has no cycles"), ({"schedule": "warmup_stable_decay"}, "use a tenth"),
     ({"schedule": "linear", "min_lr_ratio": 1.5}, "use 0 to 1"), ({"optimizer": "sgd"}, "use one of adamw"),
     ({"optimizer": "prodigy"}, "use 1"), ({"learning_rate": 2.0}, "up to 1"),
     ({"optimizer": "adamw_schedulefree", "schedule": "cosine"}, "use constant"),
     ({"arguments": "momentum=0.9"}, "takes betas, eps"), ({"arguments": "betas=0.9,0.99"}, "use a number"),
     ({"optimizer": "lion", "arguments": "eps=1e-8"}, "Lion takes betas")],
)  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused_with_advice(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)


def test_arguments_reach_the_optimizer():
    settings = OptimizerSettings(arguments="betas=[0.8,0.95] eps=1e-6", weight_decay=0.1)
    (group,) = make_optimizer([torch.nn.Parameter(torch.ones(2))], settings).param_groups
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 and group["weight_decay"] == 0.1


def rate_for(name):
    return {"prodigy": 1.0, "lion": 1e-3}.get(name, 1e-2)


def problem(seed=0):
    """A quadratic bowl, in matrices of which one is large enough for 8-bit states."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=rng)) for shape in ((64, 80), (3, 4), (5, 4))]


def descend(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        rng = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=rng)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name):
    parameters = problem()
    before = sum(float(p.detach().square().sum()) for p in parameters)
    optimizer = make_optimizer(parameters, OptimizerSettings(optimizer=name, learning_rate=rate_for(name)))
    descend(optimizer, parameters, 200)
    with given_out(optimizer, OPTIMIZERS[name]):
        assert sum(float(p.detach().square().sum()) for p in parameters) < 0.95 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_survives_saving_to_the_bit(name):
    settings = OptimizerSettings(optimizer=name, learning_rate=rate_for(name))
    straight, halfway = problem(), problem()
    optimizer = make_optimizer(straight, settings)
    descend(optimizer, straight, 20)
    first = make_optimizer(halfway, settings)
    descend(first, halfway, 10)
    tensors, rest = state_of(first)
    again = [torch.nn.Parameter(p.detach().clone()) for p in halfway]
    second = make_optimizer(again, settings)
    restore_state(second, {key: value.clone() for key, value in tensors.items()}, rest)
    descend(second, again, 10, first=10)
    assert all(torch.equal(one, other) for one, other in zip(straight, again, strict=True))


def test_what_a_schedule_free_optimizer_gives_out_is_the_average_and_training_goes_on_untouched():
    settings = OptimizerSettings(optimizer="adamw_schedulefree", learning_rate=1e-2)
    parameters, undisturbed = problem(), problem()
    one, other = make_optimizer(parameters, settings), make_optimizer(undisturbed, settings)
    for step in range(20):
        descend(one, parameters, 1, step)
        descend(other, undisturbed, 1, step)
        trained = [p.detach().clone() for p in parameters]
        with given_out(one, settings.kind):
            averaged = [p.detach().clone() for p in parameters]
        assert all(torch.equal(p, value) for p, value in zip(parameters, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, undisturbed, strict=True))
    # y = (1 - beta1) z + beta1 x, of which x is given out
    z = [one.state[p]["z"] for p in parameters]
    for x, y, each in zip(averaged, trained, z, strict=True):
        torch.testing.assert_close(y, 0.1 * each + 0.9 * x)
        assert not torch.equal(x, y)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.package])
def test_a_missing_package_is_named_with_the_way_to_install_it(name, monkeypatch):
    find = importlib.util.find_spec
    missing = OPTIMIZERS[name].path.split(".")[0].split(":")[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == missing else find(module))
    with pytest.raises(ValueError, match=f"pip install {OPTIMIZERS[name].package}"):
        make_optimizer(problem(), OptimizerSettings(optimizer=name, learning_rate=rate_for(name)))


def test_an_argument_that_a_package_refuses_is_an_error_before_training():
    with pytest.raises(ValueError, match=r"AdamW does not work on cpu here .*or use adamw"):
        make_optimizer(problem(), OptimizerSettings(arguments="betas=[2,0.99]"))
