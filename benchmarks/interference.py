"""How much LORAIDs and plain LoRAs of the same size disturb each other, on a small model; writes docs/interference.md.

python dev.py bench interference [--steps 60] [--seeds 3] [--output docs/interference.md]

The model learns moving patterns of many kinds first; each LoRA then learns one kind of its own, and is measured on clips
of that kind that it has not seen. Each seed draws other kinds. For real models: python core interference RUN_FOLDER RUN_FOLDER ...
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devtools"))
import pack
import small_models

cache_files, shapes, flow = (pack.load(f"core.{name}") for name in ("data.cache_files", "shapes", "flow"))
job, worker, run = (pack.load(f"core.training.{name}") for name in ("job", "worker", "run"))
loraid, network, safetensors = (
    pack.load("core.lora.loraid"),
    pack.load("core.lora.network"),
    pack.load("core.io.safetensors"),
)
interference, io_files = pack.load("core.interference"), pack.load("core.io.files")
FAMILY = pack.load("core.families").FAMILIES["wan"]
VARIANT = "2.1-t2v-1.3B"

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".dev" / "interference"
SIZE, CLIPS, KINDS, TEXT_DIM = shapes.VideoSize(9, 64, 64), 10, 3, 64
# Of about as many values each: 12 slots hold 3 of the 60 matrices, 12 bands a twentieth of the rows of all.
GROUPS = {
    "LORAIDs by slot": (("slot", (2, 9, 16)), 20),
    "LORAIDs by row": (("row", (2, 9, 16)), 1),
    "plain LoRAs": (None, 1),
}


def pattern(kind: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A wave that moves through all channels; `kind` (3,) is its direction and pace, its phase is drawn."""
    frames, height, width = FAMILY.latent.latents(SIZE)
    t, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (frames, height, width)), indexing="ij")
    phase = torch.rand(16, 1, 1, 1, generator=rng) * 0.8 + torch.linspace(0, 2 * math.pi, 16)[:, None, None, None]
    return 1.5 * torch.sin(kind[0] * x + kind[1] * y + kind[2] * t + phase)


def pretrained(path: Path, steps: int) -> None:
    """A model that has seen waves of all kinds, of a prompt that says nothing."""
    dit = small_models.dit(dim=128, ffn=256, depth=6, text_dim=TEXT_DIM)
    rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=2e-3)
    for step in range(steps):
        data = torch.stack([pattern(torch.randn(3, generator=rng), rng) for _ in range(4)])
        noise, sigma = torch.randn(data.shape, generator=rng), torch.rand(4, generator=rng)
        text = torch.zeros(4, 4, TEXT_DIM)
        made = dit(flow.noised(data, noise, sigma), flow.model_time(sigma), text_states=text)
        loss = (made - flow.velocity(data, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"pretraining, step {step}: loss {loss:.3f}", flush=True)
    safetensors.save(path, dit.state_dict(), {})


def clips(folder: Path, kind: int, seed: int) -> tuple:
    """Cached clips of one kind of wave, each with its own text states."""
    rng = torch.Generator().manual_seed(100 * seed + kind)
    direction, word = 2 * torch.randn(3, generator=rng), torch.randn(4, TEXT_DIM, generator=rng)
    items = []
    for index in range(CLIPS):
        name = f"{seed}-{kind}-{index}"
        latents, text = folder / f"{name}_latents.safetensors", folder / f"{name}_te.safetensors"
        cache_files.save_latents(latents, pattern(direction, rng), SIZE, FAMILY, name)
        states = word + 0.1 * torch.randn(word.shape, generator=rng)
        cache_files.save_text(text, {FAMILY.text_states[0]: states}, "a wave", FAMILY, name)
        items.append(
            job.TrainingItem(
                latents=str(latents), text=str(text), size=tuple(FAMILY.latent.latents(SIZE)), fingerprints=(name, name)
            )
        )
    return tuple(items)


def train(title: str, kind: int, seed: int, dit: Path, items: tuple, steps: int) -> Path:
    """Train one LoRA of a group; its run folder."""
    division, rank = GROUPS[title]
    number = division and loraid.Loraid(number=division[1][kind], unit=division[0])
    described = job.Job(
        name=f"{title.replace(' ', '_')}_{seed}/kind_{kind + 1}", output_folder=str(FOLDER / "loras"), family=FAMILY.name, variant=VARIANT,
        dit=str(dit), dit_fingerprint=io_files.fingerprint(dit), steps=steps, seed=100 * seed + kind,
        datasets=(job.TrainingSet(title="waves", batch_size=2, num_repeats=1, items=items),), loraid=number,
        network=network.NetworkSettings(rank=rank, alpha=float(rank)), optimizer=job.OptimizerSettings(learning_rate=5e-3),
        save=job.SaveSettings(precision="float32"), watch=job.WatchSettings(validation_share=0.3, validation_every_steps=10**6),
    )  # fmt: skip
    this = run.Run.of(described, FOLDER / "runs")
    if worker.work(this.folder, "cpu"):
        raise SystemExit(this.status()["error"])
    this.path("worker.json").unlink()
    return this.folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "interference.md")
    args = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    dit = FOLDER / "dit.safetensors"
    pretrained(dit, 2 * args.steps)
    groups = []
    for seed in range(1, args.seeds + 1):
        of_kind = [clips(FOLDER, kind, seed) for kind in range(KINDS)]
        for title in GROUPS:
            groups.append((title, [train(title, kind, seed, dit, of_kind[kind], args.steps) for kind in range(KINDS)]))
    notes = f"""The model here is a small transformer (6 blocks, width 128) that has seen waves of all kinds; each of {KINDS} LoRAs learnt
one kind from {round(0.7 * CLIPS)} clips in {args.steps} steps at one learning rate, and is measured on {round(0.3 * CLIPS)} others. A line is the mean over {args.seeds} seeds, which draw other
kinds, clips and starts, and from where to where they lie; the tables of single LoRAs are of the first seed. All files hold about as
many values. A LORAID reaches less of the model and takes less of the loss away alone, and what changes less also disturbs less: read
retention together with the loss that is taken away."""
    command = f"python dev.py bench interference --steps {args.steps} --seeds {args.seeds}"
    print(interference.report(groups, args.output, torch.device("cpu"), command, notes))


if __name__ == "__main__":
    main()
