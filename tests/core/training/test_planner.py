"""The forecast of memory against what real steps hold, and what is chosen from it."""

from dataclasses import replace

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.families.wan import dit as dit_module
from videolora.core.families.wan.dit import WanConfig, WanDiT
from videolora.core.lora.adapter import attached
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.lora.network import NetworkSettings, make_adapters
from videolora.core.modules.attention import load_backend
from videolora.core.modules.offloading import Offload
from videolora.core.training import loop, planner
from videolora.core.training.batches import Batch
from videolora.core.training.job import MemorySettings

WAN, CPU, CUDA = FAMILIES["wan"], torch.device("cpu"), torch.device("cuda")
CONFIG = WanConfig(dim=128, ffn_dim=256, depth=8, in_channels=16, out_channels=16, text_dim=32, freq_dim=64)
GIB = 2**30


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(dit_module, "TEXT_TOKENS", 8)


def subject(device=CPU, number=None, kind="lora", config=CONFIG, dtype=torch.float32, latents=(2, 16, 2, 16, 16)):
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in WanDiT(config).state_dict().items()}
    matrices = inventory(WAN, shapes)
    whole = {matrix.name: (0, matrix.rows) for matrix in matrices}
    rows = allocate(matrices, Loraid(number=number)).rows if number else whole
    return planner.Subject(
        family=WAN, config=config, matrices=matrices, dtypes=dict.fromkeys(shapes, dtype), rows=rows,
        network=NetworkSettings(rank=4, kind=kind), optimizer_bytes=8,
        latents=latents, conditions={"text_states": torch.empty(latents[0], 7, config.text_dim)}, device=device,
    )  # fmt: skip


def real_step(about, recompute, offload):
    """Bytes that live at once in a real step, and those that autograd keeps after its forward pass."""
    dit = WanDiT(about.config).requires_grad_(False)
    dit.run_block.recompute = recompute
    dit.run_block.offload = Offload(CPU) if offload else None
    latents = torch.randn(about.latents)
    text = torch.randn(about.conditions["text_states"].shape)
    batch = Batch(latents, latents, torch.rand(len(latents)), {"text_states": text})
    adapters = make_adapters(dit, about.rows, about.network, about.matrices, "", seed=0)
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with attached(dit, adapters), planner.LiveBytes([*dit.parameters(), *parameters, latents]) as live:
        if recompute:
            loss = loop.flow_loss(dit, batch, CPU)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = loop.flow_loss(dit, batch, CPU)
        loss.backward()
    frozen = {value.untyped_storage().data_ptr() for value in (*dit.parameters(), *parameters)}
    return live.peak, sum(size for pointer, size in kept.items() if pointer not in frozen)


