"""Writing pictures and videos. Frames are (H, W, 3) uint8 RGB."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .files import atomic

_CRF = "18"  # hardly to be told from the frames


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Encode frames (at least one, of even size), as they come, to an MP4 file that every browser plays; atomic."""
    frames = iter(frames)
    first = next(frames)
    with atomic(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": _CRF})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = first.shape[:2]
        for frame in chain((first,), frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_picture(path: Path, frame: np.ndarray) -> None:
    """Write a PNG file; atomic."""
    with atomic(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
