"""LoRAs of a chosen rank: of another LoRA, or of what two checkpoints differ in. The best of that rank by Eckart and Young."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..family import Part
from ..weights import Checkpoint
from .factors import Factors, LoRAFactors
from .files import LoRAFile
from .inventory import Matrix

_EXACT_SIDE = (
    1024  # smaller matrices are decomposed whole; of larger ones the leading part is found by random projection
)
_OVERSAMPLING, _ITERATIONS = 16, 4  # arXiv 0909.4061, section 4: enough for spectra that fall slowly


@dataclass(frozen=True)
class Approximation:
    """A delta in a lower rank, the squared Frobenius norms of what is lost and of the whole. None: there is no delta."""

    name: str
    factors: Factors | None
    lost: float
    whole: float

    @property
    def error(self) -> float:
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


def resized(file: LoRAFile, rank: int) -> Iterator[Approximation]:
    """Each matrix of the LoRA in this rank at most; one of a lower rank stays as it is. Raises ValueError for a DoRA."""
    _check_rank(rank)
    for name, factors in file.factors.items():
        try:
            yield Approximation(name, *_lowered(factors, rank))
        except ValueError as error:
            raise ValueError(f"{file.path.name}: '{name}': {error}") from error


def _lowered(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    start, stop = factors.touched
    lora = factors.as_lora().to(torch.float32)
    if start == stop or lora.rank <= rank:
        norm = float((lora.up.t() @ lora.up * (lora.down @ lora.down.t())).sum()) * lora.scale**2
        return lora, 0.0, norm
    # Only the rows that are trained: elsewhere rounding would leave something other than zero.
    up, down = lora.up[start:stop] * lora.scale, lora.down
    (left, small_left), (right, small_right) = torch.linalg.qr(up), torch.linalg.qr(down.t())
    u, s, vh = torch.linalg.svd(small_left @ small_right.t())
    made = _balanced(left @ u[:, :rank], s[:rank], vh[:rank] @ right.t())
    return made.placed(start, lora.shape[0]), float(s[rank:].square().sum()), float(s.square().sum())


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> LoRAFactors:
    """Singular values are shared by both factors, as training leaves them of similar size."""
    root = s.sqrt()
    return LoRAFactors((root[:, None] * vh).contiguous(), u * root, float(len(s)))


def extracted(
    base: Checkpoint, base_part: Part, tuned: Checkpoint, tuned_part: Part, matrices: Sequence[Matrix], rank: int
) -> Iterator[Approximation]:
    """What `tuned` has learnt over `base`, matrix by matrix: one of each at a time is in memory.

    Raises ValueError when the two are of different size.
    """
    _check_rank(rank)
    theirs = {tuned_part.keymap.to_model(name): name for name in tuned.tensors}
    for m in matrices:
        ours, name = base_part.keymap.to_file(f"{m.name}.weight"), theirs.get(f"{m.name}.weight")
        if name is None or tuned.tensors[name].shape != (m.rows, m.columns):
            raise ValueError(
                f"{tuned.path.name} and {base.path.name} are models of different size: '{m.name}' differs."
            )
        delta = tuned.read(name, torch.float32).sub_(base.read(ours, torch.float32))
        yield Approximation(m.name, *_decomposed(delta, rank))


def _decomposed(delta: Tensor, rank: int) -> tuple[Factors | None, float, float]:
    whole = float(delta.double().square().sum()) if delta.any() else 0.0
    if not whole:
        return None, 0.0, 0.0
    changed = delta.ne(0).any(dim=1).nonzero()
    start, stop = int(changed[0]), int(changed[-1]) + 1
    u, s, v = _leading(delta[start:stop], rank)
    made = _balanced(u, s, v.t())
    return made.placed(start, len(delta)), max(whole - float(s.double().square().sum()), 0.0), whole


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.t()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + _OVERSAMPLING, *matrix.shape), niter=_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank is {rank}: use 1 or more (16 is a good start).")


def other_differences(
    base: Checkpoint, base_part: Part, tuned: Checkpoint, tuned_part: Part, matrices: Iterable[Matrix]
) -> list[str]:
    """Parameters that differ and that no LoRA can hold: norms, biases, what lies outside of the blocks."""
    held = {f"{m.name}.weight" for m in matrices}
    theirs = {tuned_part.keymap.to_model(name): name for name in tuned.tensors}
    names = {base_part.keymap.to_model(name): name for name in base.tensors}
    return [
        name
        for name, ours in names.items()
        if name not in held
        and (
            name not in theirs
            or not torch.equal(base.read(ours, torch.float32), tuned.read(theirs[name], torch.float32))
        )
    ]


def factors_of(made: Iterable[Approximation]) -> dict[str, Factors]:
    return {one.name: one.factors for one in made if one.factors is not None}


def report(made: Sequence[Approximation]) -> str:
    """How much of the deltas is lost, and where most."""
    kept = [one for one in made if one.factors is not None]
    if not kept:
        return "there is no difference"
    lost, whole = sum(one.lost for one in kept), sum(one.whole for one in kept)
    worst = max(kept, key=lambda one: one.error)
    error = (lost / whole) ** 0.5 if whole else 0.0
    return (f"{len(kept)} matrices, error {error:.2%} of the delta's norm, most in {worst.name} ({worst.error:.2%})")  # fmt: skip


def metadata_of(source: Mapping[str, str], made: Mapping[str, Factors]) -> dict[str, str]:
    """The metadata with the largest rank and its alpha, as trainers write them."""
    rank = max(factors.rank for factors in made.values())
    return {**source, "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
