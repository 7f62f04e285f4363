"""Optimisers: those of torch and transformers, which are always there, and those of packages that a user installs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from .schedules import ScheduleSettings

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An optimiser of a package.

    path        `package.module:Class`
    package     what has to be installed, when it does not come with ComfyUI
    arguments   what it may be given, with our defaults
    one_rate    whether all parameters must have the same learning rate
    least_rate  a learning rate below this is a mistake (for those that find the rate and take ours as a factor)
    state_bytes what it keeps for each parameter
    averages    whether it trains with one set of weights and gives out another, their average (schedule-free)
    """

    title: str
    path: str
    package: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    one_rate: bool = False
    least_rate: float = 0.0
    state_bytes: int = 8
    averages: bool = False

    def check_installed(self) -> None:
        """Raise ValueError when its package is missing."""
        module = self.path.split(".")[0].split(":")[0]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{self.title} needs the package '{self.package}', which is not installed. Install it into ComfyUI's Python "
                f"(python -m pip install {self.package}) and start ComfyUI again, or use adamw."
            )

    def make(self, groups: Iterable[dict], settings: OptimizerSettings) -> Optimizer:
        module, name = self.path.split(":")
        made = getattr(importlib.import_module(module), name)
        values = {**self.arguments, **settings.given_arguments, **self.fixed}
        return made(list(groups), lr=settings.learning_rate, weight_decay=settings.weight_decay, **values)


_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}

