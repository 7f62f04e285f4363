"""ComfyUI's own HunyuanVideo 1.5 on the same checkpoints: velocities, prompts, start images, LoRAs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.hunyuan_video_15.defaults import GLYPH, IMAGE, TEXT, VISION
from videolora.core.lora import files, loraid
from videolora.core.lora.adapter import attached
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inventory import inventory
from videolora.core.text import JointTextEncoder, check_complete
from videolora.core.weights import load_into

from .test_hunyuan_video_15 import byt5_weights, fused, qwen_weights, samples, siglip_weights, step_distilled

HV15 = FAMILIES["hunyuan_video_1_5"]
ROOT = Path(__file__).resolve().parents[3]
COMFYUI = ROOT / ".dev" / "ComfyUI"
TOKENIZERS = [COMFYUI / "comfy" / "sd1_tokenizer", COMFYUI / "comfy" / "text_encoders" / "qwen25_tokenizer"]
PROMPTS = ("", "A cat walks on the grass, realistic style.", 'A neon sign says "Open" and “geöffnet”, ‘24 h’.',
           "Ein Bär & 猫 — café, 12345 steps!", "word " * 150)  # fmt: skip
NAMES = ("t2v", "i2v", "distilled")

SCRIPT = """
import json, sys
folder, sys.argv = sys.argv[1], [sys.argv[0], "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.lora, comfy.clip_vision
from comfy.text_encoders.hunyuan_image import te
from comfy.text_encoders.hunyuan_video import HunyuanVideo15Tokenizer
from pathlib import Path
from safetensors.torch import load_file, save_file

folder = Path(folder)
for path in folder.glob("*.dit.safetensors"):
    name = path.name.split(".")[0]
    given = load_file(folder / f"{name}.given")
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    model, made = patcher.model, {}
    options = {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.25, 0.0])}

    def velocity(i):
        told = {"context": given[f"text.{i}"][None]}  # ComfyUI's averages over all it is given
        if f"glyphs.{i}" in given:
            told["txt_byt5"] = given[f"glyphs.{i}"][None]
        if f"seen.{i}" in given:
            told["clip_fea"] = given[f"seen.{i}"][None]
        with torch.no_grad():
            return model.diffusion_model(given["latents"][i : i + 1], given["timestep"][i : i + 1], transformer_options=options, **told).contiguous()

    for i in range(2):
        made[f"velocity.{i}"] = velocity(i)
    noise = torch.zeros_like(given["latents"][:1, :32])
    image = {"concat_latent_image": given["image"].clone(), "concat_mask": given["mask"]} if "image" in given else {}
    made["condition"] = model.concat_cond(noise=noise, device=noise.device, **image).contiguous()
    lora = load_file(folder / f"{name}.lora")
    keys = comfy.lora.model_lora_keys_unet(model)
    loaded = comfy.lora.load_lora(lora, keys, log_missing=False)
    used = {key for patch in loaded.values() for key in patch.loaded_keys} | {key for key in lora if key.endswith(".alpha") and key[:-6] in keys}
    patcher.add_patches(loaded, 1.0)
    patcher.patch_model()
    made["adapted"] = velocity(0)
    save_file(made, folder / f"{name}.made", {"unused": json.dumps(sorted(lora.keys() - used)), "patched": str(len(loaded))})

