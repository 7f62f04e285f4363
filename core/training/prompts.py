"""What previews are made of: prompts with their options, in the formats of prompt files that other trainers use.

    text    one prompt in a line, with options behind it: a cat in the snow --w 832 --h 480 --f 81 --d 7
            An option begins at " --" and one of the letters below; anything else belongs to the prompt. Lines that begin
            with # are comments.
    TOML    [prompt] holds what is the same for all, each [[prompt.subset]] what is a prompt's own
    JSON    a list of such lines, or of objects with the names below

Letters and names: w width, h height, f frame_count, d seed, s sample_steps, l cfg_scale (guidance), fs discrete_flow_shift,
n negative_prompt; for image-to-video models i image_path, ei end_image_path; for models that are told their guidance
g guidance_scale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..checks import require
from ..data import cache_files
from ..family import Family, TextEncoder, Variant
from ..io.files import digest
from ..sampling.schedule import Schedule
from ..shapes import Tiles

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt; None leaves a choice to whoever samples."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frame_count: int | None = None
    seed: int | None = None
    sample_steps: int | None = None
    cfg_scale: float | None = None
    guidance_scale: float | None = None
    discrete_flow_shift: float | None = None
    image_path: str | None = None
    end_image_path: str | None = None

    def filled(self, defaults: Prompt) -> Prompt:
        """With the choices of `defaults` where it has none."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(defaults, **{name: value for name, value in values.items() if value is not None})

    def shift_for(self, variant: Variant) -> float:
        """The flow shift of a prompt that says all else: its own, or what suits its size and steps."""
        return self.discrete_flow_shift or variant.shift_for(self.width, self.height, self.sample_steps)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A prompt ready to be sampled: `states` and `negative_states` are files of encoded text, no negative one, no guidance;
    `images` is a file of image states, for an image-to-video model. `embedded_guidance` is told to a model that takes it; 0 is
    what its authors recommend."""

    prompt: str
    states: str
    negative_states: str
    width: int
    height: int
    frames: int
    seed: int
    steps: int
    guidance: float
    shift: float
    solver: str = "euler"
    images: str = ""
    embedded_guidance: float = 0.0

    def __post_init__(self) -> None:
        Schedule(steps=self.steps, shift=self.shift, solver=self.solver)  # checks all three
        require(0 <= self.guidance <= 100, f"guidance is {self.guidance}: use 1 (off) to 100, usually 3 to 6.")
        require(0 <= self.seed < 2**64, f"seed is {self.seed}: use 0 to {2**64 - 1}.")


@dataclass(frozen=True, kw_only=True)
class PreviewSettings:
    """What is sampled while training, and when; 0 switches an interval off. `vae` decodes it, in tiles of so many frames and
    pixels (0: what suits the family); without one only latents are kept."""

    prompts: tuple[Preview, ...] = ()
    every_steps: int = 0
    every_epochs: int = 0
    at_start: bool = False
    vae: str = ""
    tile_frames: int = 0
    tile_size: int = 0

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tile_frames, self.tile_size)

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_epochs"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: use 0 or more.")


_LETTERS = {
    "w": "width", "h": "height", "f": "frame_count", "d": "seed", "s": "sample_steps", "l": "cfg_scale",
    "fs": "discrete_flow_shift", "n": "negative_prompt", "i": "image_path", "ei": "end_image_path",
    "g": "guidance_scale",
}  # fmt: skip
_IMPOSSIBLE = {
    "cn": "control_video_path", "ci": "control_image_path", "of": "one_frame",
}  # fmt: skip
_KINDS: Mapping[str, type] = {
    "prompt": str, "negative_prompt": str, "width": int, "height": int, "frame_count": int, "seed": int,
    "sample_steps": int, "cfg_scale": float, "guidance_scale": float, "discrete_flow_shift": float,
    "image_path": str, "end_image_path": str,
}  # fmt: skip
_OPTION = re.compile(rf"(?:^|(?<=\s))--({'|'.join([*_LETTERS, *_IMPOSSIBLE])})(?=\s|$)", re.IGNORECASE)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .txt, .toml or .json file. Raises ValueError that names what is wrong in it."""
    readers = {".txt": parse_lines, ".toml": _parse_toml, ".json": _parse_json}
    suffix = path.suffix.lower()
    require(suffix in readers, f"{path.name} is no prompt file: use one that ends in {', '.join(readers)}.")
    try:
        return readers[suffix](path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def parse_lines(text: str) -> list[Prompt]:
    """One prompt in a line; see the module. Raises ValueError that names the line."""
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                prompts.append(_parse_line(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return prompts


def _parse_line(line: str) -> Prompt:
    prompt, *words = _OPTION.split(line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for letter, text in zip(words[::2], words[1::2], strict=True):
        name = {**_LETTERS, **_IMPOSSIBLE}[letter.lower()]
        require(name not in values, f"--{letter} is there twice.")
        values[name] = _number(f"--{letter}", text.strip(), _KINDS.get(name, str))
    return _prompt(values)


def _number(option: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"'{text}' behind {option} is not {wanted}.") from error


def _parse_json(text: str) -> list[Prompt]:
    content = json.loads(text)
    require(isinstance(content, list), "it must hold a list of prompts.")
    return [_parse_line(entry) if isinstance(entry, str) else _prompt(entry) for entry in content]


def _parse_toml(text: str) -> list[Prompt]:
    content = tomllib.loads(text)
    table = content.get("prompt")
    require(set(content) == {"prompt"} and isinstance(table, dict) and isinstance(table.get("subset"), list),
            "it must hold a table [prompt] with at least one [[prompt.subset]].")  # fmt: skip
    common = {name: value for name, value in table.items() if name != "subset"}
    return [_prompt({**common, **subset}) for subset in table["subset"]]


def _prompt(values: Any) -> Prompt:
    """Checks names and types; values are checked where they are used."""
    require(isinstance(values, dict), f"a prompt must be a text or an object, not {values!r}.")
    for name, value in values.items():
        require(
            name not in _IMPOSSIBLE.values(),
            f"'{name}' cannot be used with the models that this pack trains: remove it.",
        )
        require(name in _KINDS, f"unknown entry '{name}': use {', '.join(_KINDS)}.")
        kind = _KINDS[name]
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        require(fits, f"'{name}' is {value!r}, and must be a {'text' if kind is str else 'number'}.")
    require(bool(str(values.get("prompt", "")).strip()), "there is no prompt before the options.")
    return Prompt(**values)


def encode_prompts(
    texts: Sequence[str], folder: Path, family: Family, identity: str, load: Callable[[], TextEncoder]
) -> dict[str, str]:
    """Each text with the file of its states, made where it is not there yet. `identity` stands for the text encoder."""
    paths = {text: folder / f"{digest([identity, text])}.safetensors" for text in dict.fromkeys(texts)}
    missing = [text for text, path in paths.items() if not cache_files.is_current(path, path.stem)]
    for text, states in zip(missing, load().encode(missing) if missing else (), strict=True):
        cache_files.save_text(paths[text], states, text, family, paths[text].stem)
    return {text: str(path) for text, path in paths.items()}
