"""Compiled blocks against plain ones."""

import torch
from videolora.core.families import FAMILIES
from videolora.core.families.wan.dit import WanConfig, WanDiT
from videolora.core.lora.adapter import attached, untrained_adapters
from videolora.core.lora.inventory import inventory
from videolora.core.modules import compiling
from videolora.core.training import loop
from videolora.core.training.batches import Batch

CPU = torch.device("cpu")


def gradients(dit, adapters, batch):
    with attached(dit, adapters):
        loop.flow_loss(dit, batch, CPU).backward()
    return {
        (name, role): parameter.grad
        for name, adapter in adapters.items()
        for role, parameter in adapter.named_parameters()
    }


def test_compiled_blocks_have_the_gradients_of_plain_ones():
    torch.manual_seed(0)
    dit = WanDiT(WanConfig(dim=128, ffn_dim=128, depth=2, in_channels=16, out_channels=16, text_dim=32, freq_dim=64))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dit.requires_grad_(False)
    matrices = inventory(FAMILIES["wan"], {name: tuple(value.shape) for name, value in dit.state_dict().items()})
    latents = torch.randn(1, 16, 1, 8, 8)
    batch = Batch(latents, torch.randn_like(latents), torch.tensor([0.5]), {"text_states": torch.randn(1, 7, 32)})
    found = []
    for compiled in (False, True):
        adapters = untrained_adapters(dit, {m.name: (0, m.rows) for m in matrices}, rank=2, alpha=2.0, seed=0)
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.up, std=0.1, generator=torch.Generator().manual_seed(1))
        if compiled:
            compiling.compile_blocks(dit.blocks, CPU)
        found.append(gradients(dit, adapters, batch))
    plain, compiled = found
    for name, value in plain.items():
        assert (compiled[name] - value).norm() < 1e-4 * value.norm(), name
