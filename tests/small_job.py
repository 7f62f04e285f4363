"""A training that takes a moment: a small checkpoint, five cached clips of two sizes, and jobs with them."""

import reference
import torch
from safetensors.torch import save_file
from videolora.core.data import cache_files
from videolora.core.families import FAMILIES
from videolora.core.io.files import fingerprint
from videolora.core.lora.loraid import Loraid
from videolora.core.shapes import VideoSize
from videolora.core.training import worker
from videolora.core.training.job import (
    Job,
    NetworkSettings,
    OptimizerSettings,
    SaveSettings,
    TrainingItem,
    TrainingSet,
)

WAN = FAMILIES["wan"]


def make(folder, vector="wan21_t2v", variant="2.1-t2v-1.3B"):
    """The checkpoint and the clips, in `folder`, with image states where the variant takes images."""
    _, weights = reference.vector(vector)
    save_file(weights, folder / "dit.safetensors")
    images = WAN.variants[variant].images
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(5):
        size = VideoSize(5, 32, 48) if index < 3 else VideoSize(1, 48, 32)
        latents, text = folder / f"{index}_latents.safetensors", folder / f"{index}_te.safetensors"
        shape = WAN.latent.latents(size)
        data = torch.randn(16, *shape, generator=generator)
        states = {
            name: torch.randn(s, generator=generator) for name, s in (images.shapes(shape) if images else {}).items()
        }
        cache_files.save_latents(latents, data, size, WAN, str(index), states, "images" if images else "")
        cache_files.save_text(text, {"varlen_t5": torch.randn(4 + index, 4096, generator=generator)}, "a clip", WAN, "")
        items.append(
            TrainingItem(latents=str(latents), text=str(text), size=tuple(shape), fingerprints=(str(index), ""))
        )
    return folder, tuple(items)


def job(made, output, **changes):
    folder, items = made
    values = {
        "name": "lora", "output_folder": str(output), "family": "wan", "variant": "2.1-t2v-1.3B",
        "dit": str(folder / "dit.safetensors"), "dit_fingerprint": fingerprint(folder / "dit.safetensors"),
        "datasets": (TrainingSet(title="clips", batch_size=2, num_repeats=1, items=items),), "steps": 6, "seed": 1,
        "loraid": Loraid(number=1, unit="row", units_per_id=120), "network": NetworkSettings(rank=4, alpha=4.0),
        "optimizer": OptimizerSettings(learning_rate=1e-2), "save": SaveSettings(precision="float32"),
    }  # fmt: skip
    return Job(**{**values, **changes})


def work(this):
    """Train in this very process, which is quicker, and let go of the run."""
    code = worker.work(this.folder, "cpu")
    this.path("worker.json").unlink()
    return code
