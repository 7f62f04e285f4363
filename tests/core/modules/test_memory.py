"""What is traded for memory changes no gradient: recomputing, offloading, streaming, and all of them with LORAID shares."""

import weakref
from itertools import pairwise

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.families.wan import dit as dit_module
from videolora.core.families.wan.dit import WanConfig, WanDiT
from videolora.core.lora.adapter import attached, untrained_adapters
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.modules.offloading import Offload
from videolora.core.modules.quantized import STORINGS, Stored
from videolora.core.modules.streaming import BlockStream, move_resident, streamed_blocks, streamed_weights
from videolora.core.training import loop
from videolora.core.training.batches import Batch
from videolora.core.training.optimizers import OptimizerSettings, make_optimizer

CPU = torch.device("cpu")
DEPTH = 6


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """Most of the time would go into padding."""
    monkeypatch.setattr(dit_module, "TEXT_TOKENS", 8)


def model(dtype=torch.float32, storing=None):
    """A small transformer with random weights, those of its matrices stored as `storing` says, and its matrices."""
    torch.manual_seed(0)
    dit = WanDiT(
        WanConfig(dim=128, ffn_dim=192, depth=DEPTH, in_channels=16, out_channels=16, text_dim=32, freq_dim=64)
    )
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            torch.nn.init.normal_(parameter, std=0.1)
    dit.to(dtype).requires_grad_(False)
    matrices = inventory(FAMILIES["wan"], {name: tuple(value.shape) for name, value in dit.state_dict().items()})
    for matrix in matrices if storing else ():
        layer = dit.get_submodule(matrix.name)
        weight, layer.weight_scale = STORINGS[storing](Stored(layer.weight.data))
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return dit, matrices


def shares(matrices):
    return {
        "whole model": {matrix.name: (0, matrix.rows) for matrix in matrices},
        "first slots": allocate(matrices, Loraid(number=1)).rows,
        "last slots": allocate(matrices, Loraid(number=20)).rows,
        "rows": allocate(matrices, Loraid(number=3, unit="row")).rows,
    }


