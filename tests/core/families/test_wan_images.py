"""Image-to-video: what the transformer is told of the start and end image, and its way through ComfyUI's CONDITIONING."""

import pytest
import reference
import torch
from safetensors.torch import save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.wan import defaults
from videolora.core.families.wan.defaults import CLIP, IMAGE, TEXT
from videolora.core.shapes import VideoSize
from videolora.core.weights import load_into

WAN = FAMILIES["wan"]
SIZE = VideoSize(9, 32, 48)
LATENTS = WAN.latent.latents(SIZE)


class Vision:
    def encode(self, pictures):
        return pictures.mean((1, 2, 3))[:, None, None].expand(-1, 257, 1280)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(reference.vector("wan21_vae")[1], path)
    checkpoint, part = open_part(path, "vae")
    with torch.device("meta"):
        model = WAN.build_vae(part.config)
    return load_into(model, checkpoint, part.keymap, torch.float32)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 1, 3, SIZE.height, SIZE.width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def images(variant):
    return WAN.variants[variant].images


def encoded(vae, *frames):
    """A clip of grey with these (index, picture) in it, in model space."""
    clip = torch.zeros(1, 3, *SIZE)
    for index, picture in frames:
        clip[:, :, index] = picture
    return WAN.latent.to_model(vae.encode(clip))[0]


def test_a_start_image_is_the_first_frame_of_a_grey_clip(vae, pictures):
    (states,) = WAN.image_states(vae, None, images("2.2-i2v-A14B-high"), pictures[0], None, SIZE.frames)
    mask, latents = states[IMAGE].split((4, 16))
    assert states.keys() == {IMAGE} and states[IMAGE].shape == (20, *LATENTS)
    assert mask[:, 0].eq(1).all() and mask[:, 1:].eq(0).all()
    torch.testing.assert_close(latents, encoded(vae, (0, pictures[0])))


def test_an_end_image_is_an_extra_latent_frame(vae, pictures):
    (states,) = WAN.image_states(vae, Vision(), images("2.1-i2v-14B"), pictures[0], pictures[1], SIZE.frames)
    assert states[IMAGE].shape == (20, LATENTS.frames + 1, *LATENTS[1:]) and states[CLIP].shape == (257, 1280)
    torch.testing.assert_close(states[IMAGE][4:, :-1], encoded(vae, (0, pictures[0])))
    alone = WAN.latent.to_model(vae.encode(pictures[1][:, :, None]))[0]
    torch.testing.assert_close(states[IMAGE][4:, -1:], alone)
    assert states[IMAGE][:4, -1].eq(1).all() and states[IMAGE][:4, 1:-1].eq(0).all()


def test_a_first_last_frame_model_has_both_inside_the_clip(vae, pictures):
    (states,) = WAN.image_states(vae, Vision(), images("2.1-flf2v-14B"), pictures[0], pictures[1], SIZE.frames)
    mask, latents = states[IMAGE].split((4, 16))
    torch.testing.assert_close(latents, encoded(vae, (0, pictures[0]), (-1, pictures[1])))
    assert mask[:, 0].eq(1).all() and mask[3, -1].eq(1).all() and mask[:3, 1:].eq(0).all()
    assert states[CLIP].shape == (514, 1280) and states[CLIP][0, 0] != states[CLIP][-1, 0]


def test_what_a_model_lacks_or_cannot_use_is_refused(vae, pictures):
    with pytest.raises(ValueError, match="between two images"):
        WAN.image_states(vae, Vision(), images("2.1-flf2v-14B"), pictures[0], None, SIZE.frames)
    with pytest.raises(ValueError, match="link Load CLIP Image Encoder"):
        WAN.image_states(vae, None, images("2.1-i2v-14B"), pictures[0], None, SIZE.frames)
    with pytest.raises(ValueError, match="takes no CLIP features"):
        WAN.image_states(vae, Vision(), images("2.2-i2v-A14B-low"), pictures[0], None, SIZE.frames)


def test_image_states_survive_the_way_through_comfyui(vae, pictures):
    (states,) = WAN.image_states(vae, Vision(), images("2.1-flf2v-14B"), pictures[0], pictures[1], SIZE.frames)
    states[TEXT] = torch.randn(7, 32)
    back = WAN.from_comfyui(*WAN.to_comfyui(states))
    assert back.keys() == states.keys()
    for name, value in states.items():
        torch.testing.assert_close(back[name], value, rtol=1e-4, atol=1e-5)


def test_the_mask_of_comfyuis_own_node_has_one_channel_and_may_end_early():
    latents = torch.randn(1, 16, 3, 4, 6)
    mask = torch.ones(1, 1, 2, 4, 6)
    mask[:, :, 0] = 0
    found = WAN.from_comfyui(torch.ones(1, 1, 8), {"concat_latent_image": latents, "concat_mask": mask})[IMAGE]
    assert found[:4, 0].eq(1).all() and found[:4, 1:].eq(0).all()
    with pytest.raises(ValueError, match="does not fit its image"):
        WAN.from_comfyui(torch.ones(1, 1, 8), {"concat_latent_image": latents, "concat_mask": mask[..., :2]})


CONFIGS = {
    name: WAN.recognise(reference.manifest(manifest)).config
    for name, manifest in {
        "t2v": "wan21_t2v_14B", "2.1": "wan21_i2v_14B_480p_720p", "flf": "wan21_flf2v_14B_720p",
        "2.2": "wan22_i2v_A14B_high_low",
    }.items()
}  # fmt: skip


TAKES = {"t2v": None, "2.1": defaults.START_SEEN, "flf": defaults.START_END_SEEN, "2.2": defaults.START}


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [("2.1", {}, "there is no start image"), ("2.2", {}, "there is no start image"),
     ("t2v", {IMAGE: (20, *LATENTS)}, "cannot use a start image"), ("t2v", {CLIP: (257, 1280)}, "cannot use a start image"),
     ("2.2", {IMAGE: (20, 4, 4, 6)}, "was encoded for 48x32, 13 frames, and the video is 48x32, 9 frames"),
     ("2.2", {IMAGE: (20, *LATENTS), CLIP: (257, 1280)}, "of 1 images.*takes those of 0"),
     ("flf", {IMAGE: (20, *LATENTS), CLIP: (257, 1280)}, "of 1 images.*takes those of 2"),
     ("2.1", {IMAGE: (20, *LATENTS)}, "of 0 images.*takes those of 1")],
)  # fmt: skip
def test_states_that_the_transformer_cannot_take_are_refused(config, shapes, message):
    with pytest.raises(ValueError, match=message):
        WAN.check_states(CONFIGS[config], TAKES[config], {TEXT: (5, 4096), **shapes}, LATENTS)


@pytest.mark.parametrize(("config", "tokens"), [("2.1", 257), ("flf", 514), ("2.2", 0), ("t2v", 0)])
def test_states_that_fit_are_taken(config, tokens):
    shapes = {} if config == "t2v" else {IMAGE: (20, *LATENTS)}
    shapes |= {CLIP: (tokens, 1280)} if tokens else {}
    WAN.check_states(CONFIGS[config], TAKES[config], {TEXT: (5, 4096), **shapes}, LATENTS)
