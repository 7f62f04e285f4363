"""A loaded image encoder of any family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ImageEncoder:
    """A tower, and what comes before it: `normalised` brings (B, 3, H, W) in -1..1 to the size and range that it knows."""

    def __init__(self, model: nn.Module, normalised: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self._normalised = normalised

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> features (B, tokens, D) on the CPU."""
        weight = next(self.model.parameters())
        return self.model(self._normalised(pictures.to(weight.device)).to(weight.dtype)).cpu()
