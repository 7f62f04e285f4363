"""Inspecting LoRAs: maps, overlaps, cosines, angles, free LORAIDs."""

import math

import numpy as np
import pytest
import reference
import torch
from small_loras import dense, some_factors
from videolora.core.families import FAMILIES
from videolora.core.lora import files
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inspection import inspect, picture, principal_angle, report
from videolora.core.lora.inventory import Matrix, inventory
from videolora.core.lora.loraid import Loraid, allocate

WAN = FAMILIES["wan"]
MATRICES = [
    Matrix(m.name, m.rows // 64, m.columns // 64, m.block) for m in inventory(WAN, reference.manifest("wan21_t2v_1_3B"))
]


def lora(path, loraid=None, seed=0, kind="lora", matrices=MATRICES):
    share = allocate(MATRICES, loraid) if loraid else None
    made = some_factors([m for m in matrices if not share or m.name in share.rows], kind=kind, seed=seed)
    if share:
        made = {name: f.cut(share.rows[name]).placed(share.rows[name][0], f.shape[0]) for name, f in made.items()}
    files.save(path, made, share.metadata("wan") if share else {})
    return files.read(path, MATRICES, "")


def test_disjoint_loraids_have_no_overlap_and_the_others_are_free(tmp_path):
    loras = [lora(tmp_path / f"{number}.safetensors", Loraid(number=number), seed=number) for number in (2, 5)]
    found = inspect(loras, MATRICES)
    assert not found.overlaps
    text = report(found)
    sizes = [allocate(MATRICES, Loraid(number=number)).parameters for number in range(1, 21)]
    assert "no parameter is touched twice" in text and (
        "free LORAIDs by slot, 12 each: 1, 3-4, 6-20; there are 20, "
        f"which own {min(sizes):,} to {max(sizes):,} parameters of the model" in text
    )
    assert "2.safetensors (LORAID 2 by slot): training names, rank 4, alpha 2.5, 45 keys matched" in text
    share = allocate(MATRICES, Loraid(number=2))
    assert found.parameters[0] == share.parameters
    assert f"{share.parameters:,} parameters, " in text


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_the_cosine_of_overlapping_deltas_is_that_of_the_whole_matrices(kind, tmp_path):
    some = [m for m in MATRICES[:7] if m.rows % 4 == 0]
    one, two = (lora(tmp_path / f"{seed}.safetensors", seed=seed, kind=kind, matrices=some) for seed in (1, 2))
    (overlap,) = inspect([one, two], MATRICES).overlaps
    a, b = (torch.cat([dense(f.factors[name]).flatten() for name in overlap.matrices]) for f in (one, two))
    assert overlap.matrices == [m.name for m in some]
    assert overlap.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-4)
    (same,) = inspect([one, one], MATRICES).overlaps
    assert same.cosine == pytest.approx(1, abs=1e-5)
    assert same.output_angle == pytest.approx(0, abs=0.1) and same.input_angle == pytest.approx(0, abs=0.1)


def test_principal_angles_are_those_of_the_spaces():
    e = torch.eye(4)
    assert principal_angle(e[:, :2], e[:, 2:]) == 90
    turned = torch.stack([math.cos(0.5) * e[0] + math.sin(0.5) * e[2]], 1)
    assert principal_angle(e[:, :2], turned) == pytest.approx(math.degrees(0.5))
    assert principal_angle(e[:, :1], torch.zeros(4, 2)) == 90


def test_what_cannot_be_compared_is_said(tmp_path):
    huge = {m.name: LoRAFactors(torch.randn(600, m.columns), torch.randn(m.rows, 600), 1.0) for m in MATRICES[:1]}
    files.save(tmp_path / "huge.safetensors", huge, {})
    file = files.read(tmp_path / "huge.safetensors", MATRICES, "")
    assert "cannot be compared" in report(inspect([file, file], MATRICES))


def test_the_picture_shows_each_lora_in_its_colour_and_frames_what_is_touched_twice(tmp_path):
    one, two = (
        lora(tmp_path / f"{number}.safetensors", Loraid(number=number, unit=unit))
        for number, unit in ((1, "slot"), (1, "row"))
    )
    alone, both = (np.asarray(picture(inspect(loras, MATRICES))).reshape(-1, 3) for loras in ([one], [one, two]))
    share = lambda pixels, colour: (np.abs(pixels.astype(int) - colour).sum(1) < 30).mean()  # noqa: E731
    assert share(alone, (63, 112, 196)) > 0.005
    assert share(both, (224, 109, 46)) > 0.005
    assert share(both, (38, 42, 51)) > share(alone, (38, 42, 51)), "frames"
