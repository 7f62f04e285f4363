"""Our files and latents in ComfyUI's own nodes, and theirs in ours."""

import subprocess
import sys

import client
import demo
import reference
import server as servers
import torch
from safetensors.torch import load_file, save_file

from .conftest import node


def stock(server, lora, name):
    """ComfyUI's own loader, LoRA loader and sampler, with our conditioning and latent."""
    graph = demo.sampling_graph()
    ours = {
        k: v
        for k, v in graph.items()
        if v["class_type"] in ("VideoLoRALoadDiT", "VideoLoRALoadT5", "VideoLoRAEncodeText", "VideoLoRAEmptyLatent")
    }
    positive, negative = (k for k, v in ours.items() if v["class_type"] == "VideoLoRAEncodeText")
    model = ["unet", 0]
    if lora:
        ours["lora"] = {"class_type": "LoraLoaderModelOnly", "_meta": {"title": ""},
                        "inputs": {"model": ["unet", 0], "lora_name": lora, "strength_model": 1.0}}  # fmt: skip
        model = ["lora", 0]
    return {
        **ours,
        "unet": {"class_type": "UNETLoader", "_meta": {"title": ""},
                 "inputs": {"unet_name": "wan2.1_t2v_1.3B_bf16.safetensors", "weight_dtype": "default"}},
        "sample": {"class_type": "KSampler", "_meta": {"title": ""}, "inputs": {
            "model": model, "seed": 1, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": [positive, 0], "negative": [negative, 0],
            "latent_image": [node(ours, "VideoLoRAEmptyLatent"), 0], "denoise": 1.0}},
        "save": {"class_type": "SaveLatent", "_meta": {"title": ""}, "inputs": {"samples": ["sample", 0], "filename_prefix": f"latents/{name}"}},
    }  # fmt: skip


def latent_of(server, name):
    (path,) = (server.base / "output" / "latents").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


def test_our_loras_load_in_comfyuis_own_loader_with_every_key_and_change_what_it_samples(server, trained):
    for name, lora in {
        "without": None,
        "with_1": "character_1.safetensors",
        "with_2": "character_2.safetensors",
    }.items():
        outcome = client.run(server, stock(server, lora, name))
        assert not outcome.error, outcome.error
    assert "lora key not loaded" not in server.log.read_text()
    plain = latent_of(server, "without")
    for name in ("with_1", "with_2"):
        assert reference.relative_error(latent_of(server, name), plain) > 1e-3


def test_a_lora_with_a_key_too_many_would_have_been_noticed(server, trained):
    """The log line that the test above looks for is the one ComfyUI writes."""
    loras = server.base / "output" / "loras"
    tensors = load_file(loras / "character_1.safetensors")
    save_file({**tensors, "lora_unet_blocks_99_ffn_0.alpha": torch.ones(())}, loras / "one_too_many.safetensors")
    log = server.log.read_text()
    client.run(server, stock(server, "one_too_many.safetensors", "too_many"))
    assert "lora key not loaded" in server.log.read_text()[len(log) :]
    server.log.write_text(log)


