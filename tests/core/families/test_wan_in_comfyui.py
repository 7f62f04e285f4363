"""ComfyUI's own Wan on the same checkpoints: velocities, start images, and what its nodes put into CONDITIONING."""

import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.wan.defaults import CLIP, IMAGE, TEXT
from videolora.core.weights import load_into

WAN = FAMILIES["wan"]
ROOT = Path(__file__).resolve().parents[3]
DITS = ("wan21_t2v", "wan22_t2v", "wan21_i2v", "wan22_i2v")

SCRIPT = """
import sys
folder, sys.argv = sys.argv[1], [sys.argv[0], "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.clip_vision
from pathlib import Path
from safetensors.torch import load_file, save_file
from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo

folder = Path(folder)
def output(features):
    made = comfy.clip_vision.Output()
    made.penultimate_hidden_states = features
    return made

for path in folder.glob("wan2?_?2v.safetensors"):
    given = load_file(folder / f"{path.stem}.given")
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}).model
    text = torch.zeros(2, 512, 4096)
    for i in range(2):
        states = given[f"text_states.{i}"]
        text[i, : len(states)] = states
    x, clip = given["latents"], given.get("clip_features")
    image = given.get("image_condition")
    if image is not None:
        latents = model.process_latent_out(image[:, 4:].clone())
        x = torch.cat((x, model.concat_cond(noise=x, concat_latent_image=latents, concat_mask=1 - image[:, :4], device=x.device)), 1)
    with torch.no_grad():
        velocity = model.diffusion_model(x, given["timestep"], text, **({} if clip is None else {"clip_fea": clip}))
    save_file({"velocity": velocity}, folder / f"{path.stem}.velocity")

vae = comfy.sd.VAE(sd=load_file(folder / "vae.safetensors"))
given = load_file(folder / "pictures")
seen, empty = output(given["seen"]), [[torch.zeros(1, 512, 8), {}]]
size = {"vae": vae, "width": 48, "height": 32, "length": 9, "batch_size": 1}
for name, node, images in (
    ("first", WanImageToVideo, {"start_image": given["start"], "clip_vision_output": seen}),
    ("both", WanFirstLastFrameToVideo, {"start_image": given["start"], "end_image": given["end"],
                                        "clip_vision_start_image": seen, "clip_vision_end_image": seen}),
):
    positive, *_ = node.execute(empty, empty, **size, **images).args
    options = positive[0][1]
    save_file({"concat_latent_image": options["concat_latent_image"].contiguous(), "concat_mask": options["concat_mask"].contiguous(),
               "seen": options["clip_vision_output"].penultimate_hidden_states.contiguous()}, folder / f"{name}.options")
"""


class Vision:
    def __init__(self, features):
        self.features = features

    def encode(self, pictures):
        return self.features


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """A folder with what ComfyUI made of the vectors' inputs and of two pictures."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in DITS:
        tensors, weights = reference.vector(name)
        save_file(weights, folder / f"{name}.safetensors")
        save_file(tensors, folder / f"{name}.given")
    save_file(reference.vector("wan21_vae")[1], folder / "vae.safetensors")
    generator = torch.Generator().manual_seed(0)
    pictures = {name: torch.rand(1, 32, 48, 3, generator=generator) for name in ("start", "end")}
    save_file(pictures | {"seen": torch.randn(1, 257, 1280, generator=generator)}, folder / "pictures")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT / ".dev" / "ComfyUI", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def loaded(path, kind, build):
    checkpoint, part = open_part(path, kind)
    with torch.device("meta"):
        model = build(part.config)
    return load_into(model, checkpoint, part.keymap, torch.float32)


@pytest.mark.parametrize("name", DITS)
def test_the_velocity_is_that_of_comfyuis_own_wan(comfyui, name):
    given = load_file(comfyui / f"{name}.given")
    states = [{TEXT: given[f"text_states.{i}"]} for i in range(2)]
    for stem, key in ((IMAGE, "image_condition"), (CLIP, "clip_features")):
        if key in given:
            states = [one | {stem: value} for one, value in zip(states, given[key], strict=True)]
    dit = loaded(comfyui / f"{name}.safetensors", "dit", WAN.build_dit)
    with torch.no_grad():
        velocity = dit(given["latents"], given["timestep"], **WAN.conditions(states))
    assert reference.relative_error(velocity, load_file(comfyui / f"{name}.velocity")["velocity"]) < 1e-3


class Output:
    def __init__(self, features):
        self.penultimate_hidden_states = features


@pytest.mark.parametrize(("name", "variant"), [("first", "2.1-i2v-14B"), ("both", "2.1-flf2v-14B")])
def test_images_become_the_same_conditioning_as_in_comfyuis_own_nodes(comfyui, name, variant):
    given, options = load_file(comfyui / "pictures"), load_file(comfyui / f"{name}.options")
    seen = Output(options.pop("seen"))
    start, end = (given[one].movedim(3, 1) * 2 - 1 for one in ("start", "end"))
    vae = loaded(comfyui / "vae.safetensors", "vae", WAN.build_vae)
    images = WAN.variants[variant].images
    (ours,) = WAN.image_states(vae, Vision(given["seen"]), images, start, end if name == "both" else None, 9)
    theirs = WAN.from_comfyui(torch.ones(1, 1, 8), {**options, "clip_vision_output": seen})
    torch.testing.assert_close(ours[IMAGE], theirs[IMAGE], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[CLIP], theirs[CLIP])
    made = WAN.image_options(ours)
    torch.testing.assert_close(made["concat_latent_image"], options["concat_latent_image"], rtol=1e-3, atol=1e-3)
    assert torch.equal(made["concat_mask"], options["concat_mask"].expand_as(made["concat_mask"]))
