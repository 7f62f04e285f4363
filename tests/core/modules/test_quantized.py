"""Weights in fewer bits: what is stored, what is restored, and what autograd is left with."""

import copy
import json
import weakref

import pytest
import reference
import torch
from safetensors.torch import save_file
from torch import nn
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.wan import text
from videolora.core.keymap import IDENTITY
from videolora.core.lora.adapter import LoRA, Several
from videolora.core.lora.inventory import inventory
from videolora.core.modules import quantized
from videolora.core.modules.layers import Linear, use_fast_products
from videolora.core.modules.quantized import (
    FP8,
    STORINGS,
    Stored,
    check_fast,
    linear_weights,
    restore_on_call,
    restored,
    to_fp8,
    to_scaled_fp8,
)
from videolora.core.weights import load_into, open_checkpoint

WAN = FAMILIES["wan"]


def matrix(rows=48, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def stored_linear(name, dtype=torch.float32, bias=True):
    """A layer whose weight is stored, and a plain one with the restored weight."""
    torch.manual_seed(1)
    layer = Linear(64, 48)
    if not bias:
        layer.bias = None
    layer.to(dtype).requires_grad_(False)
    weight, scale = STORINGS[name](Stored(layer.weight.data))
    plain = copy.deepcopy(layer)
    plain.weight.data = restored(weight, scale, dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = scale
    return layer, plain


def attach(layer, rows, several=False):
    torch.manual_seed(2)
    adapters = [LoRA(torch.randn(4, 64), torch.randn(rows[1] - rows[0], 4), 0.5, rows) for _ in range(1 + several)]
    layer.adapter = Several(adapters) if several else adapters[0]


def test_a_row_keeps_its_relative_precision_however_small_it_is():
    weight = matrix() * torch.logspace(-12, 4, 48)[:, None]
    stored = to_scaled_fp8(Stored(weight))
    assert stored.weight.dtype == torch.float8_e4m3fn and stored.scale.dtype == torch.float32
    error = (restored(*stored, torch.float32) - weight).abs()
    assert (error <= torch.maximum(weight.abs() * 2**-4, stored.scale * 2**-10)).all(), (
        "half a step, three bits of mantissa"
    )
    torch.testing.assert_close(restored(*stored, torch.float32).abs().amax(1), weight.abs().amax(1))


def test_a_row_of_zeros_stays_zero():
    assert not restored(*to_scaled_fp8(Stored(torch.zeros(3, 4))), torch.float32).any()


def test_a_plain_cast_saturates_instead_of_becoming_nan():
    assert restored(*to_fp8(Stored(torch.tensor([[1e4, -1e4, 1.0]]))), torch.float32).tolist() == [[448.0, -448.0, 1.0]]


def test_a_restored_weight_is_rounded_once():
    stored = to_scaled_fp8(Stored(matrix()))
    expected = (stored.weight.float() * stored.scale).bfloat16()
    torch.testing.assert_close(restored(*stored, torch.bfloat16), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fp8", "fp8_scaled"])
def test_what_is_in_fp8_already_is_kept_bit_for_bit(name):
    for stored in (Stored(matrix().to(FP8[0])), Stored(matrix().to(FP8[1]), torch.tensor(0.5))):
        assert STORINGS[name](stored) is stored


@pytest.mark.parametrize("name", STORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "several"), [((0, 48), False), ((7, 20), False), ((7, 20), True), (None, False)])
def test_outputs_and_gradients_are_those_of_the_restored_weight(name, dtype, rows, several):
    results = []
    for layer in stored_linear(name, dtype):
        if rows is not None:
            attach(layer, rows, several)
        x = matrix(10, 64, seed=3).to(dtype).view(2, 5, 64).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", STORINGS)
def test_a_restored_weight_lives_no_longer_than_its_product(name, monkeypatch):
    layer, _ = stored_linear(name)
    attach(layer, (0, 48))
    made, saved = [], []

    def watched(*arguments):
        weight = restored(*arguments)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantized, "restored", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = layer(torch.randn(3, 64, requires_grad=True))
    assert len(made) == 1 and made[0]() is None, "gone, although the graph is kept"
    assert all(tensor.untyped_storage().nbytes() < 48 * 64 for tensor in saved)
    y.sum().backward()
    assert len(made) == 2 and made[1]() is None


def dialects():
    """Files with the same fp8 weight in each way of writing its scale."""
    weight = matrix()
    plain = weight.to(torch.float8_e4m3fn)
    scale = weight.abs().max() / 448
    scaled = (weight / scale).to(torch.float8_e4m3fn)
    quant = torch.frombuffer(bytearray(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    marker = torch.empty(2, dtype=torch.float8_e4m3fn)
    return {
        "plain": ({"weight": plain}, plain.float()),
        "scale_weight": ({"weight": scaled, "scale_weight": scale, "scale_input": torch.ones(1)}, scaled.float() * scale),
        "weight_scale": ({"weight": scaled, "weight_scale": scale.view(1), "comfy_quant": quant}, scaled.float() * scale),
        "per row": ({"weight": scaled, "weight_scale": scale.expand(48, 1).contiguous()}, scaled.float() * scale),
    }, {"scaled_fp8": marker}  # fmt: skip


@pytest.mark.parametrize("dialect", ["plain", "scale_weight", "weight_scale", "per row"])
@pytest.mark.parametrize("storing", [*STORINGS, None])
def test_every_dialect_of_fp8_loads_to_the_same_weights(dialect, storing, tmp_path):
    tensors, expected = dialects()[0][dialect]
    tensors = {f"layer.{name}": value for name, value in tensors.items()} | {"layer.bias": torch.zeros(48)}
    if dialect == "scale_weight":
        tensors |= dialects()[1]
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": Linear(64, 48)})
    stored = {"layer.weight": STORINGS[storing]} if storing else {}
    load_into(model, open_checkpoint(tmp_path / "model.safetensors"), IDENTITY, torch.float32, stored=stored)
    layer = model["layer"]
    if storing in ("fp8", "fp8_scaled"):
        assert torch.equal(layer.weight.view(torch.uint8), tensors["layer.weight"].view(torch.uint8))
    found = layer(torch.eye(64)).t()
    torch.testing.assert_close(found, expected.half().float() if storing == "float16" else expected, rtol=0, atol=1e-9)


def test_a_checkpoint_is_stored_as_it_is_read_and_all_else_keeps_its_precision(tmp_path):
    _, weights = reference.vector("wan21_t2v")
    save_file(weights, tmp_path / "dit.safetensors")
    checkpoint, part = open_part(tmp_path / "dit.safetensors", "dit")
    matrices = inventory(WAN, {name: tuple(value.shape) for name, value in weights.items()})
    names = [f"{matrix.name}.weight" for matrix in matrices]
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.bfloat16, stored=dict.fromkeys(names, to_scaled_fp8))
    for name, parameter in dit.named_parameters():
        assert parameter.dtype == (torch.float8_e4m3fn if name in names else torch.bfloat16)
    assert sum(name.endswith("weight_scale") for name, _ in dit.named_buffers()) == len(names)
    tensors, _ = reference.vector("wan21_t2v")
    states = [{"varlen_t5": tensors[f"text_states.{i}"]} for i in range(2)]
    with torch.no_grad():
        output = dit(tensors["latents"], tensors["timestep"], **WAN.conditions(states))
    assert reference.relative_error(output, tensors["output"]) < 0.1


@pytest.mark.parametrize("storing", ["fp8", "fp8_scaled"])
def test_a_text_encoder_of_another_library_is_stored_narrow_and_still_understood(storing, tmp_path):
    tensors, weights = reference.vector("umt5_encoder")
    save_file(weights, tmp_path / "umt5.safetensors")
    checkpoint, part = open_part(tmp_path / "umt5.safetensors", "text_encoder")
    outputs = []
    for stored in ({}, None):
        with torch.device("meta"):
            model = text.build(part.config)
        names = linear_weights(model)
        stored = dict.fromkeys(names, STORINGS[storing]) if stored is None else stored
        load_into(model, checkpoint, part.keymap, torch.float32, stored=stored)
        if stored:
            restore_on_call(model)
            narrow = [parameter for parameter in model.parameters() if parameter.dtype == torch.float8_e4m3fn]
            assert len(narrow) == len(names) > 0
        else:  # the same weights, at full size
            for name in names:
                weight = model.get_parameter(name)
                weight.data = restored(*STORINGS[storing](Stored(weight.data)), torch.float32)
        with torch.no_grad():
            outputs.append(model["encoder"](input_ids=tensors["ids"], attention_mask=tensors["mask"]).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("name", ["fp8", "fp8_scaled"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_fp8_are_near_those_of_the_restored_weight(name, bias):
    layer, plain = stored_linear(name, bias=bias)
    use_fast_products(nn.Sequential(layer))
    assert layer.fast
    x = torch.randn(2, 5, 64) * torch.tensor([1e-3, 10.0])[:, None, None]  # one factor serves both samples
    error = (layer(x) - plain(x)).norm(dim=(1, 2)) / plain(x).norm(dim=(1, 2))
    assert error[1] < 0.04 and layer(x).dtype == x.dtype
    assert torch.isfinite(layer(torch.zeros(1, 1, 64))).all()


def test_weights_that_are_no_fp8_or_do_not_divide_are_multiplied_as_ever():
    odd, plain = Linear(24, 17), Linear(32, 32)
    odd.weight = nn.Parameter(torch.zeros(17, 24, dtype=FP8[0]), requires_grad=False)
    use_fast_products(nn.Sequential(odd, plain))
    assert not odd.fast and not plain.fast


def test_hardware_without_fp8_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match=r"RTX 40 series or newer.*RTX 3090: use fp8_scaled"):
        check_fast(torch.device("cuda"))
    with pytest.raises(ValueError, match="cannot work on mps"):
        check_fast(torch.device("mps"))
    check_fast(torch.device("cpu"))
