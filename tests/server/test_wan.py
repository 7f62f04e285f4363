"""Image-to-video, pictures and the two experts of Wan 2.2 on a real server, alone and mixed with ComfyUI's own nodes."""

import client
import demo
import pytest
import reference
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import node, summary
from .test_interop import latent_of
from .test_workflows import frames

QUICK = {"VideoLoRATrain": {"steps": 4}, "VideoLoRAFlowSchedule": {"steps": 4}}
TITLE = {"_meta": {"title": ""}}


def run(server, graph):
    outcome = client.run(server, graph)
    assert not outcome.error, outcome.error
    return outcome


@pytest.fixture(scope="module")
def experts(server):
    """Both experts, trained."""
    return run(server, demo.graph("wan22_train_experts", **QUICK))


def test_image_to_video_is_trained_from_caches_with_image_states(server):
    graph = demo.graph("wan_i2v_train", **QUICK)
    outcome = run(server, graph)
    (path,) = summary(outcome)["files"]
    assert any("k_img" in name for name in load_file(path))
    again = client.with_overrides(graph, {"VideoLoRATrain": {"steps": 3}})
    report = run(server, again).texts[node(graph, "VideoLoRACacheLatents")]
    assert report.startswith("latents: 0 made, 6 up to date")


def test_latents_that_were_cached_without_the_model_are_refused_for_image_to_video(server):
    graph = demo.graph("wan_i2v_train", **QUICK)
    for name in ("dit", "clip_vision"):
        del graph[node(graph, "VideoLoRACacheLatents")]["inputs"][name]
    assert "link the model to Cache Latents" in client.run(server, graph).error


def test_pictures_are_trained(server):
    graph = demo.graph("wan_t2i_train", **QUICK)
    outcome = run(server, graph)
    assert "96x64, 1 frame: 4 windows" in outcome.texts[node(graph, "VideoLoRACacheLatents")]
    assert summary(outcome)["steps"] == 4


def test_two_experts_get_a_lora_each_and_both_are_applied_where_they_belong(server, experts):
    for path, expert in zip(summary(experts)["files"], ("high", "low"), strict=True):
        assert path.endswith(f"character_1_{expert}.safetensors")
        with safe_open(path, "pt") as file:
            assert file.metadata()["videolora_variant"].endswith(expert)
    graph = demo.graph("wan22_t2v_sample", **QUICK)
    outcome = run(server, graph)
    high, low = outcome.texts[node(graph, "VideoLoRAApplyLoRA")].split("Wan 2.2 T2V A14B, low noise:")
    assert "character_1_high" in high and "character_1_low" not in high
    assert "character_1_low" in low and "character_1_high" not in low
    assert frames(demo.saved_video(server, outcome)).shape == (13, 64, 96, 3)


def test_a_model_that_is_no_expert_is_refused_before_anything_runs(server):
    graph = demo.graph("wan22_train_experts", VideoLoRALoadWanExperts={"low": "wan2.1_i2v_480p_14B_fp16.safetensors"})
    with pytest.raises(client.Rejected, match=r"no expert of Wan 2\.2: use Load Video DiT"):
        client.run(server, graph)


def test_a_video_begins_with_an_image_and_ends_with_another(server):
    both = run(server, demo.graph("wan_flf2v_sample", **QUICK))
    assert frames(demo.saved_video(server, both)).shape == (13, 64, 96, 3)
    graph = demo.graph("wan_i2v_sample", **QUICK)
    outcome = run(server, graph)
    first = frames(demo.saved_video(server, outcome))
    assert first.shape == (13, 64, 96, 3)
    graph["end"] = {"class_type": "LoadImage", **TITLE, "inputs": {"image": "end_image.png"}}
    graph = client.with_overrides(
        graph, {"VideoLoRAEncodeImage": {"end_image": ["end", 0]}, "VideoLoRADecode": {"trim_tail_frames": 3}}
    )
    outcome = run(server, graph)
    assert "trim 3 frames" in outcome.texts[node(graph, "VideoLoRAEncodeImage")]
    assert frames(demo.saved_video(server, outcome)).shape == (14, 64, 96, 3)


