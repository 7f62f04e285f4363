"""HunyuanVideo 1.5's transformer, VAE and encoders against reference outputs and official tensor lists."""

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from videolora.core.families import FAMILIES, open_part, recognise, variant_of
from videolora.core.families.hunyuan_video.checkpoint import COMFYUI
from videolora.core.families.hunyuan_video_15 import text, vision
from videolora.core.families.hunyuan_video_15.defaults import GLYPH, IMAGE, PLAIN, START, TEXT, VISION
from videolora.core.families.hunyuan_video_15.vae import HunyuanVideo15VAEConfig
from videolora.core.keymap import find_prefix
from videolora.core.lora import files, loraid, merge
from videolora.core.lora.factors import LoRAFactors
from videolora.core.lora.inventory import blocks_of, inventory
from videolora.core.lora.network import NetworkSettings
from videolora.core.lora.stack import StackEntry
from videolora.core.lora.workbench import OpenedModel, read_stack
from videolora.core.modules.quantized import to_scaled_fp8
from videolora.core.modules.tiling import tiled
from videolora.core.sampling.sample import sample
from videolora.core.sampling.schedule import Schedule
from videolora.core.shapes import Tiles, VideoSize
from videolora.core.weights import load_into, open_checkpoint

HV15 = FAMILIES["hunyuan_video_1_5"]
BUILD = {"dit": HV15.build_dit, "vae": HV15.build_vae, "text_encoder": text.build,
         "vision_encoder": vision.SigLIP}  # fmt: skip
T2V, I2V = "hunyuan_video_15_t2v", "hunyuan_video_15_i2v"


def built(checkpoint, part, dtype=torch.float32):
    with torch.device("meta"):
        model = BUILD[part.kind](part.config)
    return load_into(model, checkpoint, part.keymap, dtype)


def loaded(folder, name, kind, change=lambda weights: weights):
    """The reference tensors of a vector, and our model with its weights read from a file."""
    tensors, weights = reference.vector(name)
    save_file(change(weights), folder / f"{name}.safetensors")
    return tensors, built(*open_part(folder / f"{name}.safetensors", kind))


def samples(tensors):
    """The states of each sample, without what is behind their ends."""
    return [
        {TEXT: states[mask.bool()], GLYPH: glyphs[where.bool()], **({VISION: seen} if seen is not None else {})}
        for states, mask, glyphs, where, seen in zip(
            tensors["text_states"], tensors["text_mask"], tensors["glyph_states"], tensors["glyph_mask"],
            tensors.get("vision_states", [None, None]), strict=True,
        )
    ]  # fmt: skip


def velocity(dit, tensors, states=None):
    """The vectors' latents hold the start image's already."""
    with torch.no_grad():
        return dit(tensors["latents"], tensors["timestep"], **HV15.conditions(states or samples(tensors)))


def fused(weights):
    """The same transformer with query, key and value in one, as ComfyUI has it."""
    made = {}
    for name, value in weights.items():
        if "_attn_q." in name:
            parts = [weights[name.replace("_attn_q.", f"_attn_{letter}.")] for letter in "qkv"]
            made[name.replace("_attn_q.", "_attn_qkv.")] = torch.cat(parts)
        elif not ("_attn_k." in name or "_attn_v." in name):
            made[name] = value
    return made


def as_comfyui_saves(weights):
    """With a prefix and ComfyUI's own names of modules."""
    return {"model.diffusion_model." + COMFYUI.to_file(name): value for name, value in fused(weights).items()}


@pytest.mark.parametrize("name", [T2V, I2V])
@pytest.mark.parametrize("change", [dict, fused, as_comfyui_saves], ids=lambda change: change.__name__)
def test_the_transformer_gives_the_reference_velocity_in_every_layout(name, change, tmp_path):
    tensors, dit = loaded(tmp_path, name, "dit", change)
    assert [(len(one[TEXT]), len(one[GLYPH])) for one in samples(tensors)] == [(9, 6), (5, 0)]
    assert reference.relative_error(velocity(dit, tensors), tensors["output"]) < 1e-4
    checkpoint, part = open_part(tmp_path / f"{name}.safetensors", "dit")
    assert part.variants == PLAIN
    assert len(loraid_matrices(checkpoint, part)) == 2 * 12


