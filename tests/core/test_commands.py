"""The workbench from a shell, by the usage examples of the document that LORAID comes from: what each one says, or meant."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import small_job
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from videolora.core import commands
from videolora.core.families import open_part
from videolora.core.lora.adapter import attached
from videolora.core.lora.loraid import Loraid
from videolora.core.lora.stack import adapters, entries_of
from videolora.core.lora.workbench import OpenedModel, read_stack
from videolora.core.training.job import SaveSettings
from videolora.core.training.run import Run
from videolora.core.weights import load_into

ROOT = Path(__file__).resolve().parents[2]
WAN, DIT = small_job.WAN, "dit.safetensors"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Sarah, Jessica and Anna, trained as LORAID 1, 2 and 3 of 12 units each; of Sarah's training files from on the way too."""
    folder = tmp_path_factory.mktemp("document")
    made = small_job.make(folder)
    for number, name in enumerate(("Sarah_512", "Jessica_512", "Anna_512"), start=1):
        save = SaveSettings(precision="float32", every_steps=2 if number == 1 else 0)
        described = small_job.job(
            made, folder, name=name, loraid=Loraid(number=number), save=save, seed=number, steps=5 if number == 1 else 2
        )
        assert small_job.work(Run.of(described, folder / "runs")) == 0
    return folder


def command(capsys, *words):
    code = commands.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.err if code else printed.out


@functools.cache
def dit_of(path):
    checkpoint, part = open_part(path, "dit")
    with torch.device("meta"):
        dit = WAN.build_dit(part.config)
    return load_into(dit, checkpoint, part.keymap, torch.float32)


def velocity(checkpoint, *entries):
    """What the model predicts with these LoRAs on, as sampling uses them: the model is loaded once for all of them."""
    stack = read_stack(OpenedModel.open(checkpoint), entries, allow_overlap=False)
    tensors, _ = reference.vector("wan21_t2v")
    states = WAN.conditions([{"varlen_t5": tensors["text_states.0"]}])
    with torch.no_grad(), attached(dit_of(checkpoint), adapters(stack, torch.device("cpu"), torch.float32)) as dit:
        return dit(tensors["latents"][:1], tensors["timestep"][:1], **states)


def files_of(folder, *names):
    return [folder / f"{name}.safetensors" for name in names]


def test_each_training_says_whose_loraid_it_is_and_they_share_nothing(loras, capsys):
    code, text = command(capsys, "inspect", "--dit", loras / "dit.safetensors", "--lora", *files_of(loras, "Sarah_512", "Jessica_512", "Anna_512"),
                         "--picture", loras / "map.png")  # fmt: skip
    assert code == 0 and (loras / "map.png").stat().st_size > 1000
    assert "no parameter is touched twice" in text and "Sarah_512.safetensors (LORAID 1 by slot)" in text
    assert "free LORAIDs by slot, 12 each: 4-20" in text


def test_one_loraid_alone_changes_the_model(loras):
    (alone,) = entries_of(files_of(loras, "Sarah_512"), [1.0], [1])
    assert reference.relative_error(velocity(loras / DIT, alone), velocity(loras / DIT)) > 1e-6


def test_files_are_paired_with_loraids_by_what_they_say_and_not_by_their_place(loras):
    """The document lists Jessica before Sarah with LORAIDs 1 2, and its script refuses that."""
    sarah, jessica = files_of(loras, "Sarah_512", "Jessica_512")
    entries = entries_of([jessica, sarah], [1.0, 0.7], [1, 2])
    assert [(entry.path, entry.multiplier, entry.number) for entry in entries] == [(sarah, 1.0, 1), (jessica, 0.7, 2)]
    assert entries == entries_of([sarah, jessica], [1.0, 0.7], [1, 2])


def test_multipliers_control_each_loraid(loras):
    two = files_of(loras, "Sarah_512", "Jessica_512")
    sarah, jessica = ([entry] for entry in entries_of(two))
    assert torch.equal(velocity(loras / DIT, *entries_of(two, [1.0, 0.0], [1, 2])), velocity(loras / DIT, *sarah))
    assert torch.equal(velocity(loras / DIT, *entries_of(two, [0.0, 1.0], [1, 2])), velocity(loras / DIT, *jessica))
    assert torch.equal(velocity(loras / DIT, *entries_of(two, [0.0, 0.0], [1, 2])), velocity(loras / DIT))
    half = velocity(loras / DIT, *entries_of(two, [0.5, 0.5], [1, 2]))
    assert not torch.equal(half, velocity(loras / DIT, *entries_of(two, [1.0, 1.0], [1, 2])))
    three = [*two, *files_of(loras, "Anna_512")]
    assert [entry.multiplier for entry in entries_of(three, [1.0, 0.7, 0.3], [1, 2, 3])] == [1.0, 0.7, 0.3]
    assert [entry.multiplier for entry in entries_of(three, [1.0], [1, 2, 3])] == [1.0, 1.0, 1.0]
    assert [entry.multiplier for entry in entries_of(three, [0.5], [1, 2, 3])] == [0.5, 1.0, 1.0], (
        "padded, not repeated"
    )


@pytest.mark.parametrize(
    ("names", "multipliers", "numbers", "message"),
    [(["Sarah_512"], [], [1, 2], "no file is given for LORAID 2"), (["Sarah_512", "Jessica_512"], [], [1], "is LORAID 2, and LORAID 1 are asked"),
     (["Sarah_512"], [1.0, 1.0], [], "2 multipliers are given for 1"), (["Sarah_512", "Sarah_512-step00000002"], [], [1], "are both LORAID 1")],
)  # fmt: skip
def test_lists_that_do_not_fit_each_other_are_refused(names, multipliers, numbers, message, loras):
    with pytest.raises(ValueError, match=message):
        entries_of(files_of(loras, *names), multipliers, numbers)


