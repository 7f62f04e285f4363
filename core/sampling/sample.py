"""From noise to latents, and from latents to pictures. B batch, C channels, F frames, H W latents or pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..family import VAE, Family, TextStates
from ..flow import model_time, noised
from ..shapes import VideoSize
from .guidance import Velocity, guided
from .schedule import Schedule
from .solvers import SOLVERS


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise ComfyUI's own samplers draw for this seed: on the CPU, float32, the whole tensor at once."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    dit: nn.Module,
    family: Family,
    latents: Tensor,
    positive: TextStates,
    negative: TextStates | None,
    schedule: Schedule,
    guidance: float | Callable[[float], float],
    seed: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Sample from noise; yields latents (B, C, F, H, W) in model space after each step, float32.

    `latents` give the size, in model space; at the first sigma, which is 1, nothing of them is left. `dit` has its
    adapters attached, or is an ExpertPair; `guidance` is one for all steps, or a function of sigma.
    """
    x = noised(latents.cpu(), seeded_noise(tuple(latents.shape), seed), schedule.sigmas[:1]).to(device)
    plain = _velocity(dit, family, positive, x)
    away = _velocity(dit, family, negative, x) if negative is not None else None
    scale = guidance if callable(guidance) else lambda sigma: guidance

    @torch.no_grad()  # not inference mode: a training goes on with what is gathered or streamed here
    def velocity(x: Tensor, sigma: float, index: int) -> Tensor:
        return (guided(plain, away, scale(sigma)) if schedule.plan[index] == "A" else plain)(x, sigma)

    yield from SOLVERS[schedule.solver](velocity, x, schedule.sigmas)


def _velocity(dit: nn.Module, family: Family, states: TextStates, like: Tensor) -> Velocity:
    conditions = {name: value.to(like.device) for name, value in family.conditions([states] * len(like)).items()}

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return dit(x, model_time(torch.full((len(x),), sigma, device=x.device)), **conditions)

    return velocity


def decode(vae: VAE, family: Family, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """VAE-space latents (1, C, F, H, W) -> (index of the first frame, frames (f, H, W, 3) in 0..1 on the CPU), in order."""
    begin = 0
    for chunk in vae.decode(latents):
        frames = chunk[0].movedim(0, -1).add(1).mul(0.5).clamp(0, 1).cpu()
        yield begin, frames
        begin += len(frames)
    assert begin == family.latent.pixels(VideoSize(*latents.shape[2:])).frames
