"""Wan's transformer, VAE and text encoder against reference outputs and official tensor lists."""

import pytest
import reference
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizer import train_tokenizer
from videolora.core.families import FAMILIES, open_part, recognise
from videolora.core.families.wan import text
from videolora.core.families.wan.defaults import TEXT
from videolora.core.modules.quantized import to_fp8, to_scaled_fp8
from videolora.core.weights import load_into, open_checkpoint

WAN = FAMILIES["wan"]
BUILD = {"dit": WAN.build_dit, "vae": WAN.build_vae, "text_encoder": text.build}


def loaded(folder, name, kind):
    """The reference tensors of a vector, and our model with its weights read from a file."""
    tensors, weights = reference.vector(name)
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    checkpoint, part = open_part(path, kind)
    with torch.device("meta"):
        model = BUILD[kind](part.config)
    return tensors, load_into(model, checkpoint, part.keymap, torch.float32)


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_t2v", "wan21_i2v", "wan22_i2v"])
def test_the_transformer_gives_the_reference_velocity(name, tmp_path):
    tensors, dit = loaded(tmp_path, name, "dit")
    states = [{TEXT: tensors[f"text_states.{i}"]} for i in range(len(tensors["latents"]))]
    images = {key: tensors[key] for key in ("image_condition", "clip_features") if key in tensors}
    with torch.no_grad():
        output = dit(tensors["latents"], tensors["timestep"], **WAN.conditions(states), **images)
    assert reference.relative_error(output, tensors["output"]) < 1e-4


def test_the_vae_encodes_and_decodes_as_the_reference(tmp_path):
    tensors, vae = loaded(tmp_path, "wan21_vae", "vae")
    latents = vae.encode(tensors["video"])
    assert reference.relative_error(WAN.latent.to_model(latents), tensors["normalized_latents"]) < 1e-4
    decoded = torch.cat(list(vae.decode(WAN.latent.from_model(tensors["normalized_latents"]))), dim=2)
    assert reference.relative_error(decoded, tensors["decoded"]) < 1e-4