def test_an_image_for_a_text_to_video_model_is_refused(server):
    graph = demo.graph("wan_i2v_sample", **QUICK)
    graph = client.with_overrides(graph, {"VideoLoRALoadDiT": {"model": "wan2.1_t2v_1.3B_bf16.safetensors"}})
    assert "is no image-to-video model" in client.run(server, graph).error


def samplers(graph, unet, conditioning, name):
    """ComfyUI's own sampler beside ours, with the same noise, sigmas and conditioning; both save their latents."""
    sample, schedule = node(graph, "VideoLoRASample"), node(graph, "VideoLoRAFlowSchedule")
    positive, negative, latent = conditioning
    graph = client.with_overrides(graph, {schedule: {"steps": 10, "solver": "euler", "latent": latent}})
    keep = {k: v for k, v in graph.items() if v["class_type"] not in ("VideoLoRADecode", "CreateVideo", "SaveVideo")}
    keep[sample]["inputs"] |= {"positive": positive, "negative": negative, "latent": latent, "seed": 5}
    return {
        **keep,
        "unet": {"class_type": "UNETLoader", **TITLE, "inputs": {"unet_name": unet, "weight_dtype": "default"}},
        "euler": {"class_type": "KSamplerSelect", **TITLE, "inputs": {"sampler_name": "euler"}},
        "stock": {"class_type": "SamplerCustom", **TITLE, "inputs": {
            "model": ["unet", 0], "add_noise": True, "noise_seed": 5, "cfg": 3.0, "positive": positive, "negative": negative,
            "sampler": ["euler", 0], "sigmas": [schedule, 1], "latent_image": latent}},
        "save_stock": {"class_type": "SaveLatent", **TITLE, "inputs": {"samples": ["stock", 0], "filename_prefix": f"latents/{name}_stock"}},
        "save_ours": {"class_type": "SaveLatent", **TITLE, "inputs": {"samples": [sample, 0], "filename_prefix": f"latents/{name}_ours"}},
    }  # fmt: skip


def test_our_start_image_samples_alike_in_comfyuis_own_sampler(server):
    graph = demo.graph("wan_i2v_sample", **QUICK)
    encode = node(graph, "VideoLoRAEncodeImage")
    graph = samplers(graph, "wan2.1_i2v_480p_14B_fp16.safetensors", [[encode, 0], [encode, 1], [encode, 2]], "image")
    run(server, graph)
    assert reference.relative_error(latent_of(server, "image_ours"), latent_of(server, "image_stock")) < 1e-2


def test_comfyuis_own_start_image_samples_alike_in_our_sampler(server):
    graph = demo.graph("wan_i2v_sample", **QUICK)
    encode = graph.pop(node(graph, "VideoLoRAEncodeImage"))
    inputs = encode["inputs"]
    graph["vae"] = {"class_type": "VAELoader", **TITLE, "inputs": {"vae_name": "wan_2.1_vae.safetensors"}}
    graph["image"] = {"class_type": "WanImageToVideo", **TITLE, "inputs": {
        "positive": inputs["positive"], "negative": inputs["negative"], "vae": ["vae", 0], "width": 96, "height": 64,
        "length": 13, "batch_size": 1, "start_image": inputs["start_image"]}}  # fmt: skip
    unet = "wan2.2_i2v_high_noise_14B_fp16.safetensors"  # which takes no CLIP features: ComfyUI's own CLIP knows no small one
    graph = client.with_overrides(graph, {"VideoLoRALoadDiT": {"model": unet}})
    graph = samplers(graph, unet, [["image", 0], ["image", 1], ["image", 2]], "own")
    run(server, graph)
    assert reference.relative_error(latent_of(server, "own_ours"), latent_of(server, "own_stock")) < 1e-2


