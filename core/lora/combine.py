"""How deltas of several LoRAs on one matrix become one: added; or by TIES or DARE, made for LoRAs that overlap.

A matrix that a single LoRA touches is never changed by the choice: LORAIDs merge alike in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from .factors import Factors

METHODS = ("sum", "ties", "dare")
_BINS = 1 << 15  # the upper half of a positive float32: steps of 2^-7 of a value


@dataclass(frozen=True, kw_only=True)
class Combination:
    """`density` is the share of each delta's elements that TIES and DARE keep; `seed` decides which ones DARE drops."""

    method: str = "sum"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"combination '{self.method}' is unknown: use one of {', '.join(METHODS)}.")
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density is {self.density}: use more than 0 (0.2 keeps a fifth) up to 1 (keeps everything)."
            )

    def describe(self) -> dict[str, object]:
        """For provenance: what has an effect."""
        used = {"sum": (), "ties": ("density",), "dare": ("density", "seed")}[self.method]
        return {"method": self.method, **{name: getattr(self, name) for name in used}}


@dataclass(frozen=True)
class Share:
    """A LoRA's factors of one matrix, its multiplier, and a name of the file's content."""

    factors: Factors
    multiplier: float
    content: str

    def delta(self, first: int, weight: Tensor) -> Tensor:
        """multiplier * delta of the rows from `first` on, where the model has `weight` in float32."""
        band = torch.zeros_like(weight)
        start, stop = self._inside(first, len(weight))
        if start < stop:
            self.factors.add_to(band[start:stop], first + start, self.multiplier, weight[start:stop])
        return band

    def _inside(self, first: int, rows: int) -> tuple[int, int]:
        start, stop = (min(max(row - first, 0), rows) for row in self.factors.touched)
        return start, stop

    def add_to(self, band: Tensor, first: int, weight: Tensor, touched: Tensor) -> None:
        """Add the delta to a band, and mark the rows it touches."""
        start, stop = self._inside(first, len(band))
        if start < stop:
            self.factors.add_to(band[start:stop], first + start, self.multiplier, weight[start:stop])
            touched[start:stop] = True


Adding = Callable[[Tensor, int, Tensor, Tensor], None]
"""(band, first row, weight in float32, rows touched): adds what the LoRAs make of these rows."""


def adding(
    how: Combination, name: str, shares: Sequence[Share], weights: Callable[[], Iterable[tuple[int, Tensor]]]
) -> Adding:
    """The way to add the LoRAs on matrix `name`; `weights` gives all of its bands, (first row, float32)."""
    shares = [replace(share, factors=share.factors.measured(weights)) for share in shares]
    if how.method == "sum" or len(shares) < 2:
        return lambda band, first, weight, touched: _add_all(shares, band, first, weight, touched)
    if how.method == "ties":
        thresholds = [_threshold(share, weights(), how.density) for share in shares]
        return lambda band, first, weight, touched: _ties(shares, thresholds, band, first, weight, touched)
    return lambda band, first, weight, touched: _dare(shares, how, name, band, first, weight, touched)


def _add_all(shares: Sequence[Share], band: Tensor, first: int, weight: Tensor, touched: Tensor) -> None:
    for share in shares:
        share.add_to(band, first, weight, touched)


def _threshold(share: Share, weights: Iterable[tuple[int, Tensor]], density: float) -> float:
    """The magnitude above which `density` of the delta's elements lie, to 1 %: from a histogram, so that no whole delta is
    held."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for first, weight in weights:
        bins = share.delta(first, weight).abs_().view(torch.int32).flatten() >> 16
        counts += torch.bincount(bins, minlength=_BINS)
    counts[0] = 0  # what the LoRA does not touch
    above = counts.flip(0).cumsum(0).flip(0)  # elements in this bin or a higher one
    highest = (above >= density * float(counts.sum())).nonzero()[-1]
    return float((highest.int() << 16).view(torch.float32))


def _ties(
    shares: Sequence[Share], thresholds: Sequence[float], band: Tensor, first: int, weight: Tensor, touched: Tensor
) -> None:
    """TIES (arXiv 2306.01708): small elements are trimmed, the sign with more weight is elected, and the mean of those that
    agree with it is added."""
    trimmed = []
    for share, threshold in zip(shares, thresholds, strict=True):
        delta = share.delta(first, weight)
        trimmed.append(delta.masked_fill_(delta.abs() < threshold, 0.0))
    stacked = torch.stack(trimmed)
    elected = stacked.sum(0).sign()
    agreeing = (stacked.sign() == elected) & (stacked != 0)
    band += (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    touched |= stacked.ne(0).any(0).any(1)


def _dare(
    shares: Sequence[Share], how: Combination, name: str, band: Tensor, first: int, weight: Tensor, touched: Tensor
) -> None:
    """DARE (arXiv 2311.03099): elements of each delta are dropped at random, the others scaled up by as much."""
    for share in shares:
        # Of the file's content, not of its place in the stack: the order has no effect.
        rng = torch.Generator().manual_seed(crc32(f"{how.seed}/{share.content}/{name}/{first}".encode()))
        kept = torch.empty_like(band).bernoulli_(how.density, generator=rng)
        band.addcmul_(share.delta(first, weight), kept, value=1 / how.density)
        start, stop = share.factors.touched
        touched[max(start - first, 0) : max(stop - first, 0)] = True
