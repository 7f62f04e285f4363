"""Full attention over (B, L, N, D): batch, tokens, heads, head size. No backend ever makes an L x S matrix of a mask."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, L, N, D), k and v (B, S, N, D) -> (B, L, N, D)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _flash3(function: Callable) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v)
        return result[0] if isinstance(result, tuple) else result  # earlier versions also return log-sum-exp

    return attend


def _sage(function: Callable) -> Attend:
    return lambda q, k, v: function(q, k, v, tensor_layout="NHD")


@dataclass(frozen=True)
class Backend:
    """A package's attention: the module and function to import, and how it becomes an Attend."""

    title: str
    module: str
    function: str
    adapt: Callable[[Callable], Attend] = lambda function: function
    trains: bool = True


PACKAGES = {
    "flash": Backend("flash-attn 2", "flash_attn", "flash_attn_func"),
    "flash3": Backend("flash-attn 3", "flash_attn_interface", "flash_attn_func", _flash3),
    "xformers": Backend("xformers", "xformers.ops", "memory_efficient_attention"),
    "sage": Backend("sageattention", "sageattention", "sageattn", _sage, trains=False),
}
BACKENDS = ("sdpa", *PACKAGES)


def load_backend(name: str, device: torch.device, dtype: torch.dtype, *, training: bool) -> Attend:
    """The attention function of that name. ValueError, with what to do, when it cannot work here."""
    if name == "sdpa":
        return sdpa
    backend = PACKAGES[name]
    if training and not backend.trains:
        raise ValueError(f"attention '{name}' has no backward pass: it can sample but not train. Use sdpa or flash.")
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention '{name}' works in 16 bits on a CUDA device, and this is {str(dtype).removeprefix('torch.')} on "
            f"{device}: use sdpa."
        )
    try:
        return backend.adapt(getattr(importlib.import_module(backend.module), backend.function))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"attention '{name}' needs the package {backend.title}, which cannot be loaded ({error}): install the build of it "
            "that fits this torch and CUDA, or use sdpa."
        ) from error


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, heads joined: (B, L, N, D) x (B, S, N, D) -> (B, L, N * D)."""
    return sdpa(q, k, v).flatten(2)


class FullAttention(nn.Module):
    """`attention`, by the function that the model was told to use."""

    def __init__(self) -> None:
        super().__init__()
        self.attend: Attend = sdpa

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v).flatten(2)


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Let all of the model's attention be computed by `attend`."""
    for module in model.modules():
        if isinstance(module, FullAttention):
            module.attend = attend
