"""Checkpoints: read lazily, fitted strictly."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from videolora.core.keymap import IDENTITY, KeyMap, find_prefix
from videolora.core.weights import check_names, load_into, open_checkpoint, shards

SUFFIXES = [".safetensors", ".pth", ".pt", ".bin"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def meta():
    with torch.device("meta"):
        return Model()


@pytest.fixture
def values():
    torch.manual_seed(0)
    return {name: value.clone() for name, value in Model().state_dict().items()}


def write(path, tensors, metadata=None):
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return open_checkpoint(path)


def prefixed(values, prefix):
    return {prefix + name: value for name, value in values.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_and_shapes_are_known_at_once_and_values_on_demand(tmp_path, values, suffix):
    checkpoint = write(tmp_path / f"model{suffix}", values)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: tuple(value.shape) for name, value in values.items()
    }
    for name, value in values.items():
        torch.testing.assert_close(checkpoint.read(name), value, rtol=0, atol=0)
        torch.testing.assert_close(checkpoint.read(name, torch.bfloat16), value.bfloat16(), rtol=0, atol=0)
        assert checkpoint.tensors[name].dtype == torch.float32


@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "module.", "transformer.", "vae.",
     "first_stage_model."],
)  # fmt: skip
def test_every_known_prefix_is_found_and_stripped(tmp_path, values, prefix):
    whole = write(tmp_path / "model.safetensors", prefixed(values, prefix) | {"other.head.weight": torch.ones(1)})
    assert find_prefix(whole.tensors, ["blocks.0.weight"]) == prefix
    stripped = whole.without_prefix(prefix)
    assert values.keys() == stripped.tensors.keys() - {"other.head.weight"}
    torch.testing.assert_close(stripped.read("head.weight"), values["head.weight"], rtol=0, atol=0)


def test_without_an_anchor_there_is_no_prefix(values):
    assert find_prefix(prefixed(values, "something.else."), ["blocks.0.weight"]) is None


def test_a_renamed_module_is_filled_with_the_right_values(tmp_path, values):
    rows = (("layer_{i}.w", "blocks.{i}.weight"), ("layer_{i}.b", "blocks.{i}.bias"), ("out.", "head."))
    keymap = KeyMap(rows)
    assert all(keymap.to_model(keymap.to_file(name)) == name for name in values)
    checkpoint = write(tmp_path / "model.safetensors", {keymap.to_file(n): value for n, value in values.items()})
    assert {"layer_0.w", "layer_1.b", "out.weight"} <= checkpoint.tensors.keys()
    model = load_into(meta(), checkpoint, keymap, torch.float32)
    torch.testing.assert_close(dict(model.state_dict()), values, rtol=0, atol=0)


def test_a_filled_module_is_frozen_in_the_dtypes_that_were_asked_for(tmp_path, values):
    checkpoint = write(tmp_path / "model.safetensors", values)
    model = load_into(meta(), checkpoint, IDENTITY, lambda n: torch.float32 if "bias" in n else torch.bfloat16)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == (torch.float32 if "bias" in name else torch.bfloat16)
        torch.testing.assert_close(parameter.data, values[name].to(parameter.dtype), rtol=0, atol=0)


def split(folder, values, count=3):
    """The values dealt out to `count` shards; returns their paths."""
    paths = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for index, path in enumerate(paths):
        part = dict(list(values.items())[index::count])
        save_file(part, path, {"part": "any", f"shard {index}": "yes"})
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_shards_are_joined_whichever_is_opened(tmp_path, values, opened):
    paths = split(tmp_path, values)
    assert shards(paths[opened]) == paths
    checkpoint = open_checkpoint(paths[opened])
    assert {"shard 0", "shard 1", "shard 2"} <= checkpoint.metadata.keys()
    torch.testing.assert_close({n: checkpoint.read(n) for n in checkpoint.tensors}, values, rtol=0, atol=0)


def test_missing_shards_are_named(tmp_path, values):
    paths = split(tmp_path, values)
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 3 files.*missing: model-00001-of-00003\.safetensors\."):
        open_checkpoint(paths[2])


def test_a_truncated_shard_is_named(tmp_path, values):
    paths = split(tmp_path, values)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is truncated"):
        open_checkpoint(paths[0])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale_shape", [(), (1,), (3,), (3, 1)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_weights_are_restored(tmp_path, suffix, dtype, scale_name, scale_shape, prefix):
    stored = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.linspace(0.5, 4, torch.Size(scale_shape).numel()).view(scale_shape)
    tensors = {"layer.weight": stored, "layer.bias": torch.ones(3), f"layer.{scale_name}": scale,
               "layer.input_scale": torch.ones(1), "layer.comfy_quant": torch.ones(2, dtype=torch.uint8)}  # fmt: skip
    tensors = prefixed(tensors, prefix) | {"scaled_fp8": torch.empty(2, dtype=dtype)}
    checkpoint = write(tmp_path / f"model{suffix}", tensors).without_prefix(prefix)
    assert {"layer.weight", "layer.bias"} == checkpoint.tensors.keys()
    expected = stored.float() * scale.reshape(-1, 1)
    torch.testing.assert_close(checkpoint.read("layer.weight", torch.float32), expected, rtol=0, atol=0)
    assert checkpoint.read("layer.weight").dtype == torch.bfloat16
    torch.testing.assert_close(checkpoint.extra(f"{prefix}layer.{scale_name}"), scale, rtol=0, atol=0)


def test_fp8_weights_without_a_scale_are_read_as_they_are(tmp_path):
    stored = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    checkpoint = write(tmp_path / "model.safetensors", {"layer.weight": stored})
    assert checkpoint.read("layer.weight").dtype == torch.float8_e4m3fn
    torch.testing.assert_close(checkpoint.read("layer.weight", torch.float32), stored.float(), rtol=0, atol=0)


def test_what_is_no_weight_is_kept_out_of_the_weights_and_can_be_read(tmp_path, values):
    extras = {"spiece_model": torch.arange(5, dtype=torch.uint8), "text.embeddings.position_ids": torch.arange(3)}
    checkpoint = write(tmp_path / "model.safetensors", values | extras, {"title": "a model"})
    assert checkpoint.tensors.keys() == values.keys()
    assert checkpoint.extra("spiece_model").tolist() == [0, 1, 2, 3, 4] and checkpoint.extra("absent") is None
    assert checkpoint.metadata == {"title": "a model"}
    load_into(meta(), checkpoint, IDENTITY, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.weight"), r"1 tensors missing \(head\.weight\)"),
        (lambda tensors: tensors.update({"extra.weight": torch.ones(1)}), r"1 tensors not part .* \(extra\.weight\)"),
        (lambda tensors: tensors.update({"head.weight": torch.ones(3, 5)}), r"head\.weight \[3, 5\] instead of \[3, 4\]"),
        (lambda tensors: tensors.clear() or tensors.update(a=torch.ones(1)), r"5 tensors missing \(.*, \.\.\.\).*not part"),
    ],
    ids=["missing", "left over", "shape", "everything"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_names(tmp_path, values, change, message):
    change(values)
    checkpoint = write(tmp_path / "model.safetensors", values)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit.*" + message):
        load_into(meta(), checkpoint, IDENTITY, torch.float32)


def test_equal_names_and_shapes_are_accepted(tmp_path):
    check_names({"a": (1, 2)}, {"a": (1, 2)}, tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loaded_in_inference_mode_can_take_part_in_a_backward_pass(tmp_path, values, suffix, dtype):
    write(tmp_path / f"model{suffix}", values)
    with torch.inference_mode():
        model = load_into(meta(), open_checkpoint(tmp_path / f"model{suffix}"), IDENTITY, dtype)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    x = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        open_checkpoint(tmp_path / name)


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_known(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model\.gguf is not a model file: expected one of \.safetensors, .*\.pth"):
        open_checkpoint(tmp_path / "model.gguf")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"empty\.safetensors holds no tensors"):
        open_checkpoint(tmp_path / "empty.safetensors")
