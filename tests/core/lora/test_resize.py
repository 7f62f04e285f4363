"""LoRAs of a chosen rank, of other LoRAs and of what two checkpoints differ in."""

import pytest
import reference
import torch
from safetensors.torch import save_file
from small_loras import WAN_MATRICES, dense, some_factors
from videolora.core.families import FAMILIES, open_part
from videolora.core.lora import files, resize
from videolora.core.lora.inventory import inventory

WAN = FAMILIES["wan"]


def saved(path, factors, **metadata):
    files.save(path, factors, metadata)
    return files.read(path, WAN_MATRICES, "")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_lower_rank_is_the_best_of_that_rank_and_its_error_is_the_reported_one(kind, tmp_path):
    file = saved(tmp_path / "l.safetensors", some_factors(WAN_MATRICES, rank=6, kind=kind))
    for one in resize.resized(file, 2):
        whole = dense(file.factors[one.name])
        s = torch.linalg.svdvals(whole)
        assert one.factors.rank == 2
        assert reference.relative_error(dense(one.factors), whole) == pytest.approx(
            float(s[2:].norm() / s.norm()), rel=1e-3
        )
        assert one.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-3)


def test_a_lora_of_a_lower_rank_keeps_its_tensors_and_rows_without_training_stay_zero(tmp_path):
    made = {
        name: factors.cut((4, 9)).placed(4, factors.shape[0]) for name, factors in some_factors(WAN_MATRICES).items()
    }
    file = saved(tmp_path / "l.safetensors", made, ss_network_dim="4")
    for one in resize.resized(file, 8):
        assert torch.equal(one.factors.up, file.factors[one.name].up) and one.error == 0
    lower = list(resize.resized(file, 1))
    assert all(one.factors.touched == (4, 9) for one in lower)
    assert "5 matrices, error " in resize.report(lower)
    metadata = resize.metadata_of(file.metadata, resize.factors_of(lower))
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("1", "1.0")
    with pytest.raises(ValueError, match="rank is 0"):
        next(resize.resized(file, 0))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model, and the same with two matrices and a bias changed."""
    folder = tmp_path_factory.mktemp("models")
    _, weights = reference.vector("wan21_t2v")
    save_file(weights, folder / "base.safetensors")
    torch.manual_seed(0)
    tuned = dict(weights)
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        change = torch.randn(len(weights[f"{name}.weight"]), 3) @ torch.randn(3, weights[f"{name}.weight"].shape[1])
        tuned[f"{name}.weight"] = weights[f"{name}.weight"] + 0.01 * change
    tuned["blocks.0.ffn.0.bias"] = weights["blocks.0.ffn.0.bias"] + 1
    save_file({f"model.diffusion_model.{name}": value for name, value in tuned.items()}, folder / "tuned.safetensors")
    return folder, {name: tuned[name] - weights[name] for name in tuned}


@pytest.mark.parametrize("side", [1024, 16])
def test_what_two_checkpoints_differ_in_is_extracted(side, checkpoints, monkeypatch):
    monkeypatch.setattr(resize, "_EXACT_SIDE", side)  # decomposed whole, and by random projection
    folder, differences = checkpoints
    base, tuned = open_part(folder / "base.safetensors", "dit"), open_part(folder / "tuned.safetensors", "dit")
    matrices = inventory(WAN, {name: info.shape for name, info in base[0].tensors.items()})
    made = list(resize.extracted(*base, *tuned, matrices, rank=3))
    factors = resize.factors_of(made)
    assert set(factors) == {"blocks.0.self_attn.q", "blocks.1.ffn.0"}
    for name, found in factors.items():
        assert reference.relative_error(dense(found), differences[f"{name}.weight"]) < 1e-3
    (error,) = {round(one.error, 1) for one in resize.extracted(*base, *tuned, matrices, rank=1) if one.factors}
    assert error > 0.3
    assert resize.other_differences(*base, *tuned, matrices) == ["blocks.0.ffn.0.bias"]
    assert resize.report([one for one in made if one.factors is None]) == "there is no difference"
