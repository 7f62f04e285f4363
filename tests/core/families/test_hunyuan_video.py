"""HunyuanVideo's transformer, VAE and text encoders against reference outputs and official tensor lists."""

import pytest
import reference
import torch
from layouts import in_comfyuis_names, in_diffusers_names, in_module
from safetensors.torch import save_file
from videolora.core.families import FAMILIES, open_part, recognise, variant_of
from videolora.core.families.hunyuan_video import text, vae
from videolora.core.families.hunyuan_video.defaults import IMAGE, LLM, LLM_MASK, POOLED, POOLED_MASK, START
from videolora.core.family import GUIDANCE
from videolora.core.lora.inventory import blocks_of, inventory
from videolora.core.modules.quantized import to_scaled_fp8
from videolora.core.modules.tiling import tiled
from videolora.core.shapes import Tiles, VideoSize
from videolora.core.weights import load_into, open_checkpoint

HV = FAMILIES["hunyuan_video"]
BUILD = {"dit": HV.build_dit, "vae": HV.build_vae, "text_encoder": text.build}


def built(checkpoint, part, dtype=torch.float32):
    with torch.device("meta"):
        model = BUILD[part.kind](part.config)
    return load_into(model, checkpoint, part.keymap, dtype)


def loaded(folder, name, kind, change=lambda weights: weights, suffix=".safetensors"):
    """The reference tensors of a vector, and our model with its weights read from a file."""
    tensors, weights = reference.vector(name)
    path, weights = folder / f"{name}{suffix}", change(weights)
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    return tensors, built(*open_part(path, kind))


def conditions(tensors):
    samples = [
        {LLM: states, LLM_MASK: mask, POOLED: pooled, GUIDANCE: guidance / 1000}
        for states, mask, pooled, guidance in zip(
            tensors["text_states"], tensors["text_mask"], tensors["pooled"], tensors["guidance"], strict=True
        )
    ]
    return HV.conditions(samples)


def velocity(dit, tensors):
    with torch.no_grad():
        return dit(tensors["latents"], tensors["timestep"], **conditions(tensors))


@pytest.mark.parametrize("name", ["hunyuan_video_t2v", "skyreels_v1_i2v"])
def test_the_transformer_gives_the_reference_velocity_for_prompts_of_different_lengths(name, tmp_path):
    tensors, dit = loaded(tmp_path, name, "dit")
    assert tensors["text_mask"].sum(1).tolist() == [9, 5]
    assert reference.relative_error(velocity(dit, tensors), tensors["output"]) < 1e-4


@pytest.mark.parametrize(
    ("change", "suffix", "variant"),
    [(in_comfyuis_names, ".safetensors", "hunyuan-t2v"), (in_diffusers_names, ".safetensors", "skyreels-v1-t2v"),
     (in_module, ".pt", "hunyuan-t2v")],
)  # fmt: skip
def test_every_layout_gives_the_same_velocity(change, suffix, variant, tmp_path):
    tensors, dit = loaded(tmp_path, "hunyuan_video_t2v", "dit", change, suffix)
    assert reference.relative_error(velocity(dit, tensors), tensors["output"]) < 1e-4
    checkpoint, part = open_part(tmp_path / f"hunyuan_video_t2v{suffix}", "dit")
    assert part.variants[0] == variant
    assert len(inventory(HV, checkpoint.shapes(part.keymap))) == 2 * 8 + 3 * 2


def test_a_checkpoint_in_fp8_gives_nearly_the_same(tmp_path):
    def in_fp8(weights):
        blocks = ("double_blocks", "single_blocks")
        return {
            name: value.to(torch.float8_e4m3fn) if name.startswith(blocks) and value.ndim == 2 else value.bfloat16()
            for name, value in weights.items()
        }

    tensors, dit = loaded(tmp_path, "hunyuan_video_t2v", "dit", in_fp8)
    assert 0 < reference.relative_error(velocity(dit, tensors), tensors["output"]) < 0.1


