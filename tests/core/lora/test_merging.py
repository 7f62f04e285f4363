"""Merging into any dtype, taking out again, and the ways to combine LoRAs that overlap."""

import json
import random

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.wan.dit import WanConfig, WanDiT
from videolora.core.io import safetensors
from videolora.core.lora import files
from videolora.core.lora.adapter import attached, untrained_adapters
from videolora.core.lora.combine import Combination
from videolora.core.lora.factors import LoRAFactors, factors_of
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.lora.merge import merge, unmerge
from videolora.core.lora.stack import StackEntry, load_stack
from videolora.core.modules.quantized import Stored, restored, to_scaled_fp8
from videolora.core.training.batches import Batch
from videolora.core.training.loop import flow_loss

WAN = FAMILIES["wan"]
VARIANT = WAN.variants["2.1-t2v-1.3B"]
NAME = "blocks.0.ffn.0"  # a matrix that the tests look at


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint, written as the pack writes: what comes back can be compared with it byte for byte."""
    _, weights = reference.vector("wan21_t2v")
    path = tmp_path_factory.mktemp("base") / "dit.safetensors"
    safetensors.save(path, {name: value.bfloat16() for name, value in weights.items()}, {"modelspec.title": "small"})
    return path


@pytest.fixture(scope="module")
def matrices(base):
    opened, _ = open_part(base, "dit")
    return inventory(WAN, {name: info.shape for name, info in opened.tensors.items()})


def lora(path, matrices, seed=0, size=0.05, loraid=None):
    rng = torch.Generator().manual_seed(seed)
    share = allocate(matrices, loraid) if loraid else None
    made = {}
    for m in matrices:
        start, stop = share.rows.get(m.name, (0, 0)) if share else (0, m.rows)
        if start < stop:
            up = size * torch.randn(stop - start, 4, generator=rng)
            made[m.name] = LoRAFactors(torch.randn(4, m.columns, generator=rng), up, 4.0).placed(start, m.rows)
    files.save(path, made, share.metadata("wan") if share else {})
    return path


def stack_of(matrices, *entries):
    return load_stack(entries, WAN, VARIANT, matrices, allow_overlap=True)


def run(steps):
    *_, (done, total) = steps
    assert done == total


def merged(source, target, matrices, *entries, how=None):
    part = open_part(source, "dit")[1]
    run(merge(source, target, "", part, stack_of(matrices, *entries), *([how] if how else [])))
    return load_file(target)


def deltas(matrices, *entries):
    """The LoRAs' own deltas of the matrix that is looked at."""
    found = []
    for entry in entries:
        factors = files.read(entry.path, matrices, "").factors[NAME]
        found.append(entry.multiplier * factors.scale * factors.up @ factors.down)
    return found


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32])
def test_every_dtype_takes_the_sum_rounded_once(dtype, tmp_path, base, matrices):
    source = tmp_path / "source.safetensors"
    save_file({name: value.to(dtype) if value.ndim == 2 else value for name, value in load_file(base).items()}, source)
    entries = [StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i), 0.7) for i in range(3)]
    result = merged(source, tmp_path / "m.safetensors", matrices, *entries)[f"{NAME}.weight"]
    expected = (load_file(source)[f"{NAME}.weight"].float() + sum(deltas(matrices, *entries))).to(dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    if dtype.itemsize < 4:
        assert (result == expected).float().mean() > 0.998, "but for sums in the middle between two values"


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_keeps_its_factor_where_the_sum_fits_and_enlarges_it_where_not(per_row, tmp_path, base, matrices):
    tensors = {}
    for name, value in load_file(base).items():
        if name.removesuffix(".weight") in {m.name for m in matrices}:
            weight, scale = to_scaled_fp8(Stored(value))
            if not per_row:
                scale = value.float().abs().max() / 448
                weight = (value.float() / scale).to(torch.float8_e4m3fn)
            tensors |= {name: weight, name.removesuffix("weight") + "scale_weight": scale.squeeze()}
        else:
            tensors[name] = value
    source = tmp_path / "source.safetensors"
    safetensors.save(source, tensors, {})
    small, large = (StackEntry(lora(tmp_path / f"{size}.safetensors", matrices, size=size)) for size in (1e-6, 1.0))
    scale, weight = f"{NAME}.scale_weight", f"{NAME}.weight"
    little = merged(source, tmp_path / "little.safetensors", matrices, small)
    kept = little[scale] == tensors[scale]  # the largest value of a row stands at the end of the range: some must grow
    assert torch.allclose(little[scale], tensors[scale], rtol=1e-4)
    much = merged(source, tmp_path / "much.safetensors", matrices, large)
    assert (much[scale] >= tensors[scale]).all() and (much[scale] > tensors[scale]).any()
    full = lambda found: restored(found[weight], found[scale].reshape(-1, 1), torch.float32)  # noqa: E731
    expected = full(tensors) + deltas(matrices, large)[0]
    assert reference.relative_error(full(much), expected) < 0.04  # that of fp8 itself
    assert full(much).abs().max() == pytest.approx(float(expected.abs().max()), rel=0.07), "nothing is cut off"
    assert kept.shape == tensors[scale].shape
    part = open_part(source, "dit")[1]
    run(unmerge(tmp_path / "much.safetensors", tmp_path / "back.safetensors", "", part, stack_of(matrices, large),
                (source, "", part)))  # fmt: skip
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_dtypes_that_nothing_can_be_added_to_are_refused(tmp_path, base, matrices):
    tensors = load_file(base)
    entry = StackEntry(lora(tmp_path / "l.safetensors", matrices))
    save_file({**tensors, f"{NAME}.weight": tensors[f"{NAME}.weight"].to(torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match="int8, which nothing can be added to"):
        merged(tmp_path / "int8.safetensors", tmp_path / "m.safetensors", matrices, entry)
    blocks = {
        f"{NAME}.weight": tensors[f"{NAME}.weight"].to(torch.float8_e4m3fn),
        f"{NAME}.scale_weight": torch.ones(3, 7),
    }
    save_file({**tensors, **blocks}, tmp_path / "blocks.safetensors")
    with pytest.raises(ValueError, match=r"shape \(3, 7\), and only one factor"):
        merged(tmp_path / "blocks.safetensors", tmp_path / "m.safetensors", matrices, entry)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_lora_is_taken_out_again_to_the_byte_and_the_others_stay(tmp_path, base, matrices):
    entries = [
        StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i, loraid=Loraid(number=i, unit="row")), 0.8)
        for i in (1, 2, 3)
    ]
    part = open_part(base, "dit")[1]
    merged(base, tmp_path / "12.safetensors", matrices, *entries[:2])
    merged(tmp_path / "12.safetensors", tmp_path / "123.safetensors", matrices, entries[2])  # in two goes
    origin = (base, "", part)
    run(
        unmerge(
            tmp_path / "123.safetensors", tmp_path / "13.safetensors", "", part, stack_of(matrices, entries[1]), origin
        )
    )
    expected = merged(base, tmp_path / "expected.safetensors", matrices, entries[0], entries[2])
    found = load_file(tmp_path / "13.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    run(
        unmerge(
            tmp_path / "13.safetensors",
            tmp_path / "none.safetensors",
            "",
            part,
            stack_of(matrices, entries[2], entries[0]),
            origin,
        )
    )
    assert (tmp_path / "none.safetensors").read_bytes() == base.read_bytes()


def test_without_the_base_a_lora_is_subtracted_up_to_rounding(tmp_path, base, matrices):
    entry = StackEntry(lora(tmp_path / "l.safetensors", matrices))
    part = open_part(base, "dit")[1]
    merged(base, tmp_path / "m.safetensors", matrices, entry)
    run(unmerge(tmp_path / "m.safetensors", tmp_path / "back.safetensors", "", part, stack_of(matrices, entry)))
    before, after = load_file(base), load_file(tmp_path / "back.safetensors")
    for m in matrices:
        assert reference.relative_error(after[f"{m.name}.weight"], before[f"{m.name}.weight"]) < 2**-7
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert "videolora_merged" not in file.metadata()


def test_what_was_not_merged_or_cannot_go_alone_is_not_taken_out(tmp_path, base, matrices):
    one, two = (StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i)) for i in (1, 2))
    part, target = open_part(base, "dit")[1], tmp_path / "back.safetensors"
    merged(base, tmp_path / "m.safetensors", matrices, one, two)

    def out(*entries, origin=(base, "", part)):
        run(unmerge(tmp_path / "m.safetensors", target, "", part, stack_of(matrices, *entries), origin))

    with pytest.raises(
        ValueError, match=r"does not say that 1\.safetensors x 0\.5 was merged.*1\.safetensors x 1, 2\.safetensors x 1"
    ):
        out(StackEntry(one.path, 0.5))
    with pytest.raises(ValueError, match=r"2\.safetensors was merged into the same rows"):
        out(one)
    other = tmp_path / "other.safetensors"
    save_file({**load_file(base), "head.head.bias": torch.ones(64)}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors is not what m\.safetensors was made of: that was dit"):
        out(one, two, origin=(other, "", part))
    merged(base, tmp_path / "m.safetensors", matrices, one, two, how=Combination(method="ties"))
    with pytest.raises(ValueError, match="merged by ties, which cannot be subtracted"):
        out(one, two, origin=None)
    out(one, two)
    assert target.read_bytes() == base.read_bytes()
    with pytest.raises(ValueError, match="nothing to take out"):
        out()


@pytest.mark.parametrize(
    "history",
    ["[", '["x"]', '[{"base": "b"}]', '[{"base": "b", "base_fingerprint": "f", "method": "sum", "loras": [3]}]'],
)
def test_a_history_that_cannot_be_read_is_an_error_that_names_the_file(history, tmp_path, base, matrices):
    save_file(load_file(base), tmp_path / "m.safetensors", {"videolora_merged": history})
    entry = StackEntry(lora(tmp_path / "l.safetensors", matrices))
    with pytest.raises(ValueError, match=r"m\.safetensors: what it says was merged into it .* cannot be read"):
        merged(tmp_path / "m.safetensors", tmp_path / "more.safetensors", matrices, entry)


def test_ties_trims_elects_signs_and_takes_the_mean(tmp_path, base, matrices):
    """Against the paper's steps on whole deltas."""
    entries = [StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i), 1.0) for i in range(3)]
    save_file({name: value.float() for name, value in load_file(base).items()}, tmp_path / "f32.safetensors")
    result = merged(
        tmp_path / "f32.safetensors",
        tmp_path / "m.safetensors",
        matrices,
        *entries,
        how=Combination(method="ties", density=0.3),
    )
    trimmed = []
    for delta in deltas(matrices, *entries):
        edge = delta.abs().flatten().kthvalue(round(0.7 * delta.numel())).values
        trimmed.append(torch.where(delta.abs() > edge, delta, 0.0))
    stacked = torch.stack(trimmed)
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (stacked != 0)
    expected = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    found = result[f"{NAME}.weight"] - load_file(tmp_path / "f32.safetensors")[f"{NAME}.weight"]
    assert float((found != 0).float().mean()) == pytest.approx(float((expected != 0).float().mean()), rel=0.03)
    same = (found != 0) & (expected != 0)
    assert (found[same].sign() == expected[same].sign()).float().mean() > 0.999
    assert reference.relative_error(found, expected) < 0.2  # elements at the edge are trimmed or not
    assert reference.relative_error(found, sum(deltas(matrices, *entries))) > 0.5, "it is no sum"


