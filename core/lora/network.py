"""What is trained: the kind and size of the adapters, the matrices they are put on, and what they start from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..checks import require
from ..io.files import fingerprint
from . import files
from .adapter import KINDS, Adapter, Dropout, untrained_adapters
from .factors import Factors
from .files import LoRAFile
from .inventory import Matrix
from .loraid import Rows
from .names import LoRANames
from .patterns import check_patterns, chosen

_MOST_LOHA_RANK = 64  # it reaches the rank of a LoRA of 4096, and costs what that costs


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The adapters (see `adapter.py`).

    kind                lora, loha or lokr
    rank, alpha         the delta is scaled by alpha / rank
    factor              most rows and columns of LoKr's first matrix; -1: as near to square as they divide
    dropout             probability of each rank activation to be dropped, of every token
    rank_dropout        of a rank, for a whole sample
    module_dropout      of an adapter, for a whole batch
    loraplus_lr_ratio   LoRA+ (arXiv 2402.12354): learning rate of the up matrices, in that of the down matrices
    max_norm            deltas with a larger Frobenius norm are shrunk to it after each step; 0 for no limit
    include, exclude    regular expressions on whole names of matrices: train only these, and not those
    modulation          also train the matrices that make modulation of the time, where the family lists them
    start_from          a LoRA file to go on from, and its fingerprint
    """

    rank: int = 16
    alpha: float = 16.0
    kind: str = "lora"
    factor: int = -1
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float = 1.0
    max_norm: float = 0.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modulation: bool = False
    start_from: str = ""
    start_fingerprint: str = ""

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"network kind '{self.kind}': use one of {', '.join(KINDS)}.")
        require(self.rank >= 1, f"LoRA rank is {self.rank}: use 1 or more (16 is a good start).")
        require(0 < self.alpha < math.inf, f"LoRA alpha is {self.alpha}: use a number above 0, such as the rank.")
        require(
            self.kind != "loha" or self.rank <= _MOST_LOHA_RANK,
            f"LoHa rank is {self.rank}: use {_MOST_LOHA_RANK} or less; LoHa reaches the square of its rank (8 is a good start).",
        )
        require(
            self.factor == -1 or self.factor >= 1, f"LoKr factor is {self.factor}: use -1 (automatic), or 1 or more."
        )
        require(self.kind == "lokr" or self.factor == -1, f"'{self.kind}' has no factor, only lokr has: set it to -1.")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}: use 0 (off) or a little more (0.1), less than 1.")
        ratio = self.loraplus_lr_ratio
        require(0 < ratio <= 1000, f"LoRA+ ratio is {ratio}: use 1 (off), or 4 to 16.")
        require(
            self.kind == "lora" or ratio == 1,
            f"'{self.kind}' has no up matrix, which LoRA+ is for: set its ratio to 1.",
        )
        require(0 <= self.max_norm < math.inf, f"max norm is {self.max_norm}: use 0 (off), or 1 or so.")
        check_patterns(*self.include, *self.exclude)

    @property
    def dropouts(self) -> Dropout:
        return Dropout(neuron=self.dropout, rank=self.rank_dropout, module=self.module_dropout)

    def chosen(self, matrices: Sequence[Matrix], share: Mapping[str, Rows] | None = None) -> dict[str, Rows]:
        """The rows to train of a model with these matrices: what the patterns choose of a LORAID's share, or of all.

        Raises ValueError for a pattern that matches none of them, when nothing is left to train, and for modulation where
        the model has none or a LORAID is trained.
        """
        has_modulation = any(matrix.modulation for matrix in matrices)
        require(
            has_modulation or not self.modulation, "this model's modulation cannot be trained: switch modulation off."
        )
        require(share is None or not self.modulation, "no LORAID owns the modulation: switch modulation off, or train without "
                "a LORAID.")  # fmt: skip
        whole = {m.name: (0, m.rows) for m in matrices if self.modulation or not m.modulation}
        rows = whole if share is None else share
        left = set(chosen(rows, self.include, self.exclude, [matrix.name for matrix in matrices]))
        require(bool(left), f"include and exclude leave none of the {len(rows)} matrices to train: widen them.")
        return {name: owned for name, owned in rows.items() if name in left}


