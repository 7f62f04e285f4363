"""ComfyUI's own HunyuanVideo on the same checkpoints: velocities, prompts, start images, LoRAs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.hunyuan_video.defaults import IMAGE, LLM, LLM_MASK, POOLED
from videolora.core.family import GUIDANCE
from videolora.core.lora import files
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inventory import inventory
from videolora.core.text import JointTextEncoder, check_complete
from videolora.core.weights import load_into

from .test_hunyuan_video import llama_weights

HV = FAMILIES["hunyuan_video"]
ROOT = Path(__file__).resolve().parents[3]
COMFYUI = ROOT / ".dev" / "ComfyUI"
DITS = ("hunyuan_video_t2v", "skyreels_v1_i2v")
PROMPTS = ("", "A cat walks on the grass, realistic style.", "Ein Bär & 猫 — café, 12345 steps!", "word " * 150)
TOKENIZERS = (COMFYUI / "comfy" / "sd1_tokenizer", COMFYUI / "comfy" / "text_encoders" / "llama_tokenizer")

SCRIPT = """
import json, sys
folder, sys.argv = sys.argv[1], [sys.argv[0], "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.lora
from comfy.text_encoders.hunyuan_video import HunyuanVideoClipModel, HunyuanVideoTokenizer
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

folder = Path(folder)
for path in folder.glob("*v.safetensors"):
    given = load_file(folder / f"{path.stem}.given")
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}).model
    made = {}
    with torch.no_grad():
        for i in range(2):
            context = given["text_states"][i : i + 1, : int(given["text_mask"][i].sum())]  # ComfyUI's averages over all it is given
            made[f"velocity.{i}"] = model.diffusion_model(
                given["latents"][i : i + 1], given["timestep"][i : i + 1], context=context, y=given["pooled"][i : i + 1],
                guidance=given["guidance"][i : i + 1] / 1000)
    if "image" in given:
        noise = torch.zeros_like(given["latents"][:1, :16])
        made["image"] = model.concat_cond(noise=noise, concat_latent_image=given["image"].clone(), device=noise.device)
    keys = comfy.lora.model_lora_keys_unet(model)
    lora = load_file(folder / f"{path.stem}.lora")
    patches = comfy.lora.load_lora(lora, keys, log_missing=False)
    used = {key for patch in patches.values() for key in patch.loaded_keys} | {key for key in lora if key.endswith(".alpha") and key[:-6] in keys}
    save_file(made, folder / f"{path.stem}.made", {"unused": json.dumps(sorted(lora.keys() - used)), "patched": str(len(patches))})