given = load_file(folder / "qwen.safetensors")
dim, rows = given["model.layers.0.mlp.down_proj.weight"].shape
small = {"hidden_size": dim, "intermediate_size": rows, "num_hidden_layers": 4, "num_attention_heads": dim // 128,
         "num_key_value_heads": dim // 128}
encoder = te()(dtype=torch.float32, model_options={"qwen25_7b_model_config": small, "_model_config": {"num_layers": 2, "d_ff": 64}})
encoder.load_sd(given)
encoder.load_sd(load_file(folder / "byt5.safetensors"))
tokenizer, made = HunyuanVideo15Tokenizer(), {}
with torch.no_grad():
    for i, prompt in enumerate(json.loads((folder / "prompts.json").read_text(encoding="utf-8"))):
        states, _, extra = encoder.encode_token_weights(tokenizer.tokenize_with_weights(prompt))
        made[f"states.{i}"] = states.contiguous()
        if "conditioning_byt5small" in extra:
            made[f"glyphs.{i}"] = extra.pop("conditioning_byt5small").contiguous()
        assert not extra
tower = load_file(folder / "siglip.safetensors")
config = json.loads((Path(comfy.sd.__file__).parent / "clip_vision_siglip_384.json").read_text())
vision = comfy.clip_vision.ClipVisionModel({**config, "num_hidden_layers": 2, "intermediate_size": 64})
vision.model.float()
vision.load_sd(tower)
made["seen"] = vision.encode_image(load_file(folder / "picture.given")["picture"], crop=False)["last_hidden_state"].contiguous()
save_file(made, folder / "prompts.made")
"""


def comfyuis_widths(weights):
    """ComfyUI knows no other width inside of what takes the glyphs."""
    wide = {"byt5_in.fc1.weight": (2048, 1472), "byt5_in.fc1.bias": (2048,), "byt5_in.fc2.weight": (2048, 2048),
            "byt5_in.fc2.bias": (2048,), "byt5_in.fc3.weight": (256, 2048)}  # fmt: skip
    return {**weights, **reference.weights(wide)}


def some_lora(path):
    """A LoRA of what LORAID 2 owns and of modulation, as trainings write it: not all of ComfyUI's fused matrices."""
    checkpoint, part = open_part(path, "dit")
    matrices = inventory(HV15, checkpoint.shapes(part.keymap))
    rows = loraid.allocate(matrices, loraid.Loraid(number=2, unit="matrix", units_per_id=7)).rows
    assert not {"double_blocks.0.txt_attn_q", "double_blocks.1.img_attn_v"} & rows.keys()
    generator = torch.Generator().manual_seed(0)
    factors = {
        m.name: LoRAFactors(0.1 * torch.randn(2, m.columns, generator=generator), 0.1 * torch.randn(m.rows, 2, generator=generator), 2.0)
        for m in matrices if m.name in rows or m.modulation
    }  # fmt: skip
    files.save(path.with_name(path.name.split(".")[0] + ".lora"), factors, {}, names=HV15.lora_names)
    return factors


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """A folder with what ComfyUI made of the vectors' inputs and of a few prompts. Each model is there in both layouts."""
    folder = tmp_path_factory.mktemp("comfyui")
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        tensors, weights = reference.vector(f"hunyuan_video_15_{'t2v' if name == 't2v' else 'i2v'}")
        weights = comfyuis_widths(weights)
        weights = step_distilled(weights) if name == "distilled" else weights
        given = {"latents": tensors["latents"], "timestep": torch.full((2,), 500.0)}
        for i, states in enumerate(samples(tensors)):
            given[f"text.{i}"] = states[TEXT]
            given |= {f"glyphs.{i}": states[GLYPH]} if len(states[GLYPH]) else {}
            given |= {f"seen.{i}": states[VISION]} if VISION in states else {}
        if name != "t2v":
            image = torch.zeros(1, 32, *tensors["latents"].shape[2:])
            image[:, :, 0] = torch.randn(image[:, :, 0].shape, generator=generator)
            mask = torch.ones_like(image[:, :1])
            mask[:, :, 0] = 0
            given |= {"image": image, "mask": mask}
        save_file(fused(weights), folder / f"{name}.dit.safetensors")
        save_file(weights, folder / f"{name}_official.safetensors")
        save_file({key: value.contiguous() for key, value in given.items()}, folder / f"{name}.given")
        some_lora(folder / f"{name}.dit.safetensors")
    save_file(qwen_weights(), folder / "qwen.safetensors")
    save_file(byt5_weights(), folder / "byt5.safetensors")
    save_file(siglip_weights(), folder / "siglip.safetensors")
    save_file({"picture": torch.rand(1, 90, 130, 3, generator=generator)}, folder / "picture.given")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=COMFYUI, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def transformer(path):
    checkpoint, part = open_part(path, "dit")
    with torch.device("meta"):
        dit = HV15.build_dit(part.config)
    return load_into(dit, checkpoint, part.keymap, torch.float32), inventory(HV15, checkpoint.shapes(part.keymap))


def velocity(dit, given, indices=(0, 1)):
    """Of samples whose prompts, and quoted words, differ in length, in one batch."""
    states = [
        {TEXT: given[f"text.{i}"], GLYPH: given.get(f"glyphs.{i}", torch.zeros(0, 1472)),
         **({VISION: given[f"seen.{i}"]} if f"seen.{i}" in given else {})}
        for i in indices
    ]  # fmt: skip
    chosen = list(indices)
    told = HV15.conditions(states) | ({"end": torch.full((len(chosen),), 250.0)} if dit.takes_end else {})
    with torch.no_grad():
        return dit(given["latents"][chosen], given["timestep"][chosen], **told)


@pytest.mark.parametrize("layout", ["official", "comfyui"])
@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_is_that_of_comfyuis_own_model(comfyui, name, layout):
    """The first sample has quoted words, the second has none."""
    given, theirs = load_file(comfyui / f"{name}.given"), load_file(comfyui / f"{name}.made")
    assert "glyphs.0" in given and "glyphs.1" not in given
    file = f"{name}_official.safetensors" if layout == "official" else f"{name}.dit.safetensors"
    ours = velocity(transformer(comfyui / file)[0], given)
    for i in range(2):
        assert reference.relative_error(ours[i : i + 1], theirs[f"velocity.{i}"]) < 1e-3


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_comfyuis_model_is_told_what_ours_is_of_the_start_image(comfyui, name):
    given, theirs = load_file(comfyui / f"{name}.given"), load_file(comfyui / f"{name}.made")["condition"]
    cross_attn = given["text.0"][None]
    if name == "t2v":
        assert not theirs.any()
        return
    states = HV15.from_comfyui(cross_attn, {"concat_latent_image": given["image"], "concat_mask": given["mask"]})
    torch.testing.assert_close(HV15.conditions([states])["image_condition"], theirs)
    options = HV15.image_options({IMAGE: states[IMAGE]})
    assert torch.equal(options["concat_latent_image"], given["image"]) and torch.equal(options["concat_mask"], given["mask"])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_as_trainings_save_it_does_in_comfyuis_own_loader_what_it_does_here(comfyui, name):
    with safe_open(comfyui / f"{name}.made", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["unused"]) == [] and int(metadata["patched"]) == 5 + 4
    given, theirs = load_file(comfyui / f"{name}.given"), load_file(comfyui / f"{name}.made")
    dit, matrices = transformer(comfyui / f"{name}_official.safetensors")
    read = files.read(comfyui / f"{name}.lora", matrices, "", HV15.lora_names)
    assert not read.unmatched and len(read.factors) == 7 + 4
    adapters = {m.name: read.factors[m.name].adapter((0, m.rows)) for m in matrices if m.name in read.factors}
    plain = velocity(dit, given, (0,))
    with attached(dit, adapters):
        ours = velocity(dit, given, (0,))
    assert reference.relative_error(plain, theirs["adapted"]) > 3e-2
    assert reference.relative_error(ours, theirs["adapted"]) < 1e-2


@pytest.fixture(scope="module")
def encoder(comfyui):
    opened = [open_part(comfyui / f"{name}.safetensors", "text_encoder") for name in ("qwen", "byt5")]
    check_complete([part for _, part in opened], HV15)
    loaded = [HV15.load_text(*one, torch.float32, None, TOKENIZERS) for one in opened]
    return JointTextEncoder([lambda one=one: one for one in loaded])


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_a_prompt_is_encoded_as_by_comfyuis_own_encoders(comfyui, encoder, index):
    theirs = load_file(comfyui / "prompts.made")
    (states,) = encoder.encode([PROMPTS[index]])
    cross_attn, options = HV15.to_comfyui(states)
    assert cross_attn.shape == theirs[f"states.{index}"].shape
    assert reference.relative_error(cross_attn, theirs[f"states.{index}"]) < 1e-3
    glyphs = theirs.get(f"glyphs.{index}")
    assert (glyphs is None) == ("conditioning_byt5small" not in options) == (index != 2)
    if glyphs is not None:
        assert reference.relative_error(options["conditioning_byt5small"], glyphs) < 1e-3
    back = HV15.from_comfyui(theirs[f"states.{index}"], {"conditioning_byt5small": glyphs})
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in states.items()}


