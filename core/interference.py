"""How much LoRAs disturb each other on one model: what is left of each one's held-out loss when others are on too.

    L_i(S)       held-out loss of LoRA i's clips (its training's validation share, fixed noise and timesteps) with the set S on
    retention    (L_i(none) - L_i(S)) / (L_i(none) - L_i({i})): 1, nothing is lost; 0, as without the LoRA
    additivity   ||v_S - v_0 - sum of (v_i - v_0)|| / sum of ||v_i - v_0||: 0, the velocities simply add up

Disjoint parameters make the merge exact, reversible and free of order. They bound neither of these two: later layers see
what earlier ones have changed. So both are measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .checks import require
from .families import FAMILIES
from .flow import model_time
from .lora import stack
from .lora.adapter import attached
from .lora.inventory import inventory
from .lora.stack import LoadedLoRA, StackEntry
from .training.batches import Batch
from .training.job import Job
from .training.loading import open_dit
from .training.loop import flow_loss
from .training.run import Run
from .training.validation import validation_batches
from .weights import load_into

_SCALE = 2
_PAPER, _INK, _FAINT, _GRID = (250, 250, 248), (38, 42, 51), (116, 122, 134), (226, 228, 231)
_COLOURS = ((63, 112, 196), (36, 138, 110), (224, 109, 46), (150, 90, 190))


@dataclass(frozen=True)
class Subject:
    """A trained LoRA, and batches of clips that it was not trained on."""

    name: str
    lora: LoadedLoRA
    held_out: list[Batch]


@dataclass(frozen=True)
class Interference:
    """What was measured of a group of LoRAs. `losses` are L_i(S) by (i, S); `additivity` is by S."""

    title: str
    names: list[str]
    parameters: list[int]
    losses: dict[tuple[int, tuple[int, ...]], float]
    additivity: dict[tuple[int, ...], float]

    def retention(self, index: int, others: tuple[int, ...]) -> float:
        none, alone = self.losses[index, ()], self.losses[index, (index,)]
        return (none - self.losses[index, others]) / (none - alone)

    @property
    def everything(self) -> tuple[int, ...]:
        return tuple(range(len(self.names)))

    @property
    def pairs(self) -> list[tuple[int, ...]]:
        return list(combinations(self.everything, 2))

    def mean_retention(self, sets: Sequence[tuple[int, ...]]) -> float:
        return fmean(self.retention(index, members) for members in sets for index in members)

    def gain(self, together: bool) -> float:
        """The share of their losses that the LoRAs take away, each alone or all together, on average."""
        on = {i: self.everything if together else (i,) for i in self.everything}
        return fmean(1 - self.losses[i, on[i]] / self.losses[i, ()] for i in self.everything)

    @property
    def worst(self) -> float:
        return min(self.retention(i, self.everything) for i in self.everything)

    @property
    def useless(self) -> list[str]:
        """LoRAs that take nothing away alone: there is nothing to be retained."""
        return [self.names[i] for i in self.everything if self.losses[i, (i,)] >= self.losses[i, ()]]


def subjects(runs: Sequence[Run]) -> tuple[nn.Module, list[Subject]]:
    """The model in float32 and the LoRAs of finished trainings of one model, each with a validation share.

    Raises ValueError when they are not of one model, or hold nothing out.
    """
    jobs = [run.job() for run in runs]
    require(len(jobs) >= 2, "interference is measured between two trainings or more.")
    first, family = jobs[0].experts[0], FAMILIES[jobs[0].family]
    checkpoint, part = open_dit(first)
    with torch.device("meta"):
        dit = family.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    matrices = inventory(family, {name: info.shape for name, info in checkpoint.tensors.items()})
    found = []
    for job in jobs:
        _check(job, first.dit_fingerprint)
        entry = StackEntry(job.final_path)
        (lora,) = stack.load_stack([entry], family, family.variants[first.variant], matrices, allow_overlap=True)
        found.append(Subject(Path(job.name).name, lora, list(validation_batches(job, family, job.experts[0]))))
    return dit, found


def _check(job: Job, dit: str) -> None:
    require(len(job.experts) == 1, f"{job.name} trains two experts: measure trainings of one expert at a time.")
    require(job.experts[0].dit_fingerprint == dit, f"{job.name} was trained on another model than the first one.")
    require(
        job.watch.validation_share > 0,
        f"{job.name} holds nothing out: train it with a validation share (Watch Settings).",
    )
    require(job.final_path.is_file(), f"{job.final_path} does not exist: finish the training first.")


def measure(title: str, dit: nn.Module, group: Sequence[Subject], device: torch.device) -> Interference:
    """Losses and velocities alone, in pairs and all together."""
    dit.to(device)
    everything = tuple(range(len(group)))
    sets = list(dict.fromkeys([(), *((i,) for i in everything), *combinations(everything, 2), everything]))
    losses: dict[tuple[int, tuple[int, ...]], float] = {}
    velocities: dict[tuple[int, ...], Tensor] = {}
    for members in sets:
        with torch.no_grad(), attached(dit, stack.adapters([group[i].lora for i in members], device, torch.float32)):
            for index in members or everything:
                batches = group[index].held_out
                losses[index, members] = fmean(float(flow_loss(dit, batch, device)) for batch in batches)
            velocities[members] = torch.cat(
                [_velocity(dit, batch, device) for one in group for batch in one.held_out[:2]]
            )
    for i, one in enumerate(group):
        require(
            losses[i, (i,)] != losses[i, ()], f"{one.name} changes nothing of its own held-out loss: train it first."
        )
    plain = velocities[()]
    changes = {i: velocities[i,] - plain for i in everything}
    additivity = {
        members: float(
            (velocities[members] - plain - sum(changes[i] for i in members)).norm()
            / sum(changes[i].norm() for i in members)
        )
        for members in sets
        if len(members) > 1
    }
    parameters = [sum(p.numel() for f in one.lora.file.factors.values() for p in f.tensors().values()) for one in group]
    return Interference(title, [one.name for one in group], parameters, losses, additivity)


def _velocity(dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    conditions = {name: value.to(device) for name, value in batch.conditions.items()}
    return dit(batch.latents.to(device), model_time(batch.sigma.to(device)), **conditions).float().flatten().cpu()


def table(found: Sequence[Interference]) -> str:
    """In Markdown: a line per title, with the spread of groups that share it, then each LoRA's retention in its first group."""
    lines = ["| LoRAs | values in a file | loss taken away, alone | loss taken away, all on | retention, in pairs | retention, all on | worst retention, all on | additivity, all on |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    titled = _titled(found)
    for title, groups in titled.items():
        cells = [
            _spread("{:.1%}", [one.gain(together=False) for one in groups]),
            _spread("{:.1%}", [one.gain(together=True) for one in groups]),
            _spread("{:.2f}", [one.mean_retention(one.pairs) for one in groups]),
            _spread("{:.2f}", [one.mean_retention([one.everything]) for one in groups]),
            _spread("{:.2f}", [one.worst for one in groups]),
            _spread("{:.2f}", [one.additivity[one.everything] for one in groups]),
        ]
        lines.append(f"| {title} | {round(fmean(groups[0].parameters)):,} | {' | '.join(cells)} |")
    for one in found:
        if one.useless:
            lines += [
                "",
                f"{', '.join(one.useless)} ({one.title}) took nothing away alone: retention says nothing of it.",
            ]
    for one, *_ in titled.values():
        lines += ["", f"**{one.title}**: held-out loss, and retention beside each other LoRA and beside all", "",
                  "| LoRA | without | alone | " + " | ".join(f"with {name}" for name in one.names) + " | with all |",
                  "|---" * (len(one.names) + 4) + "|"]  # fmt: skip
        for i, name in enumerate(one.names):
            cells = [f"{one.retention(i, tuple(sorted((i, j)))):.3f}" if i != j else "" for j in one.everything]
            lines.append(f"| {name} | {one.losses[i, ()]:.4f} | {one.losses[i, (i,)]:.4f} | " + " | ".join(cells)
                         + f" | {one.retention(i, one.everything):.3f} |")  # fmt: skip
    return "\n".join(lines)


def _titled(found: Sequence[Interference]) -> dict[str, list[Interference]]:
    titled: dict[str, list[Interference]] = {}
    for one in found:
        titled.setdefault(one.title, []).append(one)
    return titled


def _spread(form: str, values: Sequence[float]) -> str:
    """The mean, and from where to where several values lie."""
    mean = form.format(fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def picture(found: Sequence[Interference]) -> Image.Image:
    """Each LoRA's retention alone (1), in its pairs and beside all others, three columns of marks per title."""
    titled = _titled(found)
    width, height, left, top, bottom = 220 * len(titled) + 140, 460, 90, 70, 380
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, size: int, colour: tuple, anchor: str = "la") -> None:
        draw.text((x * _SCALE, y * _SCALE), words, colour, ImageFont.load_default(size * _SCALE), anchor=anchor)

    values = [_retentions(groups) for groups in titled.values()]
    lowest = min(0.0, min(value for group in values for column in group for value in column))
    highest = max(1.05, max(value for group in values for column in group for value in column))
    y = lambda value: bottom - (bottom - top) * (value - lowest) / (highest - lowest)  # noqa: E731
    text(24, 20, "Retention: what is left of each LoRA's gain on clips it has not seen", 16, _INK)
    for tick in range(int(lowest * 4) - (lowest < 0), int(highest * 4) + 1):
        if lowest <= tick / 4 <= highest:
            draw.line(
                [(left * _SCALE, y(tick / 4) * _SCALE), ((width - 30) * _SCALE, y(tick / 4) * _SCALE)], _GRID, _SCALE
            )
            text(left - 10, y(tick / 4), f"{tick / 4:g}", 13, _FAINT, "rm")
    for index, (title, columns) in enumerate(zip(titled, values, strict=True)):
        start, colour = left + 40 + 220 * index, _COLOURS[index % len(_COLOURS)]
        for place, (name, column) in enumerate(zip(("alone", "in pairs", "all"), columns, strict=True)):
            x = start + 60 * place
            for value in column:
                box = [(x - 4) * _SCALE, (y(value) - 4) * _SCALE, (x + 4) * _SCALE, (y(value) + 4) * _SCALE]
                draw.ellipse(box, outline=colour, width=2 * _SCALE)
            mean = y(fmean(column)) * _SCALE
            draw.line([((x - 16) * _SCALE, mean), ((x + 16) * _SCALE, mean)], colour, 3 * _SCALE)
            text(x, bottom + 10, name, 12, _FAINT, "ma")
        text(start + 60, bottom + 36, title, 13, colour, "ma")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _retentions(groups: Sequence[Interference]) -> list[list[float]]:
    sets = [lambda one: [(i,) for i in one.everything], lambda one: one.pairs, lambda one: [one.everything]]
    return [[one.retention(i, members) for one in groups for members in of(one) for i in members] for of in sets]


def write(found: Sequence[Interference], target: Path, command: str, notes: str = "") -> None:
    """The report as Markdown, and its picture beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = target.with_suffix(".png")
    picture(found).save(drawn)
    text = f"""# Do LoRAs disturb each other?

Made by `{command}`.

*Loss taken away*: the share of the loss on clips that a LoRA was not trained on by which it is lower with the LoRA on alone, and with
all on. *Retention*: how much of the former is left when others are on too; 1 is all of it, and above 1 the others help, where clips
have something in common. *Additivity*: how far the change of the velocity by all of them is from the sum of their own changes; 0 is
not at all.

![Retention]({drawn.name})

{table(found)}

## What disjoint LORAIDs give, and what they do not

They give: no parameter is shared. So they merge in any order to the same bytes, each weight is rounded once, and any of them comes out
of the merge again without touching the others. That is exact, and tested.

They do not give: effects that are independent. A later layer sees what an earlier one has changed, whoever owns it, so retention may
be far from 1 and additivity far from 0. How much that costs is in the table, for these models and these clips; measure it on yours.

{notes}"""
    target.write_text(text.rstrip() + "\n", encoding="utf-8")


def report(
    groups: Sequence[tuple[str, Sequence[Path]]], target: Path, device: torch.device, command: str, notes: str = ""
) -> str:
    """Measure groups of trainings (title, run folders) and write the report; its table. Groups of one title are repetitions."""
    found = []
    for title, paths in groups:
        dit, group = subjects([Run(path) for path in paths])
        found.append(measure(title, dit, group, device))
    write(found, target, command, notes)
    return f"{table(found)}\n\n{target}{os.linesep}{target.with_suffix('.png')}"