def test_a_longer_clip_does_not_change_the_latents_of_its_beginning(tmp_path):
    _, vae = loaded(tmp_path, "wan21_vae", "vae")
    video = torch.randn(1, 3, 13, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(vae.encode(video)[:, :, :2], vae.encode(video[:, :, :5]))


def test_the_text_encoder_gives_the_reference_states_in_both_layouts(tmp_path):
    tensors, model = loaded(tmp_path, "umt5_encoder", "text_encoder")
    with torch.no_grad():
        output = model["encoder"](input_ids=tensors["ids"], attention_mask=tensors["mask"]).last_hidden_state
    used = tensors["mask"].bool()
    assert reference.relative_error(output[used], tensors["output"][used]) < 1e-4


MODELS = {
    "wan21_t2v_1_3B": ("dit", "2.1-t2v-1.3B"), "wan21_t2v_14B": ("dit", "2.1-t2v-14B"),
    "wan21_i2v_14B_480p_720p": ("dit", "2.1-i2v-14B"), "wan21_flf2v_14B_720p": ("dit", "2.1-flf2v-14B"),
    "wan22_t2v_A14B_high_low": ("dit", "2.2-t2v-A14B-low"), "wan22_i2v_A14B_high_low": ("dit", "2.2-i2v-A14B-high"),
    "wan22_ti2v_5B": ("dit", "2.2-ti2v-5B"), "wan21_vae": ("vae", None),
    "te_umt5_xxl_official": ("text_encoder", None), "te_umt5_xxl_comfyorg": ("text_encoder", None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_official_file_is_recognised_and_fits_without_a_key_missing_or_left_over(name):
    kind, variant = MODELS[name]
    shapes = reference.manifest(name)
    part = WAN.recognise(shapes)
    assert part.kind == kind
    assert variant is None or variant in part.variants
    with torch.device("meta"):
        model = BUILD[kind](part.config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        part.keymap.to_model(key): shape for key, shape in shapes.items()
    }
    assert [part.keymap.to_file(part.keymap.to_model(key)) for key in shapes] == list(shapes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_layout_and_prefix_do_not_matter(suffix, prefix, tmp_path):
    _, weights = reference.vector("wan21_t2v")
    path = tmp_path / f"model{suffix}"
    tensors = {prefix + name: value for name, value in weights.items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    checkpoint, part = recognise(open_checkpoint(path))
    assert part.variants[0] == "2.1-t2v-1.3B"
    torch.testing.assert_close(checkpoint.read("head.head.bias"), weights["head.head.bias"])


def test_a_file_of_another_kind_or_family_is_named(tmp_path):
    _, vae = reference.vector("wan21_vae")
    save_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae\.safetensors is a VAE .*, not a diffusion model"):
        open_part(tmp_path / "vae.safetensors", "dit")
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a model this pack knows"):
        open_part(tmp_path / "other.safetensors", "dit")


def test_a_known_relative_is_refused_with_its_name():
    with pytest.raises(ValueError, match="TI2V-5B"):
        WAN.recognise(reference.manifest("wan22_vae"))
    shapes = reference.manifest("wan21_t2v_14B") | {"vace_patch_embedding.weight": (5120, 96, 1, 2, 2)}
    with pytest.raises(ValueError, match="VACE"):
        WAN.recognise(shapes)


def test_a_checkpoint_of_another_family_is_not_taken_for_this_one():
    assert WAN.recognise(reference.manifest("hunyuanvideo_dit_t2v_720p_official")) is None


def test_conditioning_survives_the_way_through_comfyui():
    states = {TEXT: torch.randn(7, 32)}
    back = WAN.from_comfyui(*WAN.to_comfyui(states))
    torch.testing.assert_close(back[TEXT], states[TEXT])


def test_too_long_conditioning_is_refused():
    with pytest.raises(ValueError, match="513 tokens"):
        WAN.from_comfyui(torch.ones(1, 513, 8), {})


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [("  two\n lines ", "two lines"), ("caf&amp;eacute;", "café"), ("a &lt;b&gt;", "a <b>"), ("schÃ¶n", "schön")],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert text.cleaned(prompt) == cleaned


def umt5_file(folder, suffix, tokenizer):
    """A small umT5 in the official layout, or with its tokenizer inside as ComfyUI's file has it."""
    _, weights = reference.vector("umt5_encoder")
    model = train_tokenizer([f"a {word} moves over the {word}" for word in ("disk", "square", "cat", "dog")] * 9, 290)
    rows = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    weights["token_embedding.weight"] = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0))
    if tokenizer == "inside":
        weights["spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    elif tokenizer == "beside":
        (folder / "spiece.model").write_bytes(model)
    path = folder / f"umt5{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    return path


@pytest.mark.parametrize(("suffix", "tokenizer"), [(".safetensors", "inside"), (".pth", "beside")])
@pytest.mark.parametrize("inference", [False, True])
def test_the_text_encoder_loads_with_its_tokenizer_inside_or_beside_it(suffix, tokenizer, inference, tmp_path):
    with torch.inference_mode(inference):
        encoder = WAN.load_text(*open_part(umt5_file(tmp_path, suffix, tokenizer), "text_encoder"), torch.float32)
        short, long = encoder.encode(["a cat", "a cat moves over the dog and the square"])
    assert short[TEXT].shape[0] < long[TEXT].shape[0]
    (alone,) = encoder.encode(["a cat"])
    torch.testing.assert_close(short[TEXT], alone[TEXT], rtol=1e-4, atol=1e-5)
    assert encoder.tokenizer.too_long("a cat") == 0 and encoder.tokenizer.too_long("cat " * 600) > 0


@pytest.mark.parametrize("storing", [to_fp8, to_scaled_fp8])
def test_a_text_encoder_in_fp8_takes_half_the_memory_and_gives_nearly_the_same(storing, tmp_path):
    opened = open_part(umt5_file(tmp_path, ".safetensors", "inside"), "text_encoder")
    exact, small = (WAN.load_text(*opened, torch.bfloat16, kept) for kept in (None, storing))

    def linear_bytes(encoder):
        return sum(p.nbytes for name, p in encoder.model.named_parameters() if p.ndim == 2 and "embed" not in name)

    assert linear_bytes(small) <= 0.55 * linear_bytes(exact)
    states = [encoder.encode(["a cat moves over the dog"])[0][TEXT] for encoder in (exact, small)]
    assert states[0].dtype == states[1].dtype == torch.bfloat16
    error = reference.relative_error(states[1], states[0])
    assert 0 < error < 0.25  # random weights spread errors more than trained ones


def test_a_text_encoder_without_a_tokenizer_says_where_to_put_it(tmp_path):
    checkpoint, part = open_part(umt5_file(tmp_path, ".pth", "nowhere"), "text_encoder")
    with pytest.raises(ValueError, match=r"put the file spiece\.model of google/umt5-xxl into"):
        WAN.load_text(checkpoint, part, torch.float32)


def test_image_to_video_in_480p_has_a_flow_shift_of_its_own():
    i2v = WAN.variants["2.1-i2v-14B"]
    assert [i2v.shift_for(*size, 40) for size in ((832, 480), (480, 832), (1280, 720), (832, 464))] == [3, 3, 5, 5]
    assert WAN.variants["2.1-t2v-14B"].shift_for(832, 480, 40) == 5
