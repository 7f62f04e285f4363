"""What VAEs that take a clip a few frames at a time have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream:
    """What the layers remember between two chunks of one clip, on the CPU when `on_cpu`. `first` until the coder says that
    the clip's first chunk has passed."""

    def __init__(self, on_cpu: bool) -> None:
        self._kept: dict[nn.Module, Tensor] = {}
        self._device = torch.device("cpu") if on_cpu else None
        self.first = True

    def recall(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """What the layer kept, or None at the clip's first chunk."""
        kept = self._kept.get(layer)
        return None if kept is None else kept.to(device)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        self._kept[layer] = frames.to(self._device or frames.device, copy=True)


class ChannelRMSNorm(nn.Module):
    """Normalises over channels, those of (B, C, ...) with so many `dims` behind them."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma * self.gamma.shape[0] ** 0.5)