def make_adapters(
    dit: nn.Module, rows: Mapping[str, Rows], settings: NetworkSettings, matrices: Sequence[Matrix], title: str,
    seed: int, names: LoRANames | None = None,
) -> dict[str, Adapter]:  # fmt: skip
    """The adapters to train on a share: fresh ones, or those of the file to start from. `title` names the model, `names` are
    its family's.

    Raises ValueError when that file does not fit.
    """
    adapters = untrained_adapters(
        dit, rows, settings.rank, settings.alpha, seed, kind=settings.kind, factor=settings.factor
    )
    if settings.start_from:
        file = read_start(settings, rows, matrices, title, names)
        for name, adapter in adapters.items():
            _copy(adapter, file.factors[name], f"{file.path.name}, '{name}'")
    for adapter in adapters.values():
        adapter.dropout = settings.dropouts
    return adapters


def read_start(settings: NetworkSettings, rows: Mapping[str, Rows], matrices: Sequence[Matrix], title: str,
               names: LoRANames | None = None) -> LoRAFile:  # fmt: skip
    """The file to start from. Raises ValueError when it does not fit the share, the kind and the rank.

    All or nothing: what would silently start afresh, or be lost, is an error.
    """
    path = Path(settings.start_from)
    if fingerprint(path) != settings.start_fingerprint:
        raise ValueError(f"{path.name}, the LoRA to start from, was changed. Queue the training again.")
    file = files.read(path, matrices, title, names)
    if file.unmatched:
        raise ValueError(
            f"{path.name} cannot be gone on from: {len(file.unmatched)} of its keys fit no matrix of this model "
            f"({', '.join(file.unmatched[:3])}, ...)."
        )
    missing, left = rows.keys() - file.factors.keys(), file.factors.keys() - rows.keys()
    if missing or left:
        lists = ((missing, "it has nothing for"), (left, "these would be lost, as they are not trained here:"))
        what = "; ".join(f"{text} {len(names)} matrices such as {min(names)}" for names, text in lists if names)
        raise ValueError(
            f"{path.name} is for other matrices than are to be trained: {what}. Use the LORAID, include and exclude that it "
            "was trained with."
        )
    for name, factors in file.factors.items():
        (start, stop), (first, last) = rows[name], factors.touched
        where = f"{path.name}, '{name}': it"
        require(factors.kind == settings.kind, f"{where} is a {factors.kind}, and a {settings.kind} is to be trained. Set the "
                f"kind to {factors.kind}.")  # fmt: skip
        require(
            factors.kind == "lokr" or factors.rank == settings.rank,
            f"{where} is of rank {factors.rank}, and rank {settings.rank} is to be trained. Set the rank to {factors.rank}.",
        )
        require(
            first == last or (start <= first and last <= stop),
            f"{where} changes rows {first} to {last - 1}, and rows {start} to {stop - 1} are to be trained. Use its LORAID.",
        )
    return file


@torch.no_grad()
def _copy(adapter: Adapter, factors: Factors, where: str) -> None:
    source = factors.adapter(adapter.rows)
    shapes, wanted = (
        {name: " x ".join(map(str, value.shape)) for name, value in one.named_parameters()} for one in (source, adapter)
    )
    require(
        shapes == wanted,
        f"{where} has factors of {shapes}, and {wanted} are to be trained. Set the rank and factor that it was trained with.",
    )
    adapter.load_state_dict(source.state_dict())
    # The delta stays what was trained: where the file has another alpha, one factor takes the difference up.
    next(adapter.parameters()).mul_(source.scale / adapter.scale)


def parameter_groups(adapters: Mapping[str, Adapter], settings: NetworkSettings) -> list[dict]:
    """The adapters' parameters for an optimiser; `ratio` is a group's learning rate in the schedule's."""
    named = [(name, value) for adapter in adapters.values() for name, value in adapter.named_parameters()]
    if settings.loraplus_lr_ratio == 1:
        return [{"params": [value for _, value in named], "ratio": 1.0}]
    up = [value for name, value in named if name == "up"]
    rest = [value for name, value in named if name != "up"]
    return [{"params": rest, "ratio": 1.0}, {"params": up, "ratio": settings.loraplus_lr_ratio}]