def test_our_sampler_gives_what_comfyuis_own_gives_for_the_same_sigmas(server):
    """Same weights, noise, conditioning and sigmas: stock SamplerCustom against Sample Video."""
    graph = demo.sampling_graph()
    sample, schedule = node(graph, "VideoLoRASample"), node(graph, "VideoLoRAFlowSchedule")
    keep = (
        "VideoLoRALoadDiT",
        "VideoLoRALoadT5",
        "VideoLoRAEncodeText",
        "VideoLoRAEmptyLatent",
        "VideoLoRAFlowSchedule",
    )
    both = {k: v for k, v in graph.items() if v["class_type"] in (*keep, "VideoLoRASample")}
    both = client.with_overrides(both, {"VideoLoRAFlowSchedule": {"steps": 10, "solver": "euler"},
                                        sample: {"dit": [node(graph, "VideoLoRALoadDiT"), 0], "schedule": [schedule, 0], "seed": 5}})  # fmt: skip
    inputs = both[sample]["inputs"]
    title = {"_meta": {"title": ""}}
    both |= {
        "unet": {"class_type": "UNETLoader", **title, "inputs": {"unet_name": "wan2.1_t2v_1.3B_bf16.safetensors", "weight_dtype": "default"}},
        "euler": {"class_type": "KSamplerSelect", **title, "inputs": {"sampler_name": "euler"}},
        "stock": {"class_type": "SamplerCustom", **title, "inputs": {
            "model": ["unet", 0], "add_noise": True, "noise_seed": 5, "cfg": 3.0, "positive": inputs["positive"],
            "negative": inputs["negative"], "sampler": ["euler", 0], "sigmas": [schedule, 1], "latent_image": inputs["latent"]}},
        "save_stock": {"class_type": "SaveLatent", **title, "inputs": {"samples": ["stock", 0], "filename_prefix": "latents/stock"}},
        "save_ours": {"class_type": "SaveLatent", **title, "inputs": {"samples": [sample, 0], "filename_prefix": "latents/ours"}},
    }  # fmt: skip
    outcome = client.run(server, both)
    assert not outcome.error, outcome.error
    assert reference.relative_error(latent_of(server, "ours"), latent_of(server, "stock")) < 1e-2


def test_comfyuis_vae_decodes_our_latents_to_the_same_frames(server, tmp_path):
    run_in_comfyui(VAE_SCRIPT, tmp_path, server.base)


def test_comfyuis_own_transformer_gives_the_same_velocity(server, tmp_path):
    run_in_comfyui(DIT_SCRIPT, tmp_path, server.base)


def run_in_comfyui(script, folder, base):
    """Run a script inside ComfyUI's code, with our engine beside it."""
    path = folder / "script.py"
    path.write_text(script)
    words = [str(servers.ROOT / "devtools"), str(base), str(servers.ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, str(path), *words], cwd=servers.COMFYUI, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


HEAD = """
import sys
DEVTOOLS, BASE, TESTS = sys.argv[1:4]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [".", DEVTOOLS, TESTS]
import torch
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, comfy.utils
import pack
from pathlib import Path

families, weights = pack.load("core.families"), pack.load("core.weights")
WAN = families.FAMILIES["wan"]

def ours(kind, name, build):
    checkpoint, part = families.open_part(Path(BASE) / "models" / name, kind)
    return weights.load_into(build(part.config), checkpoint, part.keymap, torch.float32)

def error(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())
"""

DIT_SCRIPT = (
    HEAD
    + """
name = "diffusion_models/wan2.1_t2v_1.3B_bf16.safetensors"
dit = ours("dit", name, WAN.build_dit)
theirs = comfy.sd.load_diffusion_model(str(Path(BASE) / "models" / name), model_options={"dtype": torch.float32})
theirs = theirs.model.diffusion_model
torch.manual_seed(0)
latents, time = torch.randn(2, 16, 4, 8, 12), torch.tensor([900.0, 333.3])
text = WAN.conditions([{"varlen_t5": torch.randn(length, 4096)} for length in (9, 30)])["text_states"]
with torch.no_grad():
    relative = error(dit(latents, time, text_states=text), theirs(latents, time, text))
print(relative)
assert relative < 1e-3, relative
"""
)

VAE_SCRIPT = (
    HEAD
    + """
name = "vae/wan_2.1_vae.safetensors"
vae = ours("vae", name, WAN.build_vae)
theirs = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(Path(BASE) / "models" / name)))
import clips
frames, _ = clips.render_generic(3, 9)
video = torch.from_numpy(frames).float() / 255
latents = vae.encode(video.movedim(3, 0)[None] * 2 - 1)
assert error(latents, theirs.encode(video)) < 1e-3
decoded = torch.cat(list(vae.decode(latents)), dim=2)[0].movedim(0, 3) / 2 + 0.5
assert error(decoded.clamp(0, 1), theirs.decode(latents)[0]) < 1e-3
"""
)