given = load_file(folder / "llama.safetensors")
dim, rows = given["model.layers.0.mlp.down_proj.weight"].shape
options = {"llama_model_config": {"hidden_size": dim, "intermediate_size": rows, "num_hidden_layers": 4, "num_attention_heads": dim // 128,
                                  "num_key_value_heads": dim // 128},
           "clip_l_model_config": {"num_hidden_layers": 2, "intermediate_size": 64}}
encoder = HunyuanVideoClipModel(dtype_llama=torch.float32, dtype=torch.float32, model_options=options)
encoder.load_sd(given)
encoder.load_sd(load_file(folder / "clip_l.safetensors"))
tokenizer = HunyuanVideoTokenizer()
# What ComfyUI asks for by name, transformers 5 makes of this file with rules that are not in it; 4 made this.
path = Path(comfy.sd.__file__).parent / "text_encoders" / "llama_tokenizer" / "tokenizer.json"
tokenizer.llama.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
made = {}
with torch.no_grad():
    for i, prompt in enumerate(json.loads((folder / "prompts.json").read_text())):
        states, pooled, extra = encoder.encode_token_weights(tokenizer.tokenize_with_weights(prompt, disable_weights=True))
        assert not extra
        made |= {f"states.{i}": states.contiguous(), f"pooled.{i}": pooled.contiguous()}
save_file(made, folder / "prompts.made")
"""


def clip_weights(dim=768, ffn=64, depth=2):
    norms = {"final_layer_norm": dim}
    shapes = {"embeddings.token_embedding.weight": (49408, dim), "embeddings.position_embedding.weight": (77, dim)}
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        norms |= {f"{layer}.layer_norm1": dim, f"{layer}.layer_norm2": dim}
        for name, rows, columns in (
            *((f"self_attn.{part}_proj", dim, dim) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", ffn, dim), ("mlp.fc2", dim, ffn),
        ):  # fmt: skip
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    shapes |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    return {f"text_model.{name}": value for name, value in reference.weights(shapes).items()}


def some_lora(path):
    """A LoRA for all matrices of a checkpoint, written as trainings write it; how many matrices there are."""
    checkpoint, part = open_part(path, "dit")
    matrices = inventory(HV, checkpoint.shapes(part.keymap))
    factors = {m.name: LoRAFactors(torch.randn(2, m.columns), torch.randn(m.rows, 2), 2.0) for m in matrices}
    files.save(path.with_suffix(".lora"), factors, {}, names=HV.lora_names)
    return len(matrices)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """A folder with what ComfyUI made of the vectors' inputs and of a few prompts."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in DITS:
        tensors, weights = reference.vector(name)
        if name == "skyreels_v1_i2v":
            tensors["image"] = torch.randn(
                1, 16, *tensors["latents"].shape[2:], generator=torch.Generator().manual_seed(0)
            )
        save_file(weights, folder / f"{name}.safetensors")
        save_file(tensors, folder / f"{name}.given")
        some_lora(folder / f"{name}.safetensors")
    save_file(llama_weights(), folder / "llama.safetensors")
    save_file(clip_weights(), folder / "clip_l.safetensors")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=COMFYUI, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", DITS)
def test_the_velocity_is_that_of_comfyuis_own_model(comfyui, name):
    given, theirs = load_file(comfyui / f"{name}.given"), load_file(comfyui / f"{name}.made")
    checkpoint, part = open_part(comfyui / f"{name}.safetensors", "dit")
    with torch.device("meta"):
        dit = HV.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    states = [
        {LLM: given["text_states"][i], LLM_MASK: given["text_mask"][i], POOLED: given["pooled"][i],
         GUIDANCE: given["guidance"][i] / 1000}
        for i in range(2)
    ]  # fmt: skip
    with torch.no_grad():
        velocity = dit(given["latents"], given["timestep"], **HV.conditions(states))
    for i in range(2):
        assert reference.relative_error(velocity[i : i + 1], theirs[f"velocity.{i}"]) < 1e-3


def test_comfyuis_model_of_skyreels_finds_our_start_image(comfyui):
    latents = load_file(comfyui / "skyreels_v1_i2v.given")["image"]
    states = {IMAGE: HV.latent.to_model(latents)[0]}
    torch.testing.assert_close(HV.image_options(states)["concat_latent_image"], latents)
    torch.testing.assert_close(load_file(comfyui / "skyreels_v1_i2v.made")["image"][0], states[IMAGE])


@pytest.mark.parametrize("name", DITS)
def test_a_lora_as_trainings_save_it_loads_in_comfyuis_own_loader_with_every_key(comfyui, name):
    from safetensors import safe_open

    with safe_open(comfyui / f"{name}.made", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["unused"]) == [] and int(metadata["patched"]) == 2 * 8 + 3 * 2
    checkpoint, part = open_part(comfyui / f"{name}.safetensors", "dit")
    read = files.read(comfyui / f"{name}.lora", inventory(HV, checkpoint.shapes(part.keymap)), "", HV.lora_names)
    assert not read.unmatched and len(read.factors) == 22


@pytest.fixture(scope="module")
def encoder(comfyui):
    opened = [open_part(comfyui / f"{name}.safetensors", "text_encoder") for name in ("llama", "clip_l")]
    check_complete([part for _, part in opened], HV)
    loaded = [HV.load_text(*one, torch.float32, None, TOKENIZERS) for one in opened]
    return JointTextEncoder([lambda one=one: one for one in loaded])


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_a_prompt_is_encoded_as_by_comfyuis_own_encoders(comfyui, encoder, index):
    theirs = load_file(comfyui / "prompts.made")
    (states,) = encoder.encode([PROMPTS[index]])
    cross_attn, options = HV.to_comfyui(states)
    assert cross_attn.shape == theirs[f"states.{index}"].shape
    assert reference.relative_error(cross_attn, theirs[f"states.{index}"]) < 1e-3
    assert reference.relative_error(options["pooled_output"], theirs[f"pooled.{index}"]) < 1e-3
    back = HV.from_comfyui(theirs[f"states.{index}"], {"pooled_output": theirs[f"pooled.{index}"]})
    ours, of_theirs = (HV.conditions([one])["text_states"][0] for one in (states, back))
    assert reference.relative_error(of_theirs, ours) < 1e-3


def test_prompts_that_are_too_long_are_cut_and_it_is_said(encoder):
    long = " ".join(["word"] * 300)
    (states,) = encoder.encode([long])
    assert int(states[LLM_MASK].sum()) == 256 and encoder.tokenizer.too_long(long) == 300 + 1 - 256
    assert encoder.tokenizer.too_long(PROMPTS[1]) == 0


def test_one_encoder_alone_is_refused_with_what_is_missing(comfyui):
    _, llama = open_part(comfyui / "llama.safetensors", "text_encoder")
    _, clip = open_part(comfyui / "clip_l.safetensors", "text_encoder")
    with pytest.raises(ValueError, match="LLaVA-Llama-3 alone cannot encode prompts"):
        check_complete([llama], HV)
    with pytest.raises(ValueError, match="do not belong together"):
        check_complete([clip, clip], HV)


def test_the_text_tower_is_found_in_a_file_of_all_of_clip(tmp_path):
    whole = clip_weights(depth=1) | {
        "vision_model.embeddings.class_embedding": torch.zeros(1024), "text_projection.weight": torch.zeros(768, 768),
        "logit_scale": torch.zeros(()),
    }  # fmt: skip
    save_file(whole, tmp_path / "model.safetensors")
    checkpoint, part = open_part(tmp_path / "model.safetensors", "text_encoder")
    assert part.gives[0] == POOLED and all(not name.startswith("vision") for name in checkpoint.tensors)
