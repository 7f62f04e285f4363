"""HunyuanVideo 1.5 from pictures and captions to a LoRA, on small models in both layouts."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_job
import small_models
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.data import cache_files
from videolora.core.data.caching import cache_latents, cache_text
from videolora.core.data.config import DatasetConfig
from videolora.core.data.planning import Dataset, ImagePlan, plan_latents, plan_text
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.hunyuan_video_15.defaults import GLYPH, IMAGE, START, TEXT, VISION
from videolora.core.io import latents as latent_files
from videolora.core.io.files import fingerprint
from videolora.core.lora import files
from videolora.core.lora.adapter import attached
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.lora.network import NetworkSettings, make_adapters
from videolora.core.modules.offloading import Offload
from videolora.core.sampling.sample import sample
from videolora.core.sampling.schedule import Schedule
from videolora.core.text import JointTextEncoder
from videolora.core.training import batches, loop
from videolora.core.training.job import MemorySettings, TimestepSettings, TrainingItem, TrainingSet
from videolora.core.training.prompts import Preview, PreviewSettings
from videolora.core.training.run import Run
from videolora.core.weights import load_into

HV15 = FAMILIES["hunyuan_video_1_5"]
T2V, I2V = "hunyuan-1.5-t2v-720p", "hunyuan-1.5-i2v-720p"
CAPTIONS = (
    "a red shape",
    'a shape that says "Hi" and "there"',
    "a long caption of a third shape, over a dark background",
)
TOKENIZER = (Path(__file__).resolve().parents[3] / ".dev" / "ComfyUI" / "comfy" / "text_encoders" / "qwen25_tokenizer",)
CPU = torch.device("cpu")


def split(tensors):
    """Query, key and value apart, as in the official layout."""
    made = {}
    for name, value in tensors.items():
        if name.startswith("double_blocks") and "_attn_qkv." in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            made |= {name.replace("_attn_qkv.", f"_attn_{letter}."): part.clone() for letter, part in parts}
        else:
            made[name] = value
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Pictures and captions through the real encoders, with what an image-to-video model is told; the checkpoint in both
    layouts. The folder, and the items of the cache."""
    folder = tmp_path_factory.mktemp("clips")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index, caption in enumerate(CAPTIONS):
        Image.new("RGB", (48, 32), (80 * index, 60, 200 - 50 * index)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(caption, encoding="utf-8")
    models = {"vae": small_models.hunyuan_15_vae, "qwen": small_models.qwen, "byt5": small_models.byt5,
              "siglip": small_models.siglip}  # fmt: skip
    for name, make in models.items():
        save_file(make(), folder / f"{name}.safetensors")
    dit = small_models.hunyuan_15_dit(seed=16)
    save_file(dit, folder / "comfyui.safetensors")
    save_file(split(dit), folder / "official.safetensors")
    checkpoint, part = open_part(folder / "vae.safetensors", "vae")
    with torch.device("meta"):
        vae = HV15.build_vae(part.config)
    load_into(vae, checkpoint, part.keymap, torch.float32)
    opened = [open_part(folder / f"{name}.safetensors", "text_encoder") for name in ("qwen", "byt5")]
    encoders = [HV15.load_text(*one, torch.float32, None, TOKENIZER) for one in opened]
    vision = HV15.load_vision(*open_part(folder / "siglip.safetensors", "vision_encoder"), torch.float32)
    config = DatasetConfig(
        kind="image", folder=pictures, cache=pictures / "cache", resolution=(48, 32), caption_extension=".txt"
    )
    dataset = Dataset.find(config)
    plan = plan_latents(dataset, HV15, "the VAE", images=ImagePlan(input=START, encoder_identity="SigLIP"))
    assert {step.outcome for step in cache_latents([plan], HV15, lambda: vae, CPU, load_vision=lambda: vision)} == {
        "made"
    }
    texts = plan_text(dataset, HV15, "the encoders")
    joint = JointTextEncoder([lambda one=one: one for one in encoders])
    assert {step.outcome for step in cache_text(texts, HV15, lambda: joint)} == {"made"}
    items = tuple(
        TrainingItem(latents=str(window.path), text=str(text.path), size=tuple(HV15.latent.latents(window.size)),
                     fingerprints=(window.content, text.fingerprint))
        for window, text in zip(plan.windows, texts, strict=True)
    )  # fmt: skip
    return folder, items


def job(clips, output, variant=T2V, layout="official", **changes):
    folder, items = clips
    path = folder / f"{layout}.safetensors"
    values = {
        "family": "hunyuan_video_1_5", "variant": variant, "dit": str(path), "dit_fingerprint": fingerprint(path),
        "datasets": (TrainingSet(title="clips", batch_size=3, num_repeats=1, items=items),), "steps": 2,
        "loraid": Loraid(number=2, unit="matrix", units_per_id=8), "timesteps": TimestepSettings(sampling="flux_shift"),
    }  # fmt: skip
    (folder / "dit.safetensors").write_bytes(path.read_bytes())  # what a small job is made of, until it is told
    return small_job.job(clips, output, **{**values, **changes})


def opened(clips, layout):
    checkpoint, part = open_part(clips[0] / f"{layout}.safetensors", "dit")
    with torch.device("meta"):
        dit = HV15.build_dit(part.config)
    return load_into(dit, checkpoint, part.keymap, torch.float32), inventory(HV15, checkpoint.shapes(part.keymap))


def test_caches_have_the_names_of_the_shared_layout(clips):
    item, text = clips[1][1].latents, clips[1][1].text
    names = {name: tuple(value.shape) for name, value in load_file(item).items()}
    assert names == {"latents_1x2x3_float16": (32, 1, 2, 3), "latents_image_1x2x3_float16": (33, 1, 2, 3),
                     "siglip_float16": (729, 1152)}  # fmt: skip
    assert item.endswith("_hv15.safetensors") and text.endswith("_hv15_te.safetensors")
    told = [cache_files.load_text(Path(one.text)) for one in clips[1]]
    assert [len(states[GLYPH]) for states in told] == [0, len('Text "Hi". Text "there". ') + 1, 0]
    assert len({len(states[TEXT]) for states in told}) == 3


@pytest.mark.parametrize("variant", [T2V, I2V])
def test_a_batch_is_told_of_each_samples_words_and_image_scaled_as_in_sampling(clips, variant, tmp_path):
    one = job(clips, tmp_path, variant)
    (batch,) = next(batches.steps(one, HV15, 0))
    assert sorted(len(states) for states in batch.conditions["glyph_states"]) == [0, 0, 26]
    assert len({len(states) for states in batch.conditions["text_states"]}) == 3
    assert ("image_condition" in batch.conditions) == ("vision_states" in batch.conditions) == (variant == I2V)
    if variant == I2V:
        stored = [cache_files.load_sample(Path(item.latents), HV15, START)[1] for item in clips[1]]
        wanted = [HV15.conditions([{TEXT: torch.zeros(1, 1), GLYPH: torch.zeros(0, 1), **states}])["image_condition"][0]
                  for states in stored]  # fmt: skip
        for condition in batch.conditions["image_condition"]:
            assert sum(torch.equal(condition, one) for one in wanted) == 1
        torch.testing.assert_close(wanted[0][:32], stored[0][IMAGE][:32].float() * 1.03682)
        assert wanted[0][32:].eq(1).all() and stored[0][VISION].shape == (729, 1152)


@pytest.mark.parametrize(("variant", "layout"), [(T2V, "official"), (I2V, "comfyui")])
def test_a_loraid_is_trained_and_gone_on_from_whatever_the_layout(clips, variant, layout, tmp_path):
    """With all that saves memory."""
    one = job(clips, tmp_path / "out", variant, layout, memory=MemorySettings(
        mode="manual", precision="fp8_scaled", block_swap=2, offload_checkpoints=True))  # fmt: skip
    this = Run.of(one, tmp_path / "runs")
    assert small_job.work(this) == 0, this.log_end()
    (path,) = one.final_paths
    tensors = load_file(path)
    assert all(name.startswith("diffusion_model.double_blocks.") for name in tensors)
    assert any(".txt_attn_qkv." in name for name in tensors) and not any("_attn_q." in name for name in tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "hunyuan_video_1_5" and metadata["ss_timestep_sampling"] == "flux_shift"
    _, matrices = opened(clips, layout)
    read = files.read(path, matrices, "", HV15.lora_names)
    assert read.factors.keys() == allocate(matrices, one.loraid).rows.keys() and not read.unmatched
    again = replace(one, name="further", network=NetworkSettings(
        rank=4, alpha=4.0, start_from=str(path), start_fingerprint=fingerprint(path)))  # fmt: skip
    further = Run.of(again, tmp_path / "runs")
    assert small_job.work(further) == 0, further.log_end()


def test_modulation_is_trained_on_demand(clips, tmp_path):
    network = NetworkSettings(rank=2, alpha=2.0, modulation=True, include=(r"double_blocks\.0\..*",))
    one = job(clips, tmp_path / "out", I2V, loraid=None, network=network)
    this = Run.of(one, tmp_path / "runs")
    assert small_job.work(this) == 0, this.log_end()
    assert any("img_mod.linear.lora_up" in name for name in load_file(one.final_path))


def test_both_layouts_and_all_that_saves_memory_give_the_same_gradients(clips, tmp_path):
    one = job(clips, tmp_path, I2V)
    (batch,) = next(batches.steps(one, HV15, 0))

    def gradients(layout, recompute=False, offload=False):
        dit, matrices = opened(clips, layout)
        rows = allocate(matrices, one.loraid).rows
        dit.run_block.recompute, dit.run_block.offload = recompute, Offload(CPU) if offload else None
        adapters = make_adapters(dit, rows, one.network, matrices, "", seed=0)
        for adapter in adapters.values():
            torch.nn.init.ones_(adapter.up)
        with attached(dit, adapters):
            loop.flow_loss(dit, batch, CPU).backward()
        return [parameter.grad for adapter in adapters.values() for parameter in adapter.parameters()]

    plain = gradients("official")
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for other in (gradients("comfyui"), gradients("comfyui", True), gradients("official", True, True)):
        for ours, theirs in zip(plain, other, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_a_preview_is_what_sampling_gives(clips, tmp_path):
    """Of image-to-video with guidance, one prompt with quoted words and one without."""
    dit, _ = opened(clips, "official")
    told = [cache_files.load_text(Path(item.text)) for item in clips[1][:2]]
    seen = cache_files.load_sample(Path(clips[1][0].latents), HV15, START)[1]
    for name, states in (("away", told[0]), ("toward", told[1]), ("images", seen)):
        cache_files.save_text(tmp_path / f"{name}.safetensors", states, "", HV15, "")
    preview = Preview(
        prompt="a shape", states=str(tmp_path / "toward.safetensors"), negative_states=str(tmp_path / "away.safetensors"),
        images=str(tmp_path / "images.safetensors"), width=48, height=32, frames=1, seed=1, steps=2, guidance=6.0, shift=7.0,
    )  # fmt: skip
    one = job(clips, tmp_path / "out", I2V, previews=PreviewSettings(prompts=(preview,), at_start=True), steps=1)
    this = Run.of(one, tmp_path / "runs")
    assert small_job.work(this) == 0 and not this.notes(), this.log_end()
    shown, _ = latent_files.load(this.preview_path(0, 0, latent_files.SUFFIX))
    *_, reached = sample(dit, HV15, torch.zeros(1, 32, 1, 2, 3), {**told[1], **seen}, {**told[0], **seen},
                         Schedule(steps=2, shift=7.0), 6.0, 1, CPU)  # fmt: skip
    torch.testing.assert_close(shown, HV15.latent.from_model(reached.latents), rtol=1e-3, atol=1e-3)


def test_guidance_leads_away_from_the_negative_prompt_alone_or_in_one_batch(clips):
    dit, _ = opened(clips, "comfyui")
    told = [cache_files.load_text(Path(item.text)) for item in clips[1][:2]]
    seen = cache_files.load_sample(Path(clips[1][0].latents), HV15, START)[1]
    positive, negative = ({**states, **seen} for states in reversed(told))

    def end(away, guidance=6.0, batched=False):
        *_, reached = sample(dit, HV15, torch.zeros(1, 32, 1, 2, 3), positive, away, Schedule(steps=3, shift=7.0), guidance, 1,
                             CPU, batched=batched)  # fmt: skip
        return reached.latents

    plain, led = end(None), end(negative)
    assert torch.isfinite(led).all() and not torch.allclose(plain, led, rtol=1e-2)
    torch.testing.assert_close(end(negative, batched=True), led, rtol=1e-3, atol=1e-3)
    assert torch.equal(end(negative, guidance=1.0), plain)
