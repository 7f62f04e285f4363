"""Adapters of each kind: gradients, rows, dropout, norms, files, merging, going on from a file."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recomputed
from videolora.core.families import FAMILIES, open_part
from videolora.core.io.files import fingerprint
from videolora.core.lora import files
from videolora.core.lora.adapter import KINDS, Dropout, Size, attached, reseed, row_groups
from videolora.core.lora.factors import factors_of
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.lora.merge import merge
from videolora.core.lora.network import NetworkSettings, make_adapters, parameter_groups
from videolora.core.lora.stack import StackEntry, adapters, load_stack, report
from videolora.core.weights import load_into

ROOT = Path(__file__).resolve().parents[3]
WAN = FAMILIES["wan"]
VARIANT = WAN.variants["2.1-t2v-1.3B"]
ROWS, COLUMNS = 24, 20
SHARES = [(0, 24), (8, 16), (5, 12)]
# Rank 2 divides LoKr's second matrix, rank 16 makes it a full one.
CASES = [(kind, rank, rows) for kind in KINDS for rank in (2, 16) for rows in SHARES]


def moved(kind, rows=(0, ROWS), rank=2, alpha=3.0, seed=0, factor=-1):
    """An adapter with random factors, in float64."""
    rng = torch.Generator().manual_seed(seed)
    adapter = KINDS[kind].untrained((ROWS, COLUMNS), rows, Size(rank, alpha, factor), rng).double()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=rng)
    return adapter


def delta(adapter, outputs=ROWS, columns=COLUMNS):
    """The whole delta (outputs, columns) by the formula of the kind, made in full."""
    p = dict(adapter.named_parameters())
    match type(adapter).__name__:
        case "LoRA":
            share = p["up"] @ p["down"]
        case "LoHa":
            share = (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])
        case "LoKr":
            share = torch.kron(p["w1"], p["w2_a"] @ p["w2_b"] if "w2_b" in p else p["w2_a"])
    whole = torch.zeros(outputs, columns, dtype=share.dtype)
    whole[slice(*adapter.rows)] = adapter.scale * share
    return whole


@pytest.mark.parametrize(("kind", "rank", "rows"), CASES)
def test_outputs_and_gradients_are_those_of_the_formula(kind, rank, rows):
    adapter = moved(kind, rows, rank)
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    x = torch.randn(2, 7, COLUMNS, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 7, ROWS, dtype=torch.float64)
    results = []
    for forward in (lambda: adapter(x, x @ weight.t()), lambda: x @ (weight + delta(adapter)).t()):
        y = forward()
        results.append((y, *torch.autograd.grad(((y - target) ** 2).mean(), [x, *adapter.parameters()])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_adds_nothing_and_its_start_learns(kind):
    adapter = KINDS[kind].untrained((ROWS, COLUMNS), (8, 16), Size(2, 2.0), torch.Generator().manual_seed(1))
    x, y = torch.randn(3, 5, COLUMNS), torch.zeros(3, 5, ROWS)
    out = adapter(x, y.clone())
    assert torch.equal(out, y)
    gradients = torch.autograd.grad((adapter(x, y.clone()) - 1).square().sum(), list(adapter.parameters()))
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_the_matrix_is_kept_for_the_backward_pass(kind):
    kept = []
    rng = torch.Generator().manual_seed(0)
    adapter = KINDS[kind].untrained((512, 512), (0, 512), Size(4, 4.0), rng)
    x, y = torch.randn(1, 3, 512, requires_grad=True), torch.zeros(1, 3, 512)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        adapter(x, y)
    assert max(kept) <= 512 * 16  # factors of LoHa's pairs


@pytest.mark.parametrize(("kind", "rank", "rows"), CASES)
def test_norms_are_those_of_the_delta_and_are_limited(kind, rank, rows):
    adapter = moved(kind, rows, rank)
    norm = delta(adapter).norm().detach()
    torch.testing.assert_close(adapter.norm().detach(), norm)
    before = delta(adapter).detach()
    adapter.limit_norm(2 * float(norm))
    torch.testing.assert_close(delta(adapter).detach(), before)
    adapter.limit_norm(0.5 * float(norm))
    torch.testing.assert_close(delta(adapter).detach(), 0.5 * before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [Dropout(neuron=0.3), Dropout(rank=0.5), Dropout(neuron=0.2, rank=0.2, module=0.5)])
def test_dropout_follows_from_the_seed_and_is_the_same_when_a_block_is_recomputed(kind, dropout):
    adapter = moved(kind)
    adapter.dropout = dropout
    x = torch.randn(3, 5, COLUMNS, dtype=torch.float64, requires_grad=True)
    run = lambda: adapter(x, x.new_zeros(3, 5, ROWS))  # noqa: E731
    state, outputs = torch.get_rng_state(), set()
    for seed in range(6):
        reseed({"it": adapter}, seed)
        first = run()
        outputs.add(round(float(first.detach().abs().sum()), 6))
        straight = torch.autograd.grad(first.square().sum(), list(adapter.parameters()))
        again = recomputed(run, use_reentrant=False, preserve_rng_state=False)
        assert torch.equal(again, first)
        for one, other in zip(torch.autograd.grad(again.square().sum(), list(adapter.parameters())), straight,
                              strict=True):  # fmt: skip
            assert torch.equal(one, other)
    assert len(outputs) > 1, "another seed drops other activations"
    assert torch.equal(torch.get_rng_state(), state)
    adapter.eval()
    torch.testing.assert_close(run().detach(), (x @ delta(adapter).t()).detach())


def test_dropout_drops_as_often_as_asked_and_keeps_the_mean():
    hidden = torch.ones(400, 50, 8)
    dropped, _ = Dropout(neuron=0.25)(hidden, 1)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    dropped, _ = Dropout(rank=0.25)(hidden, 1)
    assert ((dropped == 0).all(1) | (dropped != 0).all(1)).all(), "of a sample, ranks are dropped as a whole"
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    kept = [Dropout(module=0.25)(hidden[:1], seed)[1] for seed in range(2000)]
    assert sum(kept) / 2000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("outputs", "rows"), [(24, (0, 24)), (24, (8, 16)), (24, (5, 12)), (13824, (691, 1382))])
@pytest.mark.parametrize("factor", [-1, 2, 8])
def test_the_rows_of_a_share_are_divided_into_groups_that_tile_the_matrix(outputs, rows, factor):
    groups = row_groups(outputs, rows, factor)
    size, rest = divmod(rows[1] - rows[0], groups)
    assert rest == 0 and rows[0] % size == 0 and outputs % size == 0
    if rows == (0, outputs):
        assert groups <= math.isqrt(outputs) and (factor == -1 or groups <= factor)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    _, weights = reference.vector("wan21_t2v")
    path = tmp_path_factory.mktemp("model") / "dit.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def matrices(checkpoint):
    opened, _ = open_part(checkpoint, "dit")
    return inventory(WAN, {name: info.shape for name, info in opened.tensors.items()})


def dit_of(path):
    opened, part = open_part(path, "dit")
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    return load_into(dit, opened, part.keymap, torch.float32)


def share(matrices, number):
    """The rows of a LORAID of bands, or all."""
    if number is None:
        return {m.name: (0, m.rows) for m in matrices}, {}
    allocation = allocate(matrices, Loraid(number=number, unit="row", units_per_id=60))
    return allocation.rows, allocation.metadata(WAN.name)


def trained(checkpoint, matrices, path, settings, number=None, seed=0):
    """A file as training writes it, with random factors; and its adapters."""
    rows, metadata = share(matrices, number)
    made = make_adapters(dit_of(checkpoint), rows, settings, matrices, "", seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in made.values():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.3, generator=rng)
    outputs = {m.name: m.rows for m in matrices}
    files.save(path, {name: factors_of(a, outputs[name], settings.alpha) for name, a in made.items()}, metadata)
    return made


def velocity(dit):
    tensors, _ = reference.vector("wan21_t2v")
    states = WAN.conditions([{"varlen_t5": tensors[f"text_states.{i}"]} for i in range(2)])
    with torch.no_grad():
        return dit(tensors["latents"], tensors["timestep"], **states)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 2), ("loha", 2), ("lokr", 2), ("lokr", 16)])  # 16: one full matrix
@pytest.mark.parametrize("number", [None, 2])
def test_a_file_gives_back_what_was_trained_attached_and_merged(kind, rank, number, tmp_path, checkpoint, matrices):
    path, settings = tmp_path / "lora.safetensors", NetworkSettings(kind=kind, rank=rank, alpha=0.3)
    made = trained(checkpoint, matrices, path, settings, number)
    stack = load_stack([StackEntry(path, 0.5)], WAN, VARIANT, matrices, allow_overlap=False)
    assert not stack[0].file.unmatched and stack[0].number == number
    rows, _ = share(matrices, number)
    assert {name: factors.touched for name, factors in stack[0].file.factors.items()} == rows
    dit = dit_of(checkpoint)
    plain = velocity(dit)
    for adapter in made.values():
        adapter.scale *= 0.5
    with attached(dit, made):
        expected = velocity(dit)
    with attached(dit, adapters(stack, torch.device("cpu"), torch.float32)):
        found = velocity(dit)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    _, part = open_part(checkpoint, "dit")
    assert list(merge(checkpoint, tmp_path / "merged.safetensors", "", part, stack))
    assert reference.relative_error(velocity(dit_of(tmp_path / "merged.safetensors")), expected) < 1e-5
    assert reference.relative_error(expected, plain) > 1e-4
    assert (f" {kind}," in report(stack)) == (kind != "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_factors_add_the_same_delta_to_any_band_of_rows(kind):
    adapter = moved(kind, (8, 16)).float()
    factors = factors_of(adapter, ROWS, 3.0)
    whole = delta(adapter).detach()
    for first, last in ((0, 24), (3, 11), (9, 10), (15, 24)):
        band = torch.zeros(last - first, COLUMNS)
        factors.add_to(band, first, 2.0)
        torch.testing.assert_close(band, 2 * whole[first:last])


def test_a_lokr_with_both_matrices_divided_and_without_alpha_is_read(tmp_path, matrices):
    m = matrices[0]
    j = 4
    made = {"lokr_w1_a": torch.randn(2, 1), "lokr_w1_b": torch.randn(1, j), "lokr_w2_a": torch.randn(m.rows // 2, 3),
            "lokr_w2_b": torch.randn(3, m.columns // j), "alpha": torch.tensor(6.0)}  # fmt: skip
    expected = 2.0 * torch.kron(made["lokr_w1_a"] @ made["lokr_w1_b"], made["lokr_w2_a"] @ made["lokr_w2_b"])
    save_file(
        {f"lycoris_{m.name.replace('.', '_')}.{key}": value for key, value in made.items()}, tmp_path / "l.safetensors"
    )
    band = torch.zeros(m.rows, m.columns)
    files.read(tmp_path / "l.safetensors", matrices, "").factors[m.name].add_to(band, 0, 1.0)
    torch.testing.assert_close(band, expected)
    full = {"lokr_w1_a": made["lokr_w1_a"], "lokr_w1_b": made["lokr_w1_b"], "alpha": torch.tensor(6.0),
            "lokr_w2": made["lokr_w2_a"] @ made["lokr_w2_b"]}  # fmt: skip
    save_file({f"lora_unet_{m.name.replace('.', '_')}.{key}": v for key, v in full.items()}, tmp_path / "f.safetensors")
    band.zero_()
    files.read(tmp_path / "f.safetensors", matrices, "").factors[m.name].add_to(band, 0, 1.0)
    torch.testing.assert_close(band, 3.0 * expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [2.0, 7.0])
def test_going_on_from_a_file_starts_with_its_delta_whatever_its_alpha(kind, alpha, tmp_path, checkpoint, matrices):
    path, settings = tmp_path / "lora.safetensors", NetworkSettings(kind=kind, rank=2, alpha=2.0)
    made = trained(checkpoint, matrices, path, settings, number=2)
    rows, _ = share(matrices, 2)
    again = replace(settings, alpha=alpha, start_from=str(path), start_fingerprint=fingerprint(path))
    started = make_adapters(dit_of(checkpoint), rows, again, matrices, "", seed=5)
    for name, adapter in started.items():
        assert adapter.scale == (alpha / 2 if kind != "lokr" or not adapter.is_full else 1.0)
        m = next(m for m in matrices if m.name == name)
        torch.testing.assert_close(delta(adapter, m.rows, m.columns), delta(made[name], m.rows, m.columns))
        if alpha == 2.0:
            assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), made[name].parameters(), strict=True))


def test_a_file_of_another_dialect_can_be_gone_on_from(tmp_path, checkpoint, matrices):
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for m in matrices:
        tensors[f"diffusion_model.{m.name}.lora_A.weight"] = torch.randn(4, m.columns, generator=rng)
        tensors[f"diffusion_model.{m.name}.lora_B.weight"] = torch.randn(m.rows, 4, generator=rng)
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    settings = NetworkSettings(rank=4, alpha=2.0, start_from=str(path), start_fingerprint=fingerprint(path))
    rows, _ = share(matrices, None)
    started = make_adapters(dit_of(checkpoint), rows, settings, matrices, "", seed=5)
    m = matrices[2]
    expected = tensors[f"diffusion_model.{m.name}.lora_B.weight"] @ tensors[f"diffusion_model.{m.name}.lora_A.weight"]
    torch.testing.assert_close(delta(started[m.name], m.rows, m.columns).detach(), expected)


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [({"rank": 4}, 2, "it is of rank 2"), ({"kind": "loha"}, 2, "it is a lora, and a loha is to be trained"),
     ({}, None, "it has nothing for"), ({}, 3, "it changes rows"),
     ({"exclude": (".*ffn.*",)}, 2, "these would be lost"), ({"start_fingerprint": "x"}, 2, "was changed")],
)  # fmt: skip
def test_a_file_that_does_not_fit_what_is_trained_is_an_error(changes, number, message, tmp_path, checkpoint, matrices):
    path, settings = tmp_path / "lora.safetensors", NetworkSettings(rank=2)
    few = [m for m in matrices if "ffn" not in m.name] if number is None else matrices
    trained(checkpoint, few, path, settings, number=2 if number else None)
    rows, _ = share(matrices, number)
    again = replace(settings, **{"start_from": str(path), "start_fingerprint": fingerprint(path), **changes})
    with pytest.raises(ValueError, match=message):
        make_adapters(dit_of(checkpoint), again.chosen(matrices, rows), again, matrices, "", seed=5)


def test_patterns_choose_matrices_by_their_whole_names(matrices):
    rows, _ = share(matrices, None)
    chosen = NetworkSettings(include=(".*self_attn.*", ".*ffn.*"), exclude=(r"blocks\.0\..*",)).chosen(matrices)
    assert chosen and all(name.startswith("blocks.1.") and "cross" not in name for name in chosen)
    assert NetworkSettings().chosen(matrices) == rows
    with pytest.raises(ValueError, match=r"'self_attn' matches none .* use \.\*self_attn\.\*"):
        NetworkSettings(include=("self_attn",)).chosen(matrices)
    with pytest.raises(ValueError, match="leave none"):
        NetworkSettings(exclude=(".*",)).chosen(matrices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"kind": "dora"}, "use one of lora, loha, lokr"), ({"include": ("(",)}, r"the pattern '\(' is no regular"),
     ({"kind": "loha", "rank": 65}, "use 64 or less"), ({"factor": 8}, "only lokr has"),
     ({"kind": "lokr", "factor": 0}, "use -1"), ({"dropout": 1.0}, "use 0"), ({"module_dropout": float("nan")}, "use 0"),
     ({"kind": "loha", "loraplus_lr_ratio": 4.0}, "no up matrix"), ({"max_norm": -1.0}, "use 0")],
)  # fmt: skip
def test_networks_that_cannot_be_are_refused_with_advice(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkSettings(**settings)


def test_lora_plus_gives_the_up_matrices_a_group_of_their_own():
    made = {"a": moved("lora"), "b": moved("lora")}
    rest, up = parameter_groups(made, NetworkSettings(loraplus_lr_ratio=8.0))
    assert up["ratio"] == 8.0 and [id(p) for p in up["params"]] == [id(a.up) for a in made.values()]
    assert rest["ratio"] == 1.0 and [id(p) for p in rest["params"]] == [id(a.down) for a in made.values()]
