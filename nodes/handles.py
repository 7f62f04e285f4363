"""What travels between our nodes where ComfyUI has no type for it: small descriptions; weights are read when needed."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import comfy.model_management as mm
import torch
from comfy import sd1_clip
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import llama
from comfy_api.latest import io

from ..core.data.planning import Dataset, ImagePlan, LatentPlan, PlannedText
from ..core.devices import compute_dtype, free_memory
from ..core.families import FAMILIES, check_size, open_part, variant_of
from ..core.family import KIND_TITLES, VAE, Family, Kind, Part, TextEncoder, Tokenizer, Variant, VisionEncoder
from ..core.io.files import digest, fingerprint
from ..core.io.safetensors import read_header
from ..core.lora.adapter import attached
from ..core.lora.inventory import Matrix, blocks_of, inventory
from ..core.lora.stack import LoadedLoRA, StackEntry, adapters, load_stack
from ..core.modules.attention import load_backend, use_attention
from ..core.modules.compiling import compile_blocks
from ..core.modules.layers import use_fast_products
from ..core.modules.quantized import STORINGS, check_fast, stored_weights
from ..core.modules.streaming import BlockStream, move_resident, streamed_blocks
from ..core.modules.tiling import tiled
from ..core.sampling.experts import ExpertPair
from ..core.shapes import Tiles, VideoSize
from ..core.text import JointTextEncoder, JointTokenizer, check_complete
from ..core.weights import load_into, shards

DiT = io.Custom("VIDEOLORA_DIT")
Vae = io.Custom("VIDEOLORA_VAE")
VisionEncoderType = io.Custom("VIDEOLORA_VISION_ENCODER")
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
Watch = io.Custom("VIDEOLORA_WATCH")
Previews = io.Custom("VIDEOLORA_PREVIEWS")
Stack = io.Custom("VIDEOLORA_LORAS")
ScheduleType = io.Custom("VIDEOLORA_SCHEDULE")

SAMPLED_WITH = "videolora_sampled_with"  # in a LATENT: texts that say what it was sampled from
PROMPT = "videolora_prompt"  # in the options of a CONDITIONING

PRECISIONS = ("auto", "bfloat16", "float16", "float32")
FP8_PRECISIONS = ("fp8", "fp8_scaled")  # of weights alone; they are restored to compute with
FAST_FP8 = "fp8_fast"  # as fp8_scaled, and products are made in fp8 too
_BYTES_PER_ACTIVATION = 24  # of a token's width: residual, query, key, value, attention output and their copies


class Slot:
    """Holds a loaded model for as long as the node output it belongs to is kept; ComfyUI manages its memory."""

    _all: WeakSet[Slot] = WeakSet()

    def __init__(self) -> None:
        self.patcher: ModelPatcher | None = None
        self.encoder: TextEncoder | VisionEncoder | None = None
        self.streamed: torch.nn.Module | None = None
        self._all.add(self)

    def on_device(
        self, make: Callable[[], torch.nn.Module], memory: int, device: torch.device | None = None
    ) -> torch.nn.Module:
        """The module on the compute device (or `device`), made if it is not there. `memory` is what it will need to work,
        in bytes."""
        if self.patcher is None:
            self.patcher = ModelPatcher(make(), device or mm.get_torch_device(), mm.unet_offload_device())
        # Our modules cannot work with a part of their weights elsewhere, as ComfyUI's own can.
        mm.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        module, device = self.patcher.model, self.patcher.load_device
        if any(parameter.device.type != device.type for parameter in module.parameters()):
            needed = sum(parameter.nbytes for parameter in module.parameters())
            raise ValueError(f"the model needs {needed / 2**30:.1f} GiB and {mm.get_free_memory(device) / 2**30:.1f} GiB are free on "
                             f"{device}: use a smaller model, or start ComfyUI without --novram.")  # fmt: skip
        return module

    def stream(
        self, make: Callable[[], torch.nn.Module], blocks: Sequence[str], count: int, memory: int
    ) -> torch.nn.Module:
        """The module, made if it is not there, on the compute device but for `count` of its `blocks`, which stay in main
        memory and visit it (see `streaming.py`), until `rest`."""
        device = mm.get_torch_device()
        if self.streamed is None:
            module = make()
            paths = [module.get_submodule(path) for path in blocks]
            module.run_block.stream = BlockStream(paths, streamed_blocks(count, len(blocks)), device)
            self.streamed = module
        stream = self.streamed.run_block.stream
        resident = sum(value.nbytes for value in self.streamed.parameters() if not stream.streams(value))
        mm.free_memory(resident + stream.buffers_bytes + memory, device)
        move_resident(self.streamed, stream, device)
        return self.streamed

    def rest(self) -> None:
        """Take what is streamed from the device; ComfyUI does so with other models by itself."""
        if self.streamed is not None:
            stream = self.streamed.run_block.stream
            stream.rest()
            move_resident(self.streamed, stream, "cpu")

    @property
    def is_loaded(self) -> bool:
        return self.patcher is not None or self.streamed is not None

    def release(self) -> None:
        """Give back the memory of this model; it is read again when it is needed again."""
        self.patcher = self.encoder = self.streamed = None
        gc.collect()
        mm.cleanup_models()
        mm.soft_empty_cache()

    @classmethod
    def release_all(cls) -> None:
        """Give back all memory of loaded models; they are read again when they are needed again."""
        for slot in cls._all:
            slot.patcher = slot.encoder = slot.streamed = None
        mm.unload_all_models()
        gc.collect()
        mm.soft_empty_cache()


@dataclass(frozen=True)
class ModelFile:
    """A recognised model file that is not read yet, and the precision it is to be used in."""

    path: Path
    part: Part
    precision: str = "auto"
    slot: Slot = field(default_factory=Slot, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.part.family]

    @property
    def dtype(self) -> torch.dtype:
        if self.precision in ("auto", FAST_FP8, *FP8_PRECISIONS):
            return compute_dtype(mm.get_torch_device())
        return getattr(torch, self.precision)

    @functools.cached_property
    def identity(self) -> str:
        """Stands for the file's content and the precision it is used in."""
        stored = [self.precision] if self.precision in FP8_PRECISIONS else []
        return digest([[fingerprint(path) for path in shards(self.path)], str(self.dtype), *stored])

    def _module(self, kind: Kind, build: Callable[[Any], torch.nn.Module]) -> torch.nn.Module:
        """The weights, read into a module on the CPU."""
        checkpoint, part = open_part(self.path, kind)
        with torch.device("meta"):
            module = build(part.config)
        return load_into(module, checkpoint, part.keymap, self.dtype)