def test_prompts_that_are_too_long_are_cut_and_it_is_said(encoder):
    long = " ".join(["word"] * 1100)
    (states,) = encoder.encode([long])
    assert len(states[TEXT]) == 1024 and encoder.tokenizer.too_long(long) == 1100 + 5 - 1024
    assert encoder.tokenizer.too_long(PROMPTS[1]) == 0


def test_one_encoder_alone_is_refused_with_what_is_missing(comfyui):
    parts = {name: open_part(comfyui / f"{name}.safetensors", "text_encoder")[1] for name in ("qwen", "byt5")}
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL alone cannot encode prompts"):
        check_complete([parts["qwen"]], HV15)
    with pytest.raises(ValueError, match="do not belong together"):
        check_complete([parts["byt5"], parts["byt5"]], HV15)


def test_a_picture_is_seen_as_by_comfyuis_own_siglip(comfyui):
    picture = load_file(comfyui / "picture.given")["picture"].movedim(-1, 1) * 2 - 1
    encoder = HV15.load_vision(*open_part(comfyui / "siglip.safetensors", "vision_encoder"), torch.float32)
    theirs = load_file(comfyui / "prompts.made")["seen"]
    assert theirs.shape == (1, 729, 1152)
    assert reference.relative_error(encoder.encode(picture), theirs) < 1e-3