def test_dare_drops_and_rescales_and_keeps_the_mean(tmp_path, base, matrices):
    entries = [StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i), 1.0) for i in range(2)]
    save_file({name: value.float() for name, value in load_file(base).items()}, tmp_path / "f32.safetensors")
    before = load_file(tmp_path / "f32.safetensors")[f"{NAME}.weight"]

    def dare(*order, seed=0):
        how = Combination(method="dare", density=0.25, seed=seed)
        return (
            merged(tmp_path / "f32.safetensors", tmp_path / "m.safetensors", matrices, *order, how=how)[
                f"{NAME}.weight"
            ]
            - before
        )

    found = dare(*entries)
    one, two = deltas(matrices, *entries)
    combinations = [0, 4 * one, 4 * two, 4 * one + 4 * two]
    nearest = torch.stack([(found - c).abs() for c in combinations]).amin(0)
    assert float(nearest.max()) < 1e-5
    assert float((found == 0).float().mean()) == pytest.approx(0.75**2, abs=0.02)
    assert torch.equal(found, dare(*reversed(entries))), "free of order"
    assert not torch.equal(found, dare(*entries, seed=1))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_disjoint_loraids_merge_alike_in_every_way(method, tmp_path, base, matrices):
    entries = [
        StackEntry(lora(tmp_path / f"{i}.safetensors", matrices, i, loraid=Loraid(number=i, units_per_id=60)))
        for i in (1, 2)
    ]
    summed = merged(base, tmp_path / "s.safetensors", matrices, *entries)
    other = merged(base, tmp_path / "o.safetensors", matrices, *entries, how=Combination(method=method))
    assert all(torch.equal(summed[name], other[name]) for name in summed)
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert json.loads(file.metadata()["videolora_merged"])[0]["method"] == method