OPTIMIZERS: Mapping[str, Kind] = {
    "adamw": Kind(title="AdamW", path="torch.optim:AdamW", arguments=_ADAM),  # arXiv 1711.05101
    "adamw8bit": Kind(title="AdamW 8-bit", path="bitsandbytes.optim:AdamW8bit", package="bitsandbytes", arguments=_ADAM,
                      state_bytes=2),
    # Of transformers: torch's own multiplies the rate by the size of the weights, which are zero at the start.
    "adafactor": Kind(title="Adafactor", path="transformers.optimization:Adafactor",  # arXiv 1804.04235
                      arguments={"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
                                 "scale_parameter": False},
                      fixed={"relative_step": False, "warmup_init": False}, state_bytes=1),
    "lion": Kind(title="Lion", path="lion_pytorch:Lion", package="lion-pytorch",  # arXiv 2302.06675
                 arguments={"betas": (0.9, 0.99)}, state_bytes=4),
    "prodigy": Kind(title="Prodigy", path="prodigyopt:Prodigy", package="prodigyopt",  # arXiv 2306.06101
                    arguments={**_ADAM, "beta3": None, "d0": 1e-6, "d_coef": 1.0, "growth_rate": math.inf,
                               "decouple": True, "use_bias_correction": True, "safeguard_warmup": True, "slice_p": 1},
                    one_rate=True, least_rate=0.1, state_bytes=16),
    "adamw_schedulefree": Kind(title="Schedule-free AdamW", path="schedulefree:AdamWScheduleFree",  # arXiv 2405.15682
                               package="schedulefree", averages=True,
                               arguments={**_ADAM, "r": 0.0, "weight_lr_power": 2.0}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(ScheduleSettings):
    """The optimiser, its learning rate and how that goes. `arguments` are what else it is given, as `name=value`, values in
    JSON: betas=[0.9,0.99] d_coef=2."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    arguments: str = ""

    def __post_init__(self) -> None:
        ScheduleSettings.__post_init__(self)
        require(self.optimizer in OPTIMIZERS, f"optimizer '{self.optimizer}': use one of {', '.join(OPTIMIZERS)}.")
        rate, kind = self.learning_rate, self.kind
        require(0 < rate <= 10, f"learning rate is {rate}: use a number above 0 and up to 1 (2e-4 is a good start).")
        require(
            rate >= kind.least_rate,
            f"learning rate is {rate}: {kind.title} finds the rate itself and multiplies it by this, use 1.",
        )
        require(
            rate <= 1 or kind.least_rate > 0, f"learning rate is {rate}: use a number up to 1 (2e-4 is a good start)."
        )
        require(0 <= self.weight_decay < 1, f"weight decay is {self.weight_decay}: use 0 or a little more (0.01).")
        require(
            self.gradient_accumulation >= 1, f"gradient accumulation is {self.gradient_accumulation}: use 1 or more."
        )
        require(self.max_grad_norm >= 0, f"max gradient norm is {self.max_grad_norm}: use 1.0, or 0 for no limit.")
        require(
            not kind.averages or self.schedule == "constant",
            f"{kind.title} replaces a schedule by averaging, and the schedule is '{self.schedule}': use constant.",
        )
        _ = self.given_arguments

    @property
    def kind(self) -> Kind:
        return OPTIMIZERS[self.optimizer]

    @property
    def given_arguments(self) -> dict[str, Any]:
        """`arguments`, read. Raises ValueError for what the optimiser does not take."""
        given = {}
        for word in self.arguments.split():
            name, _, text = word.partition("=")
            if name not in self.kind.arguments:
                raise ValueError(
                    f"optimizer argument '{word}': {self.kind.title} takes {', '.join(self.kind.arguments)}. Use name=value."
                )
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ValueError(
                    f"optimizer argument '{word}': use a number, true, false, null or a list without spaces, as in "
                    "betas=[0.9,0.99]."
                ) from error
            given[name] = tuple(value) if isinstance(value, list) else value
        return given

    @property
    def all_arguments(self) -> dict[str, Any]:
        """Everything that the optimiser is made with, besides the parameters and the learning rate."""
        return {"weight_decay": self.weight_decay, **self.kind.arguments, **self.given_arguments}


def make_optimizer(parameters: Iterable[nn.Parameter] | Sequence[dict], settings: OptimizerSettings) -> Optimizer:
    """The optimiser of `settings`, ready to train.

    `parameters`, or groups of them with a `ratio` to the schedule's learning rate. Raises ValueError, before anything is
    trained, when its package is missing, does not take the arguments or does not work on the parameters' device.
    """
    parameters = list(parameters)
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters, "ratio": 1.0}]
    kind = settings.kind
    kind.check_installed()
    _try(kind, settings, groups[0]["params"][0].device)
    optimizer = kind.make(groups, settings)
    if kind.averages:
        optimizer.train()
    return optimizer


def _try(kind: Kind, settings: OptimizerSettings, device: torch.device) -> None:
    """Take one step with a small parameter: packages find out only then that a device or an argument does not suit."""
    parameter = nn.Parameter(torch.ones(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = kind.make([{"params": [parameter]}], settings)
        if kind.averages:
            optimizer.train()
        optimizer.step()
    except Exception as error:  # whatever a package raises
        raise ValueError(
            f"{kind.title} does not work on {device} here ({type(error).__name__}: {error}). Check its arguments, bring "
            f"{kind.package or 'torch'} up to date, or use adamw."
        ) from error


@contextmanager
def given_out(optimizer: Optimizer, kind: Kind) -> Iterator[None]:
    """Within the block the parameters are those to save and to show: for schedule-free optimisers, the average.

    Afterwards they are what they were, to the bit.
    """
    if not kind.averages:
        yield
        return
    trained = [(parameter, parameter.detach().clone()) for parameter in _parameters(optimizer)]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)


def effective_rate(optimizer: Optimizer) -> float | None:
    """The learning rate of an optimiser that finds it itself (its `d` times ours); None for all others."""
    group = optimizer.param_groups[0]
    return float(group["d"]) * group["lr"] if "d" in group else None


def state_of(optimizer: Optimizer) -> tuple[dict[str, Tensor], str]:
    """Everything an optimiser has gathered: its tensors by `<number of the parameter>/<name>`, and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[int, dict[str, Any]] = {}
    on_cpu = []  # counters that stay there while the parameters are on a device
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                values.setdefault(number, {})[name] = value
                continue
            tensors[f"{number}/{name}"] = value
            if value.device.type == "cpu" != parameter.device.type:
                on_cpu.append(f"{number}/{name}")
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return tensors, json.dumps({"values": values, "groups": groups, "on_cpu": on_cpu}, default=_number)


def restore_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: str) -> None:
    """The inverse of `state_of`, on an optimiser of the same settings and parameters.

    torch's own `load_state_dict` would cast a state to the dtype of its parameter, whatever its own was.
    """
    described, parameters = json.loads(rest), _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        parameter = parameters[int(number)]
        optimizer.state[parameter][name] = value.to("cpu" if key in described["on_cpu"] else parameter.device)
    for number, values in described["values"].items():
        optimizer.state[parameters[int(number)]].update(values)
    for group, saved in zip(optimizer.param_groups, described["groups"], strict=True):
        group.update({name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _number(value: Any) -> float:
    """Of a group's value that is a tensor or a number of numpy's."""
    return value.item()
