"""The job description: everything that decides what a training makes, as one JSON file."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..checks import require
from ..io.files import digest, read_json
from ..lora.loraid import Loraid
from ..lora.network import NetworkSettings
from ..modules.attention import BACKENDS
from .optimizers import OptimizerSettings
from .prompts import Preview, PreviewSettings
from .timesteps import TimestepSettings

VERSION = 1
BASE_PRECISIONS = ("auto", "bfloat16", "float32", "float16", "fp8", "fp8_scaled")
MEMORY_MODES = ("auto", "manual")
FILE_PRECISIONS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What to trade for memory.

    mode                    auto: checkpointing, offloading, streaming and, where it is auto, precision are the fastest that
                            fit (see `planner.py`); manual: they are as said here
    gradient_checkpointing  activations are computed again in the backward pass
    precision               of the frozen matrices. auto: as the checkpoint has them where that is fp8, else as the
                            computation, which is bfloat16 (float32 on the CPU) unless bfloat16 or float32 is asked for.
                            float16, fp8 and fp8_scaled are how they are stored: gradients in float16 would need their
                            loss scaled, so no computation is done in it
    offload_checkpoints     what checkpointing keeps waits in host memory
    block_swap              blocks whose weights stay in host memory and visit the device, two at a time
    shard                   the GPUs that train together divide the weights; without it each holds all of them
    """

    gradient_checkpointing: bool = True
    precision: str = "auto"
    mode: str = "auto"
    offload_checkpoints: bool = False
    block_swap: int = 0
    shard: bool = False
    attention: str = "sdpa"
    compile: bool = False

    def __post_init__(self) -> None:
        for title, value, allowed in (("precision", self.precision, BASE_PRECISIONS), ("mode", self.mode, MEMORY_MODES),
                                      ("attention", self.attention, BACKENDS)):  # fmt: skip
            require(value in allowed, f"{title} '{value}': use one of {', '.join(allowed)}.")
        require(self.block_swap >= 0, f"block swap is {self.block_swap}: use 0 or the number of blocks to stream.")
        require(self.mode == "auto" or self.gradient_checkpointing or not self.offload_checkpoints,
                 "offloading needs gradient checkpointing: use both or neither.")  # fmt: skip
        require(not (self.shard and self.block_swap), "weights are divided among GPUs or streamed from the host, not both: set "
                "block swap to 0, or switch shard off.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """When LoRA files are written besides the last one. 0 switches an interval off; `keep` 0 keeps all.

    `keep_states` are the newest states that a run can go on from: more than one, in case the newest is damaged.
    """

    every_steps: int = 0
    every_epochs: int = 0
    keep: int = 0
    precision: str = "bfloat16"
    keep_states: int = 2

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_epochs", "keep"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: use 0 or more.")
        require(self.keep_states >= 1, f"keep_states is {self.keep_states}: use 1 or more (2 is safer).")
        require(
            self.precision in FILE_PRECISIONS, f"precision '{self.precision}': use one of {', '.join(FILE_PRECISIONS)}."
        )


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """How a training is watched.

    validation_share        share of the clips that is never trained but validated with; 0 for none
    validation_every_steps  how often
    skipped_in_a_row        so many steps with a loss that is not finite, one after another, end the training
    tensorboard             also write files for TensorBoard
    """

    validation_share: float = 0.0
    validation_every_steps: int = 100
    skipped_in_a_row: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        share, every, skipped = self.validation_share, self.validation_every_steps, self.skipped_in_a_row
        require(0 <= share <= 0.5, f"validation share is {share}: use 0 (off), or 0.05 to 0.2 and at most 0.5.")
        require(every >= 1, f"validation every {every} steps: use 1 or more (100 is a good start).")
        require(skipped >= 1, f"skipped_in_a_row is {skipped}: use 1 or more (10 is a good start).")

    def check_installed(self) -> None:
        """Raise ValueError when a package that the settings need is missing."""
        require(
            not self.tensorboard or importlib.util.find_spec("tensorboard") is not None,
            "TensorBoard files need the package 'tensorboard', which is not installed. Install it into ComfyUI's Python "
            "(python -m pip install tensorboard) and start ComfyUI again, or switch tensorboard off.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingItem:
    """A cached sample: latents, text states, size of the latents, and fingerprints of both files."""

    latents: str
    text: str
    size: tuple[int, int, int]
    fingerprints: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The cached samples of one data set."""

    title: str
    batch_size: int
    num_repeats: int
    items: tuple[TrainingItem, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A transformer to be trained: its release, checkpoint and that file's fingerprint. `name` tells apart the two of a
    pair (high and low, for much and little noise); a transformer that is trained alone has none."""

    name: str
    variant: str
    dit: str
    dit_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """`low` is the low-noise expert that is trained in the same run, `dit` then the high-noise one, for the sigmas from
    `boundary` on. `name` and `output_folder` say where the LoRA files go: `<output_folder>/<name>.safetensors`. `gpus` is how many
    processes share a step; each adds as many batches to it as gradients are accumulated."""

    name: str
    output_folder: str
    family: str
    variant: str
    dit: str
    dit_fingerprint: str
    datasets: tuple[TrainingSet, ...]
    steps: int
    seed: int
    loraid: Loraid | None = None
    network: NetworkSettings = field(default_factory=NetworkSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    timesteps: TimestepSettings = field(default_factory=TimestepSettings)
    memory: MemorySettings = MemorySettings()
    save: SaveSettings = SaveSettings()
    watch: WatchSettings = WatchSettings()
    previews: PreviewSettings = field(default_factory=PreviewSettings)
    gpus: int = 1
    low: Expert | None = None
    boundary: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        require(self.version == VERSION, f"this job is of version {self.version}, this pack runs version {VERSION}.")
        require(self.steps >= 1, f"steps is {self.steps}: use 1 or more.")
        require(1 <= self.gpus <= 1024, f"gpus is {self.gpus}: use 1, or the number of GPUs to train on together.")
        require(
            any(dataset.items for dataset in self.datasets), "there is nothing to train on: all data sets are empty."
        )
        require(self.gpus > 1 or not self.memory.shard, "the weights are to be divided among the GPUs, and gpus is 1: use 2 or "
                "more, or switch shard off.")  # fmt: skip
        require(not (self.low and self.network.start_from), "two experts cannot go on from one LoRA: train them one at a time, or "
                "start afresh.")  # fmt: skip
        require(not self.low or 0 < self.boundary < 1, f"the boundary of the two experts is {self.boundary}: use a sigma between 0 and 1, "
                "such as 0.875.")  # fmt: skip
        require(not self.low or self.steps > 1, "two experts are to be trained in 1 step: use 2 or more.")
        self.optimizer.check(self.steps)
        kind, ratio = self.optimizer.kind, self.network.loraplus_lr_ratio
        require(
            not kind.one_rate or ratio == 1,
            f"{kind.title} needs one learning rate for all parameters, and LoRA+'s ratio is {ratio}: set it to 1, or use "
            "another optimizer.",
        )

    @property
    def experts(self) -> tuple[Expert, ...]:
        """What is trained, each with a LoRA of its own."""
        own = Expert(
            name="high" if self.low else "", variant=self.variant, dit=self.dit, dit_fingerprint=self.dit_fingerprint
        )
        return (own, self.low) if self.low else (own,)

    @property
    def batches_per_step(self) -> int:
        return self.optimizer.gradient_accumulation * self.gpus

    @property
    def digest(self) -> str:
        """Two jobs with the same digest make the same LoRA: where files lie, when to save, what is shown on the way and
        what is traded for memory is not in it."""
        values = asdict(self)
        for name in ("output_folder", "dit", "save", "previews"):
            del values[name]
        values["memory"] = {"precision": self.memory.precision}
        values["watch"] = {"validation_share": self.watch.validation_share}
        del values["network"]["start_from"]
        if self.low:
            del values["low"]["dit"]
        for dataset in values["datasets"]:
            dataset["items"] = [[item["size"], item["fingerprints"]] for item in dataset["items"]]
        return digest(values)

    def path_of(self, expert: str, step: int | None = None) -> Path:
        """Where the LoRA of an expert is published: at the end, or after `step`."""
        words = [self.name, *filter(None, [expert])]
        return Path(self.output_folder) / (
            "_".join(words) + ("" if step is None else f"-step{step:08d}") + ".safetensors"
        )

    @property
    def final_path(self) -> Path:
        """Of the only one, or of the first."""
        return self.final_paths[0]

    @property
    def final_paths(self) -> tuple[Path, ...]:
        return tuple(self.path_of(expert.name) for expert in self.experts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_NESTED = {
    "loraid": Loraid, "network": NetworkSettings, "optimizer": OptimizerSettings, "timesteps": TimestepSettings,
    "memory": MemorySettings, "save": SaveSettings, "watch": WatchSettings, "previews": PreviewSettings,
    "low": Expert,
}  # fmt: skip

T = TypeVar("T")


def _build(cls: type[T], values: dict[str, Any]) -> T:
    unknown = values.keys() - {entry.name for entry in fields(cls)}
    require(not unknown, f"job description: unknown entry '{min(unknown, default='')}' in {cls.__name__}.")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"job description: {cls.__name__} is incomplete ({error}).") from error


def read_job(path: Path) -> Job:
    """Read a job file. Raises ValueError that names what is wrong in it."""
    try:
        return _job(read_json(path))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or of another version of this pack ({error!r}).") from error


def _job(values: dict[str, Any]) -> Job:
    values = dict(values)
    if values.get("previews") is not None:
        prompts = [_build(Preview, prompt) for prompt in values["previews"].get("prompts", ())]
        values["previews"] = {**values["previews"], "prompts": prompts}
    for name, cls in _NESTED.items():
        if values.get(name) is not None:
            values[name] = _build(cls, values[name])
    values["datasets"] = tuple(
        _build(TrainingSet, {**dataset, "items": tuple(_item(item) for item in dataset["items"])})
        for dataset in values.get("datasets", ())
    )
    return _build(Job, values)


def _item(values: dict[str, Any]) -> TrainingItem:
    item = {**values, "size": tuple(values["size"]), "fingerprints": tuple(values["fingerprints"])}
    return _build(TrainingItem, item)
