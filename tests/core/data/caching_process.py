"""Makes the caches of a folder of clips, to be killed while it does.

Run as `caching_process.py FOLDER CACHE` it forks, for every line it reads, a process that makes them (importing torch
anew would take longer than the caching), writes its number, and when it has ended, how.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "devtools")]

import pack  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
caching, planning, config = (pack.load(f"core.data.{name}") for name in ("caching", "planning", "config"))
WAN = pack.load("core.families").FAMILIES["wan"]


class SlowVAE:
    """Enough work for a clip that a process can be killed in the middle of it."""

    def encode(self, video):
        for _ in range(3):
            video = torch.nn.functional.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1))
        grey = torch.nn.functional.avg_pool3d(video[:, :, ::4].mean(1, keepdim=True), (1, 8, 8))
        return grey * torch.linspace(0.5, 2, 16).view(1, 16, 1, 1, 1)


class Encoder:
    def __init__(self):
        self.tokenizer = self

    def encode(self, prompts):
        return [{"varlen_t5": torch.full((len(prompt), 64), 0.5)} for prompt in prompts]

    def too_long(self, prompt):
        return 0


def cache(folder: Path, target: Path) -> list[str]:
    """Cache latents and text of `folder` in `target`; the outcome of every file."""
    settings = config.DatasetConfig(kind="video", folder=folder, cache=target, resolution=(64, 48), target_frames=(5, 9),
                                    frame_extraction="chunk")  # fmt: skip
    found = planning.Dataset.find(settings)
    plan = planning.plan_latents(found, WAN, "the VAE")
    latents = caching.cache_latents([plan], WAN, SlowVAE, torch.device("cpu"))
    text = caching.cache_text(planning.plan_text(found, WAN, "the encoder"), WAN, Encoder)
    return [step.outcome for steps in (latents, text) for step in steps]


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            cache(Path(sys.argv[1]), Path(sys.argv[2]))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
