"""Where files may be read and written: ComfyUI's own folders, asked for anew each time because users move them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import folder_paths

from ..core.data.config import CACHE_FOLDER
from ..core.data.discovery import IMAGES, VIDEOS, media_files
from ..core.io.files import inside
from ..core.io.latents import SUFFIX
from ..core.weights import SUFFIXES, shards

_FROM_INPUT = " [input]"


def model_files(folder: str) -> list[str]:
    """The model files that ComfyUI sees in one of its model folders."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SUFFIXES)]


def model_path(folder: str, name: str) -> Path:
    """The path of a listed model file; ValueError when it is not there (any more)."""
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise ValueError(
            f"'{name}' is not in ComfyUI's folder '{folder}' ({', '.join(folder_paths.get_folder_paths(folder))})."
        )
    return Path(found)


def data_roots() -> list[Path]:
    """Where data sets may lie: input, output, and what extra_model_paths.yaml lists under `datasets`."""
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory()]
    return [Path(root).resolve() for root in (*roots, *folder_paths.get_folder_paths("datasets"))]


def data_path(name: str) -> Path:
    """A file or folder of a data set, by a path relative to one of the roots, or absolute and inside one.

    Raises ValueError for anything outside. What does not exist yet is placed below the input folder.
    """
    roots = data_roots()
    # Names that lead out are not even looked at: on Windows looking at \\host\share sends credentials there.
    candidates = [Path(os.path.normpath(root / name)) for root in roots]  # an absolute name stands for itself
    allowed = [candidate for candidate in candidates if any(candidate.is_relative_to(root) for root in roots)]
    for candidate in allowed:
        if candidate.exists() and any(candidate.resolve().is_relative_to(root) for root in roots):
            return candidate.resolve()
    if allowed and not allowed[0].exists():
        return allowed[0]
    raise ValueError(
        f"'{name}' is outside the folders that data sets may lie in: {', '.join(map(str, roots))}. Move it there, or add "
        "its folder under 'datasets:' in ComfyUI's extra_model_paths.yaml."
    )


def output_folder(kind: str) -> Path:
    """ComfyUI's output folder for a kind of model; ComfyUI itself loads models from there too."""
    return Path(folder_paths.get_output_directory()) / kind


def output_file(kind: str, name: str) -> Path:
    """`<output>/<kind>/<name>.safetensors`; ValueError for a name that would lead elsewhere."""
    return inside(output_folder(kind), f"{name.removesuffix('.safetensors')}.safetensors")


def checked_output(kind: str, name: str | None) -> bool | str:
    """For validate_inputs: whether the name can be used. A linked name (None) is checked when it is known."""
    try:
        return name is None or bool(output_file(kind, name))
    except ValueError as error:
        return str(error)


def latent_files() -> list[str]:
    """Saved latents in ComfyUI's output/latents, and in its input folder as `name [input]`."""
    roots = ((output_folder("latents"), ""), (Path(folder_paths.get_input_directory()), _FROM_INPUT))
    return [
        f"{path.relative_to(root).as_posix()}{note}"
        for root, note in roots
        for path in sorted(root.glob(f"**/*{SUFFIX}"))
    ]


def latent_path(name: str) -> Path:
    """The path of a listed file of latents; ValueError when it is not there."""
    root = Path(folder_paths.get_input_directory()) if name.endswith(_FROM_INPUT) else output_folder("latents")
    path = inside(root, name.removesuffix(_FROM_INPUT))
    if path.suffix != SUFFIX or not path.is_file():
        raise ValueError(f"'{name}' is no file of latents in {root}.")
    return path


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "videolora" / "runs"


def prompts_folder() -> Path:
    """Where the encoded prompts of previews are kept."""
    return Path(folder_paths.get_output_directory()) / "videolora" / "prompts"


def temporary_folder() -> Path:
    """A new folder among ComfyUI's temporary files, which go when it starts again."""
    root = Path(folder_paths.get_temp_directory()) / "videolora"
    root.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=root))


def shown(path: Path) -> dict[str, str]:
    """A file below ComfyUI's output or among its temporary files, as the editor asks the server for it."""
    temporary = Path(folder_paths.get_temp_directory())
    kind = "temp" if path.is_relative_to(temporary) else "output"
    root = temporary if kind == "temp" else Path(folder_paths.get_output_directory())
    return {"filename": path.name, "subfolder": path.parent.relative_to(root).as_posix(), "type": kind}


def model_state(folder: str, name: str, belonging: Callable[[Path], Iterable[Path]] = shards) -> list[list]:
    """Changes when one of the files that belong to it is replaced, or another comes."""
    return _state(lambda: belonging(model_path(folder, name)))


def clip_state(name: str) -> list[list]:
    """Changes when a video does, or one of the images in a folder."""

    def files() -> Iterable[Path]:
        path = data_path(name)
        return media_files(path, IMAGES) if path.is_dir() else [path]

    return _state(files)


def _state(files: Callable[[], Iterable[Path]]) -> list[list]:
    try:
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files()]
    except (ValueError, OSError):
        return []


def data_folders() -> list[str]:
    """The folders below ComfyUI's input that may hold clips."""
    return [name for name in folder_paths.get_input_subfolders() if CACHE_FOLDER not in name.split("/")]


def clips() -> list[str]:
    """The videos in ComfyUI's input folder, and the folders below it."""
    root = Path(folder_paths.get_input_directory())
    return [*sorted(path.name for path in root.glob("*") if path.suffix.lower() in VIDEOS), *data_folders()]
