"""HunyuanVideo 1.5 on a real server: the shipped workflows, alone and mixed with ComfyUI's own nodes."""

import client
import demo
import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import node, summary
from .test_interop import latent_of
from .test_wan import TITLE, run, samplers
from .test_workflows import frames

QUICK = {"VideoLoRATrain": {"steps": 4}, "VideoLoRAFlowSchedule": {"steps": 4}}
T2V, I2V = "hunyuanvideo1.5_720p_t2v_fp16.safetensors", "hunyuanvideo1.5_720p_i2v_fp16.safetensors"


def training(folder, loraid):
    return demo.graph(
        "hunyuan15_t2v_train_loraid",
        VideoLoRADatasetFolder={"folder": folder},
        VideoLoRASelectLORAID={"loraid": loraid, "unit": "matrix", "units_per_id": 25},
        VideoLoRATrain={"steps": 4, "name": f"hunyuan15_{folder}"},
        VideoLoRAFlowSchedule={"steps": 4},
    )


@pytest.fixture(scope="module")
def loras(server):
    """Both LORAIDs, trained by the shipped workflow; the first ends inside of what ComfyUI has as one matrix. One caption has
    quotes."""
    caption = next((server.base / "input" / "character_1").glob("*.txt"))
    before = caption.read_text()
    caption.write_text(before + ' A sign says "Open".')
    yield {folder: run(server, training(folder, number)) for number, folder in enumerate(demo.PROMPTS, start=1)}
    caption.write_text(before)


def test_a_loraid_is_trained_and_a_video_sampled_with_it(server, loras):
    for number, (folder, outcome) in enumerate(loras.items(), start=1):
        shown = summary(outcome)
        assert shown["loraid"] == number and shown["steps"] == 4
        (path,) = shown["files"]
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert path.endswith(f"hunyuan15_{folder}.safetensors") and metadata["ss_timestep_sampling"] == "flux_shift"
        assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)


def test_caches_are_made_once_and_hold_what_other_trainers_read(server, loras):
    graph, kinds = training("character_1", 1), ("Load", "DatasetFolder", "CacheLatents", "CacheText")
    graph = {
        key: entry
        for key, entry in graph.items()
        if entry["class_type"].startswith(tuple(f"VideoLoRA{k}" for k in kinds))
    }
    for kind in kinds[2:]:
        cache = node(graph, f"VideoLoRA{kind}")
        graph[f"shown_{kind}"] = {"class_type": "PreviewAny", **TITLE, "inputs": {"source": [cache, 1]}}
    outcome = run(server, graph)
    assert outcome.texts[node(graph, "VideoLoRACacheLatents")].startswith("latents: 0 made, 6 up to date")
    assert outcome.texts[node(graph, "VideoLoRACacheText")].startswith("captions: 0 made, 6 up to date")
    texts = [load_file(path) for path in (server.base / "input" / "character_1").rglob("*_hv15_te.safetensors")]
    assert {name.rsplit("_", 1)[0] for text in texts for name in text} == {"varlen_vl_embed", "varlen_byt5_embed"}
    glyphs = sorted(len(value) for text in texts for name, value in text.items() if "byt5" in name)
    assert glyphs == [0] * 5 + [len('Text "Open". ') + 1]


@pytest.mark.parametrize(
    ("folder", "cached"),
    [("character_2", "96x64, 13 frames: 6 windows"), ("pictures_1", "96x64, 1 frame: 4 windows")],
)
def test_image_to_video_is_trained_from_clips_and_from_pictures(server, folder, cached):
    graph = demo.graph(
        "hunyuan15_i2v_train",
        VideoLoRADatasetFolder={"folder": folder},
        VideoLoRATrain={"steps": 2, "name": f"hunyuan15_i2v_{folder}"},
    )
    outcome = run(server, graph)
    assert cached in outcome.texts[node(graph, "VideoLoRACacheLatents")]
    (path,) = summary(outcome)["files"]
    assert all(name.startswith("diffusion_model.double_blocks.") for name in load_file(path))


def test_an_encoder_of_another_model_or_none_is_refused(server):
    graph = demo.graph("hunyuan15_i2v_train", **QUICK)
    for name in ("hunyuan_video_vae_bf16", "wan_2.1_vae"):
        other = client.with_overrides(graph, {node(graph, "VideoLoRALoadVAE"): {"model": f"{name}.safetensors"}})
        assert "link the VAE of its family" in client.run(server, other).error
    cache = node(graph, "VideoLoRACacheLatents")
    other = {
        **graph,
        "clip": {"class_type": "VideoLoRALoadCLIPVision", **TITLE, "inputs": {"model": "clip_vision_h.safetensors"}},
    }
    other = client.with_overrides(other, {cache: {"clip_vision": ["clip", 0]}})
    assert "link the image encoder of its family" in client.run(server, other).error
    del graph[cache]["inputs"]["clip_vision"]
    assert "Load SigLIP Image Encoder" in client.run(server, graph).error


