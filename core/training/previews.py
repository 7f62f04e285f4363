"""Previews: what the LoRA makes of a few prompts so far, sampled with the code that the sampling nodes use.

A preview that fails is noted and left out; it never ends a training. Processes that divide the weights among them sample
together, and none can leave out what the others compute: there, only what the first one does alone may fail.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import cache_files
from ..devices import compute_dtype, free_memory, release_memory
from ..families import open_part
from ..family import VAE, Family
from ..io import latents as latent_files
from ..io.video import write_picture, write_video
from ..modules.tiling import tiled
from ..sampling.experts import ExpertPair
from ..sampling.sample import decode, sample
from ..sampling.schedule import Schedule
from ..shapes import VideoSize
from ..weights import load_into
from .experts import Experts
from .job import Job
from .prompts import Preview
from .run import PREVIEW_SUFFIXES, STOP, Run
from .team import ALONE, Team

log = logging.getLogger("videolora.training")
_VIDEO, _PICTURE = PREVIEW_SUFFIXES


class _Stopped(Exception):
    """The run was asked to stop meanwhile; the preview is made when it goes on."""


class Previews:
    """Makes the previews of a run in its folder."""

    def __init__(self, run: Run, job: Job, family: Family, device: torch.device, team: Team = ALONE) -> None:
        """`team` are the processes that sample together, each of which makes the same calls."""
        self.run, self.settings, self.family, self.device, self.team = run, job.previews, family, device, team
        self.variant = family.variants[job.variant]

    def make(self, step: int, experts: Experts) -> None:
        """The previews after `step` that are not there yet. All are sampled before the VAE is loaded, and it goes again."""
        try:
            self._sample_all(step, experts)
            if self.settings.vae and self.team.leads:
                self._decode_all(step)
        except _Stopped:
            log.info("the previews of step %d wait until the run goes on", step)
        finally:
            release_memory(self.device)

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in the block, out of memory too, is no reason to end the training."""
        try:
            yield
        except _Stopped:
            raise
        except Exception as error:
            log.warning("%s", traceback.format_exc())
            self.run.note(f"{what} failed: {type(error).__name__}: {error}")

    def _latents(self, step: int, number: int) -> Path:
        return self.run.preview_path(step, number, latent_files.SUFFIX)

    def _shown(self, step: int, number: int, preview: Preview) -> Path:
        return self.run.preview_path(step, number, _PICTURE if preview.frames == 1 else _VIDEO)

    def _sample_all(self, step: int, experts: Experts) -> None:
        for number, preview in enumerate(self.settings.prompts):
            path = self._latents(step, number)
            if self.team.agree(not path.exists(), self.device):
                with self._attempt(f"preview {number} of step {step}") if self.team.size == 1 else nullcontext():
                    self._sample(path, preview, experts.sampler(preview.guidance))

    def _sample(self, path: Path, preview: Preview, dit: nn.Module | ExpertPair) -> None:
        size = self.family.latent.latents(VideoSize(preview.frames, preview.height, preview.width))
        empty = torch.zeros(1, self.family.latent.channels, *size)
        told = cache_files.load_text(Path(preview.images)) if preview.images else {}
        told |= self.variant.guidance_states(preview.embedded_guidance)
        positive = {**cache_files.load_text(Path(preview.states)), **told}
        negative = {**cache_files.load_text(Path(preview.negative_states)), **told} if preview.negative_states else None
        schedule = Schedule(steps=preview.steps, shift=preview.shift, solver=preview.solver)
        steps = sample(
            dit, self.family, empty, positive, negative, schedule, preview.guidance, preview.seed, self.device
        )
        with closing(steps):
            for reached in steps:
                if self.team.agree(self.run.is_asked(STOP), self.device):
                    raise _Stopped
                sampled = reached.latents
        if not self.team.leads:
            return
        latents = self.family.latent.from_model(sampled.cpu())
        if not torch.isfinite(latents).all():
            raise ValueError("the latents are not finite.")
        latent_files.save(path, latents, {"prompt": preview.prompt, "seed": str(preview.seed)})

    def _decode_all(self, step: int) -> None:
        waiting = [
            (number, preview)
            for number, preview in enumerate(self.settings.prompts)
            if self._latents(step, number).exists() and not self._shown(step, number, preview).exists()
        ]
        if not waiting:
            return
        with self._attempt(f"decoding the previews of step {step}"):
            vae, device = self._load_vae([preview for _, preview in waiting])
            for number, preview in waiting:
                with self._attempt(f"decoding preview {number} of step {step}"):
                    latents, _ = latent_files.load(self._latents(step, number))
                    self._write(self._shown(step, number, preview), self._frames(vae, latents.to(device)))

    def _load_vae(self, previews: Sequence[Preview]) -> tuple[VAE, torch.device]:
        """On the device when it fits beside the training, else on the CPU."""
        path, family = Path(self.settings.vae), self.family
        tiles = self.settings.tiles.or_else(family.vae_tiles)
        checkpoint, part = open_part(path, "vae")
        if part.family != family.name:
            raise ValueError(f"{path.name} is the VAE of another model ({part.title}).")
        release_memory(self.device)
        values = max(family.vae_values(VideoSize(one.frames, one.height, one.width), tiles) for one in previews)
        dtype = compute_dtype(self.device)
        needed = path.stat().st_size + values * dtype.itemsize
        device = self.device if needed < free_memory(self.device) else torch.device("cpu")
        with torch.device("meta"):
            vae = family.build_vae(part.config)
        vae = load_into(vae, checkpoint, part.keymap, compute_dtype(device), device)
        return tiled(vae, tiles, family.latent), device

    def _write(self, path: Path, frames: Iterator[np.ndarray]) -> None:
        if path.suffix == _PICTURE:
            write_picture(path, next(frames))
        else:
            write_video(path, frames, self.family.fps)
        log.info("preview: %s", path)

    def _frames(self, vae: VAE, latents: Tensor) -> Iterator[np.ndarray]:
        for _, frames in decode(vae, self.family, latents):
            if self.run.is_asked(STOP):
                raise _Stopped
            yield from frames.mul(255).round().byte().numpy()
