"""Blending: on shared matrices only, alpha first; the original formulas as they were."""

import pytest
import torch
from safetensors.torch import load_file
from small_loras import WAN_MATRICES, some_factors
from videolora.core.lora import files
from videolora.core.lora.blend import METHODS, Blend, blended, blended_compatibly, save
from videolora.core.lora.factors import LoRAFactors

TEXT, SPATIAL, FEATURES = "blocks.0.cross_attn.k_img", "blocks.0.self_attn.q", "blocks.1.ffn.0"


def lora(path, matrices, seed, scale=1.0, alpha=2.5, **metadata):
    made = some_factors(matrices, alpha=alpha, seed=seed)
    files.save(path, {name: LoRAFactors(f.down, scale * f.up, f.alpha) for name, f in made.items()}, metadata)
    return files.read(path, WAN_MATRICES, "")


@pytest.fixture
def two(tmp_path):
    return [
        lora(tmp_path / "a.safetensors", WAN_MATRICES, 1, alpha=2.0),
        lora(tmp_path / "b.safetensors", WAN_MATRICES[:3], 2, alpha=8.0),
    ]


def test_an_average_is_taken_of_shared_matrices_after_alpha_went_into_up(two):
    a, b = (file.factors[SPATIAL] for file in two)
    first, second = blended(two, Blend(strength=0.25))
    torch.testing.assert_close(first[SPATIAL].up, 0.75 * a.up * a.scale + 0.25 * b.up * b.scale)
    torch.testing.assert_close(second[SPATIAL].up, 0.75 * b.up * b.scale + 0.25 * a.up * a.scale)
    assert first[SPATIAL].scale == second[SPATIAL].scale == 1.0
    own = WAN_MATRICES[4].name
    assert first[own] is two[0].factors[own] and own not in second


def test_a_strength_of_0_changes_no_delta(two):
    for method in METHODS:
        for file, made in zip(two, blended(two, Blend(method=method, strength=0.0)), strict=True):
            for name, factors in file.factors.items():
                torch.testing.assert_close(made[name].up * made[name].scale, factors.up * factors.scale)


def test_thresholded_keeps_what_is_far_from_the_others(two):
    a, b = (file.factors[SPATIAL] for file in two)
    up, other = a.up * a.scale, b.up * b.scale
    first, _ = blended(two, Blend(method="thresholded", strength=1.0, threshold=0.5))
    torch.testing.assert_close(first[SPATIAL].up, torch.where((up - other).abs() > 0.5, up, other))


def test_democratic_strength_depends_on_the_kind_of_module():
    own, other = torch.full((2, 2), 1.0), torch.full((2, 2), 0.0)
    how = Blend(method="democratic", strength=0.4)
    assert how(SPATIAL, own, [other])[0, 0] == pytest.approx(1 - 0.5 * 0.4)
    assert how(FEATURES, own, [other])[0, 0] == pytest.approx(1 - 0.7 * 0.4)
    assert how(TEXT, own, [other + 0.9])[0, 0] == pytest.approx(0.6 + 0.4 * 0.9)
    found = how(TEXT, own, [2 * own, 4 * own])
    assert found[0, 0] == pytest.approx(0.5 + 0.5 * 4), "the strongest of the others, at most half"
    assert torch.equal(how("blocks.0.norm", own, [other]), own)


def test_disjoint_files_are_not_blended_and_it_is_said_why(tmp_path):
    one = lora(tmp_path / "a.safetensors", WAN_MATRICES[:2], 1, ss_loraid="1")
    two = lora(tmp_path / "b.safetensors", WAN_MATRICES[2:], 2, ss_loraid="2")
    with pytest.raises(
        ValueError,
        match=r"\(LORAID 1\) and b\.safetensors \(LORAID 2\) share no parameter, so there is nothing to blend",
    ):
        blended([one, two], Blend())


def test_disjoint_rows_of_one_matrix_are_not_blended_and_a_file_that_grows_loses_its_loraid(tmp_path):
    m = WAN_MATRICES[0]
    whole = some_factors([m])[m.name]
    for name, rows, number in (("a", (0, 4), "1"), ("b", (4, 9), "2"), ("c", (0, 9), "3")):
        made = {m.name: whole.cut(rows).placed(rows[0], m.rows)}
        files.save(tmp_path / f"{name}.safetensors", made, {"ss_loraid": number, "ss_output_name": name})
    a, b, c = (files.read(tmp_path / f"{name}.safetensors", WAN_MATRICES, "") for name in "abc")
    with pytest.raises(ValueError, match="share no parameter"):
        blended([a, b], Blend())
    for lora, made, number in zip((a, c), blended([a, c], Blend()), (None, "3"), strict=True):
        save(lora, made, tmp_path / "out.safetensors")
        metadata = files.read(tmp_path / "out.safetensors", WAN_MATRICES, "").metadata
        assert metadata.get("ss_loraid") == number and metadata["ss_output_name"] == lora.path.stem


def test_other_ranks_and_kinds_are_refused(tmp_path, two):
    files.save(tmp_path / "c.safetensors", some_factors(WAN_MATRICES, rank=2), {})
    with pytest.raises(ValueError, match=r"a\.safetensors rank 4, c\.safetensors rank 2\. Resize"):
        blended([two[0], files.read(tmp_path / "c.safetensors", WAN_MATRICES, "")], Blend())
    files.save(tmp_path / "d.safetensors", some_factors(WAN_MATRICES, kind="loha"), {})
    with pytest.raises(ValueError, match="is a loha; only LoRAs can be blended"):
        blended([two[0], files.read(tmp_path / "d.safetensors", WAN_MATRICES, "")], Blend())
    for wrong in ({"method": "royal"}, {"strength": 1.1}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match="blend"):
            Blend(**wrong)


def test_a_blended_file_is_written_in_the_dtype_it_came_in(tmp_path, two):
    save(two[0], blended(two, Blend())[0], tmp_path / "out.safetensors")
    assert files.read(tmp_path / "out.safetensors", WAN_MATRICES, "").dtype == torch.float32


def test_the_original_formulas_destroy_disjoint_files_as_they_did(tmp_path):
    """Strength 1 of the original democratic blend: own text attention times 0, spatial 0.5, features 0.3; foreign ones arrive
    times 0.5, 0.5 and 0.7, alphas too."""
    by_name = {m.name: m for m in WAN_MATRICES}
    own = lora(tmp_path / "a.safetensors", [by_name[TEXT], by_name[SPATIAL], by_name[FEATURES]], 1)
    lora(tmp_path / "b.safetensors", [by_name["blocks.1.ffn.2"], by_name["blocks.1.self_attn.o"]], 2)
    before = {**load_file(tmp_path / "a.safetensors"), **load_file(tmp_path / "b.safetensors")}
    (made, _), _ = blended_compatibly(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], Blend(method="democratic", strength=1.0)
    )
    kept = {TEXT: 0.0, SPATIAL: 0.5, FEATURES: 0.3, "blocks.1.ffn.2": 0.7, "blocks.1.self_attn.o": 0.5}
    for name, share in kept.items():
        stem = "lora_unet_" + name.replace(".", "_")
        for role in ("lora_up.weight", "lora_down.weight", "alpha"):
            torch.testing.assert_close(made[f"{stem}.{role}"], share * before[f"{stem}.{role}"])
    assert own.factors.keys() < set(kept)
