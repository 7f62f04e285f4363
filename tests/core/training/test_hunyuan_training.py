"""HunyuanVideo and SkyReels V1 from caches to a LoRA and to latents, on a small transformer."""

from dataclasses import replace

import pytest
import reference
import small_job
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.data import cache_files
from videolora.core.families import FAMILIES, open_part
from videolora.core.families.hunyuan_video.defaults import LLM, LLM_MASK, POOLED, POOLED_MASK
from videolora.core.io import latents as latent_files
from videolora.core.io.files import fingerprint
from videolora.core.lora import files
from videolora.core.lora.adapter import attached
from videolora.core.lora.inventory import inventory
from videolora.core.lora.loraid import Loraid, allocate
from videolora.core.lora.network import make_adapters
from videolora.core.modules.offloading import Offload
from videolora.core.sampling.sample import sample
from videolora.core.sampling.schedule import Schedule
from videolora.core.shapes import VideoSize
from videolora.core.training import batches, loop, planner
from videolora.core.training.job import TrainingItem, TrainingSet
from videolora.core.training.prompts import Preview, PreviewSettings
from videolora.core.training.run import Run
from videolora.core.weights import load_into

HV = FAMILIES["hunyuan_video"]
VECTORS = {"hunyuan-t2v": "hunyuan_video_t2v", "skyreels-v1-i2v": "skyreels_v1_i2v"}


def text_states(tokens, generator):
    llm = torch.zeros(256, 4096)
    llm[:tokens] = torch.randn(tokens, 4096, generator=generator)
    return {LLM: llm.half(), LLM_MASK: (torch.arange(256) < tokens).long(),
            POOLED: torch.randn(768, generator=generator).half(), POOLED_MASK: torch.ones(77, dtype=torch.long)}  # fmt: skip


