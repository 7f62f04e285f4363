"""Layers: a linear layer that an adapter can be attached to, time and rotary embedding. L tokens, N heads, D head size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantized import can_be_fast, fast_linear, frozen_linear


class Linear(nn.Linear):
    """A linear layer with room for one adapter, which adds its share to the output.

    A frozen weight may be stored in fewer bits (see `quantized.py`); `weight_scale` is its factor, if it has one. `fast`
    products are made in fp8 themselves.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight_scale", None)
        self.adapter: nn.Module | None = None
        self.fast = False

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            y = F.linear(x, self.weight, self.bias)
        elif self.fast:
            y = fast_linear(x, self.weight, self.weight_scale, self.bias)
        else:
            y = frozen_linear(x, self.weight, self.weight_scale, self.bias)
        return y if self.adapter is None else self.adapter(x, y)


def use_fast_products(model: nn.Module) -> None:
    """Let all linear layers with fp8 weights that can work so do it."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.fast = can_be_fast(module.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def sinusoids(time: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim) float32: cosines, then sines, of frequencies from 1 to 1 / 10000."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def rotary_tables(
    sizes: Sequence[int], dims: Sequence[int], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (L, 1, sum(dims) / 2) of axial rotary embedding for a grid of `sizes`, in float32.

    `dims` are the head dimensions given to each axis (RoFormer, arXiv 2104.09864, axis by axis).
    """
    axes = []
    for axis, (size, dim) in enumerate(zip(sizes, dims, strict=True)):
        frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angle = torch.arange(size, device=device, dtype=torch.float32)[:, None] * frequency
        view = [1] * len(sizes) + [dim // 2]
        view[axis] = size
        axes.append(angle.view(view).expand(*sizes, dim // 2))
    angles = torch.cat(axes, -1).flatten(0, len(sizes) - 1).unsqueeze(1)  # (L, 1, D / 2)
    return angles.cos(), angles.sin()


class _Rotary(torch.autograd.Function):
    """Rotates pairs of neighbours in float32, head by head: neither a float32 copy of x nor x itself is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # a rotation's gradient is the rotation back


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for group, target in zip(x.split(8, dim=2), out.split(8, dim=2), strict=True):  # of heads, to bound memory
        a, b = group[..., 0::2], group[..., 1::2]
        target[..., 0::2] = a * cos - b * sin
        target[..., 1::2] = a * sin + b * cos
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables to x (B, L, N, D)."""
    return _Rotary.apply(x, cos, sin)
