"""Loaders: they check the file and read nothing else; weights are read when a later node needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comfy_api.latest import io

from ..core.families import FAMILIES, open_part
from . import handles, paths

CATEGORY = "VideoLoRA/loaders"


class LoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        variants = [
            name for family in FAMILIES.values() for name, variant in family.variants.items() if not variant.needs_image
        ]
        return io.Schema(
            node_id="VideoLoRALoadDiT",
            display_name="Load Video DiT",
            category=CATEGORY,
            description="Opens a video diffusion transformer for training, sampling and merging. What it is, is read from "
            "the file itself; the weights are read when they are needed.",
            inputs=[
                io.Combo.Input("model", options=paths.model_files("diffusion_models"),
                               tooltip="A file in ComfyUI's models/diffusion_models, official or ComfyUI layout."),
                io.Combo.Input("variant", options=["auto", *variants], default="auto",
                               tooltip="Only where the file itself cannot tell, such as Wan 2.1 14B and the two experts of "
                               "Wan 2.2. It decides defaults (flow shift, guidance)."),
            ],
            outputs=[handles.DiT.Output("dit", display_name="dit")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model: str | None, variant: str | None) -> bool | str:
        return _checked(handles.DiTFile.open, "diffusion_models", model, variant)

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> list:
        return paths.model_state("diffusion_models", model)

    @classmethod
    def execute(cls, model: str, variant: str) -> io.NodeOutput:
        return io.NodeOutput(handles.DiTFile.open(paths.model_path("diffusion_models", model), variant))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadVAE",
            display_name="Load Video VAE",
            category=CATEGORY,
            description="Opens the VAE that belongs to the transformer.",
            inputs=[
                io.Combo.Input("model", options=paths.model_files("vae"), tooltip="A file in ComfyUI's models/vae.")
            ],
            outputs=[handles.Vae.Output("vae", display_name="vae")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return _checked(open_part, "vae", model, "vae")

    @classmethod
    def fingerprint_inputs(cls, model: str) -> list:
        return paths.model_state("vae", model)

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        path = paths.model_path("vae", model)
        return io.NodeOutput(handles.VAEFile(path, open_part(path, "vae")[1]))


class LoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadT5",
            display_name="Load umT5 Text Encoder",
            category=CATEGORY,
            description="Opens the umT5-XXL text encoder of Wan.",
            inputs=[
                io.Combo.Input("model", options=paths.model_files("text_encoders"),
                               tooltip="A file in ComfyUI's models/text_encoders. ComfyUI's umt5_xxl files carry their "
                               "tokenizer; for the official .pth put google/umt5-xxl's spiece.model beside it."),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="text encoder")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return _checked(open_part, "text_encoders", model, "text_encoder")

    @classmethod
    def fingerprint_inputs(cls, model: str) -> list:
        return paths.model_state("text_encoders", model)

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        path = paths.model_path("text_encoders", model)
        return io.NodeOutput(handles.TextEncoderFile(path, open_part(path, "text_encoder")[1]))


def _checked(opening: Callable[[Path, str], object], folder: str, name: str | None, what: str | None) -> bool | str:
    """Whether the file is there and is what it should be: said before anything runs. A linked name is checked later."""
    if name is None or what is None:
        return True
    try:
        opening(paths.model_path(folder, name), what)
    except (ValueError, OSError) as error:
        return str(error)
    return True
