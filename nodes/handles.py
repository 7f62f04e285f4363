"""What travels between our nodes where ComfyUI has no type for it: small descriptions; weights are read when needed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..core.data.caching import Dataset, LatentPlan, PlannedText
from ..core.devices import compute_dtype
from ..core.families import FAMILIES, open_part
from ..core.family import VAE, Family, Part, TextEncoder, Variant
from ..core.io.files import digest, fingerprint
from ..core.lora.inventory import Matrix, inventory
from ..core.lora.stack import StackEntry
from ..core.weights import load_into

DiT = io.Custom("VIDEOLORA_DIT")
Vae = io.Custom("VIDEOLORA_VAE")
TextEncoderType = io.Custom("VIDEOLORA_TEXT_ENCODER")
Datasets = io.Custom("VIDEOLORA_DATASETS")
LatentCacheType = io.Custom("VIDEOLORA_LATENT_CACHE")
TextCacheType = io.Custom("VIDEOLORA_TEXT_CACHE")
LoraidType = io.Custom("VIDEOLORA_LORAID")
Network = io.Custom("VIDEOLORA_NETWORK")
Optimizer = io.Custom("VIDEOLORA_OPTIMIZER")
Timesteps = io.Custom("VIDEOLORA_TIMESTEPS")
Memory = io.Custom("VIDEOLORA_MEMORY")
SaveType = io.Custom("VIDEOLORA_SAVE")
Stack = io.Custom("VIDEOLORA_LORAS")
ScheduleType = io.Custom("VIDEOLORA_SCHEDULE")


class Slot:
    """Holds a loaded model for as long as the node output it belongs to is kept; ComfyUI manages its memory."""

    def __init__(self) -> None:
        self.patcher: ModelPatcher | None = None
        self.encoder: TextEncoder | None = None

    def on_device(self, module: torch.nn.Module | None = None, activations: int = 0) -> torch.nn.Module:
        """The module on the compute device; `module` fills an empty slot."""
        if self.patcher is None:
            self.patcher = ModelPatcher(module, mm.get_torch_device(), mm.unet_offload_device())
        mm.load_models_gpu([self.patcher], memory_required=activations)
        return self.patcher.model


@dataclass(frozen=True)
class ModelFile:
    """A recognised model file that is not read yet."""

    path: Path
    part: Part
    slot: Slot = field(default_factory=Slot, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.part.family]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(mm.get_torch_device())

    @functools.cached_property
    def identity(self) -> str:
        """Stands for the file's content and the precision it is used in."""
        return digest([fingerprint(self.path), str(self.dtype)])


class VAEFile(ModelFile):
    def load(self) -> VAE:
        """The VAE on the compute device."""
        if self.slot.patcher is not None:
            return self.slot.on_device()
        checkpoint, part = open_part(self.path, "vae")
        with torch.device("meta"):
            vae = self.family.build_vae(part.config)
        return self.slot.on_device(load_into(vae, checkpoint, part.keymap, self.dtype))


class TextEncoderFile(ModelFile):
    def load(self) -> TextEncoder:
        """The text encoder on the compute device."""
        if self.slot.encoder is None:
            checkpoint, part = open_part(self.path, "text_encoder")
            self.slot.encoder = self.family.load_text(checkpoint, part, self.dtype)
        self.slot.on_device(self.slot.encoder.model)
        return self.slot.encoder


@dataclass(frozen=True)
class DiTFile(ModelFile):
    """A transformer, and the LoRAs that are applied when it is used."""

    variant: Variant = None
    prefix: str = ""
    matrices: tuple[Matrix, ...] = ()
    loras: tuple[StackEntry, ...] = ()
    allow_overlap: bool = False

    @classmethod
    def open(cls, path: Path, variant: str) -> DiTFile:
        """Check the file. `variant` is a release's name, or 'auto' for the most likely one."""
        checkpoint, part = open_part(path, "dit")
        if variant not in ("auto", *part.variants):
            raise ValueError(f"{path.name} is no {variant}: its tensors are those of {' or '.join(part.variants)}.")
        family = FAMILIES[part.family]
        chosen = family.variants[part.variants[0] if variant == "auto" else variant]
        if chosen.needs_image:
            raise ValueError(f"{chosen.title} is recognised, but only text-to-video models can be used so far.")
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        return cls(path, part, variant=chosen, prefix=checkpoint.prefix, matrices=tuple(inventory(family, shapes)))

    def with_loras(self, loras: tuple[StackEntry, ...], allow_overlap: bool) -> DiTFile:
        return replace(self, loras=self.loras + loras, allow_overlap=self.allow_overlap or allow_overlap)

    def load(self, activations: int) -> torch.nn.Module:
        """The transformer on the compute device, without its LoRAs. `activations` is how much memory it will need."""
        if self.slot.patcher is not None:
            return self.slot.on_device(activations=activations)
        checkpoint, part = open_part(self.path, "dit")
        with torch.device("meta"):
            dit = self.family.build_dit(part.config)
        return self.slot.on_device(load_into(dit, checkpoint, part.keymap, self.dtype), activations)


@dataclass(frozen=True)
class LatentCache:
    family: Family
    plans: tuple[LatentPlan, ...]


@dataclass(frozen=True)
class TextCache:
    family: Family
    plans: tuple[tuple[Dataset, tuple[PlannedText, ...]], ...]