def test_a_batch_gives_what_its_samples_give_alone(tmp_path):
    tensors, dit = loaded(tmp_path, "hunyuan_video_t2v", "dit")
    together = velocity(dit, tensors)
    for index in range(2):
        alone = velocity(dit, {name: value[index : index + 1] for name, value in tensors.items()})
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)


def test_what_is_behind_a_prompts_end_changes_nothing(tmp_path):
    tensors, dit = loaded(tmp_path, "hunyuan_video_t2v", "dit")
    other = {**tensors, "text_states": tensors["text_states"] + 9 * (1 - tensors["text_mask"][..., None])}
    torch.testing.assert_close(velocity(dit, other), velocity(dit, tensors))


@pytest.mark.parametrize("layout", ["official", "comfyui", "pt"])
def test_the_vae_encodes_and_decodes_as_the_reference(layout, tmp_path):
    change = {"official": lambda w: w, "comfyui": vae_in_comfyuis_names, "pt": lambda w: {"state_dict": w}}[layout]
    tensors, model = loaded(tmp_path, "hunyuan_video_vae", "vae", change, ".pt" if layout == "pt" else ".safetensors")
    assert reference.relative_error(model.encode(tensors["video"]), tensors["latents_mean"]) < 1e-4
    (decoded,) = model.decode(tensors["latents_mean"])
    assert reference.relative_error(decoded, tensors["decoded"]) < 1e-4
    assert torch.equal(decoded, next(model.decode(tensors["latents_mean"])))


