"""VideoLoRA: the ComfyUI entry point."""

import logging
import re

MIN_COMFYUI = (0, 30, 0)


def _comfyui_version() -> tuple[int, ...] | None:
    """The version of the ComfyUI around this pack; None outside of ComfyUI."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", __version__)[:3])


async def comfy_entrypoint():
    """Called by ComfyUI; the nodes are imported here so that tests can import the pack without ComfyUI."""
    from .nodes import VideoLoRA

    return VideoLoRA()


if __package__ and (_version := _comfyui_version()) is not None and _version < MIN_COMFYUI:
    logging.getLogger("videolora").error(
        "VideoLoRA is disabled: it needs ComfyUI %s or newer and this is %s. Update ComfyUI.",
        ".".join(map(str, MIN_COMFYUI)), ".".join(map(str, _version)),
    )  # fmt: skip
    NODE_CLASS_MAPPINGS: dict = {}  # ComfyUI then does not look for the entry point
else:
    WEB_DIRECTORY = "./web"
