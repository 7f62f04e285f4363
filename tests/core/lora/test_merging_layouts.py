"""Merging into checkpoints that lie otherwise in their files than in the model: torch files, diffusers' division, fp8 with
factors under other names or in another file."""

import pytest
import reference
import torch
from layouts import in_comfyuis_names, in_diffusers_names, in_module
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.lora import files
from videolora.core.lora.combine import Combination
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inventory import inventory
from videolora.core.lora.merge import merge, unmerge
from videolora.core.lora.stack import StackEntry, load_stack
from videolora.core.lora.workbench import OpenedModel
from videolora.core.modules.quantized import Stored, to_scaled_fp8
from videolora.core.weights import open_checkpoint, read_header

HV = FAMILIES["hunyuan_video"]


def as_they_are(weights):
    return weights


LAYOUTS = [
    (as_they_are, ".safetensors"),
    (in_comfyuis_names, ".safetensors"),
    (in_diffusers_names, ".safetensors"),
    (in_module, ".pt"),
]


@pytest.fixture(scope="module")
def weights():
    return {name: value.bfloat16() for name, value in reference.vector("hunyuan_video_t2v")[1].items()}


@pytest.fixture(scope="module")
def matrices(weights):
    return inventory(HV, {name: tuple(value.shape) for name, value in weights.items()})


@pytest.fixture
def stack(tmp_path, matrices):
    entries = []
    for seed in (1, 2):
        rng = torch.Generator().manual_seed(seed)
        made = {
            m.name: LoRAFactors(
                torch.randn(4, m.columns, generator=rng), 0.05 * torch.randn(m.rows, 4, generator=rng), 4.0
            )
            for m in matrices
        }
        files.save(tmp_path / f"{seed}.safetensors", made, {})
        entries.append(StackEntry(tmp_path / f"{seed}.safetensors", 0.7))
    return load_stack(entries, HV, HV.variants["hunyuan-t2v"], matrices, allow_overlap=True)


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def merged(source, stack, **how):
    """The new checkpoint."""
    checkpoint, part = open_part(source, "dit")
    target = source.with_name("merged.safetensors")
    *_, (done, total) = merge(source, target, checkpoint.prefix, part, stack, Combination(**how))
    assert done == total
    return target


def by_model(path):
    """The tensors of a checkpoint in the model's names, fp8 restored."""
    checkpoint, part = open_part(path, "dit")
    return {part.keymap.to_model(name): checkpoint.read(name, torch.float32) for name in checkpoint.tensors}


@pytest.mark.parametrize(("layout", "suffix"), LAYOUTS)
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_every_layout_gets_the_same_sum(layout, suffix, method, weights, matrices, stack, tmp_path):
    plain = by_model(merged(write(tmp_path / "plain.safetensors", weights), stack, method=method))
    (tmp_path / "merged.safetensors").unlink()
    found = by_model(merged(write(tmp_path / f"dit{suffix}", layout(weights)), stack, method=method))
    assert found.keys() == weights.keys()
    touched = {f"{m.name}.weight" for m in matrices}
    for name, value in weights.items():
        assert torch.equal(found[name], plain[name]) and torch.equal(plain[name], value.float()) == (
            name not in touched
        )


@pytest.mark.parametrize(("layout", "suffix"), LAYOUTS)
def test_every_layout_gets_its_own_bytes_back(layout, suffix, weights, stack, tmp_path):
    source = write(tmp_path / f"dit{suffix}", layout(weights))
    target, back = merged(source, stack), tmp_path / "back.safetensors"
    checkpoint, part = open_part(target, "dit")
    base = (source, checkpoint.prefix, open_part(source, "dit")[1])
    list(unmerge(target, back, checkpoint.prefix, part, stack, base))
    before = layout(weights)
    before, after = before.get("module", before), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def in_scaled_fp8(weights, matrices):
    """fp8 weights and their factors by the layer's name."""
    stored, factors = dict(weights), {}
    for m in matrices:
        factors[m.name] = weights[f"{m.name}.weight"].float().abs().max() / 448
        stored[f"{m.name}.weight"] = (weights[f"{m.name}.weight"].float() / factors[m.name]).to(torch.float8_e4m3fn)
    return stored, factors


def test_fp8_with_factors_in_a_file_of_their_own(weights, matrices, stack, tmp_path):
    stored, factors = in_scaled_fp8(weights, matrices)
    beside = stored | {f"{layer}.fp8_scale": factor for layer, factor in factors.items()}
    named = write(tmp_path / "kijai.safetensors", beside)
    apart = write(tmp_path / "states_fp8.pt", {"module": stored})
    with pytest.raises(FileNotFoundError, match=r"put states_fp8_map\.pt beside it"):
        open_part(apart, "dit")
    write(tmp_path / "states_fp8_map.pt", dict(list(factors.items())[1:]))
    for opened in (open_checkpoint, read_header):
        with pytest.raises(
            ValueError, match=rf"states_fp8_map\.pt lacks the factors of 1 of {len(factors)} fp8 weights"
        ):
            opened(apart)
    write(tmp_path / "states_fp8_map.pt", factors)
    expected = by_model(named)
    for m in matrices:
        name = f"{m.name}.weight"
        assert 0 < reference.relative_error(expected[name], weights[name].float()) < 0.05
    assert all(torch.equal(value, expected[name]) for name, value in by_model(apart).items())
    exact = by_model(merged(write(tmp_path / "plain.safetensors", weights), stack))
    for source in (named, apart):
        (tmp_path / "merged.safetensors").unlink()
        found = by_model(merged(source, stack))
        assert all(reference.relative_error(found[name], value) < 0.06 for name, value in exact.items())


def test_a_scaled_matrix_divided_by_the_file_keeps_a_factor_for_each_part(weights, matrices, stack, tmp_path):
    tensors = {}
    for name, value in in_diffusers_names(weights).items():
        tensors[name] = value
        if value.ndim == 2 and name.startswith(("transformer_blocks", "single_transformer_blocks")):
            tensors[name], tensors[name.removesuffix("weight") + "scale_weight"] = to_scaled_fp8(Stored(value))
    source = write(tmp_path / "dit.safetensors", tensors)
    exact = by_model(merged(write(tmp_path / "plain.safetensors", weights), stack))
    (tmp_path / "merged.safetensors").unlink()
    found = by_model(merged(source, stack))
    assert all(reference.relative_error(found[f"{m.name}.weight"], exact[f"{m.name}.weight"]) < 0.05 for m in matrices)


def test_a_torch_file_of_transposed_tensors_is_refused_by_name(weights, stack, tmp_path):
    turned = weights | {"img_in.proj.bias": torch.zeros(2, 4).t()}
    source = write(tmp_path / "dit.pt", weights)
    _, part = open_part(source, "dit")
    write(source, turned)
    with pytest.raises(ValueError, match=r"dit\.pt: 'img_in\.proj\.bias' .* Use the safetensors version"):
        list(merge(source, tmp_path / "merged.safetensors", "", part, stack))


@pytest.mark.parametrize(("layout", "suffix"), LAYOUTS)
def test_a_model_is_opened_with_the_same_matrices_in_every_layout(layout, suffix, weights, matrices, tmp_path):
    model = OpenedModel.open(write(tmp_path / f"dit{suffix}", layout(weights)))
    assert list(model.matrices) == matrices
