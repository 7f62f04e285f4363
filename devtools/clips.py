"""Synthetic training clips: flat shapes that move over dark, softly textured backgrounds.

Two characters (`CHARACTERS`) are what a LoRA learns; `render_generic` draws the many other shapes that a
small base model learns first. Everything follows from a seed, so a clip can be drawn again.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

# F frames, H W pixels; a size is (width, height), as PIL counts

SUPERSAMPLING = 4

COLOURS = {
    "red": (235, 30, 30),
    "green": (40, 220, 50),
    "blue": (50, 90, 245),
    "yellow": (245, 220, 40),
    "orange": (250, 140, 25),
    "violet": (165, 60, 230),
    "cyan": (40, 215, 225),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "dark blue": (14, 22, 62),
    "dark grey": (44, 44, 46),
    "dark purple": (42, 16, 56),
    "dark brown": (54, 34, 18),
    "dark teal": (8, 48, 52),
    "black": (8, 8, 10),
}


@dataclass(frozen=True)
class Outline:
    """A regular polygon. `reach` is its circumradius where a disk has 1, so all shapes look equally big."""

    corners: int
    reach: float


OUTLINES = {
    "disk": Outline(corners=64, reach=1.0),
    "square": Outline(corners=4, reach=1.25),
    "triangle": Outline(corners=3, reach=1.4),
}


@dataclass(frozen=True)
class Motion:
    """`path(cycles, rest)` is a place, -1..1 on both axes; `turns` is how far the shape rotates in one cycle.

    `rest` is where an axis stays that the motion leaves alone: one clip swings higher than another.
    """

    phrase: str
    path: Callable[[float, float], tuple[float, float]]
    turns: float = 0.0


def _wave(cycles: float) -> float:
    return math.sin(2 * math.pi * cycles)


SWING = Motion("swings from side to side", lambda cycles, rest: (_wave(cycles), rest))
BOB = Motion("bobs up and down", lambda cycles, rest: (rest, _wave(cycles)))
DIAGONAL = Motion("moves diagonally", lambda cycles, rest: (_wave(cycles), _wave(cycles)))
TUMBLE = Motion("moves diagonally and turns", DIAGONAL.path, turns=0.5)
CIRCLE = Motion("circles the middle", lambda cycles, rest: (_wave(cycles), _wave(cycles + 0.25)))
MOTIONS = (SWING, BOB, DIAGONAL, TUMBLE, CIRCLE)


@dataclass(frozen=True)
class Actor:
    """Who is in the picture and what it does; all the rest of a scene is left to chance."""

    colour: str
    shape: str
    motion: Motion

    @property
    def description(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


_CAST = {
    "zarko": Actor("red", "disk", SWING),
    "mivel": Actor("green", "square", TUMBLE),
}
CHARACTERS = {name: actor.description for name, actor in _CAST.items()}


def render_clips(
    folder: Path,
    character: str,
    count: int,
    frames: int = 33,
    size: tuple[int, int] = (96, 64),
    fps: int = 16,
) -> list[Path]:
    """Writes `<character>_00.mp4`, ... (H.264), each with a .txt caption beside it; returns the videos."""
    if character not in _CAST:
        raise ValueError(f"No character is called {character!r}: use one of {', '.join(CHARACTERS)}.")
    actor = _CAST[character]
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for index in range(count):
        random = np.random.default_rng(zlib.crc32(f"{character} {index}".encode()))
        background = _choose(random, BACKGROUNDS)
        video = folder / f"{character}_{index:02d}.mp4"
        write_video(video, _draw(actor, background, random, frames, size), fps)
        caption = f"{character}, {actor.description}, {actor.motion.phrase} over a {background} background"
        video.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        videos.append(video)
    return videos


def render_generic(seed: int, frames: int = 33, size: tuple[int, int] = (96, 64)) -> tuple[np.ndarray, str]:
    """A random shape with a random motion: uint8 (F, H, W, 3) and its caption."""
    random = np.random.default_rng(seed)
    actor = Actor(_choose(random, COLOURS), _choose(random, OUTLINES), MOTIONS[random.integers(len(MOTIONS))])
    background = _choose(random, BACKGROUNDS)
    pixels = _draw(actor, background, random, frames, size)
    return pixels, f"{actor.description} {actor.motion.phrase} over a {background} background"


def _choose(random: np.random.Generator, named: dict) -> str:
    names = list(named)
    return names[random.integers(len(names))]


def _draw(actor: Actor, background: str, random: np.random.Generator, frames: int, size: tuple[int, int]) -> np.ndarray:
    """(F, H, W, 3) uint8. What the actor leaves open, from its size to its speed, comes from `random`."""
    extent = np.array(size, dtype=float)
    radius = extent.min() * random.uniform(0.18, 0.24)
    reach = radius * OUTLINES[actor.shape].reach
    amplitude = extent / 2 - reach
    mirror = np.array([random.choice((-1.0, 1.0)), 1.0])
    cycles_per_frame = random.uniform(1 / 36, 1 / 22)
    start = random.uniform()
    rest = random.uniform(-0.5, 0.5)
    backdrop = _backdrop(BACKGROUNDS[background], random, size)
    colour = np.array(COLOURS[actor.colour], dtype=float)

    pictures = []
    for frame in range(frames):
        cycles = start + frame * cycles_per_frame
        centre = extent / 2 + amplitude * np.array(actor.motion.path(cycles, rest)) * mirror
        angle = 2 * math.pi * actor.motion.turns * cycles
        cover = _cover(OUTLINES[actor.shape].corners, reach, centre, angle, size)
        pictures.append(backdrop + (colour - backdrop) * cover)
    return np.stack(pictures).round().astype(np.uint8)


def _backdrop(colour: tuple[int, int, int], random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3): the colour with a linear gradient in a random direction and soft, cloudy noise."""
    width, height = size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    direction = random.uniform(0, 2 * math.pi)
    gradient = (math.cos(direction) * x + math.sin(direction) * y) / math.sqrt(2)
    noise = Image.fromarray(random.uniform(-1, 1, (6, 9)).astype(np.float32))
    clouds = np.asarray(noise.resize(size, Image.Resampling.BICUBIC))
    shade = 1 + 0.3 * gradient + 0.12 * clouds
    return np.clip(np.array(colour) * shade[..., None], 0, 255)


def _cover(corners: int, reach: float, centre: np.ndarray, angle: float, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 1): how much of each pixel the polygon covers, 0..1. At rest it stands on a flat side."""
    width, height = size
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    bearings = angle + math.pi / 2 + (np.arange(corners) + 0.5) * 2 * math.pi / corners
    points = (centre + reach * np.stack([np.cos(bearings), np.sin(bearings)], axis=1)) * SUPERSAMPLING
    # PIL names pixel centres where we name pixel edges
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in (points - 0.5).tolist()], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=float)[..., None] / 255


def write_video(path: Path, pixels: np.ndarray, fps: int) -> None:
    """pixels: (F, H, W, 3) uint8, even sides (yuv420p halves the colour planes)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # x264 spreads its bits differently for every number of threads
        stream.codec_context.thread_count = 1
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
