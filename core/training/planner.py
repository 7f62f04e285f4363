"""How much memory a training step will take, before anything is loaded, and which settings fit.

The activations are not guessed: the step's own code runs on the meta device, where tensors have sizes and no data, and what
lives at once is counted. So the forecast holds for any family, LORAID share, rank and setting, and follows the code when it
changes. Added to that is what is always there:

    weights     of the transformer as they are stored; of streamed blocks, two device buffers of the largest one's size; where
                processes divide them, one's share and the blocks that are gathered at once
    adapters    their parameters in float32
    optimizer   its states for each of them (gradients are among the activations, which count what backward leaves)

Two kinds of kernels keep something else on the meta device than on a real one, and are replaced by what the real ones keep:
attention keeps its inputs, its output and one number per query and head (FlashAttention, arXiv 2205.14135, and all
backends here); RMS norm on CUDA keeps its input and one number per row.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..devices import training_dtype
from ..family import Conditions, Family, moved
from ..lora.adapter import attached
from ..lora.inventory import Matrix, blocks_of
from ..lora.loraid import Rows
from ..lora.network import NetworkSettings, make_adapters
from ..modules.attention import use_attention
from ..modules.layers import RMSNorm
from ..modules.quantized import FP8, Stored, stored_weights
from ..modules.sharding import sharded_bytes
from ..modules.streaming import block_bytes, buffers_bytes, streamed_blocks
from . import loop
from .batches import Batch
from .job import MemorySettings

_META = torch.device("meta")
# Of what is free: the allocator's fragments, the libraries' workspaces, and what other programs take meanwhile.
_USABLE = 0.92


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is to be trained. `dtypes` are those of the checkpoint's tensors by the model's names; `latents` is the shape
    (B, C, F, H, W) of the largest batch, `conditions` its conditions (their values do not matter)."""

    family: Family
    config: Any
    matrices: Sequence[Matrix]
    dtypes: Mapping[str, torch.dtype]
    rows: Mapping[str, Rows]
    network: NetworkSettings
    latents: tuple[int, ...]
    conditions: Conditions
    device: torch.device
    optimizer_bytes: int  # per trained parameter
    processes: int = 1  # that train together
    networks: int = 1  # adapters on so many transformers, of which one is there at a time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings without anything left open (mode manual), and the bytes they take on the device and on the host."""

    settings: MemorySettings
    weights: int
    streaming: int
    adapters: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.streaming + self.adapters + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "streaming buffers": self.streaming, "adapters and optimizer": self.adapters,
                 "activations": self.activations}  # fmt: skip
        detail = ", ".join(f"{title} {_gib(value)}" for title, value in parts.items() if value)
        host = f"; on the host {_gib(self.host)}" if self.host else ""
        return f"{describe(self.settings)}: {_gib(self.device)} ({detail}){host}"


