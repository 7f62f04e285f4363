"""HunyuanVideo and SkyReels V1 on a real server: the shipped workflows, alone and mixed with ComfyUI's own nodes."""

import client
import demo
import pytest
import reference
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import node, summary
from .test_interop import latent_of
from .test_wan import TITLE, run, samplers
from .test_workflows import frames

QUICK = {"VideoLoRATrain": {"steps": 4}, "VideoLoRAFlowSchedule": {"steps": 4}}
HUNYUAN, SKYREELS_I2V = "hunyuan_video_t2v_720p_bf16.safetensors", "skyreels_hunyuan_i2v_bf16.safetensors"


def training(folder, loraid):
    return demo.graph(
        "hunyuan_t2v_train_loraid",
        VideoLoRADatasetFolder={"folder": folder},
        VideoLoRASelectLORAID={"loraid": loraid},
        VideoLoRATrain={"steps": 4, "name": f"hunyuan_{folder}"},
        VideoLoRAFlowSchedule={"steps": 4},
    )


@pytest.fixture(scope="module")
def loras(server):
    """Both LORAIDs, trained by the shipped workflow."""
    return {folder: run(server, training(folder, number)) for number, folder in enumerate(demo.PROMPTS, start=1)}


def test_a_loraid_is_trained_and_a_video_sampled_with_it(server, loras):
    for number, (folder, outcome) in enumerate(loras.items(), start=1):
        shown = summary(outcome)
        assert shown["loraid"] == number and shown["steps"] == 4
        (path,) = shown["files"]
        assert path.endswith(f"hunyuan_{folder}.safetensors")
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_base_model_version"] == "hunyuan_video"
        assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)


def test_caches_are_made_once_and_hold_what_other_trainers_read(server, loras):
    graph = training("character_1", 1)
    graph = client.with_overrides(graph, {"VideoLoRATrain": {"steps": 3}})
    outcome = run(server, graph)
    assert outcome.texts[node(graph, "VideoLoRACacheLatents")].startswith("latents: 0 made, 6 up to date")
    assert outcome.texts[node(graph, "VideoLoRACacheText")].startswith("captions: 0 made, 6 up to date")
    folder = server.base / "input" / "character_1"
    text = load_file(next(folder.rglob("*_hv_te.safetensors")))
    assert sorted(name.rsplit("_", 1)[0] for name in text) == ["clipL", "clipL_mask", "llm", "llm_mask"]


def test_two_loraids_sample_together_and_are_merged(server, loras):
    graph = demo.graph("hunyuan_t2v_two_loraids", **QUICK)
    outcome = run(server, graph)
    assert "no parameter is touched twice" in outcome.texts[node(graph, "VideoLoRAApplyLoRA")]
    run(server, demo.graph("hunyuan_t2v_merge"))
    merged = load_file(server.base / "output" / "diffusion_models" / "hunyuan_video_character_1_2.safetensors")
    base = load_file(server.base / "models" / "diffusion_models" / HUNYUAN)
    changed = {name for name, value in base.items() if not value.equal(merged[name])}
    assert changed and all(name.startswith(("double_blocks", "single_blocks")) for name in changed)


@pytest.mark.parametrize("name", ["hunyuan_t2v_sample", "skyreels_t2v_sample", "skyreels_i2v_sample"])
def test_a_video_is_sampled(server, name):
    outcome = run(server, demo.graph(name, **QUICK))
    assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)


def test_a_video_is_made_from_a_video(server):
    outcome = run(server, demo.graph("hunyuan_v2v_sample", **QUICK))
    assert len(frames(demo.saved_video(server, outcome))) == 13


def test_recommended_settings_come_with_the_checkpoint_and_can_be_changed(server):
    seen = {}
    for name, changes in {
        "recommended": {},
        "same": {"guidance": 6.0, "embedded_guidance": 1.0},
        "other": {"embedded_guidance": 5.0},
    }.items():
        graph = demo.graph("skyreels_t2v_sample", **QUICK, VideoLoRASample={"guidance": 0.0, **changes})
        sample = node(graph, "VideoLoRASample")
        keep = {
            k: v for k, v in graph.items() if v["class_type"] not in ("VideoLoRADecode", "CreateVideo", "SaveVideo")
        }
        keep["save"] = {"class_type": "SaveLatent", **TITLE,
                        "inputs": {"samples": [sample, 0], "filename_prefix": f"latents/skyreels_{name}"}}  # fmt: skip
        run(server, keep)
        seen[name] = latent_of(server, f"skyreels_{name}")
    assert seen["recommended"].equal(seen["same"])
    assert reference.relative_error(seen["other"], seen["recommended"]) > 1e-4