@pytest.mark.parametrize("name", ["hunyuan15_t2v_sample", "hunyuan15_i2v_sample"])
def test_a_video_is_sampled(server, name):
    outcome = run(server, demo.graph(name, **QUICK))
    assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)


def test_recommended_settings_come_with_the_checkpoint(server):
    graph = demo.graph("hunyuan15_t2v_sample", VideoLoRAFlowSchedule={"steps": 10, "shift": 0.0})
    schedule = node(graph, "VideoLoRAFlowSchedule")
    kept = {k: v for k, v in graph.items()
            if k == schedule or v["class_type"] in ("VideoLoRALoadDiT", "VideoLoRAEmptyLatent")}  # fmt: skip
    kept["shown"] = {"class_type": "PreviewAny", **TITLE, "inputs": {"source": [schedule, 1]}}
    assert "flow shift 7" in run(server, kept).texts[schedule]


def test_a_variant_that_was_chosen_wrongly_is_noticed(server):
    graph = demo.graph("hunyuan15_i2v_sample", **QUICK, VideoLoRALoadDiT={"variant": "hunyuan-1.5-t2v-720p"})
    assert "is no image-to-video model" in client.run(server, graph).error
    graph = demo.graph("hunyuan15_t2v_sample", **QUICK, VideoLoRALoadDiT={"variant": "hunyuan-1.5-i2v-480p"})
    assert "there is no start image" in client.run(server, graph).error


def test_two_loraids_are_merged_and_sample_as_in_comfyuis_own_loader(server, loras):
    graph = demo.graph("hunyuan15_t2v_merge")
    outcome = run(server, graph)
    assert "no parameter is touched twice" in outcome.texts[node(graph, "VideoLoRAApplyLoRA")]
    merged = load_file(server.base / "output" / "diffusion_models" / "hunyuanvideo1.5_character_1_2.safetensors")
    base = load_file(server.base / "models" / "diffusion_models" / T2V)
    changed = {name for name, value in base.items() if not value.equal(merged[name])}
    assert any("_attn_qkv." in name for name in changed) and all(name.startswith("double_blocks.") for name in changed)

    graph = demo.graph("hunyuan15_t2v_sample", **QUICK)
    encoders = [key for key, entry in graph.items() if entry["class_type"] == "VideoLoRAEncodeText"]
    latent = node(graph, "VideoLoRAEmptyLatent")
    applied = {key: value for key, value in demo.graph("hunyuan15_t2v_merge").items()
               if value["class_type"] in ("VideoLoRALoadLoRA", "VideoLoRAApplyLoRA")}  # fmt: skip
    names = {key: f"stack_{key}" for key in applied}
    for key, entry in applied.items():
        inputs = {name: [names.get(value[0], value[0]), value[1]] if isinstance(value, list) else value
                  for name, value in entry["inputs"].items()}  # fmt: skip
        graph[names[key]] = {**entry, "inputs": inputs}
    stack = next(key for key, entry in graph.items() if entry["class_type"] == "VideoLoRAApplyLoRA")
    graph[stack]["inputs"]["dit"] = [node(graph, "VideoLoRALoadDiT"), 0]
    graph[node(graph, "VideoLoRASample")]["inputs"]["dit"] = [stack, 0]
    graph = samplers(graph, T2V, [[encoders[0], 0], [encoders[1], 0], [latent, 0]], "hunyuan15")
    for number in (1, 2):
        graph[f"stock_{number}"] = {"class_type": "LoraLoaderModelOnly", **TITLE, "inputs": {
            "model": ["unet" if number == 1 else "stock_1", 0], "lora_name": f"hunyuan15_character_{number}.safetensors",
            "strength_model": 1.0}}  # fmt: skip
    graph["stock"]["inputs"]["model"] = ["stock_2", 0]
    log = len(server.log.read_text())
    run(server, graph)
    assert "lora key not loaded" not in server.log.read_text()[log:]
    assert reference.relative_error(latent_of(server, "hunyuan15_ours"), latent_of(server, "hunyuan15_stock")) < 1e-2


def test_a_super_resolution_file_is_refused_by_name(server):
    folder, name = server.base / "models" / "diffusion_models", "hunyuanvideo1.5_720p_sr_distilled_fp16.safetensors"
    weights = load_file(folder / T2V)
    save_file({**weights, "img_in.proj.weight": torch.zeros(128, 98, 1, 1, 1).half()}, folder / name)
    with pytest.raises(client.Rejected, match=r"1\.5 super-resolution is recognised, but cannot be used"):
        client.run(server, demo.graph("hunyuan15_t2v_sample", VideoLoRALoadDiT={"model": name}))


def test_our_start_image_samples_alike_in_comfyuis_own_sampler(server):
    graph = demo.graph("hunyuan15_i2v_sample", **QUICK)
    encode = node(graph, "VideoLoRAEncodeImage")
    graph = samplers(graph, I2V, [[encode, 0], [encode, 1], [encode, 2]], "hunyuan15_image")
    run(server, graph)
    ours, theirs = (latent_of(server, f"hunyuan15_image_{whose}") for whose in ("ours", "stock"))
    assert reference.relative_error(ours, theirs) < 1e-2
