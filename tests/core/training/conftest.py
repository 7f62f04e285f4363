import pytest
import reference
import small_job
import torch
from safetensors.torch import save_file
from small_job import WAN
from videolora.core.data import cache_files
from videolora.core.training.prompts import Preview, PreviewSettings


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small checkpoint and five cached clips of two sizes."""
    return small_job.make(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def shown(made):
    """Settings of a video and a picture every two steps."""
    folder = made[0]
    _, vae = reference.vector("wan21_vae")
    save_file(vae, folder / "vae.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in ("positive", "negative"):
        states = {"varlen_t5": torch.randn(5, 4096, generator=generator)}
        cache_files.save_text(folder / f"{name}.safetensors", states, name, WAN, "")
    common = {
        "prompt": "a cat", "states": str(folder / "positive.safetensors"), "width": 48, "height": 32, "steps": 2,
        "seed": 5, "guidance": 4.0, "shift": 3.0, "negative_states": str(folder / "negative.safetensors"),
    }  # fmt: skip
    prompts = (Preview(frames=5, **common), Preview(frames=1, **{**common, "negative_states": "", "guidance": 1.0}))
    return PreviewSettings(prompts=prompts, every_steps=2, at_start=True, vae=str(folder / "vae.safetensors"))