@pytest.mark.parametrize("wrong", [{"method": "slerp"}, {"density": 0.0}, {"density": 1.5}])
def test_combinations_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="use"):
        Combination(**wrong)


def small_batch():
    rng = torch.Generator().manual_seed(0)
    latents, target = torch.randn(2, 1, 16, 1, 4, 4, generator=rng)
    return Batch(
        latents, target, torch.tensor([0.5]), {"text_states": torch.randn(1, 4, 16, generator=rng)}, torch.ones(1)
    )


DEPTH, DIM, COUNT = 24, 128, 240  # 240 matrices: one for each slot


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A model of 240 matrices, and 240 LORAIDs of one slot each, trained on it."""
    folder = tmp_path_factory.mktemp("many")
    config = WanConfig(dim=DIM, ffn_dim=128, depth=DEPTH, in_channels=16, out_channels=16, text_dim=16, freq_dim=16)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in WanDiT(config).state_dict().items()}
    weights = reference.weights(shapes)
    safetensors.save(folder / "dit.safetensors", {name: value.bfloat16() for name, value in weights.items()}, {})
    dit = WanDiT(config)
    dit.load_state_dict(weights)
    dit.requires_grad_(False)
    found = inventory(WAN, shapes)
    shares = [allocate(found, Loraid(number=number, units_per_id=1)) for number in range(1, COUNT + 1)]
    adapters = [untrained_adapters(dit, share.rows, 2, 2.0, seed=share.loraid.number) for share in shares]
    together = {name: adapter for of_one in adapters for name, adapter in of_one.items()}
    optimizer = torch.optim.Adam([value for adapter in together.values() for value in adapter.parameters()], lr=0.02)
    batch = small_batch()
    with attached(dit, together):  # side by side: none of them has a parameter of another
        for _ in range(3):
            optimizer.zero_grad()
            flow_loss(dit, batch, torch.device("cpu")).backward()
            optimizer.step()
    rows = {m.name: m.rows for m in found}
    for share, of_one in zip(shares, adapters, strict=True):
        made = {name: factors_of(adapter, rows[name], 2.0) for name, adapter in of_one.items()}
        files.save(folder / f"{share.loraid.number:03}.safetensors", made, share.metadata("wan"))
    return folder, found


def test_240_loraids_merge_in_any_order_to_the_same_bytes_and_come_out_in_any_other(many, tmp_path):
    folder, found = many
    base, part = folder / "dit.safetensors", open_part(folder / "dit.safetensors", "dit")[1]
    entries = [StackEntry(folder / f"{number:03}.safetensors") for number in range(1, COUNT + 1)]
    stack = load_stack(entries, WAN, VARIANT, found, allow_overlap=False)
    orders = []
    for seed in range(3):
        order = random.Random(seed).sample(stack, COUNT)
        run(merge(base, tmp_path / f"{seed}.safetensors", "", part, order))
        orders.append((tmp_path / f"{seed}.safetensors").read_bytes())
    assert orders[0] == orders[1] == orders[2]
    before, after = load_file(base), load_file(tmp_path / "0.safetensors")
    changed = [m.name for m in found if not torch.equal(before[f"{m.name}.weight"], after[f"{m.name}.weight"])]
    assert len(changed) == COUNT, "every LORAID has learnt something"
    current = tmp_path / "0.safetensors"
    order = random.Random(9).sample(stack, COUNT)
    for step in range(4):
        target = tmp_path / f"less{step}.safetensors"
        run(unmerge(current, target, "", part, order[60 * step : 60 * step + 60], (base, "", part)))
        current = target
    assert current.read_bytes() == base.read_bytes()
