"""Post-hoc EMA: the reference's numbers, the order of files, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.lora.ema import Profile, average, gamma, ordered, siblings

VECTORS = Path(__file__).resolve().parents[2] / "vectors"
INPUTS = [VECTORS / f"ema_in_{index}.safetensors" for index in range(4)]
PROFILES = {
    "beta095": Profile(sigma_rel=0), "beta090_099": Profile(sigma_rel=0, beta=0.9, beta2=0.99), "sigma02": Profile(sigma_rel=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_averages_are_those_of_the_reference(name, tmp_path):
    report = average(INPUTS, tmp_path / "ema.safetensors", PROFILES[name])
    made, expected = load_file(tmp_path / "ema.safetensors"), load_file(VECTORS / f"ema_out_{name}.safetensors")
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, rtol=1e-6, atol=1e-6)
    with (
        safe_open(tmp_path / "ema.safetensors", "pt") as file,
        safe_open(VECTORS / f"ema_out_{name}.safetensors", "pt") as known,
    ):
        assert file.metadata()["ss_loraid"] == "3"
        assert file.metadata()["sshs_legacy_hash"] == known.metadata()["sshs_legacy_hash"]
    assert len(report.splitlines()) == 4


def test_the_power_of_a_profile_is_the_papers(numerics):
    for sigma_rel, expected in numerics["ema_gamma"]:
        assert gamma(sigma_rel) == pytest.approx(expected, rel=1e-9)


def test_weights_add_up_and_with_sigma_rel_the_first_counts_nothing():
    weights = Profile(sigma_rel=0.2).weights(5)
    assert weights == pytest.approx([0, 0.0198815, 0.1211203, 0.3025010, 0.5564971], abs=1e-7)
    assert sum(Profile(sigma_rel=0, beta=0.9, beta2=0.99).weights(7)) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [{"sigma_rel": 0.2887}, {"sigma_rel": -0.1}, {"beta": 1.0}, {"beta2": -0.5}])
def test_profiles_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="use 0"):
        Profile(**wrong)


def lora(path, value=1.0, **metadata):
    save_file({"lora_unet_a.lora_up.weight": torch.full((2, 2), value), "lora_unet_a.alpha": torch.tensor(2.0)}, path,
              {key: str(of) for key, of in metadata.items()})  # fmt: skip
    return path


def names(paths):
    return [path.name.removesuffix(".safetensors") for path in paths]


def test_a_training_finds_its_own_files_and_no_others(tmp_path):
    for name in (
        "sara-step00000010",
        "sara-step00000002",
        "sara",
        "sara-000004",
        "sara-two-step00000010",
        "sarah",
        "Sarah_epoch_005",
    ):
        lora(tmp_path / f"{name}.safetensors")
    for name in ("sara-step00000010", "sara"):
        found = names(siblings(tmp_path / f"{name}.safetensors"))
        assert set(found) == {"sara-000004", "sara-step00000002", "sara-step00000010", "sara"}
    assert names(siblings(tmp_path / "Sarah_epoch_005.safetensors")) == ["Sarah_epoch_005"]


def test_files_are_ordered_by_their_steps_or_their_names_and_never_by_their_age(tmp_path):
    by_name = [
        lora(tmp_path / f"{name}.safetensors", index)
        for index, name in enumerate(("x", "x-000010", "x-000002", "x_epoch_005"))
    ]
    assert names(ordered(by_name)) == ["x-000002", "x_epoch_005", "x-000010", "x"]
    by_step = [
        lora(tmp_path / f"{name}.safetensors", steps, ss_steps=steps)
        for name, steps in (("c", 5), ("a", 50), ("b", 500))
    ]
    assert names(ordered(list(reversed(by_step)))) == ["c", "a", "b"]


def test_a_last_file_that_was_also_saved_with_a_number_counts_once(tmp_path):
    same = [lora(tmp_path / f"{name}.safetensors", 1.0, ss_steps=10) for name in ("x", "x-step00000010")]
    assert len(ordered([lora(tmp_path / "x-step00000005.safetensors", ss_steps=5), *same])) == 2
    lora(tmp_path / "x.safetensors", 2.0, ss_steps=10)
    with pytest.raises(ValueError, match="are of the same step and differ"):
        ordered(same)


def test_files_of_different_trainings_are_refused(tmp_path):
    one = lora(tmp_path / "a.safetensors", ss_loraid=1)
    target, profile = tmp_path / "ema.safetensors", Profile()
    with pytest.raises(ValueError, match=r"b\.safetensors is LORAID 2 and a\.safetensors is LORAID 1"):
        average([one, lora(tmp_path / "b.safetensors", ss_loraid=2)], target, profile)
    changes = {"has no": {"more": torch.ones(1)}, "alphas must be equal": {"lora_unet_a.alpha": torch.tensor(1)},
               r"c\.safetensors: .*not finite": {"lora_unet_a.lora_up.weight": torch.full((2, 2), torch.nan)},
               r"\(3, 2\)": {"lora_unet_a.lora_up.weight": torch.ones(3, 2)}}  # fmt: skip
    for message, tensors in changes.items():
        save_file({**load_file(one), **tensors}, tmp_path / "c.safetensors", {"ss_loraid": "1"})
        with pytest.raises(ValueError, match=message):
            average([one, tmp_path / "c.safetensors"], target, profile)
    with pytest.raises(ValueError, match="takes two LoRAs or more"):
        average([one], target, profile)
    assert not target.exists()


def test_alphas_in_whole_numbers_and_dtypes_are_kept(tmp_path):
    paths = []
    for index in range(2):
        save_file(
            {"a.lora_up.weight": torch.full((2, 2), index + 1.0).bfloat16(), "a.alpha": torch.tensor(4)},
            tmp_path / f"{index}.safetensors",
        )
        paths.append(tmp_path / f"{index}.safetensors")
    average(paths, tmp_path / "ema.safetensors", Profile(sigma_rel=0, beta=0.5, beta2=0.5))
    made = load_file(tmp_path / "ema.safetensors")
    assert made["a.alpha"].dtype == torch.int64 and int(made["a.alpha"]) == 4
    assert torch.equal(made["a.lora_up.weight"], torch.full((2, 2), 1.5).bfloat16())
