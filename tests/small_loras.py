"""LoRAs of a few small matrices, with random contents."""

import torch
from videolora.core.lora.factors import LoHaFactors, LoKrFactors, LoRAFactors
from videolora.core.lora.inventory import Matrix


def matrices_of(shapes):
    return [Matrix(name, rows, columns, ".".join(name.split(".")[:2])) for name, (rows, columns) in shapes.items()]


WAN_MATRICES = matrices_of({"blocks.0.self_attn.q": (16, 12), "blocks.0.cross_attn.k_img": (16, 12), "blocks.1.ffn.0": (24, 12),
                          "blocks.1.ffn.2": (12, 24), "blocks.1.self_attn.o": (16, 16)})  # fmt: skip


def dense(factors, multiplier=1.0, weight=None):
    """multiplier * delta as a matrix; of a DoRA on this weight."""
    band = torch.zeros(factors.shape, dtype=torch.float32)
    factors.measured(lambda: [(0, weight)]).add_to(band, 0, multiplier, weight)
    return band


def some_factors(matrices, rank=4, alpha=2.5, kind="lora", seed=0):
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    make = {
        "lora": lambda m: LoRAFactors(randn(rank, m.columns), randn(m.rows, rank), alpha),
        "loha": lambda m: LoHaFactors(
            randn(m.rows, 2), randn(2, m.columns), randn(m.rows, 2), randn(2, m.columns), alpha
        ),
        "lokr": lambda m: LoKrFactors(randn(4, 2), randn(m.rows // 4, 3), randn(3, m.columns // 2), alpha),
    }[kind]
    return {m.name: make(m) for m in matrices}