def adapters_for(dit, rows, dtype=torch.float32):
    made = untrained_adapters(dit, rows, 4, 4.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for adapter in made.values():
        torch.nn.init.normal_(adapter.up, std=0.2, generator=generator)  # zero would hide most gradients
        adapter.to(dtype)
    return made


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, target = (torch.randn(2, 16, 2, 4, 6, generator=generator) for _ in range(2))
    text = torch.randn(2, 7, 32, generator=generator)
    return Batch(latents, target, torch.rand(2, generator=generator), {"text_states": text})


def applied(dit, *, recompute=False, offload=False, streamed=0):
    dit.run_block.recompute = recompute
    dit.run_block.offload = Offload(CPU) if offload else None
    if streamed:
        dit.run_block.stream = BlockStream(dit.blocks, streamed_blocks(streamed, DEPTH), CPU)
    return dit


OPTIONS = {
    "recompute": {"recompute": True},
    "offload": {"recompute": True, "offload": True},
    **{f"stream {count}": {"streamed": count} for count in (1, 2, 3, 5, 6)},
    "stream 4 and recompute": {"recompute": True, "streamed": 4},
    "stream 6 and offload": {"recompute": True, "offload": True, "streamed": 6},
}


def gradients(dit, adapters, data):
    for adapter in adapters.values():
        adapter.zero_grad(set_to_none=True)
    with attached(dit, adapters):
        loop.flow_loss(dit, data, CPU).backward()
    return {f"{name}.{role}": p.grad for name, adapter in adapters.items() for role, p in adapter.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_those_of_the_plain_model_in_float64(option):
    for share in ("whole model", "first slots", "last slots", "rows"):
        results = []
        for settings in ({}, OPTIONS[option]):
            dit, matrices = model(torch.float64)
            adapters = adapters_for(dit, shares(matrices)[share], torch.float64)
            applied(dit, **settings)
            results.append(
                [gradients(dit, adapters, batch(seed)) for seed in range(3)]
            )  # three steps: orders are learnt
        assert all(gradient.abs().sum() > 0 for gradient in results[0][0].values())
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("storing", [None, "fp8_scaled"])
def test_thirty_steps_end_in_the_same_bits_whatever_is_traded_for_memory(storing):
    results = []
    for option in (None, "recompute", "stream 3", "stream 6 and offload"):
        dit, matrices = model(storing=storing)
        adapters = adapters_for(dit, shares(matrices)["rows"])
        applied(dit, **OPTIONS.get(option, {}))
        parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
        optimizer = make_optimizer(parameters, OptimizerSettings())
        with attached(dit, adapters):
            losses = [loop.train_step(dit, optimizer, [batch(step % 3)], 1e-3, 1.0, CPU).loss for step in range(30)]
        results.append((losses, parameters))
    assert sum(results[0][0][-3:]) < sum(results[0][0][:3])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(("storing", "tolerance"), [("float16", 1e-3), ("fp8_scaled", 0.03), ("fp8", 0.03)])
def test_thirty_steps_on_stored_weights_stay_near_those_on_plain_ones(storing, tolerance):
    losses = []
    for name in (None, storing):
        dit, matrices = model(storing=name)
        adapters = adapters_for(dit, shares(matrices)["whole model"])
        optimizer = make_optimizer([p for a in adapters.values() for p in a.parameters()], OptimizerSettings())
        with attached(dit, adapters):
            losses.append([loop.train_step(dit, optimizer, [batch()], 1e-3, 1.0, CPU).loss for _ in range(30)])
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)


def test_sampling_gives_the_same_with_streamed_blocks_and_training_can_follow():
    dit, matrices = model()
    adapters = adapters_for(dit, shares(matrices)["last slots"])
    data = batch()
    with torch.inference_mode():
        expected = [dit(data.latents, data.sigma, **data.conditions) for _ in range(3)]
    plain = gradients(dit, adapters, data)
    with torch.inference_mode():
        applied(dit, streamed=5)
        found = [dit(data.latents, data.sigma, **data.conditions) for _ in range(3)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(dit, adapters, data), plain, rtol=0, atol=0)


def test_streamed_blocks_are_evenly_spread():
    assert streamed_blocks(2, 40) == [10, 30]
    assert streamed_blocks(40, 40) == list(range(40))
    for count in range(1, 40):
        numbers = streamed_blocks(count, 40)
        assert len(set(numbers)) == count and numbers[0] >= 0 and numbers[-1] < 40
        gaps = [after - before for before, after in pairwise(numbers)]
        assert not gaps or max(gaps) - min(gaps) <= 1


class Watched(BlockStream):
    """Counts the copies, and how many of them were begun only when they were needed."""

    copies = misses = 0

    def _holding(self, index):
        missing = all(buffer.tenant != index for buffer in self.buffers)
        self.copies += missing
        self.misses += missing and index == self.recent[1]
        return super()._holding(index)


@pytest.mark.parametrize("share", ["whole model", "last slots"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_comes_once_per_pass_and_before_it_is_needed(share, recompute):
    dit, matrices = model()
    adapters = adapters_for(dit, shares(matrices)[share])
    dit.run_block.recompute = recompute
    stream = dit.run_block.stream = Watched(dit.blocks, range(DEPTH), CPU)
    for _ in range(2):
        gradients(dit, adapters, batch())
    stream.copies = stream.misses = 0
    gradients(dit, adapters, batch())
    assert stream.misses == 0
    up_and_down = 2 * DEPTH if share == "whole model" else DEPTH + 2
    assert stream.copies <= up_and_down


def test_the_same_block_twice_in_a_row_is_copied_once():
    dit, _ = model()
    stream = Watched(dit.blocks, [1, 3, 5], CPU)
    for _ in range(3):
        stream.fetch(dit.blocks[3])
    assert stream.copies == 2, "itself, and the one expected next"
    stream.fetch(dit.blocks[0])  # lives on the device
    assert stream.copies == 2


def test_no_more_than_two_blocks_visit_the_device():
    dit, matrices = model()
    stream = dit.run_block.stream = BlockStream(dit.blocks, range(DEPTH), CPU)
    gradients(dit, adapters_for(dit, shares(matrices)["whole model"]), batch())
    homes = [master.data_ptr() for master in stream.masters]
    visiting = [weights[0].data_ptr() not in homes for weights in stream.weights]
    assert sum(visiting) == 2
    assert sum(len(buffer.memory) for buffer in stream.buffers) == 2 * len(stream.masters[0])


def test_a_resting_stream_holds_nothing_on_the_device_and_goes_on():
    dit, _ = model()
    data = batch()
    expected = dit(data.latents, data.sigma, **data.conditions)
    stream = dit.run_block.stream = BlockStream(dit.blocks, [1, 3], CPU)
    for _ in range(2):
        assert torch.equal(dit(data.latents, data.sigma, **data.conditions), expected)
        assert len(stream.buffers) == 2
        stream.rest()
        assert not stream.buffers
        homes = [master.data_ptr() for master in stream.masters]
        assert [weights[0].data_ptr() for weights in stream.weights] == homes
    streamed = {id(weight) for weights in stream.weights for weight in weights}
    assert {id(value) for value in dit.parameters() if stream.streams(value)} == streamed
    homes = {id(value): value.data_ptr() for value in dit.parameters()}
    move_resident(dit, stream, CPU)
    assert {id(value): value.data_ptr() for value in dit.parameters()} == homes


def test_after_an_error_in_the_middle_the_next_step_is_right():
    dit, matrices = model()
    adapters = adapters_for(dit, shares(matrices)["whole model"])
    expected = gradients(dit, adapters, batch())
    applied(dit, recompute=True, offload=True, streamed=5)

    def fail(*_):
        raise RuntimeError("out of memory")

    for when in ("register_forward_pre_hook", "register_full_backward_pre_hook"):
        handle = getattr(dit.blocks[3], when)(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            gradients(dit, adapters, batch(1))
        handle.remove()
        torch.testing.assert_close(gradients(dit, adapters, batch()), expected, rtol=0, atol=0)


def test_a_closed_stream_leaves_the_weights_as_they_were_and_can_be_opened_again():
    dit, matrices = model()
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    adapters = adapters_for(dit, shares(matrices)["rows"])
    expected = gradients(dit, adapters, batch())
    for count in (5, 3):
        applied(dit, streamed=count)
        torch.testing.assert_close(gradients(dit, adapters, batch()), expected, rtol=0, atol=0)
        dit.run_block.stream.close()
        dit.run_block.stream = None
        torch.testing.assert_close(dict(dit.state_dict()), before, rtol=0, atol=0)
        torch.testing.assert_close(gradients(dit, adapters, batch()), expected, rtol=0, atol=0)


def test_adapters_are_never_streamed():
    dit, matrices = model()
    adapters = adapters_for(dit, shares(matrices)["whole model"])
    with attached(dit, adapters):
        names = [name for name, _ in streamed_weights(dit.blocks[0])]
    assert names and not any("adapter" in name for name in names)


def test_block_inputs_are_kept_on_the_host_and_their_buffers_used_again():
    dit, matrices = model()
    adapters = adapters_for(dit, shares(matrices)["whole model"])
    applied(dit, recompute=True, offload=True)
    offload, buffers = dit.run_block.offload, []
    for seed in range(3):
        gradients(dit, adapters, batch(seed))
        buffers.append(sorted(buffer.data_ptr() for buffer in offload.free))
    assert len(buffers[0]) == DEPTH and buffers[0] == buffers[1] == buffers[2]


def test_an_offloaded_forward_pass_leaves_no_block_input_on_the_device():
    alive = {}
    for offload in (False, True):
        dit, matrices = model()
        applied(dit, recompute=True, offload=offload)
        inputs = []
        for block in dit.blocks:
            block.register_forward_pre_hook(
                lambda _, x, inputs=inputs: inputs.append(weakref.ref(x[0].untyped_storage()))
            )
        with attached(dit, adapters_for(dit, shares(matrices)["whole model"])):
            loss = loop.flow_loss(dit, batch(), CPU)
        alive[offload] = sum(storage() is not None for storage in inputs)
        assert loss.requires_grad
    assert alive == {False: DEPTH, True: 0}