def vae_in_comfyuis_names(weights):
    names = {"down_blocks": "down", "resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
             "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
             "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm",
             "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # fmt: skip
    names = {**{k: v for k, v in names.items() if k.startswith("mid")}, **names}
    made = {}
    for name, value in weights.items():
        pixel = ".to_" in name and value.ndim == 2
        for i in range(4):
            name = name.replace(f"up_blocks.{i}.", f"up.{3 - i}.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        made[name] = value[:, :, None, None, None].contiguous() if pixel else value
    return made


def test_convolutions_of_a_few_frames_at_a_time_change_nothing(tmp_path, monkeypatch):
    tensors, model = loaded(tmp_path, "hunyuan_video_vae", "vae")
    whole = model.encode(tensors["video"]), next(model.decode(tensors["latents_mean"]))
    monkeypatch.setattr(vae, "_CHUNK", 1)
    torch.testing.assert_close(model.encode(tensors["video"]), whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(next(model.decode(tensors["latents_mean"])), whole[1], rtol=1e-4, atol=1e-4)


def test_a_long_clip_is_worked_on_in_tiles_always_alike(tmp_path):
    _, model = loaded(tmp_path, "hunyuan_video_vae", "vae")
    video = torch.rand(1, 3, 41, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    by_tiles = tiled(model, Tiles(frames=32, side=64), HV.latent)
    latents = by_tiles.encode(video)
    assert latents.shape == (1, 16, *HV.latent.latents(VideoSize(41, 16, 16)))
    assert torch.equal(latents, by_tiles.encode(video))
    torch.testing.assert_close(
        latents[:, :, :3], model.encode(video[:, :, :33])[:, :, :3]
    )  # where no other tile reaches
    chunks = list(by_tiles.decode(latents))
    assert sum(chunk.shape[2] for chunk in chunks) == 41 and max(chunk.shape[2] for chunk in chunks) <= 32


MODELS = {
    "hunyuanvideo_dit_t2v_720p_official": ("", "dit", "hunyuan-t2v"),
    "hunyuanvideo_dit_t2v_720p_comfyorg": ("model.model.", "dit", "hunyuan-t2v"),
    "hunyuanvideo_dit_i2v_v1_33ch_official": ("", "dit", "hunyuan-i2v-v1"),
    "hunyuanvideo_dit_i2v_v1_33ch_comfyorg": ("model.model.", "dit", "hunyuan-i2v-v1"),
    "skyreels_v1_t2v_kijai": ("", "dit", "skyreels-v1-t2v"),
    "skyreels_v1_i2v_kijai": ("", "dit", "skyreels-v1-i2v"),
    "skyreels_v1_t2v_official_diffusers": ("", "dit", "skyreels-v1-t2v"),
    "skyreels_v1_i2v_official_diffusers": ("", "dit", "skyreels-v1-i2v"),
    "hunyuanvideo_vae_official": ("", "vae", None),
    "hunyuanvideo_vae_comfyorg": ("", "vae", None),
    "te_llava_llama3_comfyorg": ("model.", "text_encoder", None),
    "te_llava_llama3_hf_folder": ("model.", "text_encoder", None),
    "te_clip_l": ("text_model.", "text_encoder", None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_official_file_is_recognised_and_fits_without_a_key_missing_or_left_over(name):
    prefix, kind, variant = MODELS[name]
    shapes = {key.removeprefix(prefix): shape for key, shape in reference.manifest(name).items()}
    part = HV.recognise(shapes)
    assert part.kind == kind
    assert variant is None or variant in part.variants
    with torch.device("meta"):
        model = BUILD[kind](part.config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if not part.views:
        assert wanted == {part.keymap.to_model(key): shape for key, shape in shapes.items()}
        assert [part.keymap.to_file(part.keymap.to_model(key)) for key in shapes] == list(shapes)
        return
    assert {key: view.shape for key, view in part.views.items()} == wanted
    left = shapes.keys() - {source for view in part.views.values() for source, _ in view.pieces}
    if kind == "text_encoder":  # Llama's last two blocks and its norm, and what makes words of states
        assert all(key.startswith(("layers.30.", "layers.31.", "norm.", "lm_head.")) for key in left)
    else:
        assert not left


def test_the_full_model_has_240_matrices_in_60_blocks():
    shapes = reference.manifest("hunyuanvideo_dit_t2v_720p_official")
    matrices = inventory(HV, shapes)
    assert len(matrices) == 240 and len(blocks_of(matrices)) == 60
    assert matrices[0].name == "double_blocks.0.img_attn_qkv" and matrices[-1].name == "single_blocks.39.linear2"


def test_a_relative_is_refused_or_left_to_others():
    shapes = dict(reference.manifest("hunyuanvideo_dit_t2v_720p_official"))
    shapes["img_in.proj.weight"] = (3072, 52, 1, 2, 2)
    with pytest.raises(ValueError, match="52 input channels"):
        HV.recognise(shapes)
    assert HV.recognise(reference.manifest("hunyuanvideo15_dit_t2v_i2v_official")) is None
    assert HV.recognise(reference.manifest("wan21_t2v_14B")) is None
    framepack = reference.manifest("skyreels_v1_t2v_official_diffusers") | {"image_projection.up.weight": (9216, 1152)}
    with pytest.raises(ValueError, match=r"1 tensors that HunyuanVideo and SkyReels V1 lack \(image_projection"):
        HV.recognise(framepack)


@pytest.mark.parametrize("name", ["time_in.mlp.0.weight", "final_layer.linear.weight"])
def test_a_file_whose_tensors_have_no_dimensions_is_refused_by_name(name, tmp_path):
    weights = {**reference.vector("hunyuan_video_t2v")[1], name: torch.ones(())}
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=r"dit\.safetensors is damaged: it looks like HunyuanVideo"):
        open_part(tmp_path / "dit.safetensors", "dit")


def test_recommended_settings_of_skyreels_come_with_its_checkpoint(tmp_path):
    _, weights = reference.vector("skyreels_v1_i2v")
    save_file(weights, tmp_path / "dit.safetensors")
    variant = HV.variants[recognise(open_checkpoint(tmp_path / "dit.safetensors"))[1].variants[0]]
    assert (variant.guidance, variant.embedded_guidance) == (6.0, 1.0) and "bad limbs" in variant.negative_prompt
    assert float(variant.guidance_states()[GUIDANCE]) == 1 and float(variant.guidance_states(4.5)[GUIDANCE]) == 4.5
    plain = HV.variants["hunyuan-t2v"]
    assert (plain.guidance, plain.embedded_guidance) == (1.0, 6.0)
    assert [plain.shift_for(1280, 720, steps) for steps in (10, 19, 20, 50)] == [17.0, 17.0, 7.0, 7.0]
    with pytest.raises(ValueError, match="takes no embedded guidance"):
        FAMILIES["wan"].variants["2.1-t2v-14B"].guidance_states(6.0)


@pytest.mark.parametrize(
    ("file", "asked", "title"),
    [
        ("hunyuan_video_t2v_720p_bf16", "auto", "HunyuanVideo T2V"),
        ("SkyReels-hunyuan-T2V_bf16", "auto", "SkyReels V1 T2V"),
        ("SkyReels-V1-Hunyuan-T2V/model", "auto", "SkyReels V1 T2V"),
        ("SkyReels-hunyuan-T2V_bf16", "hunyuan-t2v", "HunyuanVideo T2V"),
        ("mine", "skyreels-v1-t2v", "SkyReels V1 T2V"),
    ],
)
def test_releases_with_the_same_tensors_are_told_apart_by_name_or_as_the_user_says(file, asked, title, tmp_path):
    path = tmp_path / f"{file}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(reference.vector("hunyuan_video_t2v")[1], path)
    part = open_part(path, "dit")[1]
    assert variant_of(path, part, asked).title == title
    with pytest.raises(ValueError, match=r"is no skyreels-v1-i2v: its tensors are those of hunyuan-t2v or skyreels"):
        variant_of(path, part, "skyreels-v1-i2v")


def some_states(tokens=7, dim=32):
    states = torch.zeros(256, dim)
    states[:tokens] = torch.randn(tokens, dim)
    return {LLM: states, LLM_MASK: (torch.arange(256) < tokens).long(), POOLED: torch.randn(768),
            POOLED_MASK: torch.ones(77, dtype=torch.long)}  # fmt: skip


def test_conditioning_survives_the_way_through_comfyui():
    states = {**some_states(), IMAGE: torch.randn(16, 3, 4, 6), GUIDANCE: torch.tensor(4.0)}
    cross_attn, options = HV.to_comfyui(states)
    assert cross_attn.shape == (1, 7, 32) and options["pooled_output"].shape == (1, 768)
    back = HV.from_comfyui(cross_attn, options)
    ours, theirs = HV.conditions([states]), HV.conditions([back])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value)


def test_tokens_that_comfyuis_mask_leaves_out_are_no_tokens():
    cross_attn, mask = torch.randn(1, 9, 32), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    states = HV.from_comfyui(cross_attn, {"pooled_output": torch.zeros(1, 768), "attention_mask": mask})
    torch.testing.assert_close(HV.conditions([states])["text_states"][0], cross_attn[0, :5])
    with pytest.raises(ValueError, match="no pooled prompt"):
        HV.from_comfyui(cross_attn, {})
    with pytest.raises(ValueError, match="carries reference_latents"):
        HV.from_comfyui(cross_attn, {"pooled_output": torch.zeros(1, 768), "reference_latents": []})


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_1_5"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.ones(1, 6), "9 tokens and an attention mask"), (torch.ones(9), "9 tokens and"), (torch.zeros(1, 9), "no tokens")],
)  # fmt: skip
def test_a_mask_that_is_not_the_prompts_is_refused(family, mask, message):
    options = {"pooled_output": torch.zeros(1, 768), "attention_mask": mask}
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].from_comfyui(torch.randn(1, 9, 32), options)


def test_the_start_image_is_the_first_latent_frame_and_zeros_follow(tmp_path):
    _, model = loaded(tmp_path, "hunyuan_video_vae", "vae")
    pictures = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = HV.variants["skyreels-v1-i2v"].images
    first, second = HV.image_states(model, None, images, pictures, None, 9)
    assert first.keys() == {IMAGE} and first[IMAGE].shape == (16, 3, 8, 6)
    assert first[IMAGE][:, 1:].eq(0).all() and not torch.equal(first[IMAGE], second[IMAGE])
    torch.testing.assert_close(first[IMAGE][:, :1], HV.latent.to_model(model.encode(pictures[:1, :, None]))[0])
    with pytest.raises(ValueError, match="a start image alone"):
        HV.image_states(model, None, images, pictures, pictures, 9)


CONFIGS = {
    name: HV.recognise(reference.manifest(manifest)).config
    for name, manifest in {"t2v": "skyreels_v1_t2v_kijai", "i2v": "skyreels_v1_i2v_kijai"}.items()
}
TAKES = {"t2v": None, "i2v": START}
SIZE = VideoSize(3, 4, 6)
STATES = {LLM: (256, 4096), LLM_MASK: (256,), POOLED: (768,), POOLED_MASK: (77,)}


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [("i2v", {}, "there is no start image"), ("t2v", {IMAGE: (16, *SIZE)}, "cannot use a start image"),
     ("i2v", {IMAGE: (16, 4, 4, 6)}, "was encoded for 48x32, 13 frames, and the video is 48x32, 9 frames"),
     ("t2v", {POOLED: (1280,)}, "made by the text encoder of another model")],
)  # fmt: skip
def test_states_that_the_transformer_cannot_take_are_refused(config, shapes, message):
    with pytest.raises(ValueError, match=message):
        HV.check_states(CONFIGS[config], TAKES[config], {**STATES, **shapes}, SIZE)


def test_states_that_fit_are_taken():
    HV.check_states(CONFIGS["t2v"], None, STATES, SIZE)
    HV.check_states(CONFIGS["i2v"], START, {**STATES, IMAGE: (16, *SIZE)}, SIZE)
    blank = HV.blank_text(CONFIGS["t2v"])
    assert {name: tuple(value.shape) for name, value in blank.items()} == STATES


def llama_weights(dim=128, depth=4, rows=128320):
    """A small LLaVA-Llama-3 in the names of its files; ids reach over all of the vocabulary."""
    shapes = {"embed_tokens.weight": (rows, dim), "norm.weight": (dim,)}
    for i in range(depth):
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (2 * dim, dim) for name in ("gate", "up")}
        shapes[f"layers.{i}.mlp.down_proj.weight"] = (dim, 2 * dim)
        shapes |= {f"layers.{i}.{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
    return {f"model.{name}": value for name, value in reference.weights(shapes).items()}


def test_llama_leaves_out_its_last_blocks_and_the_question(tmp_path):
    weights = llama_weights()
    save_file(weights | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "llama.safetensors")
    checkpoint, part = open_part(tmp_path / "llama.safetensors", "text_encoder")
    assert part.gives == (LLM, LLM_MASK) and part.config.depth == 2 and part.config.kv_heads == 1
    model = built(checkpoint, part)
    exact, small = (
        text.LlamaEncoder(one, lambda prompt: list(range(100, 100 + 95 + len(prompt))))
        for one in (model, stored_in_fp8(checkpoint, part))
    )
    (states,) = exact.encode(["abcde"])
    assert states[LLM].shape == (256, 128) and states[LLM_MASK].tolist() == [1] * 5 + [0] * 251
    assert states[LLM][5:].eq(0).all() and states[LLM][:5].abs().sum(1).gt(0).all()
    (rounded,) = small.encode(["abcde"])
    assert 0 < reference.relative_error(rounded[LLM], states[LLM]) < 0.25


def stored_in_fp8(checkpoint, part):
    with torch.device("meta"):
        model = text.build(part.config)
    names = [name for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    return load_into(model, checkpoint, part.keymap, torch.float32, stored=dict.fromkeys(names, to_scaled_fp8))


def test_a_tokenizer_that_is_nowhere_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"put vocab\.json and merges\.txt"):
        text.CLIPTokenizer((tmp_path,))


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"<|start_header_id|>": "\xff')
    with pytest.raises(ValueError, match=r"the tokenizer of LLaVA-Llama-3 in .* cannot be read"):
        text.LlamaTokenizer((tmp_path,))
