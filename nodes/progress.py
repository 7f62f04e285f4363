"""A node's progress bar and the text under it; stops when the user cancels."""

from __future__ import annotations

import comfy.model_management as mm
from comfy.utils import ProgressBar
from PIL import Image
from server import PromptServer

_PICTURE_SIDE = 512  # pixels at most


class Progress:
    """Progress of one node. `node_id` is the node's hidden unique_id."""

    def __init__(self, node_id: str | None, total: int = 1) -> None:
        self.node_id = node_id
        self.bar = ProgressBar(total, node_id=node_id)

    def update(self, done: int, total: int, text: str = "", picture: Image.Image | None = None) -> None:
        """Show how far it is. Raises ComfyUI's interrupt when the user has cancelled."""
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(done, total, picture and ("JPEG", picture, _PICTURE_SIDE))
        if text:
            say(text, self.node_id)


def say(text: str, node_id: str | None) -> None:
    """Show a text under a node."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