def loraid_matrices(checkpoint, part):
    return [m for m in inventory(HV15, checkpoint.shapes(part.keymap)) if not m.modulation]


@pytest.mark.parametrize("name", [T2V, I2V])
def test_a_batch_gives_what_its_samples_give_alone(name, tmp_path):
    tensors, dit = loaded(tmp_path, name, "dit")
    together, states = velocity(dit, tensors), samples(tensors)
    for index in range(2):
        one = {key: value[index : index + 1] for key, value in tensors.items()}
        torch.testing.assert_close(velocity(dit, one, states[index : index + 1])[0], together[index], rtol=1e-4, atol=1e-4)  # fmt: skip


def test_no_start_image_is_zeros_in_its_channels(tmp_path):
    tensors, dit = loaded(tmp_path, T2V, "dit")
    blank = torch.cat((tensors["latents"][:, :32], torch.zeros_like(tensors["latents"][:, 32:])), dim=1)
    ours = velocity(dit, {**tensors, "latents": blank[:, :32]})
    assert torch.equal(ours, velocity(dit, {**tensors, "latents": blank}))


def test_a_fused_checkpoint_in_scaled_fp8_keeps_its_rows(tmp_path):
    """One factor for all rows, and one for each, are cut as the weights are."""
    tensors, weights = reference.vector(T2V)
    weights, made = fused(weights), {}
    for name, value in weights.items():
        if name.startswith("double_blocks") and value.ndim == 2:
            amount = value.abs().amax(1) if ".1." in name else value.abs().max()
            scale = amount / 448
            made[name] = (value / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".scale_weight")] = scale
        else:
            made[name] = value
    save_file(made, tmp_path / "dit.safetensors")
    checkpoint, part = open_part(tmp_path / "dit.safetensors", "dit")
    stored = checkpoint.read_stored("double_blocks.1.img_attn_k.weight")
    assert stored.weight.dtype == torch.float8_e4m3fn and stored.scale.shape == (256, 1)
    assert 0 < reference.relative_error(velocity(built(checkpoint, part), tensors), tensors["output"]) < 0.1


def step_distilled(weights):
    more = {f"time_r_in.mlp.{i}.{kind}": shape for i in (0, 2) for kind, shape in
            (("weight", weights["time_in.mlp.0.weight"].shape), ("bias", weights["time_in.mlp.0.bias"].shape))}  # fmt: skip
    return {**weights, **reference.weights(more)}


def test_a_step_distilled_model_is_told_where_each_step_leads(tmp_path):
    tensors, dit = loaded(tmp_path, I2V, "dit", step_distilled)
    states, told = samples(tensors)[:1], []
    hook = dit.register_forward_pre_hook(
        lambda module, args, given: told.append((float(given["time"]), float(given["end"]))), with_kwargs=True
    )
    schedule = Schedule(steps=3, shift=7.0)
    list(sample(dit, HV15, torch.zeros(1, 32, 1, 2, 2), states[0], None, schedule, 1.0, 0, torch.device("cpu")))
    times = schedule.times.tolist()
    assert told == list(zip(times, [*times[1:], 0.0], strict=True))
    hook.remove()
    with torch.no_grad():
        at = torch.tensor([500.0])
        given = {"latents": tensors["latents"][:1], "time": at}
        there, further = (dit(**given, **HV15.conditions(states), **more) for more in ({}, {"end": at - 100}))
    assert reference.relative_error(further, there) > 1e-3
    assert (
        recognise(open_checkpoint(tmp_path / f"{I2V}.safetensors"))[1].variants[0] == "hunyuan-1.5-i2v-480p-distilled"
    )


def test_the_vae_encodes_and_decodes_as_the_reference(tmp_path):
    tensors, model = loaded(tmp_path, "hunyuan_video_15_vae", "vae")
    assert reference.relative_error(model.encode(tensors["video"]), tensors["latents_mode"]) < 1e-4
    chunks = list(model.decode(tensors["latents_mode"]))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4]
    decoded = torch.cat(chunks, dim=2)
    assert reference.relative_error(decoded, tensors["decoded"]) < 1e-4
    model.cache_on_cpu = True
    assert torch.equal(torch.cat(list(model.decode(tensors["latents_mode"])), dim=2), decoded)