def made(folder, variant):
    """A checkpoint and three cached clips whose captions differ in length."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(reference.vector(VECTORS[variant])[1], folder / "dit.safetensors")
    images, generator = HV.variants[variant].images, torch.Generator().manual_seed(0)
    size, items = VideoSize(5, 32, 48), []
    shape = HV.latent.latents(size)
    for index in range(3):
        latents, text = folder / f"{index}_latents.safetensors", folder / f"{index}_te.safetensors"
        states = {
            name: torch.randn(s, generator=generator) for name, s in (images.shapes(shape) if images else {}).items()
        }
        data = torch.randn(16, *shape, generator=generator)
        cache_files.save_latents(latents, data, size, HV, str(index), states, "images" if images else "")
        cache_files.save_text(text, text_states(4 + index, generator), "a clip", HV, "")
        items.append(
            TrainingItem(latents=str(latents), text=str(text), size=tuple(shape), fingerprints=(str(index), ""))
        )
    return folder, tuple(items)


def job(made_of, output, variant, **changes):
    folder, items = made_of
    return small_job.job(
        made_of, output, family="hunyuan_video", variant=variant, dit_fingerprint=fingerprint(folder / "dit.safetensors"),
        datasets=(TrainingSet(title="clips", batch_size=3, num_repeats=1, items=items),), steps=3,
        loraid=Loraid(number=1, unit="slot", units_per_id=120), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VECTORS)
def test_a_loraid_is_trained_from_caches_and_saved_so_that_every_tool_reads_it(variant, tmp_path):
    clips = made(tmp_path / "clips", variant)
    one = job(clips, tmp_path / "out", variant)
    this = Run.of(one, tmp_path / "runs")
    assert small_job.work(this) == 0, this.log_end()
    (path,) = one.final_paths
    tensors = load_file(path)
    assert all(name.startswith("diffusion_model.") for name in tensors) and any(
        ".img_mlp.fc1." in name for name in tensors
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "hunyuan_video" and metadata["ss_loraid"] == "1"
    checkpoint, part = open_part(clips[0] / "dit.safetensors", "dit")
    matrices = inventory(HV, checkpoint.shapes(part.keymap))
    read = files.read(path, matrices, "", HV.lora_names)
    assert read.factors.keys() == allocate(matrices, one.loraid).rows.keys() and not read.unmatched
    assert max(float(factor.up.abs().max()) for factor in read.factors.values()) > 0


@pytest.fixture(scope="module", params=VECTORS)
def opened(request, tmp_path_factory):
    """Variant, clips, the transformer and its matrices."""
    clips = made(tmp_path_factory.mktemp("clips"), request.param)
    checkpoint, part = open_part(clips[0] / "dit.safetensors", "dit")
    with torch.device("meta"):
        dit = HV.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    return request.param, clips, dit, inventory(HV, checkpoint.shapes(part.keymap))


def test_prompts_of_a_batch_keep_their_lengths_and_are_told_no_guidance(opened, tmp_path):
    variant, clips, _, _ = opened
    (batch,) = next(batches.steps(job(clips, tmp_path, variant), HV, 0))
    assert sorted(len(states) for states in batch.conditions["text_states"]) == [4, 5, 6]
    assert batch.conditions["pooled"].shape == (3, 768) and batch.conditions["guidance"].tolist() == [1000.0] * 3
    assert ("image_condition" in batch.conditions) == (variant == "skyreels-v1-i2v")


def test_memory_savings_change_no_gradient(opened, tmp_path):
    variant, clips, dit, matrices = opened
    one = job(clips, tmp_path, variant)
    (batch,) = next(batches.steps(one, HV, 0))
    device, rows = torch.device("cpu"), allocate(matrices, one.loraid).rows

    def gradients(recompute, offload):
        dit.run_block.recompute, dit.run_block.offload = recompute, Offload(device) if offload else None
        adapters = make_adapters(dit, rows, one.network, matrices, "", seed=0)
        for adapter in adapters.values():
            torch.nn.init.ones_(adapter.up)
        with attached(dit, adapters):
            loop.flow_loss(dit, batch, device).backward()
        return [parameter.grad for adapter in adapters.values() for parameter in adapter.parameters()]

    plain = gradients(False, False)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    for saving in ((True, False), (True, True)):
        for one_gradient, other in zip(plain, gradients(*saving), strict=True):
            torch.testing.assert_close(one_gradient, other, rtol=1e-4, atol=1e-6)
    dit.run_block.recompute, dit.run_block.offload = False, None


def end_of(dit, states, negative=None, **changes):
    size = HV.latent.latents(VideoSize(5, 32, 48))
    settings = {
        "schedule": Schedule(steps=2, shift=7.0),
        "guidance": 1.0,
        "seed": 1,
        "device": torch.device("cpu"),
        **changes,
    }
    latents = settings.pop("latents", torch.zeros(1, 16, *size))
    *_, reached = sample(dit, HV, latents, states, negative, settings.pop("schedule"), settings.pop("guidance"), settings.pop("seed"),
                         settings.pop("device"), **settings)  # fmt: skip
    return reached.latents


def told_prompts(variant):
    """The states of a prompt and of another one, with all that the release is told."""
    generator, release = torch.Generator().manual_seed(1), HV.variants[variant]
    told = release.guidance_states()
    if release.images:
        size = HV.latent.latents(VideoSize(5, 32, 48))
        told |= {name: torch.randn(shape, generator=generator) for name, shape in release.images.shapes(size).items()}
    return tuple({**text_states(tokens, generator), **told} for tokens in (9, 4))


def test_both_kinds_of_guidance_and_left_out_blocks_change_what_is_sampled(opened):
    variant, _, dit, _ = opened
    release = HV.variants[variant]
    states, negative = told_prompts(variant)
    plain = end_of(dit, states)
    assert torch.equal(plain, end_of(dit, states, negative))
    for other in (
        end_of(dit, {**states, **release.guidance_states(3.0)}),
        end_of(dit, states, negative, guidance=release.guidance if release.guidance > 1 else 6.0),
        end_of(dit, states, latents=torch.ones_like(plain), strength=0.5),
    ):
        assert torch.isfinite(other).all() and reference.relative_error(other, plain) > 1e-3
    with torch.no_grad():
        conditions, time = HV.conditions([states]), torch.tensor([500.0])
        whole, fewer = (dit(plain, time, **conditions, skip_layers=left_out) for left_out in ((), (1, 4)))
    assert reference.relative_error(fewer, whole) > 1e-3


def test_a_preview_is_sampled_with_the_embedded_guidance_that_it_names_or_the_release_recommends(tmp_path):
    clips = made(tmp_path / "clips", "hunyuan-t2v")
    states = text_states(6, torch.Generator().manual_seed(2))
    cache_files.save_text(tmp_path / "states.safetensors", states, "a cat", HV, "")
    preview = Preview(prompt="a cat", states=str(tmp_path / "states.safetensors"), negative_states="", width=48, height=32, frames=5,
                      seed=1, steps=2, guidance=1.0, shift=7.0)  # fmt: skip
    shown = PreviewSettings(prompts=(preview, replace(preview, embedded_guidance=3.0)), at_start=True)
    one = job(clips, tmp_path / "out", "hunyuan-t2v", previews=shown)
    this = Run.of(one, tmp_path / "runs")
    assert small_job.work(this) == 0 and not this.notes(), this.log_end()
    checkpoint, part = open_part(clips[0] / "dit.safetensors", "dit")
    with torch.device("meta"):
        dit = HV.build_dit(part.config)
    load_into(dit, checkpoint, part.keymap, torch.float32)
    told = {**states, **HV.variants["hunyuan-t2v"].guidance_states()}
    latents, _ = latent_files.load(this.preview_path(0, 0, latent_files.SUFFIX))
    torch.testing.assert_close(latents, HV.latent.from_model(end_of(dit, told)), rtol=1e-4, atol=1e-4)
    other, _ = latent_files.load(this.preview_path(0, 1, latent_files.SUFFIX))
    chosen = end_of(dit, {**states, **HV.variants["hunyuan-t2v"].guidance_states(3.0)})
    torch.testing.assert_close(other, HV.latent.from_model(chosen), rtol=1e-4, atol=1e-4)


def test_no_tensor_of_a_step_grows_with_the_square_of_the_sequence(opened, tmp_path):
    """On tensors without data: 544 x 960, of small width, over three lengths."""
    variant, clips, dit, matrices = opened
    one, peaks = job(clips, tmp_path, variant), {}
    told = HV.blank_text(dit.config)
    for frames in (13, 25, 49):
        size = HV.latent.latents(VideoSize(frames, 544, 960))
        images = HV.variants[variant].images
        states = {
            **told,
            **{name: torch.zeros(shape) for name, shape in (images.shapes(size) if images else {}).items()},
        }
        subject = planner.Subject(
            family=HV, config=dit.config, matrices=matrices, rows=allocate(matrices, one.loraid).rows, network=one.network,
            device=torch.device("cpu"), dtypes=dict.fromkeys((f"{m.name}.weight" for m in matrices), torch.float32),
            latents=(1, 16, *size), conditions=HV.conditions([states]), optimizer_bytes=8,
        )  # fmt: skip
        peaks[HV.latent.tokens(size)], _, _ = planner.step_activations(subject, "float32", True, False)
    (few, low), (some, middle), (many, high) = peaks.items()
    assert (high - middle) / (many - some) == pytest.approx((middle - low) / (some - few), rel=0.01)


def test_guidances_passes_may_be_made_as_one_batch(opened):
    variant, _, dit, _ = opened
    states, negative = told_prompts(variant)
    apart, together = (end_of(dit, states, negative, guidance=6.0, batched=batched) for batched in (False, True))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