@dataclass(frozen=True)
class VAEFile(ModelFile):
    """A VAE, and how it trades time for memory: tiles of so many frames and pixels (0: what suits the family),
    `cache_on_cpu` as in VAE."""

    tile_frames: int = 0
    tile_size: int = 0
    cache_on_cpu: bool = False

    @functools.cached_property
    def identity(self) -> str:
        """As of any model; tiles change the latents a little."""
        used = [*filter(None, reversed(self.tiles))]
        return digest([super().identity, *used]) if used else super().identity

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tile_frames, self.tile_size).or_else(self.family.vae_tiles)

    def load(self, pixels: VideoSize, batch_size: int = 1) -> VAE:
        """The VAE on the compute device, for so many videos of this size at a time."""
        memory = batch_size * self.family.vae_values(pixels, self.tiles) * self.dtype.itemsize
        vae = self.slot.on_device(lambda: self._module("vae", self.family.build_vae), memory)
        vae.cache_on_cpu = self.cache_on_cpu
        return tiled(vae, self.tiles, self.family.latent)


@dataclass(frozen=True)
class TextEncoderFile(ModelFile):
    """A text encoder, and those that its family's models take beside it."""

    beside: tuple[TextEncoderFile, ...] = ()

    @functools.cached_property
    def identity(self) -> str:
        """As of any model; of several, for all of them."""
        return digest([super().identity, *(one.identity for one in self.beside)]) if self.beside else super().identity

    def with_beside(self, other: TextEncoderFile) -> TextEncoderFile:
        """This and the other one together. ValueError when they do not belong together."""
        together = replace(self, beside=(*self.beside, other))
        check_complete([one.part for one in together.all], self.family)
        return together

    @property
    def all(self) -> tuple[TextEncoderFile, ...]:
        return (self, *self.beside)

    def tokenizer(self) -> Tokenizer:
        """What cuts prompts, without the encoders' weights."""
        return JointTokenizer([
            one.family.load_tokenizer(*open_part(one.path, "text_encoder"), tokenizer_folders()) for one in self.all
        ])  # fmt: skip

    def load(self) -> TextEncoder | JointTextEncoder:
        """The text encoder, or those that work together. ValueError when one is missing."""
        check_complete([one.part for one in self.all], self.family)
        return JointTextEncoder([one.load_alone for one in self.all]) if self.beside else self.load_alone()

    def load_alone(self) -> TextEncoder:
        """This one on the compute device, or on the CPU when it is larger than the device's memory."""
        if self.slot.encoder is None:
            storing = STORINGS[self.precision] if self.precision in FP8_PRECISIONS else None
            self.slot.encoder = self.family.load_text(
                *open_part(self.path, "text_encoder"), self.dtype, storing, tokenizer_folders()
            )
        model, device = self.slot.encoder.model, mm.get_torch_device()
        fits = sum(parameter.nbytes for parameter in model.parameters()) < 0.9 * mm.get_total_memory(device)
        self.slot.on_device(lambda: model, memory=0, device=device if fits else torch.device("cpu"))
        return self.slot.encoder


