"""Whether a training fits, before anything is cached."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..core.devices import free_memory
from ..core.families import open_part
from ..core.lora.loraid import Loraid, allocate
from ..core.lora.network import NetworkSettings
from ..core.shapes import VideoSize
from ..core.training import planner
from ..core.training.job import MemorySettings
from ..core.training.optimizers import OptimizerSettings
from . import handles
from .progress import say

CATEGORY = "VideoLoRA/training"


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAMemoryPlan",
            display_name="Memory Plan",
            category=CATEGORY,
            description="How much memory a training will take, and which settings fit, before anything is cached or loaded.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The model to be trained."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Of the largest clip, in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Of the largest clip, in pixels."),
                io.Int.Input("frames", default=81, min=1, max=1001, step=4, tooltip="Of the longest clip; 1 for pictures."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Clips at once."),
                io.Float.Input("free_gib", default=0.0, min=0.0, max=1024.0, step=0.5, round=0.1,
                               tooltip="Free memory of the card in GiB. 0: what this one has."),
                io.Int.Input("gpus", default=1, min=1, max=64, optional=True, advanced=True, tooltip="As for the training."),
                handles.LoraidType.Input("loraid", optional=True, tooltip="As for the training."),
                handles.Network.Input("network", optional=True, tooltip="As for the training."),
                handles.Optimizer.Input("optimizer", optional=True, tooltip="As for the training."),
                handles.Memory.Input("memory", optional=True, tooltip="As for the training."),
            ],
            outputs=[io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, width, height, frames) -> bool | str:
        return handles.checked_size(width, height, frames)

    @classmethod
    def execute(cls, dit: handles.DiTFile, width: int, height: int, frames: int, batch_size: int, free_gib: float, gpus: int = 1,
                loraid: Loraid | None = None, network: NetworkSettings | None = None,
                optimizer: OptimizerSettings | None = None, memory: MemorySettings | None = None) -> io.NodeOutput:  # fmt: skip
        family, device = dit.family, mm.get_torch_device()
        checkpoint, part = open_part(dit.path, "dit")
        size, images = family.latent.latents(VideoSize(frames, height, width)), dit.variant.images
        told = {name: torch.zeros(shape) for name, shape in (images.shapes(size) if images else {}).items()}
        states = {**family.blank_text(part.config), **told}
        network = network or NetworkSettings()
        subject = planner.Subject(
            family=family, config=part.config, matrices=dit.matrices, device=device,
            dtypes=checkpoint.dtypes(part.keymap),
            rows=network.chosen(dit.matrices, allocate(dit.matrices, loraid).rows if loraid else None), network=network,
            optimizer_bytes=(optimizer or OptimizerSettings()).kind.state_bytes,
            latents=(batch_size, family.latent.channels, *size),
            conditions=family.conditions([states] * batch_size), processes=gpus,
            networks=len(dit.experts),
        )  # fmt: skip
        free = int(free_gib * 2**30) or free_memory(device)
        text = planner.report(subject, memory or MemorySettings(), free, free_memory(torch.device("cpu")))
        say(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui={"text": [text]})
