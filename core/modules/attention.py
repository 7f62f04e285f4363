"""Attention over (B, L, N, D): batch, tokens, heads, head size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention without a mask, heads joined: (B, L, N, D) x (B, S, N, D) -> (B, L, N * D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