def describe(settings: MemorySettings) -> str:
    """The settings that matter for memory, in words."""
    words = [f"precision {settings.precision}"]
    words.append("gradient checkpointing" if settings.gradient_checkpointing else "no gradient checkpointing")
    if settings.offload_checkpoints:
        words.append("offloaded")
    if settings.shard:
        words.append("weights divided among the GPUs")
    if settings.block_swap:
        words.append(f"{settings.block_swap} blocks streamed")
    return ", ".join(words)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What activations and all that is no matrix of a block are computed in."""
    return getattr(torch, precision) if precision in ("bfloat16", "float32") else training_dtype(device)


def predict(subject: Subject, settings: MemorySettings) -> Plan:
    """What a training with these (manual) settings takes."""
    total, sizes = _weights(subject, settings.precision)
    streamed = [sizes[number] for number in streamed_blocks(settings.block_swap, len(sizes))]
    peak, offloaded, trained = step_activations(
        subject, settings.precision, settings.gradient_checkpointing, settings.offload_checkpoints
    )
    return Plan(
        settings=settings,
        weights=sharded_bytes(sizes, total, subject.processes) if settings.shard else total - sum(streamed),
        streaming=buffers_bytes(streamed),
        adapters=trained * (4 + subject.optimizer_bytes) * subject.networks,
        # The optimizer's own step makes about two floats per parameter beside the gradients, when activations are gone.
        activations=max(peak, 12 * trained),
        host=sum(streamed) + offloaded,
    )


def choose(subject: Subject, settings: MemorySettings, free: int, free_host: int) -> Plan:
    """The plan for these settings; in mode auto the fastest that fits into `free` bytes of the device.

    Raises ValueError, with what to change, when that does not fit.
    """
    for candidate in _candidates(subject, settings) if settings.mode == "auto" else [settings]:
        plan = predict(subject, candidate)
        if plan.device <= _USABLE * free and plan.host <= _USABLE * free_host:
            return plan
    raise ValueError(
        f"this training needs {_gib(plan.device)} on {subject.device} ({plan}), and {_gib(int(_USABLE * free))} of {_gib(free)} "
        f"free memory can be used, {_gib(int(_USABLE * free_host))} on the host. {_advice(subject, settings, plan)}"
    )


def report(subject: Subject, settings: MemorySettings, free: int, free_host: int) -> str:
    """A line per way of saving, from the fastest on, up to the one that is chosen; what to change when none fits."""
    try:
        chosen = choose(subject, settings, free, free_host)
    except ValueError as error:
        return str(error)
    ways = _candidates(subject, settings) if settings.mode == "auto" else iter([settings])
    tried = takewhile(lambda way: way != chosen.settings and not way.block_swap, ways)
    return "\n".join([*(f"too large: {predict(subject, way)}" for way in tried), f"fits: {chosen}"])


def _candidates(subject: Subject, settings: MemorySettings) -> Iterator[MemorySettings]:
    """From the fastest to the one that takes least. Only an accelerator gains from what is moved to the host."""
    plain = replace(settings, mode="manual", gradient_checkpointing=False, offload_checkpoints=False, block_swap=0,
                    shard=False)  # fmt: skip
    yield plain
    least = replace(plain, gradient_checkpointing=True)
    yield least
    moves = subject.device.type != "cpu"
    if moves:
        least = replace(least, offload_checkpoints=True)
        yield least
    if subject.processes > 1:
        least = replace(least, shard=True)
        yield least
    if settings.precision == "auto":
        least = replace(least, precision="fp8_scaled")
        yield least
    if moves:  # two of the streamed blocks are always on the device
        for count in range(3, len(blocks_of(subject.matrices)) + 1):
            yield replace(least, shard=False, block_swap=count)


def _advice(subject: Subject, settings: MemorySettings, plan: Plan) -> str:
    if settings.mode == "manual":
        return "Use memory mode auto, gradient checkpointing, precision fp8_scaled or block swap."
    if plan.activations > plan.weights:
        return "Use fewer frames, a smaller resolution or batch size 1."
    if settings.precision not in ("auto", "fp8", "fp8_scaled"):
        return "Use precision fp8_scaled."
    return "Use a smaller model, or free memory that other programs hold."


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
@torch.enable_grad()
def step_activations(subject: Subject, precision: str, recompute: bool, offload: bool) -> tuple[int, int, int]:
    """Most bytes of activations and gradients that live at once in a step on the device, bytes offloaded meanwhile, and
    how many parameters are trained."""
    dit = _with_kernels_of(_on_meta(subject, precision), subject.device)
    dit.run_block.recompute = recompute
    # Without the file to start from; and without dropout, whose masks are as small as the rank activations.
    fresh = replace(
        subject.network, start_from="", start_fingerprint="", dropout=0.0, rank_dropout=0.0, module_dropout=0.0
    )
    parking = dit.run_block.offload = _Parking() if offload else None
    with _META:
        adapters = make_adapters(dit, subject.rows, fresh, subject.matrices, "", seed=0)
        latents = torch.empty(subject.latents)
        batch = Batch(latents, latents, torch.empty(len(latents)), moved(subject.conditions, _META))
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    with attached(dit, adapters), LiveBytes([*dit.parameters(), *dit.buffers(), *parameters, latents]) as live:
        loop.flow_loss(dit, batch, _META).backward()
    return live.peak, parking.most if parking else 0, sum(parameter.numel() for parameter in parameters)


@functools.lru_cache(maxsize=8)
def _weights(subject: Subject, precision: str) -> tuple[int, tuple[int, ...]]:
    """Bytes of the stored transformer, and of what can be streamed of each block."""
    dit = _on_meta(subject, precision)
    sizes = tuple(block_bytes(dit.get_submodule(path)) for path in blocks_of(subject.matrices))
    return sum(value.nbytes for value in (*dit.parameters(), *dit.buffers())), sizes


def _on_meta(subject: Subject, precision: str) -> nn.Module:
    """The transformer without data, its parameters as they will be stored."""
    with _META:
        dit = subject.family.build_dit(subject.config)
        dit.to(compute_dtype(precision, subject.device)).requires_grad_(False)
        for name, storing in stored_weights(
            precision, (f"{matrix.name}.weight" for matrix in subject.matrices), subject.dtypes
        ).items():
            layer = dit.get_submodule(name.removesuffix(".weight"))
            in_file = subject.dtypes[name] if subject.dtypes[name] in FP8 else layer.weight.dtype
            weight, layer.weight_scale = storing(Stored(torch.empty_like(layer.weight, dtype=in_file)))
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return dit


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and live at once; not those of `others`, nor of their views."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, Any] = {id(storage): storage for storage in (x.untyped_storage() for x in others)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def gone(_: weakref.ref) -> None:
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Parking:
    """Stands for `Offload`: what is put leaves the device, and the one put before is brought back ahead of its use."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.last: _Ticket | None = None

    def put(self, tensor: Tensor) -> _Ticket:
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        self.last = _Ticket(tensor, self.last)
        return self.last


class _Ticket:
    def __init__(self, tensor: Tensor, before: _Ticket | None) -> None:
        self.shape, self.dtype, self.before = tensor.shape, tensor.dtype, before
        self.arrived: Tensor | None = None

    def fetch(self) -> Tensor:
        if self.arrived is None:
            self.arrived = torch.empty(self.shape, dtype=self.dtype, device=_META)
        return self.arrived

    def get(self) -> Tensor:
        tensor, self.arrived = self.fetch(), None
        if self.before is not None:
            self.before.fetch()
        return tensor


def _with_kernels_of(dit: nn.Module, device: torch.device) -> nn.Module:
    """The model, with what keeps the same as the kernels of `device` do in the place of those that do not; see above."""
    use_attention(dit, _Attention.apply)
    if device.type == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm"):
        for module in dit.modules():
            if isinstance(module, RMSNorm):
                module.forward = _RMSNorm.apply
    return dit


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)