def narrow_vae():
    config = HunyuanVideo15VAEConfig(widths=(8, 16, 16, 16, 64), latent_channels=32)
    with torch.device("meta"):
        model = HV15.build_vae(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(reference.weights(shapes), assign=True)
    return model


def test_a_clip_begins_as_a_shorter_one_does_and_tiles_meet():
    """Whatever follows a frame, and however many frames are convolved at a time, changes nothing before it."""
    model = narrow_vae()
    video = torch.rand(1, 3, 13, 32, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = model.encode(video)
    assert whole.shape == (1, 32, *HV15.latent.latents(VideoSize(13, 32, 192)))
    torch.testing.assert_close(model.encode(video[:, :, :5]), whole[:, :, :2], rtol=1e-4, atol=1e-4)
    by_tiles = tiled(model, Tiles(side=128), HV15.latent)
    latents = by_tiles.encode(video)
    assert latents.shape == whole.shape and 0 < reference.relative_error(latents, whole) < 0.5
    assert torch.cat(list(by_tiles.decode(latents)), dim=2).shape == video.shape
    assert torch.equal(tiled(model, Tiles(side=2048), HV15.latent).encode(video), whole)


MODELS = {
    "hunyuanvideo15_dit_t2v_i2v_official": ("", "dit", "hunyuan-1.5-t2v-720p"),
    "hunyuanvideo15_dit_t2v_i2v_comfyorg": ("", "dit", "hunyuan-1.5-i2v-480p"),
    "hunyuanvideo15_dit_480p_i2v_step_distilled_official": ("", "dit", "hunyuan-1.5-i2v-480p-distilled"),
    "hunyuanvideo15_dit_480p_i2v_step_distilled_comfyorg": ("", "dit", "hunyuan-1.5-i2v-480p-distilled"),
    "hunyuanvideo15_dit_sr_distilled_official": ("", "dit", "hunyuan-1.5-sr"),
    "hunyuanvideo15_dit_sr_distilled_comfyorg": ("", "dit", "hunyuan-1.5-sr"),
    "hunyuanvideo15_vae": ("", "vae", None),
    "te_qwen25_vl_7b": ("model.", "text_encoder", None),
    "te_byt5_small_glyph_comfyorg": ("", "text_encoder", None),
    "te_byt5_small_glyph_official": ("module.", "text_encoder", None),
    "vision_siglip_so400m_patch14_384": ("", "vision_encoder", None),
}
UNUSED = {  # Qwen's last two blocks, its norm, what makes words of states and what looks at images; what SigLIP pools with
    "text_encoder": ("layers.26.", "layers.27.", "norm.", "lm_head.", "visual."),
    "vision_encoder": ("vision_model.head.",),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_official_file_is_recognised_and_fits_without_a_key_missing_or_left_over(name):
    prefix, kind, variant = MODELS[name]
    shapes = {key.removeprefix(prefix): shape for key, shape in reference.manifest(name).items()}
    part = HV15.recognise(shapes)
    assert part.kind == kind and (variant is None or variant in part.variants)
    with torch.device("meta"):
        model = BUILD[kind](part.config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if not part.views:
        assert wanted == shapes
        return
    assert {key: view.shape for key, view in part.views.items()} == wanted
    left = shapes.keys() - {source for view in part.views.values() for source, _ in view.pieces}
    assert all(key.startswith(UNUSED.get(kind, ())) for key in left)


@pytest.mark.parametrize("layout", ["official", "comfyorg"])
def test_the_full_model_has_648_matrices_for_loraids_whatever_the_layout(layout):
    part = HV15.recognise(reference.manifest(f"hunyuanvideo15_dit_t2v_i2v_{layout}"))
    shapes = {name: view.shape for name, view in part.views.items()} or reference.manifest(
        f"hunyuanvideo15_dit_t2v_i2v_{layout}"
    )
    matrices = inventory(HV15, shapes)
    owned = [m for m in matrices if not m.modulation]
    assert len(owned) == 648 and len(matrices) == 756 and len(blocks_of(matrices)) == 54
    allocation = loraid.allocate(matrices, loraid.Loraid(number=20))
    assert list(allocation.rows)[-1] == "double_blocks.53.txt_mlp.fc2"
    assert not any("mod." in name for name in allocation.rows)
    every = [name for one in loraid.allocations(matrices, "slot", 12) for name in one.rows]
    assert sorted(every) == sorted(m.name for m in owned)


def test_modulation_is_trained_where_it_is_wished_and_never_with_a_loraid():
    matrices = inventory(HV15, reference.manifest("hunyuanvideo15_dit_t2v_i2v_official"))
    assert len(NetworkSettings().chosen(matrices)) == 648
    wished = NetworkSettings(modulation=True)
    assert len(wished.chosen(matrices)) == 756
    with pytest.raises(ValueError, match="no LORAID owns the modulation"):
        wished.chosen(matrices, loraid.allocate(matrices, loraid.Loraid(number=1)).rows)
    with pytest.raises(ValueError, match="modulation cannot be trained"):
        wished.chosen(inventory(FAMILIES["wan"], reference.manifest("wan21_t2v_1_3B")))


def test_relatives_are_refused_or_left_to_others():
    assert HV15.recognise(reference.manifest("hunyuanvideo_dit_t2v_720p_official")) is None
    assert HV15.recognise(reference.manifest("te_umt5_xxl_comfyorg")) is None
    sr = HV15.variants["hunyuan-1.5-sr"]
    assert sr.unusable and "super-resolution" in sr.title
    shapes = {**reference.manifest("hunyuanvideo15_dit_t2v_i2v_official"), "img_in.proj.weight": (2048, 70, 1, 1, 1)}
    with pytest.raises(ValueError, match="70 input channels"):
        HV15.recognise(shapes)
    shapes = {name.removeprefix("model."): shape for name, shape in reference.manifest("te_qwen25_vl_7b").items()}
    glyphs = reference.manifest("te_byt5_small_glyph_comfyorg")
    with pytest.raises(ValueError, match="not trained on glyphs"):
        HV15.recognise(glyphs | {"shared.weight": (384, 1472)})
    with pytest.raises(ValueError, match="in diffusers' layout, which is not supported"):
        HV15.recognise({"cond_type_embed.weight": (3, 2048), "x_embedder.proj.weight": (2048, 65, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL 3B"):
        HV15.recognise({**shapes, "embed_tokens.weight": (151936, 2048)})
    shapes = reference.manifest("vision_siglip_so400m_patch14_384")
    with pytest.raises(ValueError, match="another SigLIP"):
        HV15.recognise({**shapes, "vision_model.embeddings.position_embedding.weight": (1024, 1152)})


def test_recommended_settings():
    for name in PLAIN:
        variant = HV15.variants[name]
        guidance = 1.0 if "distilled" in name else 6.0
        assert (variant.guidance, variant.shift_for(1280, 720, 50), variant.steps) == (guidance, 7.0, 50)
        assert variant.training_sampling == "flux_shift" and bool(variant.images) == ("i2v" in name)


def some_states(tokens=7, glyphs=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {TEXT: torch.randn(tokens, 3584, generator=generator), GLYPH: torch.randn(glyphs, 1472, generator=generator)}


@pytest.mark.parametrize("glyphs", [0, 5])
def test_conditioning_survives_the_way_through_comfyui(glyphs):
    image = torch.cat((torch.randn(32, 3, 4, 6), torch.zeros(1, 3, 4, 6)))
    image[:32, 1:], image[32, 0] = 0, 1
    states = {**some_states(glyphs=glyphs), IMAGE: image, VISION: torch.randn(729, 1152)}
    cross_attn, options = HV15.to_comfyui(states)
    assert cross_attn.shape == (1, 7, 3584) and ("conditioning_byt5small" in options) == bool(glyphs)
    assert options["concat_mask"][0, 0, 0].eq(0).all() and options["concat_mask"][0, 0, 1:].eq(1).all()
    back = HV15.from_comfyui(cross_attn, options)
    ours, theirs = HV15.conditions([states]), HV15.conditions([back])
    assert ours.keys() == theirs.keys() >= {"image_condition", "vision_states"}
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value)
    torch.testing.assert_close(ours["image_condition"][:, :32], HV15.latent.to_model(image[None, :32]))
    assert torch.equal(ours["image_condition"][:, 32:], image[None, 32:])


def test_tokens_that_comfyuis_mask_leaves_out_are_no_tokens_and_what_has_no_effect_is_refused():
    cross_attn, mask = torch.randn(1, 9, 3584), torch.tensor([[1] * 5 + [0] * 4])
    states = HV15.from_comfyui(cross_attn, {"attention_mask": mask, "pooled_output": None})
    assert torch.equal(states[TEXT], cross_attn[0, :5]) and states[GLYPH].shape == (0, 1472)
    with pytest.raises(ValueError, match="carries guidance, which this model cannot use"):
        HV15.from_comfyui(cross_attn, {"guidance": 6.0})
    latents = torch.zeros(1, 32, 3, 4, 6)
    with pytest.raises(ValueError, match="does not fit its image"):
        HV15.from_comfyui(cross_attn, {"concat_latent_image": latents, "concat_mask": torch.ones(1, 1, 3, 2, 6)})
    assert not HV15.from_comfyui(cross_attn, {"concat_latent_image": latents})[IMAGE][32:].any()


class Eyes:
    """An image encoder that gives each picture's mean."""

    def encode(self, pictures):
        return pictures.mean((1, 2, 3))[:, None, None].expand(-1, 729, 1152)


def test_the_start_image_is_the_first_latent_frame_with_a_mask_and_zeros_follow():
    model = narrow_vae()
    pictures = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = HV15.image_states(model, Eyes(), START, pictures, None, 9)
    assert {name: tuple(value.shape) for name, value in first.items()} == START.shapes(VideoSize(3, 4, 3))
    assert first[IMAGE][:, 1:].eq(0).all() and first[IMAGE][32, 0].eq(1).all()
    torch.testing.assert_close(first[IMAGE][:32, :1], model.encode(pictures[:1, :, None])[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(first[VISION], second[VISION])
    with pytest.raises(ValueError, match="link Load SigLIP Image Encoder"):
        HV15.image_states(model, None, START, pictures, None, 9)
    with pytest.raises(ValueError, match="a start image alone"):
        HV15.image_states(model, Eyes(), START, pictures, pictures, 9)


CONFIG = HV15.recognise(reference.manifest("hunyuanvideo15_dit_t2v_i2v_official")).config
SIZE = VideoSize(3, 4, 6)
STATES = {TEXT: (9, 3584), GLYPH: (0, 1472)}
IMAGES = {IMAGE: (33, *SIZE), VISION: (729, 1152)}


@pytest.mark.parametrize(
    ("images", "shapes", "message"),
    [(START, {}, "there is no start image"), (None, IMAGES, "cannot use a start image"),
     (START, {IMAGE: IMAGES[IMAGE]}, "no SigLIP features"), (START, {**IMAGES, VISION: (257, 1280)}, "another model's encoders"),
     (START, {**IMAGES, IMAGE: (33, 4, 4, 6)}, "was encoded for 96x64, 13 frames, and the video is 96x64, 9 frames")],
)  # fmt: skip
def test_states_that_the_transformer_cannot_take_are_refused(images, shapes, message):
    with pytest.raises(ValueError, match=message):
        HV15.check_states(CONFIG, images, {**STATES, **shapes}, SIZE)


def test_states_that_fit_are_taken():
    HV15.check_states(CONFIG, None, STATES, SIZE)
    HV15.check_states(CONFIG, START, {**STATES, **IMAGES}, SIZE)
    HV15.check_states(CONFIG, START, IMAGES, SIZE)  # of a preview, whose prompt is encoded elsewhere
    assert {name: value.shape[1] for name, value in HV15.blank_text(CONFIG).items()} == {TEXT: 3584, GLYPH: 1472}


def test_words_in_quotes_are_the_glyphs():
    cut = text.GlyphTokenizer()
    assert cut("a cat") == [] and cut("it's a cat") == []
    wanted = 'Text "Hi". Text "büß". Text "two". '.encode()
    assert cut('a sign "Hi" and “two” or "büß"') == [*(3 + byte for byte in wanted), 1]
    long = '"' + "x" * 200 + '"'
    assert len(cut(long)) == 128 and cut(long)[-1] == 1 and cut.too_long(long) == 200 + 9 - 128 + 1


def qwen_weights(dim=128, depth=4, rows=152064):
    """A small Qwen2.5-VL in the names of its files, with a part that looks at images."""
    shapes = {"model.embed_tokens.weight": (rows, dim), "model.norm.weight": (dim,), "lm_head.weight": (2, 2),
              "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14)}  # fmt: skip
    for i in range(depth):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (dim, dim) for name in "qkvo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.bias": (dim,) for name in "qkv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (2 * dim, dim) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (dim, 2 * dim)
        shapes |= {f"{layer}.{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
    return reference.weights(shapes)


def byt5_weights(dim=1472, depth=2, ffn=64):
    shapes = {"shared.weight": (1510, dim), "encoder.final_layer_norm.weight": (dim,),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 6)}  # fmt: skip
    for i in range(depth):
        layers = f"encoder.block.{i}.layer"
        shapes |= {f"{layers}.0.SelfAttention.{name}.weight": (384, dim) for name in "qkv"}
        shapes |= {f"{layers}.0.SelfAttention.o.weight": (dim, 384), f"{layers}.1.DenseReluDense.wo.weight": (dim, ffn)}
        shapes |= {f"{layers}.1.DenseReluDense.wi_{j}.weight": (ffn, dim) for j in (0, 1)}
        shapes |= {f"{layers}.{j}.layer_norm.weight": (dim,) for j in (0, 1)}
    return reference.weights(shapes)


def siglip_weights(dim=1152, depth=2, ffn=64):
    stem, norms = "vision_model", ["vision_model.post_layernorm"]
    shapes = {f"{stem}.embeddings.patch_embedding.weight": (dim, 3, 14, 14), f"{stem}.embeddings.patch_embedding.bias": (dim,),
              f"{stem}.embeddings.position_embedding.weight": (729, dim), f"{stem}.head.probe": (1, 1, dim)}  # fmt: skip
    for i in range(depth):
        layer = f"{stem}.encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, rows, columns in (
            *((f"self_attn.{part}_proj", dim, dim) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", ffn, dim), ("mlp.fc2", dim, ffn),
        ):  # fmt: skip
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    return reference.weights(shapes | {f"{name}.{kind}": (dim,) for name in norms for kind in ("weight", "bias")})


def test_qwen_leaves_out_its_last_blocks_and_the_question_and_may_be_in_fp8(tmp_path):
    save_file(qwen_weights(), tmp_path / "qwen.safetensors")
    checkpoint, part = open_part(tmp_path / "qwen.safetensors", "text_encoder")
    assert part.gives == (TEXT,) and part.config.depth == 2 and part.config.kv_heads == 1
    with torch.device("meta"):
        small = text.build(part.config)
    names = [name for name, value in small.named_parameters() if value.ndim == 2 and "embed" not in name]
    small = load_into(small, checkpoint, part.keymap, torch.float32, stored=dict.fromkeys(names, to_scaled_fp8))

    class Cut:
        question = [5, 6, 7]

        def __call__(self, prompt):
            return list(range(100, 100 + len(prompt)))

    (states,), (rounded,) = (text.QwenEncoder(one, Cut()).encode(["abcde"]) for one in (built(checkpoint, part), small))
    assert states[TEXT].shape == (5, 128)
    assert 0 < reference.relative_error(rounded[TEXT], states[TEXT]) < 0.25


def test_byt5_reads_the_training_file_and_comfyuis_alike(tmp_path):
    weights = byt5_weights()
    save_file(weights, tmp_path / "byt5.safetensors")
    theirs = {
        "module.text_tower." + name.replace("shared.", "encoder.embed_tokens."): value
        for name, value in weights.items()
    }
    torch.save({"state_dict": {**theirs, "module.logit_scale": torch.zeros(())}}, tmp_path / "byt5_model.pt")
    both = []
    for name in ("byt5.safetensors", "byt5_model.pt"):
        opened = open_part(tmp_path / name, "text_encoder")
        encoder = HV15.load_text(*opened, torch.float32)
        written, plain = encoder.encode(['a sign "Hi"', "a sign"])
        assert written[GLYPH].shape == (len('Text "Hi". ') + 1, 1472) and plain[GLYPH].shape == (0, 1472)
        both.append(written[GLYPH])
    assert torch.equal(*both)
    stored = HV15.load_text(*opened, torch.float32, to_scaled_fp8).encode(['a sign "Hi"'])[0][GLYPH]
    assert 0 < reference.relative_error(stored, both[0]) < 0.25


def test_a_tokenizer_that_is_nowhere_or_another_models_is_asked_for(tmp_path):
    for name, content in (
        ("tokenizer_config.json", "{}"),
        ("vocab.json", '{"<|startoftext|>": 0}'),
        ("merges.txt", ""),
    ):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"of Qwen2\.5-VL was not found: put tokenizer_config\.json and vocab\.json"):
        text.QwenTokenizer((tmp_path,))


def lora_of(matrices, path, number, rank=2):
    """A LoRA of the share of a LORAID, as trainings write it."""
    rows = loraid.allocate(matrices, loraid.Loraid(number=number, unit="matrix", units_per_id=7)).rows
    generator = torch.Generator().manual_seed(number)
    made = {
        m.name: LoRAFactors(torch.randn(rank, m.columns, generator=generator), torch.randn(m.rows, rank, generator=generator), 2.0)
        for m in matrices if m.name in rows
    }  # fmt: skip
    files.save(path, made, {}, names=HV15.lora_names)
    return made


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_loraids_merge_alike_into_both_layouts_and_out_again(how, tmp_path):
    """LORAID 1 ends inside of what ComfyUI has as one matrix, where LORAID 2 goes on."""
    tensors, weights = reference.vector(T2V)
    paths = {"split": tmp_path / "split.safetensors", "fused": tmp_path / "fused.safetensors"}
    save_file(weights, paths["split"])
    save_file({f"model.diffusion_model.{name}": value for name, value in fused(weights).items()}, paths["fused"])
    merged = {}
    for layout, path in paths.items():
        model = OpenedModel.open(path)
        loras = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
        made = [lora_of(model.matrices, lora, number) for number, lora in zip((1, 2), loras, strict=True)]
        assert list(made[0])[-1].endswith("txt_attn_q") and next(iter(made[1])).endswith("txt_attn_k")
        stack = read_stack(model, [StackEntry(lora) for lora in loras], allow_overlap=False)
        target, back = tmp_path / f"{layout}_merged.safetensors", tmp_path / f"{layout}_back.safetensors"
        list(merge.merge(path, target, model.prefix, model.part, stack, merge.Combination(method=how)))
        merged[layout] = velocity(built(*open_part(target, "dit")), tensors)
        base = (path, model.prefix, model.part)
        list(merge.unmerge(target, back, model.prefix, model.part, stack[:1], base))
        list(merge.unmerge(back, back.with_stem("clean"), model.prefix, model.part, stack[1:], base))
        clean, original = load_file(back.with_stem("clean")), load_file(path)
        assert all(torch.equal(clean[name], value) for name, value in original.items())
    assert reference.relative_error(merged["fused"], merged["split"]) < 1e-5
    assert reference.relative_error(merged["split"], tensors["output"]) > 1e-2


def test_a_lora_is_merged_into_fused_fp8_and_other_rows_stay(tmp_path):
    _, weights = reference.vector(T2V)
    made = {}
    for name, value in fused(weights).items():
        quantised = name.startswith("double_blocks") and value.ndim == 2
        made[name] = (value / value.abs().max() * 448).to(torch.float8_e4m3fn) if quantised else value
        if quantised:
            made[name.replace(".weight", ".scale_weight")] = value.abs().max() / 448
    path, target = tmp_path / "dit.safetensors", tmp_path / "merged.safetensors"
    save_file(made, path)
    model = OpenedModel.open(path)
    k = next(m for m in model.matrices if m.name == "double_blocks.0.img_attn_k")
    factors = LoRAFactors(0.01 * torch.ones(1, k.columns), torch.full((k.rows, 1), 0.1), 1.0)
    files.save(tmp_path / "l.safetensors", {k.name: factors}, {}, names=HV15.lora_names)
    stack = read_stack(model, [StackEntry(tmp_path / "l.safetensors", 50.0)], allow_overlap=False)
    list(merge.merge(path, target, model.prefix, model.part, stack))
    before, after = open_part(path, "dit")[0], open_part(target, "dit")[0]
    moved = after.read(f"{k.name}.weight", torch.float32) - before.read(f"{k.name}.weight", torch.float32)
    assert moved.mean() == pytest.approx(0.05, rel=0.05)
    q = f"{k.name[:-1]}q.weight"
    assert reference.relative_error(after.read(q, torch.float32), before.read(q, torch.float32)) < 0.05
    written = load_file(target)
    names = [name for name, value in made.items() if not torch.equal(value.float(), written[name].float())]
    assert set(names) <= {"double_blocks.0.img_attn_qkv.weight", "double_blocks.0.img_attn_qkv.scale_weight"}


@pytest.mark.parametrize("dialect", files.DIALECTS)
def test_a_lora_of_a_share_is_the_same_in_every_dialect(dialect, tmp_path):
    """With some of query, key and value alone, and with modulation, which other trainers train."""
    model = small_matrices()
    names = {
        name
        for number in (1, 2)
        for name in loraid.allocate(model, loraid.Loraid(number=number, unit="matrix", units_per_id=7)).rows
    }
    names = {*names, "double_blocks.1.txt_mod.linear"} - {"double_blocks.0.img_attn_k"}
    generator = torch.Generator().manual_seed(0)
    made = {
        m.name: LoRAFactors(torch.randn(2, m.columns, generator=generator), torch.randn(m.rows, 2, generator=generator), 2.0)
        for m in model if m.name in names
    }  # fmt: skip
    files.save(tmp_path / "l.safetensors", made, {}, dialect, HV15.lora_names)
    read = files.read(tmp_path / "l.safetensors", model, "", HV15.lora_names)
    assert not read.unmatched and read.factors.keys() == made.keys()
    for name, factors in made.items():
        torch.testing.assert_close(read.factors[name].up @ read.factors[name].down, factors.up @ factors.down)


def small_matrices():
    weights = reference.vector(T2V)[1]
    return inventory(HV15, {name: tuple(value.shape) for name, value in weights.items()})


def test_a_lora_in_comfyuis_own_names_of_modules_is_read(tmp_path):
    up, down = torch.randn(768, 2), torch.randn(2, 256)
    up[256:512] = 0
    qkv, mlp = "diffusion_model.double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_1_txt_mlp_0"
    save_file({f"{qkv}.lora_B.weight": up, f"{qkv}.lora_A.weight": down, f"{mlp}.lora_up.weight": torch.randn(1024, 2),
               f"{mlp}.lora_down.weight": down.clone()}, tmp_path / "l.safetensors")  # fmt: skip
    read = files.read(tmp_path / "l.safetensors", small_matrices(), "", HV15.lora_names)
    assert list(read.factors) == [
        "double_blocks.0.img_attn_q",
        "double_blocks.0.img_attn_v",
        "double_blocks.1.txt_mlp.fc1",
    ]
    assert torch.equal(read.factors["double_blocks.0.img_attn_v"].up, up[512:]) and not read.unmatched


def test_qwen_of_newer_transformers_is_recognised():
    old = reference.manifest("te_qwen25_vl_7b")
    names = [
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
        for name in old
    ]
    assert find_prefix(names, HV15.anchors) == "model.language_model." and find_prefix(old, HV15.anchors) == "model."


def test_a_file_is_taken_for_the_release_that_it_is_named_after(tmp_path):
    save_file(fused(reference.vector(I2V)[1]), tmp_path / "model.safetensors")
    _, part = open_part(tmp_path / "model.safetensors", "dit")
    for name, variant in {"hunyuanvideo1.5_720p_i2v_fp16": "i2v-720p", "hunyuanvideo1.5_480p_i2v_cfg_distilled_fp16": "i2v-480p-cfg-distilled",
                          "hunyuanvideo1.5_480p_t2v_fp16": "t2v-480p", "anything": "t2v-720p"}.items():  # fmt: skip
        assert variant_of(tmp_path / f"{name}.safetensors", part).name == f"hunyuan-1.5-{variant}"
    with pytest.raises(ValueError, match="is no skyreels-v1-i2v"):
        variant_of(tmp_path / "model.safetensors", part, "skyreels-v1-i2v")
