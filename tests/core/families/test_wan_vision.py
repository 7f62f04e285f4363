"""CLIP's image tower against reference features, in both layouts of its files."""

import pytest
import reference
import torch
from safetensors.torch import save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.wan import vision

WAN = FAMILIES["wan"]


def in_transformers_names(weights):
    """The same tower as ComfyUI's file has it."""
    renamed = {}
    for name, value in weights.items():
        name = vision.OFFICIAL.to_model(name)
        if vision._PACKED in name:
            parts = zip(vision._APART, value.chunk(3), strict=True)
            renamed |= {name.replace(vision._PACKED, apart): part.clone() for apart, part in parts}
        elif name.endswith(("class_embedding", "position_embedding.weight")):
            renamed[name] = value.flatten(0, -2).squeeze(0)
        elif name == "head":
            renamed["visual_projection.weight"] = value.T.contiguous()
        else:
            renamed[name.replace("post_norm", "post_layernorm")] = value
    return {(name if name.startswith("visual") else f"vision_model.{name}"): value for name, value in renamed.items()}


def loaded(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return WAN.load_vision(*open_part(path, "vision_encoder"), torch.float32)


def test_the_image_tower_gives_the_reference_features_in_both_layouts(tmp_path):
    tensors, weights = reference.vector("clip_vision_h")
    official = {f"visual.{name}": value for name, value in weights.items()} | {"log_scale": torch.ones(())}
    official["textual.token_embedding.weight"] = torch.zeros(4, 2)
    for path, file in (("clip.pth", official), ("clip_vision.safetensors", in_transformers_names(weights))):
        encoder = loaded(tmp_path / path, file)
        with torch.no_grad():
            assert reference.relative_error(encoder.model(tensors["pixels"]), tensors["output"]) < 1e-4


def test_pictures_are_squashed_to_what_the_tower_sees():
    pictures = torch.rand(2, 3, 48, 80) * 2 - 1
    pixels = vision.normalised(pictures)
    assert pixels.shape == (2, 3, 224, 224)
    back = pixels * torch.tensor(vision.STD).view(3, 1, 1) + torch.tensor(vision.MEAN).view(3, 1, 1)
    torch.testing.assert_close(back.mean((2, 3)), pictures.mean((2, 3)) / 2 + 0.5, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["vision_clip_vision_h_comfyorg", "vision_xlm_roberta_vit_h14_official"])
def test_every_official_image_tower_is_recognised_and_fits(name):
    shapes = {key.removeprefix("visual."): shape for key, shape in reference.manifest(name).items()}
    part = WAN.recognise(shapes)
    assert part.kind == "vision_encoder" and part.config.depth == 31
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in vision.CLIPVision(part.config).state_dict().items()}
    found = vision.views(shapes, part.keymap, part.config)
    assert {key: view.shape for key, view in found.items()} == wanted


def test_the_image_tower_of_another_model_is_refused():
    shapes = reference.manifest("vision_clip_vision_h_comfyorg")
    other = {key: tuple(1024 if side == 1280 else side for side in shape) for key, shape in shapes.items()}
    with pytest.raises(ValueError, match="another CLIP image tower, of width 1024"):
        WAN.recognise(other)
