"""Reading images and videos, resized and cropped, videos at the model's frame rate. Frames are (H, W, 3) uint8 RGB."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from .discovery import IMAGES, media_files
from .windows import Window

_SAME_RATE = 0.01  # rates that differ by less than this share are taken as equal


class UnreadableMedia(ValueError):
    """A file that cannot be read; the message says why."""


@dataclass(frozen=True)
class MediaInfo:
    """Size in pixels, and frames at the model's rate (1 for an image)."""

    width: int
    height: int
    frames: int


def probe(path: Path, fps: float, source_fps: float | None = None) -> MediaInfo:
    """Size and frame count of a video file, a folder of images (taken as frames) or an image."""
    if path.is_dir():
        frames = media_files(path, IMAGES)
        if not frames:
            raise UnreadableMedia("the folder holds no images")
        return MediaInfo(*_image_size(frames[0]), len(frames))
    if path.suffix.lower() in IMAGES:
        return MediaInfo(*_image_size(path), 1)
    with _Video(path, source_fps) as video:
        return MediaInfo(video.width, video.height, video.count(fps))


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(1, H, W, 3), upright, transparency laid over white, resized and cropped to `size` (width, height)."""
    return np.array(fitted(_open_image(path), size))[None]


def read_windows(
    path: Path, windows: Sequence[Window], size: tuple[int, int], fps: float, source_fps: float | None = None
) -> Iterator[tuple[Window, np.ndarray]]:
    """Each window with its frames (count, H, W, 3), in the order in which they end.

    Only the frames that an open window still needs are kept. Raises UnreadableMedia when the clip ends early.
    """
    pending = sorted(windows, key=lambda window: window.start + window.count)
    kept: deque[np.ndarray] = deque()
    first = 0  # index of kept[0]
    frames = _folder_frames(path, size) if path.is_dir() else _video_frames(path, size, fps, source_fps)
    for index, frame in enumerate(frames):
        kept.append(frame)
        while pending and pending[0].start + pending[0].count == index + 1:
            window = pending.pop(0)
            yield window, np.stack([kept[window.start - first + offset] for offset in range(window.count)])
        if not pending:
            return
        needed = min(window.start for window in pending)
        while kept and first < needed:
            kept.popleft()
            first += 1
    raise UnreadableMedia(f"it ends before frame {pending[0].start + pending[0].count}")


def _folder_frames(folder: Path, size: tuple[int, int]) -> Iterator[np.ndarray]:
    for path in media_files(folder, IMAGES):
        yield np.asarray(fitted(_open_image(path), size))


_ORIENTATION = 0x0112  # of EXIF; from 5 on the image lies on its side


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright image, from its header alone."""
    with _readable(path) as image:
        return image.size[::-1] if image.getexif().get(_ORIENTATION, 1) >= 5 else image.size