def test_a_merge_is_permanent_and_can_be_taken_back(loras, tmp_path, capsys):
    sarah, jessica = files_of(loras, "Sarah_512", "Jessica_512")
    base, target = loras / "dit.safetensors", tmp_path / "merged.safetensors"
    stack = ["--lora_weight", f"{sarah},{jessica}", "--lora_multiplier", "1.0", "1.0", "--LORAID", "1", "2"]
    assert command(capsys, "merge", "--dit", base, *stack, "--output", target)[0] == 0
    repeated = [
        "--lora",
        sarah,
        "--lora",
        jessica,
        "--multiplier",
        "1.0",
        "--multiplier",
        "1.0",
        "--loraid",
        "1",
        "--loraid",
        "2",
    ]
    assert command(capsys, "merge", "--dit", base, *repeated, "--output", tmp_path / "again.safetensors")[0] == 0
    assert target.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    applied = velocity(loras / DIT, *entries_of([sarah, jessica]))
    assert reference.relative_error(velocity(target), applied) < 1e-5
    code, text = command(
        capsys, "unmerge", "--dit", target, *stack, "--base", base, "--output", tmp_path / "back.safetensors"
    )
    assert code == 0 and "as the base has it" in text
    assert command(capsys, "merge", "--dit", base, *stack, "--output", target)[0] == 0, "the same once more"
    code, text = command(capsys, "merge", "--dit", base, *stack, "--output", base)
    assert code == 1 and "dit.safetensors exists already and is something else" in text
    code, text = command(capsys, "convert", "--dit", base, sarah, "--output", jessica)
    assert code == 1 and "Jessica_512.safetensors exists already and is something else" in text
    before, after = load_file(base), load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_ema_finds_the_files_of_the_training_and_keeps_the_loraid(loras, tmp_path, capsys):
    """The document gives two epochs as if they were two trainings, which averages nothing."""
    sarah = loras / "Sarah_512.safetensors"
    code, text = command(capsys, "ema", "--sigma_rel", 0.2, sarah, "--output", tmp_path / "Sarah_ema.safetensors")
    assert code == 0
    assert [line.split(":")[0] for line in text.splitlines()[:3]] == ["Sarah_512-step00000002.safetensors", "Sarah_512-step00000004.safetensors", 
                                                                     "Sarah_512.safetensors"]  # fmt: skip
    with safe_open(tmp_path / "Sarah_ema.safetensors", "pt") as file:
        assert file.metadata()["ss_loraid"] == "1"
    made, last = load_file(tmp_path / "Sarah_ema.safetensors"), load_file(sarah)
    assert made.keys() == last.keys() and any(not torch.equal(made[key], last[key]) for key in made)


def test_democratic_sharing_between_disjoint_loraids_is_refused_and_was_destruction(loras, tmp_path, capsys):
    two = files_of(loras, "Sarah_512", "Jessica_512")
    outputs = [tmp_path / "Sarah_shared.safetensors", tmp_path / "Jessica_shared.safetensors"]
    words = [
        "blend",
        "--dit",
        loras / "dit.safetensors",
        "--lora",
        *two,
        "--strength",
        1.0,
        "--method",
        "democratic",
        "--output",
        *outputs,
    ]
    code, text = command(capsys, *words)
    assert code == 1 and "share no parameter, so there is nothing to blend" in text and not outputs[0].exists()
    assert command(capsys, *words, "--compatible")[0] == 0
    own, shared = load_file(two[0]), load_file(outputs[0])
    assert all(torch.allclose(shared[key], 0.5 * value) for key, value in own.items()), (
        "spatial attention keeps half of each factor"
    )
    assert shared.keys() > own.keys(), "and it is not disjoint any more"
    code, text = command(capsys, "inspect", "--dit", loras / "dit.safetensors", "--lora", *outputs)
    assert "overlap in 2 matrices" in text


def test_convert_resize_and_extract_go_round(loras, tmp_path, capsys):
    base, sarah = loras / "dit.safetensors", loras / "Sarah_512.safetensors"
    there, back = tmp_path / "diffusers.safetensors", tmp_path / "training.safetensors"
    assert command(capsys, "convert", sarah, "--dit", base, "--to", "diffusers", "--output", there)[0] == 0
    assert any(".attn1.to_q.lora_A.weight" in key for key in load_file(there))
    assert command(capsys, "convert", there, "--dit", base, "--to", "training", "--output", back)[0] == 0
    before, after = load_file(sarah), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    code, text = command(
        capsys, "resize", sarah, "--dit", base, "--rank", 2, "--output", tmp_path / "small.safetensors"
    )
    assert code == 0 and "rank 2: 1 matrices, error " in text
    command(capsys, "merge", "--dit", base, "--lora", sarah, "--output", tmp_path / "merged.safetensors")
    code, text = command(capsys, "extract", "--dit", base, "--tuned", tmp_path / "merged.safetensors", "--rank", 4,
                         "--output", tmp_path / "out.safetensors")  # fmt: skip
    assert code == 0 and "1 matrices, error 0.0" in text
    code, text = command(capsys, "extract", "--dit", base, "--tuned", base, "--output", tmp_path / "none.safetensors")
    assert code == 1 and "there is nothing to extract" in text


def test_the_folder_itself_runs_the_commands(loras):
    words = ["inspect", "--dit", loras / "dit.safetensors", "--lora", loras / "Sarah_512.safetensors"]
    done = subprocess.run([sys.executable, ROOT / "core", *map(str, words)], capture_output=True, text=True, cwd=loras)
    assert done.returncode == 0 and "Sarah_512.safetensors (LORAID 1 by slot)" in done.stdout, done.stderr
