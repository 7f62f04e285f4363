"""Adapters, LoRA files, stacks of them, and merging."""

from itertools import permutations

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.lora import files
from videolora.core.lora.adapter import LoRA, attached, untrained_adapters
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inventory import Matrix, inventory
from videolora.core.lora.loraid import UNITS, Loraid, allocate
from videolora.core.lora.merge import is_merged, merge
from videolora.core.lora.stack import Collision, StackEntry, adapters, load_stack, report
from videolora.core.weights import load_into

WAN = FAMILIES["wan"]
VARIANT = WAN.variants["2.1-t2v-1.3B"]
TITLE = VARIANT.title


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint in bfloat16, with negative zeros in it."""
    _, weights = reference.vector("wan21_t2v")
    weights = {name: value.bfloat16() for name, value in weights.items()}
    weights["blocks.0.ffn.0.weight"][::3, ::5] = -0.0
    path = tmp_path_factory.mktemp("model") / "dit.safetensors"
    save_file(weights, path, {"modelspec.title": "small"})
    return path


@pytest.fixture(scope="module")
def matrices(checkpoint):
    opened, _ = open_part(checkpoint, "dit")
    return inventory(WAN, {name: info.shape for name, info in opened.tensors.items()})


def trained(folder, matrices, loraid=None, seed=0, name=None, rank=4, alpha=8.0):
    """A LoRA file as training writes it, with random contents; all matrices without a LORAID."""
    generator = torch.Generator().manual_seed(seed)
    share = allocate(matrices, loraid) if loraid else None
    rows = share.rows if share else {m.name: (0, m.rows) for m in matrices}
    factors = {}
    for m in matrices:
        if m.name in rows:
            up = torch.zeros(m.rows, rank)
            start, stop = rows[m.name]
            up[start:stop] = torch.randn(stop - start, rank, generator=generator)
            factors[m.name] = LoRAFactors(torch.randn(rank, m.columns, generator=generator), up, alpha)
    path = folder / (name or f"lora_{loraid.number if loraid else 'plain'}_{seed}.safetensors")
    files.save(path, factors, share.metadata("wan") if share else {"ss_base_model_version": "wan"})
    return path


def merged(checkpoint, target, matrices, *entries):
    _, part = open_part(checkpoint, "dit")
    stack = load_stack(entries, WAN, VARIANT, matrices, allow_overlap=True)
    *_, (done, total) = merge(checkpoint, target, "", part, stack)
    assert done == total
    return load_file(target)


def dit_of(checkpoint, dtype=torch.float32):
    opened, part = open_part(checkpoint, "dit")
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    return load_into(dit, opened, part.keymap, dtype)


def velocity(dit):
    tensors, _ = reference.vector("wan21_t2v")
    states = WAN.conditions([{"varlen_t5": tensors[f"text_states.{i}"]} for i in range(2)])
    with torch.no_grad():
        return dit(tensors["latents"], tensors["timestep"], **states)


def test_an_untrained_adapter_changes_nothing_and_comes_off_again(checkpoint, matrices):
    dit = dit_of(checkpoint)
    before = velocity(dit)
    fresh = untrained_adapters(dit, {m.name: (0, m.rows) for m in matrices}, 4, 4.0, seed=1)
    with attached(dit, fresh):
        assert torch.equal(velocity(dit), before)
        with torch.no_grad():
            for adapter in fresh.values():
                adapter.up.normal_()
        assert not torch.equal(velocity(dit), before)
    assert torch.equal(velocity(dit), before)


def test_an_adapter_on_rows_changes_only_these_rows():
    adapter = LoRA(torch.randn(2, 6), torch.randn(3, 2), 0.5, (4, 7))
    x, y = torch.randn(2, 5, 6), torch.zeros(2, 5, 10)
    expected = torch.zeros(2, 5, 10)
    expected[..., 4:7] = 0.5 * x @ adapter.down.T @ adapter.up.T
    torch.testing.assert_close(adapter(x, y).detach(), expected)


def test_gradients_reach_the_adapter_and_nothing_else(checkpoint, matrices):
    dit = dit_of(checkpoint)
    share = allocate(matrices, Loraid(number=2, unit="block", units_per_id=1))
    fresh = untrained_adapters(dit, share.rows, 4, 4.0, seed=1)
    tensors, _ = reference.vector("wan21_t2v")
    states = WAN.conditions([{"varlen_t5": tensors["text_states.0"]}] * 2)
    with attached(dit, fresh):
        dit(tensors["latents"], tensors["timestep"], **states).square().mean().backward()
        assert all(adapter.up.grad.abs().sum() > 0 for adapter in fresh.values())
    assert all(parameter.grad is None for parameter in dit.parameters())


def test_the_frozen_part_below_the_first_trained_matrix_runs_without_a_graph(checkpoint, matrices):
    dit = dit_of(checkpoint)
    graphs = []
    for block in dit.blocks:
        block.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    share = allocate(matrices, Loraid(number=2, unit="block", units_per_id=1))
    tensors, _ = reference.vector("wan21_t2v")
    with attached(dit, untrained_adapters(dit, share.rows, 4, 4.0, seed=1)):
        dit(tensors["latents"], tensors["timestep"], text_states=tensors["text_states.0"].expand(2, -1, -1))
    assert graphs == [False, True]


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_gives_the_same_gradients(checkpoint, matrices, recompute):
    dit = dit_of(checkpoint)
    dit.run_block.recompute = recompute
    fresh = untrained_adapters(dit, {m.name: (0, m.rows) for m in matrices}, 4, 4.0, seed=1)
    tensors, _ = reference.vector("wan21_t2v")
    with attached(dit, fresh):
        loss = dit(tensors["latents"], tensors["timestep"], text_states=tensors["text_states.0"].expand(2, -1, -1))
        loss.square().mean().backward()
    total = sum(float(adapter.up.grad.double().square().sum()) for adapter in fresh.values())
    assert total == pytest.approx(GRADIENTS.setdefault("all", total), rel=1e-9)


GRADIENTS: dict = {}


def test_a_file_survives_reading_and_names_its_rank(tmp_path, matrices):
    path = trained(tmp_path, matrices, Loraid(number=1, unit="row"))
    read = files.read(path, matrices, TITLE)
    assert set(read.factors) == {m.name for m in matrices}
    assert not read.unmatched
    assert all(factors.alpha == 8.0 and factors.scale == 2.0 for factors in read.factors.values())


def test_files_have_the_names_that_other_tools_know(tmp_path, matrices):
    with safe_open(trained(tmp_path, matrices), "pt") as file:
        assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in file.keys()
        assert "lora_unet_blocks_1_ffn_2.lora_up.weight" in file.keys()
        assert "lora_unet_blocks_1_ffn_2.alpha" in file.keys()
        assert file.metadata()["videolora_hash"]


DIALECTS = {
    "kohya": ("lora_unet_{under}", ".lora_down.weight", ".lora_up.weight"),
    "peft": ("diffusion_model.{dotted}", ".lora_A.weight", ".lora_B.weight"),
    "transformer": ("transformer.{dotted}", ".lora_A.weight", ".lora_B.weight"),
    "adapter": ("base_model.model.{dotted}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": ("{dotted}", ".lora.down.weight", ".lora.up.weight"),
    "fun": ("lora_unet__{under}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_usual_dialects_are_read(dialect, tmp_path, matrices):
    stem, down, up = DIALECTS[dialect]
    m = matrices[7]
    name = stem.format(dotted=m.name, under=m.name.replace(".", "_"))
    tensors = {name + down: torch.randn(2, m.columns), name + up: torch.randn(m.rows, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    read = files.read(tmp_path / "lora.safetensors", matrices, TITLE)
    torch.testing.assert_close(read.factors[m.name].up, tensors[name + up])
    assert read.factors[m.name].scale == 1.0


def test_a_lora_of_another_model_is_an_error_that_says_what_it_is(tmp_path, matrices):
    path = tmp_path / "flux.safetensors"
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 4)},
        path,
        {"ss_base_model_version": "flux1"},
    )
    with pytest.raises(
        ValueError, match=r"flux\.safetensors does not belong to this model .* none of its 1 keys match.*'flux1'"
    ):
        files.read(path, matrices, TITLE)


def test_keys_that_fit_nothing_are_reported(tmp_path, matrices):
    m = matrices[0]
    stem = "lora_unet_" + m.name.replace(".", "_")
    save_file({f"{stem}.lora_down.weight": torch.ones(2, m.columns), f"{stem}.lora_up.weight": torch.ones(m.rows, 2),
               "lora_te_encoder.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")  # fmt: skip
    stack = load_stack([StackEntry(tmp_path / "lora.safetensors")], WAN, VARIANT, matrices, allow_overlap=False)
    assert stack[0].file.unmatched == ["lora_te_encoder.lora_up.weight"]
    assert "1 keys belong to no matrix: lora_te_encoder" in report(stack)


def test_a_lora_of_another_size_and_a_file_that_is_no_lora_are_refused(tmp_path, matrices):
    stem = "lora_unet_" + matrices[0].name.replace(".", "_")
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 99), f"{stem}.lora_up.weight": torch.ones(99, 2)},
        tmp_path / "big.safetensors",
    )
    with pytest.raises(ValueError, match="another size of the model"):
        files.read(tmp_path / "big.safetensors", matrices, TITLE)
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="is no LoRA"):
        files.read(tmp_path / "vae.safetensors", matrices, TITLE)
    save_file({f"{stem}.hada_t1": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    with pytest.raises(ValueError, match="neither a LoRA nor"):
        files.read(tmp_path / "loha.safetensors", matrices, TITLE)


@pytest.mark.parametrize("unit", UNITS)
def test_two_loraids_share_no_parameter_and_load_together(unit, tmp_path, matrices):
    n = {"slot": 60, "block": 1, "matrix": 5, "row": 60}[unit]
    paths = [trained(tmp_path, matrices, Loraid(number=i, unit=unit, units_per_id=n), seed=i) for i in (1, 2)]
    stack = load_stack([StackEntry(path) for path in paths], WAN, VARIANT, matrices, allow_overlap=False)
    for name in stack[0].file.factors.keys() & stack[1].file.factors.keys():
        rows = [lora.file.factors[name].up.ne(0).any(dim=1) for lora in stack]
        assert not (rows[0] & rows[1]).any()
    assert "no parameter is touched twice" in report(stack)


def test_the_same_loraid_twice_collides_and_says_where(tmp_path, matrices):
    paths = [trained(tmp_path, matrices, Loraid(number=1), seed=i) for i in (1, 2)]
    entries = [StackEntry(path) for path in paths]
    with pytest.raises(
        Collision, match=r"change the same parameters in 1 matrices \(blocks\.0\.self_attn\.q rows 0 to 255\)"
    ):
        load_stack(entries, WAN, VARIANT, matrices, allow_overlap=False)
    assert len(load_stack(entries, WAN, VARIANT, matrices, allow_overlap=True)) == 2


def test_a_plain_lora_collides_with_a_loraid_but_not_with_another_plain_one(tmp_path, matrices):
    plain, other = (StackEntry(trained(tmp_path, matrices, seed=i)) for i in (1, 2))
    numbered = StackEntry(trained(tmp_path, matrices, Loraid(number=1), seed=3))
    assert len(load_stack([plain, other], WAN, VARIANT, matrices, allow_overlap=False)) == 2
    with pytest.raises(Collision):
        load_stack([plain, numbered], WAN, VARIANT, matrices, allow_overlap=False)


def test_mixed_units_collide_by_what_they_really_touch(tmp_path, matrices):
    slot = StackEntry(trained(tmp_path, matrices, Loraid(number=1), seed=1))
    row = StackEntry(trained(tmp_path, matrices, Loraid(number=2, unit="row"), seed=2))
    with pytest.raises(Collision):
        load_stack([slot, row], WAN, VARIANT, matrices, allow_overlap=False)


def test_a_multiplier_of_zero_switches_a_lora_off(tmp_path, matrices):
    paths = [trained(tmp_path, matrices, Loraid(number=1), seed=i) for i in (1, 2)]
    stack = load_stack([StackEntry(paths[0]), StackEntry(paths[1], 0.0)], WAN, VARIANT, matrices, allow_overlap=False)
    assert len(stack) == 1


def test_the_requested_loraid_must_be_that_of_the_file(tmp_path, matrices):
    path = trained(tmp_path, matrices, Loraid(number=2))
    with pytest.raises(ValueError, match="LORAID 1 was asked for, but the file is LORAID 2"):
        load_stack([StackEntry(path, 1.0, 1)], WAN, VARIANT, matrices, allow_overlap=False)
    with pytest.raises(ValueError, match="has no LORAID"):
        load_stack([StackEntry(trained(tmp_path, matrices), 1.0, 1)], WAN, VARIANT, matrices, allow_overlap=False)


def test_a_file_that_touches_more_than_it_declares_is_refused(tmp_path, matrices):
    share = allocate(matrices, Loraid(number=1))
    everything = files.read(trained(tmp_path, matrices), matrices, TITLE).factors
    files.save(tmp_path / "liar.safetensors", everything, share.metadata("wan"))
    with pytest.raises(ValueError, match="which LORAID 1 does not own"):
        load_stack([StackEntry(tmp_path / "liar.safetensors")], WAN, VARIANT, matrices, allow_overlap=False)


def test_a_loraid_of_another_model_size_is_refused(tmp_path, matrices):
    share = allocate([*matrices, Matrix("blocks.2.self_attn.q", 256, 256, "blocks.2")], Loraid(number=1))
    factors = files.read(trained(tmp_path, matrices, Loraid(number=1)), matrices, TITLE).factors
    other = {**share.metadata("wan"), "ss_loraid_digest": "0" * 16}
    files.save(tmp_path / "other.safetensors", factors, other)
    with pytest.raises(ValueError, match="another size or family"):
        load_stack([StackEntry(tmp_path / "other.safetensors")], WAN, VARIANT, matrices, allow_overlap=False)


@pytest.mark.parametrize("unit", UNITS)
def test_merging_is_free_of_order_and_equals_the_single_merges(unit, tmp_path, checkpoint, matrices):
    n = {"slot": 60, "block": 1, "matrix": 5, "row": 60}[unit]
    entries = [
        StackEntry(trained(tmp_path, matrices, Loraid(number=i, unit=unit, units_per_id=n), seed=i), 0.7)
        for i in (1, 2)
    ]
    base = load_file(checkpoint)
    orders = [
        merged(checkpoint, tmp_path / f"{i}.safetensors", matrices, *order)
        for i, order in enumerate(permutations(entries))
    ]
    singles = [
        merged(checkpoint, tmp_path / f"single{i}.safetensors", matrices, entry) for i, entry in enumerate(entries)
    ]
    bits = lambda x: x.view(torch.int16)  # noqa: E731  so that -0.0 and 0.0 differ
    touched = 0
    for name, original in base.items():
        assert torch.equal(bits(orders[0][name]), bits(orders[1][name]))
        for single in singles:
            changed = bits(single[name]) != bits(original)
            touched += int(changed.sum())
            assert torch.equal(bits(orders[0][name])[changed], bits(single[name])[changed])
        untouched = (bits(singles[0][name]) == bits(original)) & (bits(singles[1][name]) == bits(original))
        assert torch.equal(bits(orders[0][name])[untouched], bits(original)[untouched])
    assert touched > 1000


def test_merging_equals_applying(tmp_path, checkpoint, matrices):
    entries = [StackEntry(trained(tmp_path, matrices, seed=i, rank=2, alpha=0.05), 0.5) for i in (1, 2)]
    stack = load_stack(entries, WAN, VARIANT, matrices, allow_overlap=True)
    dit = dit_of(checkpoint)
    plain = velocity(dit)
    with attached(dit, adapters(stack, torch.device("cpu"), torch.float32)):
        applied = velocity(dit)
    save_file({name: value.float() for name, value in load_file(checkpoint).items()}, tmp_path / "f32.safetensors")
    merged(tmp_path / "f32.safetensors", tmp_path / "merged.safetensors", matrices, *entries)
    assert reference.relative_error(velocity(dit_of(tmp_path / "merged.safetensors")), applied) < 1e-5
    assert reference.relative_error(applied, plain) > 1e-2


def test_deltas_are_added_in_float32_and_rounded_once(tmp_path, checkpoint, matrices):
    entries = [StackEntry(trained(tmp_path, matrices, seed=i, alpha=0.01)) for i in range(5)]
    result = merged(checkpoint, tmp_path / "m.safetensors", matrices, *entries)
    name = matrices[3].name
    delta = torch.zeros(matrices[3].rows, matrices[3].columns)
    for entry in entries:
        factors = files.read(entry.path, matrices, TITLE).factors[name]
        delta += factors.scale * factors.up @ factors.down
    exact = (load_file(checkpoint)[f"{name}.weight"].float() + delta).bfloat16()
    torch.testing.assert_close(result[f"{name}.weight"], exact, rtol=2**-8, atol=1e-6)
    assert (result[f"{name}.weight"] == exact).float().mean() > 0.999


def test_a_merged_file_keeps_everything_else_and_says_where_it_comes_from(tmp_path, checkpoint, matrices):
    entry = StackEntry(trained(tmp_path, matrices, Loraid(number=1)), 0.5)
    target = tmp_path / "m.safetensors"
    result = merged(checkpoint, target, matrices, entry)
    base = load_file(checkpoint)
    assert list(result) == list(base)
    changed = [name for name in base if not torch.equal(base[name], result[name])]
    assert changed == ["blocks.0.self_attn.q.weight"]
    with safe_open(target, "pt") as file:
        assert file.metadata()["modelspec.title"] == "small"
        assert '"loraid": 1' in file.metadata()["videolora_merged"]
    stack = load_stack([entry], WAN, VARIANT, matrices, allow_overlap=False)
    part = open_part(checkpoint, "dit")[1]
    assert is_merged(checkpoint, target, "", part, stack)
    other = load_stack([StackEntry(entry.path, 0.6)], WAN, VARIANT, matrices, allow_overlap=False)
    assert not is_merged(checkpoint, target, "", part, other)


def test_shards_are_merged_into_one_file(tmp_path, checkpoint, matrices):
    base = load_file(checkpoint)
    names = list(base)
    for index, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        save_file({name: base[name] for name in part}, tmp_path / f"dit-{index:05d}-of-00002.safetensors")
    entry = StackEntry(trained(tmp_path, matrices))
    whole = merged(checkpoint, tmp_path / "a.safetensors", matrices, entry)
    sharded = merged(tmp_path / "dit-00001-of-00002.safetensors", tmp_path / "b.safetensors", matrices, entry)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_a_merge_that_is_given_up_leaves_nothing(tmp_path, checkpoint, matrices):
    _, part = open_part(checkpoint, "dit")
    stack = load_stack([StackEntry(trained(tmp_path, matrices))], WAN, VARIANT, matrices, allow_overlap=False)
    steps = merge(checkpoint, tmp_path / "out" / "m.safetensors", "", part, stack)
    next(steps)
    steps.close()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_source_itself_is_not_written_over(tmp_path, checkpoint, matrices):
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        merged(checkpoint, checkpoint, matrices, StackEntry(trained(tmp_path, matrices)))


def test_prefixes_that_hold_the_word_diff_are_no_other_kind_of_lora(tmp_path, matrices):
    m = matrices[0]
    tensors = {f"model.diffusion_model.{m.name}.lora_A.weight": torch.ones(2, m.columns),
               f"model.diffusion_model.{m.name}.lora_B.weight": torch.ones(m.rows, 2)}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    assert list(files.read(tmp_path / "lora.safetensors", matrices, TITLE).factors) == [m.name]


def test_alpha_is_kept_exactly_in_a_file_of_bfloat16(tmp_path, matrices):
    m = matrices[0]
    factors = {m.name: LoRAFactors(torch.ones(4, m.columns).bfloat16(), torch.ones(m.rows, 4).bfloat16(), 12.34)}
    files.save(tmp_path / "lora.safetensors", factors, {})
    assert files.read(tmp_path / "lora.safetensors", matrices, TITLE).factors[m.name].alpha == pytest.approx(
        12.34, rel=1e-6
    )


def test_a_lora_of_one_expert_is_refused_by_the_other_and_taken_by_its_own(tmp_path, matrices):
    share = allocate(matrices, Loraid(number=1))
    factors = files.read(trained(tmp_path, matrices, Loraid(number=1)), matrices, TITLE).factors
    files.save(tmp_path / "high.safetensors", factors, share.metadata("wan", "high"))
    entry = [StackEntry(tmp_path / "high.safetensors")]
    with pytest.raises(ValueError, match="trained for the high-noise expert"):
        load_stack(entry, WAN, WAN.variants["2.2-t2v-A14B-low"], matrices, allow_overlap=False)
    assert load_stack(entry, WAN, WAN.variants["2.2-t2v-A14B-high"], matrices, allow_overlap=False)


def test_merged_files_are_the_same_to_the_byte_in_any_order(tmp_path, checkpoint, matrices):
    entries = [StackEntry(trained(tmp_path, matrices, Loraid(number=i, unit="row"), seed=i)) for i in (1, 2)]
    for index, order in enumerate(permutations(entries)):
        merged(checkpoint, tmp_path / f"{index}.safetensors", matrices, *order)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
