import itertools

import pytest
import reference
from videolora.core.families import FAMILIES
from videolora.core.lora.inventory import Matrix, inventory
from videolora.core.lora.loraid import UNITS, Loraid, allocate, from_metadata

WAN = FAMILIES["wan"]
MODELS = {
    "wan21_t2v_1_3B": (30, 300), "wan21_t2v_14B": (40, 400), "wan22_t2v_A14B_high_low": (40, 400),
    "wan21_i2v_14B_480p_720p": (40, 480),
}  # fmt: skip


def matrices(model):
    return inventory(WAN, reference.manifest(model))


def small(count=20, rows=256):
    return [Matrix(f"blocks.{i // 10}.m{i % 10}", rows, 64, f"blocks.{i // 10}") for i in range(count)]


def shares(of, unit, n):
    """All allocations of a division, until it is used up."""
    found = []
    while True:
        try:
            found.append(allocate(of, Loraid(number=len(found) + 1, unit=unit, units_per_id=n)))
        except ValueError as error:
            assert "out of range" in str(error)
            return found


@pytest.mark.parametrize("model", MODELS)
def test_the_inventory_lists_every_matrix_of_every_block_in_order(model):
    blocks, count = MODELS[model]
    found = matrices(model)
    assert len(found) == count
    assert list(dict.fromkeys(matrix.block for matrix in found)) == [f"blocks.{i}" for i in range(blocks)]
    assert [matrix.name.removeprefix("blocks.0.") for matrix in found[:4]] == [
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("unit", UNITS)
def test_all_loraids_together_own_everything_exactly_once(unit, n):
    for model in MODELS:
        of = matrices(model)
        owned = {matrix.name: [] for matrix in of}
        for share in shares(of, unit, n):
            for name, rows in share.rows.items():
                owned[name].append(rows)
        for matrix in of:
            edges = sorted(owned[matrix.name])
            assert edges[0][0] == 0 and edges[-1][1] == matrix.rows
            assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("unit", ["slot", "row"])
@pytest.mark.parametrize(("n", "capacity"), [(12, 20), (3, 80), (2, 120), (1, 240)])
@pytest.mark.parametrize("model", MODELS)
def test_slots_and_rows_give_the_promised_number_of_loraids_on_every_model(model, unit, n, capacity):
    assert len(shares(matrices(model), unit, n)) == capacity


@pytest.mark.parametrize(("unit", "capacity"), [("block", 4), ("matrix", 34)])
def test_whole_blocks_and_matrices_give_what_the_model_has(unit, capacity):
    assert len(shares(matrices("wan21_t2v_14B"), unit, 12)) == capacity


def test_the_first_twelve_slots_of_the_14b_are_its_first_two_blocks():
    share = allocate(matrices("wan21_t2v_14B"), Loraid(number=1))
    assert set(share.rows) == {m.name for m in matrices("wan21_t2v_14B") if m.block in ("blocks.0", "blocks.1")}


def test_rows_give_every_loraid_the_same_size_and_every_matrix():
    found = [share.parameters for share in shares(matrices("wan21_t2v_14B"), "row", 12)]
    assert max(found) / min(found) < 1.01
    assert len(allocate(matrices("wan21_t2v_14B"), Loraid(number=7, unit="row")).rows) == 400


def test_an_allocation_never_changes():
    """Golden digests: LoRAs that people have trained depend on them."""
    of = matrices("wan21_t2v_14B")
    digests = {unit: allocate(of, Loraid(number=2, unit=unit)).digest for unit in UNITS}
    assert digests == GOLDEN


def test_the_last_loraid_may_be_smaller_and_says_so():
    share = allocate(matrices("wan21_t2v_14B"), Loraid(number=4, unit="block"))
    assert (share.first, share.last) == (36, 39)
    assert "partial: 4 of 12" in share.report()


def test_out_of_range_says_how_many_there_are_and_what_would_fit():
    with pytest.raises(ValueError, match=r"40 blocks.*LORAIDs 1 to 4 at 12.*unit 'slot' with 12") as error:
        allocate(matrices("wan21_t2v_14B"), Loraid(number=5, unit="block"))
    assert "unit 'block' with 9 per LORAID" in str(error.value)


def test_a_suggested_setting_works():
    of = matrices("wan21_t2v_1_3B")
    allocate(of, Loraid(number=5, unit="block", units_per_id=7))
    with pytest.raises(ValueError, match="unit 'block' with 7 per LORAID"):
        allocate(of, Loraid(number=5, unit="block"))


def test_a_small_model_says_when_a_slot_is_empty():
    with pytest.raises(ValueError, match=r"would own nothing.*20 matrices"):
        allocate(small(), Loraid(number=1, units_per_id=1))


@pytest.mark.parametrize(
    "wrong", [{"number": 0}, {"number": -3}, {"number": 1, "unit": "half"}, {"number": 1, "units_per_id": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"use|numbered from 1"):
        Loraid(**wrong)


@pytest.mark.parametrize("unit", UNITS)
def test_the_metadata_brings_the_loraid_back(unit):
    share = allocate(matrices("wan21_t2v_14B"), Loraid(number=3, unit=unit, units_per_id=5))
    metadata = share.metadata("wan")
    assert from_metadata(metadata) == share.loraid
    assert metadata["ss_loraid"] == "3"


def test_an_older_file_owns_real_blocks_and_a_newer_rule_is_refused():
    assert from_metadata({"ss_loraid": "2"}) == Loraid(number=2, unit="block", units_per_id=12)
    assert from_metadata({}) is None
    with pytest.raises(ValueError, match="update the pack"):
        from_metadata({"ss_loraid": "2", "ss_loraid_version": "99"})


GOLDEN = {
    "slot": "a4bf516a2bba5448",
    "block": "0caf75cf10e53f3e",
    "matrix": "a16a77ad750212c5",
    "row": "b9b9988927efa8c7",
}
