"""From noise to latents, and from latents to pictures. B batch, C channels, F frames, H W latents or pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..family import VAE, Family, States, moved
from ..flow import noised
from ..shapes import VideoSize
from .guidance import Velocity, guided
from .schedule import Schedule
from .solvers import SOLVERS, Reached


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise ComfyUI's own samplers draw for this seed: on the CPU, float32, the whole tensor at once."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    dit: nn.Module,
    family: Family,
    latents: Tensor,
    positive: States,
    negative: States | None,
    schedule: Schedule,
    guidance: float | Callable[[float], float],
    seed: int,
    device: torch.device,
    strength: float = 1.0,
    batched: bool = False,
) -> Iterator[Reached]:
    """Sample from noise; yields latents (B, C, F, H, W) in model space after each step, float32.

    Of `latents`, in model space, a `strength` of 1 takes nothing but the size. Below 1 they are noised as far as the last
    part of the steps needs that is as large as the strength, and only these are made; none of them is left at 0. `dit` has
    its adapters attached, or is an ExpertPair; `guidance` is one for all steps, or a function of sigma. `batched` makes its two
    passes in one: somewhat faster where the device has units and memory to spare.
    """
    first = schedule.steps - int(schedule.steps * strength)
    sigmas, times = schedule.sigmas[first:], schedule.times.tolist()
    noise = seeded_noise(tuple(latents.shape), seed)
    x = (noise if first == 0 else noised(latents.cpu(), noise, sigmas[:1])).to(device)
    ends = dict(zip(times, [*times[1:], 0.0], strict=True)) if getattr(dit, "takes_end", False) else None
    plain = _velocity(dit, family, positive, x, ends)
    away = _velocity(dit, family, negative, x, ends) if negative is not None else None
    both = _both_velocities(dit, family, positive, negative, x, ends) if batched and negative is not None else None
    scale = guidance if callable(guidance) else lambda sigma: guidance

    @torch.no_grad()  # not inference mode: a training goes on with what is gathered or streamed here
    def velocity(x: Tensor, sigma: float, index: int) -> Tensor:
        step = first + index
        skip = schedule.skip_layers
        skip = skip if skip and skip.works_in(step, schedule.steps) else None
        with_guidance = guided(plain, away, scale(times[step] / 1000), skip, both)
        return (with_guidance if schedule.plan[step] == "A" else plain)(x, times[step])

    yield from SOLVERS[schedule.solver].steps(velocity, x, sigmas)


Ends = Mapping[float, float] | None
"""The time of each step -> that which the step leads to, for a transformer that is told it."""


def _times(x: Tensor, time: float, ends: Ends) -> dict[str, Tensor]:
    """The transformer's arguments of the time, (B,) each."""
    times = {"time": time} if ends is None else {"time": time, "end": ends[time]}
    return {name: torch.full((len(x),), value, device=x.device) for name, value in times.items()}


def _velocity(dit: nn.Module, family: Family, states: States, like: Tensor, ends: Ends) -> Velocity:
    conditions = moved(family.conditions([states] * len(like)), like.device)

    def velocity(x: Tensor, time: float, left_out: Collection[int] = ()) -> Tensor:
        return dit(x, **_times(x, time, ends), skip_layers=left_out, **conditions)

    return velocity


def _both_velocities(
    dit: nn.Module, family: Family, positive: States, negative: States, like: Tensor, ends: Ends
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Those with each of two prompts, made as one batch."""
    conditions = moved(family.conditions([positive] * len(like) + [negative] * len(like)), like.device)

    def velocities(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        x = torch.cat((x, x))
        return dit(x, **_times(x, time, ends), **conditions).chunk(2)

    return velocities


def decode(vae: VAE, family: Family, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
    """VAE-space latents (1, C, F, H, W) -> (index of the first frame, frames (f, H, W, 3) in 0..1 on the CPU), in order."""
    begin = 0
    for chunk in vae.decode(latents):
        frames = chunk[0].movedim(0, -1).add(1).mul(0.5).clamp(0, 1).cpu()
        yield begin, frames
        begin += len(frames)
    assert begin == family.latent.pixels(VideoSize(*latents.shape[2:])).frames