@pytest.mark.parametrize(
    ("number", "kind"), [(None, "lora"), (None, "loha"), (None, "lokr"), (1, "lora"), (20, "lora")]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_forecast_of_activations_is_what_a_real_step_holds(number, kind, recompute):
    about = subject(number=number, kind=kind)
    forecast, *_ = planner.step_activations(about, "auto", recompute, False)
    peak, kept = real_step(about, recompute, False)
    assert forecast == pytest.approx(peak, rel=0.1)
    assert kept <= forecast, "more than what is kept for backward, which autograd itself tells"
    if number is None and not recompute:
        assert forecast < 1.2 * kept


def test_each_saving_saves_and_what_is_offloaded_is_on_the_host():
    about = subject(CUDA)
    plain, recomputed, offloaded = (
        planner.step_activations(about, "auto", *options) for options in ((False, False), (True, False), (True, True))
    )
    assert plain[0] > 2 * recomputed[0] > 2 * offloaded[0]
    assert offloaded[1] == 8 * 2 * 128 * 128 * 2, "eight block inputs of 128 tokens in bfloat16"


def test_a_frozen_beginning_keeps_no_activations():
    whole, last = (planner.step_activations(subject(number=number), "auto", False, False)[0] for number in (None, 20))
    assert last < whole / 4


def test_weights_are_counted_as_they_are_stored():
    about = subject(CUDA)
    weights = {
        precision: planner.predict(about, MemorySettings(mode="manual", precision=precision)).weights
        for precision in ("float32", "bfloat16", "float16", "fp8", "fp8_scaled")
    }
    with torch.device("meta"):
        parameters = sum(value.numel() for value in WanDiT(CONFIG).parameters())
    matrices = sum(matrix.parameters for matrix in about.matrices)
    assert weights["float32"] == 4 * parameters and weights["bfloat16"] == weights["float16"] == 2 * parameters
    assert weights["fp8"] == 2 * parameters - matrices
    assert weights["fp8_scaled"] == weights["fp8"] + 4 * sum(matrix.rows for matrix in about.matrices)


def test_a_checkpoint_in_fp8_is_planned_as_it_is_stored():
    plan = planner.predict(subject(CUDA, dtype=torch.float8_e4m3fn), MemorySettings(mode="manual"))
    stored = planner.predict(subject(CUDA), MemorySettings(mode="manual", precision="fp8"))
    assert plan.weights == stored.weights


def test_streamed_blocks_leave_the_device_but_for_two():
    about = subject(CUDA)
    plain, streamed = (planner.predict(about, MemorySettings(mode="manual", block_swap=count)) for count in (0, 6))
    block = streamed.host // 6
    assert plain.weights - streamed.weights == 6 * block and streamed.streaming == 2 * block


def test_auto_is_the_fastest_that_fits():
    about = subject(CUDA)
    plans, free = [], 10 * GIB
    while True:
        try:
            plan = planner.choose(about, MemorySettings(), free, GIB)
        except ValueError as error:
            assert "Use" in str(error)
            break
        assert plan.device <= free
        plans.append(plan.settings)
        free = int(plan.device / 0.92) - 1
    assert all(settings.mode == "manual" for settings in plans)
    found = [
        (settings.gradient_checkpointing, settings.offload_checkpoints, settings.precision, settings.block_swap > 0)
        for settings in plans
    ]
    assert found[0] == (False, False, "auto", False)
    assert found == sorted(found) and found[-1] == (True, True, "fp8_scaled", True)


def test_gpus_that_train_together_divide_what_does_not_fit_one():
    about = replace(subject(CUDA), processes=4)
    kept = MemorySettings(mode="manual", offload_checkpoints=True)
    whole, divided = (planner.predict(about, replace(kept, shard=shard)) for shard in (False, True))
    blocks, block = CONFIG.depth, whole.weights / CONFIG.depth
    assert divided.weights < 0.75 * whole.weights and divided.weights > (blocks / 4 + 3) * 0.9 * block
    assert divided.activations == whole.activations
    between = (whole.device + divided.device) // 2
    chosen = planner.choose(about, MemorySettings(), int(between / 0.92), GIB).settings
    assert chosen.shard and not chosen.block_swap and chosen.precision == "auto"
    assert not planner.choose(replace(about, processes=1), MemorySettings(), int(between / 0.92), GIB).settings.shard
    least = planner.choose(about, MemorySettings(), int(divided.device / 0.92 * 0.8), GIB).settings
    assert least.precision == "fp8_scaled"


def test_a_precision_that_was_chosen_is_never_changed():
    about = subject(CUDA)
    for free in (GIB, 12_000_000, 9_000_000, 8_000_000):
        try:
            plan = planner.choose(about, MemorySettings(precision="bfloat16"), free, GIB)
        except ValueError:
            continue
        assert plan.settings.precision == "bfloat16"


def test_manual_settings_are_left_alone_and_refused_with_advice_when_they_do_not_fit():
    settings = MemorySettings(mode="manual", gradient_checkpointing=False, block_swap=3)
    assert planner.choose(subject(CUDA), settings, GIB, GIB).settings == settings
    with pytest.raises(ValueError, match="Use memory mode auto"):
        planner.choose(subject(CUDA), settings, 1000, GIB)
    with pytest.raises(ValueError, match="this model has 8 blocks: use 8 or fewer"):
        planner.choose(subject(CUDA), replace(settings, block_swap=9), GIB, GIB)


@pytest.mark.parametrize("name", ["flash", "flash3", "xformers", "sage"])
def test_attention_that_cannot_work_here_is_refused_at_the_start(name):
    with pytest.raises(ValueError, match=r"use sdpa|Use sdpa"):
        load_backend(name, CPU, torch.float32, training=True)
    with pytest.raises(ValueError, match="but not train" if name == "sage" else "needs the package"):
        load_backend(name, CUDA, torch.bfloat16, training=True)


def test_the_report_names_what_is_too_large_and_what_fits():
    about = subject(CUDA)
    lines = planner.report(about, MemorySettings(), GIB, GIB).splitlines()
    assert len(lines) == 1 and lines[0].startswith("fits: precision auto, no gradient checkpointing")
    plain = planner.predict(about, MemorySettings(mode="manual", gradient_checkpointing=False))
    lines = planner.report(about, MemorySettings(), plain.device, GIB).splitlines()
    assert [line.split(":")[0] for line in lines] == ["too large", "fits"]
    assert "Use fewer frames" in planner.report(about, MemorySettings(), 1000, GIB)