def tokenizer_folders() -> tuple[Path, ...]:
    """Where ComfyUI keeps tokenizers that its text encoder files do not bring."""
    beside = Path(llama.__file__).parent
    return Path(sd1_clip.__file__).parent / "sd1_tokenizer", beside / "llama_tokenizer", beside / "qwen25_tokenizer"


class VisionEncoderFile(ModelFile):
    def load(self) -> VisionEncoder:
        """The image encoder on the compute device."""
        if self.slot.encoder is None:
            self.slot.encoder = self.family.load_vision(*open_part(self.path, "vision_encoder"), self.dtype)
        self.slot.on_device(lambda: self.slot.encoder.model, memory=0)
        return self.slot.encoder


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a transformer is run: `block_swap` of its blocks are streamed from main memory; `batch_guidance` makes guidance's two
    passes in one."""

    block_swap: int = 0
    attention: str = "sdpa"
    compile: bool = False
    batch_guidance: bool = False


@dataclass(frozen=True)
class DiTFile(ModelFile):
    """A transformer, and the LoRAs that are applied when it is used. One that is the high-noise expert of a pair has the
    other as `low`, and is used from sigma `boundary` on."""

    running: Running = Running()
    variant: Variant = None
    prefix: str = ""
    matrices: tuple[Matrix, ...] = ()
    loras: tuple[StackEntry, ...] = ()
    allow_overlap: bool = False
    low: DiTFile | None = None
    boundary: float = 0.0

    @classmethod
    def open(cls, path: Path, variant: str) -> DiTFile:
        """Check the file. `variant` is as `variant_of` takes it."""
        checkpoint, part = open_part(path, "dit")
        chosen = variant_of(path, part, variant)
        if chosen.unusable:
            raise ValueError(f"{chosen.title} is recognised, but cannot be used: {chosen.unusable}.")
        matrices = tuple(inventory(FAMILIES[part.family], checkpoint.shapes(part.keymap)))
        return cls(path, part, variant=chosen, prefix=checkpoint.prefix, matrices=matrices)

    @property
    def is_set_up(self) -> bool:
        """Whether it was said how it is to be run."""
        return (self.precision, self.running) != ("auto", Running())

    @property
    def experts(self) -> tuple[DiTFile, ...]:
        """The model itself, or both experts of a pair, each without the other."""
        return (self,) if self.low is None else (replace(self, low=None), self.low)

    def with_low(self, low: DiTFile, boundary: float) -> DiTFile:
        """This and the expert for low noise as one. Raises ValueError when they are no pair."""
        if (
            (self.variant.expert, low.variant.expert) != ("high", "low")
            or self.matrices != low.matrices
            or self.part.config != low.part.config
        ):
            raise ValueError(f"{self.path.name} and {low.path.name} are no pair of experts for high and low noise: they are "
                             f"{self.part.title} and {low.part.title}.")  # fmt: skip
        return replace(self, low=low, boundary=boundary or self.variant.boundary)

    def run_as(self, precision: str, running: Running) -> DiTFile:
        """The same, to be sampled with another precision and otherwise; both experts of a pair. ValueError when it cannot
        work here."""
        device = mm.get_torch_device()
        if precision == FAST_FP8:
            check_fast(device)
        changed = replace(
            self,
            precision=precision,
            running=running,
            slot=Slot(),
            low=self.low and self.low.run_as(precision, running),
        )
        load_backend(running.attention, device, changed.dtype, training=False)
        streamed_blocks(running.block_swap, len(blocks_of(self.matrices)))
        return changed

    def with_loras(self, loras: tuple[StackEntry, ...], allow_overlap: bool) -> DiTFile:
        """With these LoRAs too; of a pair, each expert with those that were not made for the other."""
        if self.low is not None:
            high, low = (
                expert.with_loras(
                    tuple(one for one in loras if _made_for(one, expert.family) in ("", expert.variant.expert)),
                    allow_overlap,
                )
                for expert in self.experts
            )
            return replace(high, low=low)
        return replace(self, loras=self.loras + loras, allow_overlap=self.allow_overlap or allow_overlap)

    @contextmanager
    def at_work(self, latents: torch.Tensor, guidance: Mapping[str, float]) -> Iterator[torch.nn.Module | ExpertPair]:
        """The transformer with its LoRAs, for latents of this shape. Of a pair an expert is loaded when it is first needed,
        and the other is let go of where the host's memory cannot hold both."""
        files = {expert.variant.expert: (expert, expert.load_stack()) for expert in self.experts}
        with ExitStack() as stack:
            using: dict[str, torch.nn.Module] = {}

            def use(name: str) -> torch.nn.Module:
                if name not in using:
                    stack.close()
                    using.clear()
                    file, loras = files[name]
                    for other, _ in files.values():
                        if other is not file and other.slot.is_loaded and not file.fits_beside():
                            other.slot.release()
                    model = file.load(latents)
                    stack.callback(file.slot.rest)
                    stack.enter_context(attached(model, adapters(loras, mm.get_torch_device(), file.dtype)))
                    using[name] = model
                return using[name]

            yield use(self.variant.expert) if self.low is None else ExpertPair(self.boundary, use, guidance)

    def fits_beside(self) -> bool:
        """Whether the host's memory has room for its weights beside what is there, or they are there already."""
        size = sum(path.stat().st_size for path in shards(self.path))
        return self.slot.is_loaded or size < free_memory(torch.device("cpu"))

    def load(self, latents: torch.Tensor) -> torch.nn.Module:
        """The transformer on the compute device, without its LoRAs, for latents of this shape."""
        passes = 2 if self.running.batch_guidance else 1
        tokens = self.family.latent.tokens(VideoSize(*latents.shape[2:])) * len(latents) * passes
        memory = tokens * self.part.width * _BYTES_PER_ACTIVATION
        if self.running.block_swap:
            return self.slot.stream(self._transformer, blocks_of(self.matrices), self.running.block_swap, memory)
        return self.slot.on_device(self._transformer, memory)

    def _transformer(self) -> torch.nn.Module:
        """The weights, read into a transformer on the CPU that runs as it is set to."""
        checkpoint, part = open_part(self.path, "dit")
        with torch.device("meta"):
            dit = self.family.build_dit(part.config)
        names = [f"{matrix.name}.weight" for matrix in self.matrices]
        fast = self.precision == FAST_FP8
        stored = {}
        if self.precision in ("auto", FAST_FP8, *FP8_PRECISIONS):
            stored = stored_weights("fp8_scaled" if fast else self.precision, names, checkpoint.dtypes(part.keymap))
        load_into(dit, checkpoint, part.keymap, self.dtype, stored=stored)
        if fast:
            use_fast_products(dit)
        device, running = mm.get_torch_device(), self.running
        use_attention(dit, load_backend(running.attention, device, self.dtype, training=False))
        if running.compile:
            compile_blocks([dit.get_submodule(path) for path in blocks_of(self.matrices)], device)
        return dit

    def load_stack(self) -> list[LoadedLoRA]:
        """The LoRAs, read and checked."""
        return load_stack(self.loras, self.family, self.variant, self.matrices, allow_overlap=self.allow_overlap)


