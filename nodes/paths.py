"""Where files may be read and written: ComfyUI's own folders, asked for anew each time because users move them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..core.io.files import inside
from ..core.weights import SUFFIXES


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
    candidates = [root / name for root in roots]  # an absolute name stands for itself
    for candidate in candidates:
        if candidate.exists() and any(candidate.resolve().is_relative_to(root) for root in roots):
            return candidate.resolve()
    target = candidates[0].resolve()
    if any(target.is_relative_to(root) for root in roots):
        return target
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


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "videolora" / "runs"
