"""Image-to-video: what the transformer is told of the start image and the end image."""

from __future__ import annotations

import comfy.model_management as mm
import node_helpers
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..core.data.caching import to_video
from ..core.data.media import fitted
from ..core.family import States, VisionEncoder
from ..core.shapes import VideoSize
from . import handles
from .progress import say
from .sampling import CATEGORY


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoLoRAEncodeImage",
            display_name="Encode Start Image",
            category=CATEGORY,
            description="Adds a start image (and an end image) to the conditioning, for our sampler and for ComfyUI's own, and makes "
            "the latent that belongs to it.",
            inputs=[
                handles.DiT.Input("dit", tooltip="The image-to-video model, which decides what it needs."),
                io.Conditioning.Input("positive", tooltip="What is to be seen."),
                io.Conditioning.Input("negative", tooltip="What is not to be seen."),
                handles.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Image.Input("start_image", tooltip="The first frame. It is resized to cover the video and cropped to its middle."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Height in pixels."),
                io.Int.Input("frames", default=81, min=1, max=1001, step=4, tooltip="Number of frames, 4n+1."),
                io.Image.Input("end_image", optional=True,
                               tooltip="What the video ends with. Models made for it have it as their last frame; others get it as an "
                               "extra latent frame: then trim 3 frames in Decode Video."),
                io.MultiType.Input("clip_vision", types=[handles.VisionEncoderType, io.ClipVisionOutput], optional=True,
                                   tooltip="For Wan 2.1 Load CLIP Image Encoder, for HunyuanVideo 1.5 Load SigLIP Image Encoder, or "
                                   "the output of ComfyUI's own CLIP Vision Encode (crop: none). Wan 2.2 and SkyReels take none."),
            ],
            outputs=[
                io.Conditioning.Output("with_image", display_name="positive"),
                io.Conditioning.Output("negative_with_image", display_name="negative"),
                io.Latent.Output("latent", display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, width, height, frames) -> bool | str:
        return handles.checked_size(width, height, frames)

    @classmethod
    def execute(cls, dit: handles.DiTFile, positive, negative, vae: handles.VAEFile, start_image: Tensor, width: int,
                height: int, frames: int, end_image: Tensor | None = None, clip_vision=None) -> io.NodeOutput:  # fmt: skip
        size = VideoSize(frames, height, width)
        states = encoded(dit, vae, size, start_image, end_image, clip_vision)
        options = dit.family.image_options(states)
        latents = options["concat_latent_image"]
        extra = latents.shape[2] - dit.family.latent.latents(size).frames
        if extra:
            say(f"{extra} latent frame more for the end image: trim 3 frames in Decode Video", cls.hidden.unique_id)
        return io.NodeOutput(
            *(node_helpers.conditioning_set_values(one, options) for one in (positive, negative)),
            {"samples": torch.zeros_like(latents, device=mm.intermediate_device())},
        )


def encoded(dit: handles.DiTFile, vae: handles.VAEFile, size: VideoSize, start_image: Tensor, end_image: Tensor | None,
            clip_vision) -> States:  # fmt: skip
    """What the model is told of the images (1, H, W, C) for a video of this size. `clip_vision` is what the node's input
    takes. Raises ValueError for a model that takes no images, or not these, and for a VAE or image encoder of another
    family."""
    images = dit.variant.images
    if images is None:
        raise ValueError(f"{dit.variant.title} is no image-to-video model: leave the image out, or load another model.")
    if clip_vision is not None and not images.vision:
        raise ValueError(f"{dit.variant.title} looks at no image with an encoder: take the link to clip vision away.")
    handles.check_family(dit, vae)
    start, end = (None if one is None else _picture(one, size) for one in (start_image, end_image))
    both = end is not None and images.end == "inside"
    # First, as the VAE needs the most room to work.
    encoder = None if clip_vision is None else _encoder(dit, clip_vision, both)
    (states,) = dit.family.image_states(vae.load(size), encoder, images, start, end, size.frames)
    return states


def _picture(images: Tensor, size: VideoSize) -> Tensor:
    """ComfyUI's IMAGE (1, H, W, C) in 0..1 -> (1, 3, height, width) in -1..1 on the compute device."""
    if len(images) != 1:
        raise ValueError(f"{len(images)} images were given where one is taken: choose one of them.")
    pixels = images[0, :, :, :3].mul(255).round().clamp(0, 255).byte().cpu().numpy()
    frame = np.array(fitted(Image.fromarray(pixels), (size.width, size.height)))
    return to_video([frame[None]], mm.get_torch_device())[:, :, 0]


def _encoder(dit: handles.DiTFile, clip_vision, both: bool) -> VisionEncoder:
    """What looks at the start image, or at both images."""
    if isinstance(clip_vision, handles.VisionEncoderFile):
        handles.check_family(dit, clip_vision)
        return clip_vision.load()
    if both:
        raise ValueError("this model looks at the end image too: link Load CLIP Image Encoder, or use ComfyUI's own "
                         "WanFirstLastFrameToVideo instead of this node.")  # fmt: skip
    return _Seen(getattr(clip_vision, dit.family.comfyui_vision))


class _Seen:
    """An image that ComfyUI's own CLIP has looked at already, in the place of an image encoder."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.cpu()

    def encode(self, pictures: Tensor) -> Tensor:
        """What was seen, whatever is shown now."""
        return self.features