def _made_for(entry: StackEntry, family: Family) -> str:
    """The expert that a LoRA was trained for, by what its file says; nothing when it says nothing."""
    metadata = read_header(entry.path).metadata if entry.path.suffix == ".safetensors" else {}
    variant = family.variants.get(metadata.get("videolora_variant", ""))
    named = metadata.get("ss_loraid_expert", variant.expert if variant else "")
    return "" if named == "both" else named


def checked_size(width: int | None, height: int | None, frames: int | None) -> bool | str:
    """For validate_inputs: whether some model can take videos of this size. Linked values (None) are checked later."""
    if None in (width, height, frames):
        return True
    try:
        check_size(VideoSize(frames, height, width))
    except ValueError as error:
        return str(error)
    return True


def image_plan(dit: DiTFile | None, clip_vision: VisionEncoderFile | None) -> ImagePlan | None:
    """What an image-to-video model needs of each clip's images, None for another. Raises ValueError when the image encoder
    is missing, or too many."""
    images = dit.variant.images if dit else None
    takes_vision = images is not None and images.vision
    if clip_vision and not takes_vision:
        raise ValueError("an image encoder is linked without a model that takes one: link that model too, "
                         "or take the encoder away.")  # fmt: skip
    if takes_vision and not clip_vision:
        raise ValueError(f"{dit.variant.title} also looks at images with an encoder: link Load CLIP Image Encoder (Wan), or Load "
                         "SigLIP Image Encoder (HunyuanVideo 1.5).")  # fmt: skip
    if clip_vision:
        check_family(dit, clip_vision)
    return images and ImagePlan(input=images, encoder_identity=clip_vision.identity if clip_vision else "")


def check_family(dit: DiTFile, file: ModelFile) -> None:
    """Raise ValueError unless the file is for models of the transformer's family."""
    if file.family.name != dit.family.name:
        raise ValueError(f"{file.path.name} is for {file.family.title}, and the model is {dit.family.title}: link the "
                         f"{KIND_TITLES[file.part.kind]} of its family.")  # fmt: skip


@dataclass(frozen=True)
class LatentCache:
    family: Family
    plans: tuple[LatentPlan, ...]


@dataclass(frozen=True)
class TextCache:
    family: Family
    plans: tuple[tuple[Dataset, tuple[PlannedText, ...]], ...]