def test_the_flow_shift_follows_the_number_of_steps(server):
    graph = demo.graph("hunyuan_t2v_sample", VideoLoRAFlowSchedule={"steps": 10, "shift": 0.0})
    schedule = node(graph, "VideoLoRAFlowSchedule")
    kept = {
        k: v
        for k, v in graph.items()
        if k == schedule or v["class_type"] in ("VideoLoRALoadDiT", "VideoLoRAEmptyLatent")
    }
    kept["shown"] = {"class_type": "PreviewAny", **TITLE, "inputs": {"source": [schedule, 1]}}
    assert "flow shift 17" in run(server, kept).texts[schedule]
    kept[schedule]["inputs"]["steps"] = 30
    assert "flow shift 7" in run(server, kept).texts[schedule]


def test_one_text_encoder_alone_is_refused_with_what_is_missing(server):
    graph = demo.graph("hunyuan_t2v_sample", **QUICK)
    graph = client.with_overrides(
        graph, {"VideoLoRAEncodeText": {"text_encoder": [node(graph, "VideoLoRALoadLLM"), 0]}}
    )
    assert "LLaVA-Llama-3 alone cannot encode prompts" in client.run(server, graph).error


def test_tiles_in_time_for_a_vae_that_needs_none_are_refused(server):
    graph = demo.graph("wan_t2v_sample", VideoLoRALoadVAE={"tile_frames": 64})
    with pytest.raises(client.Rejected, match="needs no tiles in time"):
        client.run(server, graph)


def test_our_sampler_gives_what_comfyuis_own_gives_with_the_lora_applied(server, loras):
    graph = demo.graph("hunyuan_t2v_two_loraids", **QUICK)
    sample, latent = node(graph, "VideoLoRASample"), node(graph, "VideoLoRAEmptyLatent")
    inputs = graph[sample]["inputs"]
    graph = samplers(graph, HUNYUAN, [inputs["positive"], inputs["negative"], [latent, 0]], "hunyuan")
    for number in (1, 2):
        graph[f"stock_{number}"] = {"class_type": "LoraLoaderModelOnly", **TITLE, "inputs": {
            "model": ["unet" if number == 1 else "stock_1", 0], "lora_name": f"hunyuan_character_{number}.safetensors",
            "strength_model": 1.0}}  # fmt: skip
    graph["stock"]["inputs"]["model"] = ["stock_2", 0]
    log = len(server.log.read_text())
    run(server, graph)
    assert "lora key not loaded" not in server.log.read_text()[log:]
    assert reference.relative_error(latent_of(server, "hunyuan_ours"), latent_of(server, "hunyuan_stock")) < 1e-2


def test_our_start_image_samples_alike_in_comfyuis_own_sampler(server):
    graph = demo.graph("skyreels_i2v_sample", **QUICK)
    encode = node(graph, "VideoLoRAEncodeImage")
    graph = client.with_overrides(
        graph, {"VideoLoRASample": {"embedded_guidance": 6.0}}
    )  # what ComfyUI takes where nothing is said
    graph = samplers(graph, SKYREELS_I2V, [[encode, 0], [encode, 1], [encode, 2]], "skyreels_image")
    run(server, graph)
    assert (
        reference.relative_error(latent_of(server, "skyreels_image_ours"), latent_of(server, "skyreels_image_stock"))
        < 1e-2
    )


def test_an_image_for_the_text_to_video_model_or_of_another_vae_is_refused(server):
    graph = demo.graph("skyreels_i2v_sample", **QUICK)
    other = client.with_overrides(graph, {"VideoLoRALoadDiT": {"model": HUNYUAN}})
    assert "is no image-to-video model" in client.run(server, other).error
    # Wan's latents have the same shape.
    other = client.with_overrides(graph, {"VideoLoRALoadVAE": {"model": "wan_2.1_vae.safetensors"}})
    assert "link the VAE of its family" in client.run(server, other).error