def _open_image(path: Path) -> Image.Image:
    with _readable(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # Pillow would cut off everything above 255
            return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


@contextmanager
def _readable(path: Path) -> Iterator[Image.Image]:
    """The image; UnreadableMedia for whatever goes wrong with it inside the block (decoders raise many things)."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:
        raise UnreadableMedia(f"the image cannot be read ({error})") from error


def cover(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size to resize to so that `size` can be cut out of the middle."""
    scale = max(size[0] / width, size[1] / height)
    return max(size[0], int(width * scale + 0.5)), max(size[1], int(height * scale + 0.5))


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized to cover `size` and cropped to its middle, which alone is made."""
    if image.size == size:
        return image
    covering = cover(*image.size, size)
    scale = [new / old for new, old in zip(covering, image.size, strict=True)]
    start = [(new - wanted) // 2 for new, wanted in zip(covering, size, strict=True)]
    left, top = (begin / by for begin, by in zip(start, scale, strict=True))
    right, bottom = ((begin + wanted) / by for begin, wanted, by in zip(start, size, scale, strict=True))
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _quarter_turns(path: Path) -> int:
    """How often the frames must be turned by 90 degrees, against the clock, to stand upright: phones store them lying."""
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            frame = next(container.decode(video=0), None)
    except av.error.FFmpegError:  # said where the damaged part is needed
        frame = None
    return round(frame.rotation / 90) % 4 if frame is not None else 0


class _Video:
    """An open video file and the times of its frames."""

    def __init__(self, path: Path, source_fps: float | None) -> None:
        try:
            self.container = av.open(str(path), metadata_errors="ignore")
            if not self.container.streams.video:
                raise UnreadableMedia("it has no video stream")
            self.stream = self.container.streams.video[0]
            if self.stream.codec_context is None:
                raise UnreadableMedia("its codec is unknown")
            self.stream.thread_type = "AUTO"
            self.turns = _quarter_turns(path)
            self.rate = source_fps or float(self.stream.average_rate or self.stream.guessed_rate or 0)
        except (OSError, av.error.FFmpegError) as error:
            raise UnreadableMedia(f"the video cannot be opened ({error.strerror or error})") from error
        if not self.rate:
            self.container.close()
            raise UnreadableMedia("its frame rate is unknown: give source_fps")
        self.timed = source_fps is None
        context = self.stream.codec_context
        self.stored = round(context.width * float(self.stream.sample_aspect_ratio or 1)), context.height
        self.width, self.height = self.stored[::-1] if self.turns % 2 else self.stored

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def count(self, fps: float) -> int:
        """Frames at `fps`, from the packets' times."""
        try:
            packets = self.container.demux(self.stream)
            times = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
        except av.error.FFmpegError as error:
            raise UnreadableMedia(f"the video is damaged ({error.strerror or error})") from error
        if not times:
            raise UnreadableMedia("it has no frames")
        if self.converts(fps):
            span = (
                (max(times) - min(times)) * float(self.stream.time_base) if self.timed else (len(times) - 1) / self.rate
            )
            return max(1, int((span + 1 / self.rate) * fps + 0.5))
        return len(times)

    def converts(self, fps: float) -> bool:
        return abs(self.rate / fps - 1) > _SAME_RATE

    def decoded(self, size: tuple[int, int]) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds since the first frame, frame) of every frame of the file."""
        width, height = cover(self.width, self.height, size)
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        stored = (height, width) if self.turns % 2 else (width, height)
        start = last = None
        try:
            for index, frame in enumerate(self.container.decode(self.stream)):
                pixels = frame.to_ndarray(format="rgb24", width=stored[0], height=stored[1], interpolation="LANCZOS")
                pixels = np.rot90(pixels, self.turns)
                pts = frame.pts if self.timed and frame.pts is not None else None
                if pts is not None and last is not None and pts <= last:  # some AVI files hold no real times
                    self.timed, pts = False, None
                last = pts
                start = pts if start is None else start
                time = index / self.rate if pts is None else float((pts - (start or 0)) * frame.time_base)
                yield time, pixels[top : top + size[1], left : left + size[0]].copy()  # lets go of what is cut off
        except av.error.FFmpegError as error:
            raise UnreadableMedia(f"the video is damaged ({error.strerror or error})") from error


def _video_frames(path: Path, size: tuple[int, int], fps: float, source_fps: float | None) -> Iterator[np.ndarray]:
    """The frames at `fps`: of the file's frames always the nearest in time: slow clips repeat some, fast ones drop some."""
    with _Video(path, source_fps) as video:
        if not video.converts(fps):
            yield from (frame for _, frame in video.decoded(size))
            return
        index = 0
        previous: tuple[float, np.ndarray] | None = None
        for time, frame in video.decoded(size):
            while previous is not None and index / fps < (previous[0] + time) / 2:
                yield previous[1]
                index += 1
            previous = (time, frame)
        if previous is not None:
            end = previous[0] + 1 / video.rate
            while index < int(end * fps + 0.5):  # rounds as `count` does
                yield previous[1]
                index += 1