def test_a_training_shows_previews_that_begin_with_an_image(server):
    graph = demo.graph("wan_i2v_train", **QUICK)
    train = node(graph, "VideoLoRATrain")
    loaders = {kind: [node(graph, f"VideoLoRALoad{kind}"), 0] for kind in ("DiT", "VAE", "T5", "CLIPVision")}
    graph["image"] = {"class_type": "LoadImage", **TITLE, "inputs": {"image": "start_image.png"}}
    graph["previews"] = {"class_type": "VideoLoRAPreviewSettings", **TITLE, "inputs": {
        "dit": loaders["DiT"], "text_encoder": loaders["T5"], "vae": loaders["VAE"], "clip_vision": loaders["CLIPVision"],
        "start_image": ["image", 0], "prompts": "a red disk", "every_steps": 0, "every_epochs": 0, "at_start": True,
        "width": 96, "height": 64, "frames": 5, "steps": 2, "guidance": 3.0, "shift": 0.0, "seed": 1}}  # fmt: skip
    graph[train]["inputs"] |= {"previews": ["previews", 0], "steps": 2, "name": "previewed"}
    run_of_it = summary(run(server, graph))
    assert [shown["filename"] for shown in run_of_it["previews"]] == ["step-00000000_00.mp4"] and not run_of_it["notes"]
    graph["previews"]["inputs"] |= {"prompts": "a red disk --i end_image.png --w 64"}
    graph[train]["inputs"]["name"] = "previewed_by_name"
    assert [shown["filename"] for shown in summary(run(server, graph))["previews"]] == ["step-00000000_00.mp4"]
    del graph["previews"]["inputs"]["start_image"]
    graph["previews"]["inputs"]["prompts"] = "a red disk"
    assert "link a start image" in client.run(server, graph).error


def test_a_pair_samples_as_two_of_comfyuis_own_samplers_do(server, experts):
    graph = client.with_overrides(
        demo.graph("wan22_t2v_sample", **QUICK), {"VideoLoRAFlowSchedule": {"solver": "euler"}}
    )
    sample, schedule = node(graph, "VideoLoRASample"), node(graph, "VideoLoRAFlowSchedule")
    inputs = graph[sample]["inputs"]
    inputs |= {"dit": [node(graph, "VideoLoRALoadWanExperts"), 0], "seed": 5}
    keep = {k: v for k, v in graph.items() if v["class_type"] not in ("VideoLoRADecode", "CreateVideo", "SaveVideo")}
    common = {
        "cfg": 3.0,
        "noise_seed": 5,
        "positive": inputs["positive"],
        "negative": inputs["negative"],
        "sampler": ["euler", 0],
    }
    stages = {
        expert: {"class_type": "UNETLoader", **TITLE,
                 "inputs": {"unet_name": f"wan2.2_t2v_{expert}_noise_14B_fp16.safetensors", "weight_dtype": "default"}}
        for expert in ("high", "low")
    }  # fmt: skip
    keep |= stages | {
        "euler": {"class_type": "KSamplerSelect", **TITLE, "inputs": {"sampler_name": "euler"}},
        "split": {"class_type": "SplitSigmas", **TITLE, "inputs": {"sigmas": [schedule, 1], "step": 2}},  # 1.0, 0.9 | 0.75, 0.5
        "first": {"class_type": "SamplerCustom", **TITLE, "inputs": {
            **common, "model": ["high", 0], "add_noise": True, "sigmas": ["split", 0], "latent_image": inputs["latent"]}},
        "second": {"class_type": "SamplerCustom", **TITLE, "inputs": {
            **common, "model": ["low", 0], "add_noise": False, "sigmas": ["split", 1], "latent_image": ["first", 0]}},
        "save_stock": {"class_type": "SaveLatent", **TITLE, "inputs": {"samples": ["second", 0], "filename_prefix": "latents/pair_stock"}},
        "save_ours": {"class_type": "SaveLatent", **TITLE, "inputs": {"samples": [sample, 0], "filename_prefix": "latents/pair_ours"}},
    }  # fmt: skip
    run(server, keep)
    assert reference.relative_error(latent_of(server, "pair_ours"), latent_of(server, "pair_stock")) < 1e-2
