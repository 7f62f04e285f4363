"""Frozen weights stored in fewer bits than they are computed with.

A stored weight is restored where it is used, forward and again backward, so nothing of full size is kept between the
two: autograd would keep the restored copy of every matrix, and the gain would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST = 448.0  # of e4m3fn


class Stored(NamedTuple):
    """A weight (rows, columns) as it is kept, and the float32 factor that restores it, () or (rows, 1), if there is one.

    The factor stays in float32: rounded to 16 bits it would be wrong by up to 0.4 % for a whole row.
    """

    weight: Tensor
    scale: Tensor | None = None


Storing = Callable[[Stored], Stored]


def restored(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, rounded once: every fp8 value is exact in 16 bits, and the product is made in float32."""
    if scale is None:
        return weight.to(dtype)
    return weight.to(dtype, copy=True).mul_(scale)


def to_fp8(stored: Stored) -> Stored:
    """A plain cast to e4m3fn: what is below 2^-10 becomes zero. A weight that is in fp8 already stays as it is."""
    if stored.weight.dtype in FP8:
        return stored
    return Stored(stored.weight.float().clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn))


def to_scaled_fp8(stored: Stored) -> Stored:
    """e4m3fn with a factor per row, so that the row's largest value is the format's largest.

    e4m3fn is a floating point format: its error is relative, and finer blocks than rows would gain little. A weight
    that is in fp8 already stays as it is.
    """
    if stored.weight.dtype in FP8:
        return stored
    full = stored.weight.float()
    scale = full.abs().amax(dim=1, keepdim=True).div_(_LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return Stored(full.div(scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale)


def to_half(stored: Stored) -> Stored:
    """float16, restored to the dtype of the computation: its range is too small for gradients, not for weights."""
    return Stored(restored(*stored, torch.float16))


STORINGS: dict[str, Storing] = {"fp8": to_fp8, "fp8_scaled": to_scaled_fp8, "float16": to_half}


def stored_weights(precision: str, names: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> dict[str, Storing]:
    """The weights of these names that are not kept in the dtype of the computation, as `load_into` takes them: of precision
    "auto" those that are in fp8 in the file. `dtypes` are those of the file."""
    if precision == "auto":
        return {name: STORINGS["fp8"] for name in names if dtypes[name] in FP8}
    return dict.fromkeys(names, STORINGS[precision]) if precision in STORINGS else {}


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for x (tokens, columns). Keeps the stored weight only, which may be moved to and fro meanwhile."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        return F.linear(x, restored(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ restored(ctx.weight, ctx.scale, grad.dtype), None, None, None


def frozen_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (..., columns) -> (..., rows) in the dtype of x, for a stored weight that gets no gradient."""
    # Flat, so that the output is no view made inside of the function: adapters may write to it.
    return _FrozenLinear.apply(x.flatten(0, -2), weight, scale, bias).unflatten(0, x.shape[:-1])


def fast_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (..., columns) -> (..., rows) as a product of two fp8 matrices, x rounded with one factor for all of it
    (arXiv 2209.05433); about twice as fast as in 16 bits where the hardware has such products. No gradients."""
    flat = x.flatten(0, -2)
    factor = flat.abs().amax().float().div_(_LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = flat.div(factor).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    y = torch._scaled_mm(rounded, weight.t(), factor, torch.ones_like(factor), out_dtype=x.dtype)
    if scale is not None:
        y.mul_(scale.reshape(-1).to(x.dtype))
    return (y if bias is None else y.add_(bias)).unflatten(0, x.shape[:-1])


def can_be_fast(weight: Tensor) -> bool:
    """Whether `fast_linear` can work with the weight."""
    return weight.dtype in FP8 and all(side % 16 == 0 for side in weight.shape)


def check_fast(device: torch.device) -> None:
    """Raise ValueError unless the device has products of fp8 matrices."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"fp8_fast needs a card with fp8 units (RTX 40 series or newer), and this is {torch.cuda.get_device_name(device)}: "
                         "use fp8_scaled.")  # fmt: skip
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"fp8_fast cannot work on {device.type}: use fp8_scaled, or bfloat16.")


class _RestoringLinear(nn.Module):
    """Stands for an nn.Linear with a stored weight. It shows no `weight`: some models cast what they compute to its dtype."""

    weight = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.stored = linear

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.stored.weight, self.stored.weight_scale, self.stored.bias)


def linear_weights(module: nn.Module) -> list[str]:
    """Names of the weights of all linear layers."""
    return [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def restore_on_call(module: nn.Module) -> nn.Module:
    """Make plain linear layers whose weights were stored (see `load_into`) restore them in each call.

    For models of other libraries, whose layers are torch's own; `layers.Linear` does it by itself.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and "weight_scale" in child._buffers:
                setattr(parent, name, _RestoringLinear(child))
    return module
