"""Loaders: they check the file and read nothing else; weights are read when a later node needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..core.families import FAMILIES, open_part
from ..core.family import Part
from ..core.modules.tiling import check_tiles
from ..core.shapes import Tiles
from . import handles, paths

CATEGORY = "VideoLoRA/loaders"


class LoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        variants = [
            name for family in FAMILIES.values() for name, variant in family.variants.items() if not variant.unusable
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
                               tooltip="Which release it is. Auto: what the tensors say; where several releases have the same "
                               "(Wan 2.1 14B and the two experts of Wan 2.2, HunyuanVideo and SkyReels V1 T2V, text and image to video "
                               "of HunyuanVideo 1.5), the one that the file is named after. It decides defaults (flow shift, guidance)."),
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


class LoadWanExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models = paths.model_files("diffusion_models")
        return io.Schema(
            node_id="VideoLoRALoadWanExperts",
            display_name="Load Wan 2.2 Experts",
            category=CATEGORY,
            description="Opens the two transformers of Wan 2.2 A14B, one for high noise and one for low noise, to be used as one "
            "model for training and sampling. Each is read when it is needed; where memory is short only one is held.",
            inputs=[
                io.Combo.Input("high", options=models, tooltip="The high-noise expert, in ComfyUI's models/diffusion_models."),
                io.Combo.Input("low", options=models, tooltip="The low-noise expert."),
                io.Float.Input("boundary", default=0.0, min=0.0, max=0.999, step=0.005, round=0.001, optional=True, advanced=True,
                               tooltip="From this noise level on the high-noise expert is used, below it the other one. 0: what the "
                               "authors recommend (0.875 text-to-video, 0.9 image-to-video)."),
                handles.Stack.Input("high_loras", optional=True, tooltip="LoRAs for the high-noise expert alone. LoRAs in Apply "
                                    "LoRAs go to the experts that they were trained for, or to both."),
                handles.Stack.Input("low_loras", optional=True, tooltip="LoRAs for the low-noise expert alone."),
            ],
            outputs=[handles.DiT.Output("dit", display_name="dit")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, high: str | None, low: str | None) -> bool | str:
        for name, expert in ((high, "high"), (low, "low")):
            said = _checked(open_expert, "diffusion_models", name, expert)
            if said is not True:
                return said
        return True

    @classmethod
    def fingerprint_inputs(cls, high: str, low: str, **_: object) -> list:
        return [paths.model_state("diffusion_models", name) for name in (high, low)]

    @classmethod
    def execute(cls, high: str, low: str, boundary: float = 0.0, high_loras=(), low_loras=()) -> io.NodeOutput:
        opened = (
            open_expert(paths.model_path("diffusion_models", name), expert).with_loras(loras, False)
            for name, expert, loras in ((high, "high", high_loras), (low, "low", low_loras))
        )
        return io.NodeOutput(next(opened).with_low(next(opened), boundary))


def open_expert(path: Path, expert: str) -> handles.DiTFile:
    """The file as this expert of a pair; the files of both have the same tensors. ValueError when it is none."""
    _, part = open_part(path, "dit")
    variants = FAMILIES[part.family].variants
    fitting = [name for name in part.variants if variants[name].expert == expert]
    if not fitting:
        raise ValueError(f"{path.name} is {part.title}, no expert of Wan 2.2: use Load Video DiT for it.")
    return handles.DiTFile.open(path, fitting[0])


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadVAE",
            display_name="Load Video VAE",
            category=CATEGORY,
            description="Opens the VAE that belongs to the transformer.",
            inputs=[
                io.Combo.Input("model", options=paths.model_files("vae"), tooltip="A file in ComfyUI's models/vae."),
                _precision("VAE", handles.PRECISIONS),
                io.Int.Input("tile_size", default=0, min=0, max=2048, step=32, optional=True, advanced=True,
                             tooltip="Work on tiles of so many pixels when frames are too large for the memory: 256 needs a "
                             "sixth of 832x480. 0: what suits the model, whole frames for Wan and 256 for HunyuanVideo and 1.5, whose "
                             "frames a number of their size leaves whole. Caches made with tiles are made again without."),
                io.Int.Input("tile_frames", default=0, min=0, max=1024, step=16, optional=True, advanced=True,
                             tooltip="For HunyuanVideo, whose VAE looks at all frames of a clip at once: work on so many frames "
                             "at a time. 0: 64. The VAEs of Wan and HunyuanVideo 1.5 need none."),
                io.Boolean.Input("cache_on_cpu", default=False, optional=True, advanced=True,
                                 tooltip="Keeps what the VAE remembers of earlier frames in main memory: slower, somewhat "
                                 "less VRAM, the same result."),
            ],
            outputs=[handles.Vae.Output("vae", display_name="vae")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model: str | None, tile_frames: int | None = 0, tile_size: int | None = 0) -> bool | str:
        return None in (tile_frames, tile_size) or _checked(cls._open, "vae", model, Tiles(tile_frames, tile_size))

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> list:
        return paths.model_state("vae", model)

    @classmethod
    def _open(cls, path: Path, tiles: Tiles) -> Part:
        _, part = open_part(path, "vae")
        family = FAMILIES[part.family]
        if tiles.frames and not family.vae_tiles.frames:
            raise ValueError(
                f"{part.title} takes one frame after the other and needs no tiles in time: set tile_frames to 0."
            )
        check_tiles(tiles, family.latent)
        return part

    @classmethod
    def execute(cls, model: str, tile_frames: int = 0, tile_size: int = 0, **settings: Any) -> io.NodeOutput:
        path = paths.model_path("vae", model)
        part = cls._open(path, Tiles(tile_frames, tile_size))
        return io.NodeOutput(handles.VAEFile(path, part, tile_frames=tile_frames, tile_size=tile_size, **settings))


class _TextEncoderLoader(io.ComfyNode):
    """Opens a text encoder, alone or beside `llm`."""

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return _checked(open_part, "text_encoders", model, "text_encoder")

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> list:
        return paths.model_state("text_encoders", model)

    @classmethod
    def execute(cls, model: str, precision: str = "auto", llm: handles.TextEncoderFile | None = None) -> io.NodeOutput:
        path = paths.model_path("text_encoders", model)
        opened = handles.TextEncoderFile(path, open_part(path, "text_encoder")[1], precision)
        return io.NodeOutput(llm.with_beside(opened) if llm else opened)


class LoadT5(_TextEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadT5",
            display_name="Load umT5 Text Encoder",
            category=CATEGORY,
            description="Opens the umT5-XXL text encoder of Wan.",
            inputs=[
                _text_encoder("ComfyUI's umt5_xxl files carry their tokenizer; for the official .pth put google/umt5-xxl's "
                              "spiece.model beside it."),
                _precision("text encoder", _ALSO_FP8, _FP8),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="text encoder")],
        )  # fmt: skip


class LoadLLM(_TextEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadLLM",
            display_name="Load LLaVA Text Encoder",
            category=CATEGORY,
            description="Opens LLaVA-Llama-3, the large text encoder of HunyuanVideo and SkyReels V1. Link it to Load CLIP Text "
            "Encoder, which these models take too.",
            inputs=[
                _text_encoder("ComfyUI's llava_llama3 file, or one of those of the official text_encoder folder with its "
                              "tokenizer.json beside it."),
                _precision("text encoder", _ALSO_FP8, _FP8),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="llm")],
        )  # fmt: skip


class LoadCLIP(_TextEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadCLIP",
            display_name="Load CLIP Text Encoder",
            category=CATEGORY,
            description="Opens the CLIP-L text encoder of HunyuanVideo and SkyReels V1, which works together with LLaVA.",
            inputs=[
                handles.TextEncoderType.Input("llm", tooltip="From Load LLaVA Text Encoder."),
                _text_encoder("clip_l, or the official text_encoder_2 folder's model file."),
                _precision("text encoder", handles.PRECISIONS),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="text encoder")],
        )  # fmt: skip


class LoadQwenVL(_TextEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadQwenVL",
            display_name="Load Qwen2.5-VL Text Encoder",
            category=CATEGORY,
            description="Opens Qwen2.5-VL, the large text encoder of HunyuanVideo 1.5. Link it to Load Glyph ByT5, which these "
            "models take too.",
            inputs=[
                _text_encoder("ComfyUI's qwen_2.5_vl_7b file, also the fp8_scaled one, or one of the files of the official "
                              "Qwen2.5-VL-7B-Instruct folder."),
                _precision("text encoder", _ALSO_FP8, _FP8),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="llm")],
        )  # fmt: skip


class LoadByT5(_TextEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadByT5",
            display_name="Load Glyph ByT5",
            category=CATEGORY,
            description="Opens the glyph text encoder of HunyuanVideo 1.5, which works together with Qwen2.5-VL: words in quotes in "
            "a prompt or caption are to be written in the video.",
            inputs=[
                handles.TextEncoderType.Input("llm", tooltip="From Load Qwen2.5-VL Text Encoder."),
                _text_encoder("ComfyUI's byt5_small_glyphxl file, or the official byt5_model.pt."),
                _precision("text encoder", handles.PRECISIONS),
            ],
            outputs=[handles.TextEncoderType.Output("text_encoder", display_name="text encoder")],
        )  # fmt: skip


class _VisionEncoderLoader(io.ComfyNode):
    """Opens an image encoder."""

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        return _checked(open_part, "clip_vision", model, "vision_encoder")

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: object) -> list:
        return paths.model_state("clip_vision", model)

    @classmethod
    def execute(cls, model: str, precision: str = "auto") -> io.NodeOutput:
        path = paths.model_path("clip_vision", model)
        return io.NodeOutput(handles.VisionEncoderFile(path, open_part(path, "vision_encoder")[1], precision))


class LoadCLIPVision(_VisionEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadCLIPVision",
            display_name="Load CLIP Image Encoder",
            category=CATEGORY,
            description="Opens the CLIP ViT-H image encoder, with which Wan 2.1 image-to-video looks at the start image.",
            inputs=[
                _vision_encoder("clip_vision_h.safetensors, or the official models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."),
                _precision("image encoder", handles.PRECISIONS),
            ],
            outputs=[handles.VisionEncoderType.Output("clip_vision", display_name="clip vision")],
        )  # fmt: skip


class LoadSigLIP(_VisionEncoderLoader):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRALoadSigLIP",
            display_name="Load SigLIP Image Encoder",
            category=CATEGORY,
            description="Opens the SigLIP image encoder, with which HunyuanVideo 1.5 image-to-video looks at the start image.",
            inputs=[
                _vision_encoder("sigclip_vision_patch14_384.safetensors, or the image_encoder folder's model file of the official "
                                "FLUX.1-Redux-dev."),
                _precision("image encoder", handles.PRECISIONS),
            ],
            outputs=[handles.VisionEncoderType.Output("clip_vision", display_name="clip vision")],
        )  # fmt: skip


_ALSO_FP8 = (*handles.PRECISIONS, *handles.FP8_PRECISIONS)
_FP8 = " fp8: half the memory, fp8_scaled with a scale per row is closer to the original."


def _text_encoder(which: str) -> io.Combo.Input:
    return io.Combo.Input("model", options=paths.model_files("text_encoders"),
                          tooltip=f"A file in ComfyUI's models/text_encoders: {which}")  # fmt: skip


def _vision_encoder(which: str) -> io.Combo.Input:
    return io.Combo.Input("model", options=paths.model_files("clip_vision"),
                          tooltip=f"A file in ComfyUI's models/clip_vision: {which}")  # fmt: skip


def _precision(what: str, options: Sequence[str], more: str = "") -> io.Combo.Input:
    return io.Combo.Input("precision", options=list(options), default="auto", optional=True, advanced=True,
                          tooltip=f"Precision of the {what}. auto: bfloat16 where the device has it.{more}")  # fmt: skip


def _checked(opening: Callable[[Path, Any], object], folder: str, name: str | None, what: Any) -> bool | str:
    """Whether the file is there and is what it should be: said before anything runs. A linked name is checked later."""
    if name is None or what is None:
        return True
    try:
        opening(paths.model_path(folder, name), what)
    except (ValueError, OSError) as error:
        return str(error)
    return True
