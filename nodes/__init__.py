"""The nodes: sockets, tooltips and checks. Everything they do is in `core`."""

from comfy_api.latest import ComfyExtension, io

from .caching import CacheLatents, CacheText
from .data import DatasetFolder, DatasetJSONL, DatasetPreview, DatasetTOML
from .images import EncodeImage
from .latents import Decode, EmptyLatent, EncodeVideo, LoadFrames, LoadLatents, SaveLatents
from .loaders import (
    LoadByT5,
    LoadCLIP,
    LoadCLIPVision,
    LoadDiT,
    LoadLLM,
    LoadQwenVL,
    LoadSigLIP,
    LoadT5,
    LoadVAE,
    LoadWanExperts,
)
from .lora import ApplyLoRA, LoadLoRA, MergeLoRA, UnmergeLoRA
from .lora_files import BlendLoRA, ConvertLoRA, ExtractLoRA, InspectLoRA, PostHocEMA, ResizeLoRA
from .planning import MemoryPlan
from .previews import PreviewSettingsNode
from .routes import add_routes
from .sampling import CFGSkip, EncodeText, FlowSchedule, PromptList, Sample, SamplingMemory, SkipLayerGuidance
from .settings import (
    MemorySettingsNode,
    NetworkSettingsNode,
    OptimizerSettingsNode,
    SaveSettingsNode,
    SelectLORAID,
    ShowTimesteps,
    TimestepSettingsNode,
    WatchSettingsNode,
)
from .training import Train

NODES: list[type[io.ComfyNode]] = [
    LoadDiT, LoadWanExperts, LoadVAE, LoadT5, LoadLLM, LoadCLIP, LoadQwenVL, LoadByT5, LoadCLIPVision, LoadSigLIP,
    DatasetFolder, DatasetJSONL, DatasetTOML, DatasetPreview,
    CacheLatents, CacheText,
    SelectLORAID, NetworkSettingsNode, OptimizerSettingsNode, TimestepSettingsNode, ShowTimesteps,
    MemorySettingsNode, SaveSettingsNode, WatchSettingsNode, PreviewSettingsNode, MemoryPlan, Train,
    EncodeText, PromptList, EncodeImage, LoadFrames, EncodeVideo, EmptyLatent, FlowSchedule, CFGSkip, SkipLayerGuidance, SamplingMemory, Sample,
    Decode, SaveLatents, LoadLatents,
    LoadLoRA, ApplyLoRA, MergeLoRA, UnmergeLoRA,
    ConvertLoRA, ResizeLoRA, ExtractLoRA, PostHocEMA, BlendLoRA, InspectLoRA,
]  # fmt: skip


class VideoLoRA(ComfyExtension):
    async def on_load(self) -> None:
        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
