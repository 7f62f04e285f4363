"""Reading images and videos. The clips are flat pictures whose brightness tells their number in the file."""

import struct
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image
from videolora.core.data.media import UnreadableMedia, cover, probe, read_image, read_windows
from videolora.core.data.windows import Window

FPS = 16
SIZE = (64, 48)  # x264 stores smaller pictures only in the order in which they are shown
FRAMES = 30


def write(path, pictures, fps=FPS, codec="libx264", times=None, title=None, **options):
    """pictures: (H, W, 3) uint8 each, or numbers of flat ones; times: of the frames, in milliseconds."""
    pictures = [flat(picture) if isinstance(picture, int) else picture for picture in pictures]
    with av.open(str(path), "w", container_options=options) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def flat(number):
    return np.full((48, 64, 3), 16 + 7 * number, np.uint8)


def number(picture):
    return round((picture.mean() - 16) / 7)


def read(path, *windows, size=SIZE, fps=FPS, **options):
    return list(read_windows(path, [Window(*window) for window in windows], size, fps, **options))


def taken(path, count, **options):
    """The numbers of the first `count` frames at the model's rate."""
    ((_, frames),) = read(path, (0, count), **options)
    return [number(frame) for frame in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """fps, suffix, codec -> a clip of `FRAMES` frames."""
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def make(fps=FPS, suffix=".mp4", codec="libx264"):
        key = (fps, suffix, codec)
        if key not in made:
            made[key] = write(folder / f"{len(made)}{suffix}", range(FRAMES), fps, codec)
        return made[key]

    return make


def assert_nearest(numbers, times, tolerance=1e-6):
    for index, number in enumerate(numbers):
        distances = [abs(time - index / FPS) for time in times]
        assert distances[number] <= min(distances) + tolerance, (index, number)


@pytest.mark.parametrize("fps", [8, 12, 15, 16, 24, 25, 30, 60, Fraction(16000, 1001), Fraction(30000, 1001)])
def test_of_the_frames_of_a_file_the_nearest_in_time_are_taken_for_its_whole_length(clip, fps):
    path = clip(fps)
    info = probe(path, FPS)
    assert (info.width, info.height) == SIZE
    assert abs(info.frames - FRAMES * FPS / fps) <= 0.5 + 1e-9
    numbers = taken(path, info.frames)
    assert all(later >= earlier for earlier, later in pairwise(numbers))
    if fps <= FPS:
        assert set(numbers) == set(range(FRAMES))  # slow clips lose nothing
    else:
        assert len(set(numbers)) == len(numbers)  # fast clips repeat nothing
    assert_nearest(numbers, [index / float(fps) for index in range(FRAMES)], tolerance=0.002)


@pytest.mark.parametrize(
    ("fps", "count", "numbers"),
    [
        (30, 16, [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21, 23, 24, 26, 28]),
        (24, 20, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]),
        (16, 30, list(range(30))),
        (8, 60, [0, *(number for number in range(1, 30) for _ in range(2)), 29]),
    ],
)
def test_frame_rates_convert_to_16_like_this(clip, fps, count, numbers):
    assert probe(clip(fps), FPS).frames == count
    assert taken(clip(fps), count) == numbers


@pytest.mark.parametrize("fps", [8, 15, 16, 24, 25, 30, 60])
def test_a_clip_has_exactly_the_frames_that_probing_counts(clip, fps):
    count = probe(clip(fps), FPS).frames
    assert len(taken(clip(fps), count)) == count
    with pytest.raises(UnreadableMedia, match=f"ends before frame {count + 1}"):
        read(clip(fps), (0, count + 1))


def test_a_frame_rate_that_is_almost_the_models_is_taken_as_it(tmp_path):
    path = write(tmp_path / "clip.mp4", [number % FRAMES for number in range(70)], Fraction("16.15"))
    assert probe(path, FPS).frames == 70  # and not 69
    assert taken(path, 70) == [number % FRAMES for number in range(70)]


def test_a_frame_rate_that_is_given_replaces_the_one_in_the_file(clip):
    assert probe(clip(16), FPS, 32).frames == FRAMES // 2
    assert taken(clip(16), 15, source_fps=32) == list(range(0, FRAMES, 2))
    assert probe(clip(30), FPS, 16).frames == FRAMES
    assert taken(clip(30), FRAMES, source_fps=16) == list(range(FRAMES))


@pytest.mark.parametrize("fps", [16, 24])
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mkv", "libx264"), (".mov", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"), (".avi", "libx264"),
     (".flv", "libx264"), (".wmv", "wmv2")],
)  # fmt: skip
def test_every_container_gives_the_frames_in_their_order(clip, suffix, codec, fps):
    path = clip(fps, suffix, codec)
    count = probe(path, FPS).frames
    assert count == FRAMES * FPS // fps
    assert_nearest(taken(path, count), [index / fps for index in range(FRAMES)], tolerance=0.002)


def test_a_variable_frame_rate_follows_the_times_of_the_frames(tmp_path):
    times = [0, 50, 100, 300, 350, 600, 1000]
    path = write(tmp_path / "variable.mp4", range(len(times)), 20, times=times)
    count = probe(path, FPS).frames
    assert count >= FPS  # a second and the last frame's own time
    assert_nearest(taken(path, count), [time / 1000 for time in times])


def test_a_clip_cut_without_encoding_it_again_has_only_the_frames_that_are_shown(clip, tmp_path):
    path = tmp_path / "cut.mp4"
    with av.open(str(clip())) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                shift = round(5 / FPS / packet.time_base)  # the first five frames are in the file, but before its start
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    assert probe(path, FPS).frames == FRAMES - 5
    assert taken(path, FRAMES - 5) == list(range(5, FRAMES))


def test_windows_may_overlap_and_come_in_the_order_in_which_they_end(clip):
    found = read(clip(), (20, 5), (0, 5), (2, 5), (4, 9), (4, 1))
    assert [tuple(window) for window, _ in found] == [(0, 5), (4, 1), (2, 5), (4, 9), (20, 5)]
    for window, frames in found:
        assert frames.shape == (window.count, 48, 64, 3) and frames.dtype == np.uint8
        assert [number(frame) for frame in frames] == list(range(window.start, window.start + window.count))


@pytest.fixture(scope="module")
def stripes():
    """96 x 32: red, green, blue from left to right."""
    picture = np.zeros((32, 96, 3), np.uint8)
    for channel in range(3):
        picture[:, 32 * channel : 32 * channel + 32, channel] = 200
    return picture


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (64, 64), (48, 48)])
def test_the_middle_is_cut_out_of_a_wide_picture(tmp_path, stripes, size):
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    (clip,) = read(write(tmp_path / "wide.mp4", [stripes] * 2), (0, 1), size=size)
    for picture in (clip[1][0], read_image(tmp_path / "wide.png", size)[0]):
        assert picture.shape == (size[1], size[0], 3)
        inner = picture[:, size[0] // 8 : -size[0] // 8]
        assert (inner[..., 1] > 170).all() and (inner[..., [0, 2]] < 40).all()


@pytest.mark.parametrize("size", [(96, 32), (48, 16), (144, 48)])
def test_a_picture_of_the_same_shape_is_kept_whole(tmp_path, stripes, size):
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    (clip,) = read(write(tmp_path / "wide.mp4", [stripes] * 2), (0, 1), size=size)
    for picture in (clip[1][0], read_image(tmp_path / "wide.png", size)[0]):
        for channel in range(3):
            middle = picture[size[1] // 2, size[0] * (2 * channel + 1) // 6]
            assert middle.argmax() == channel and middle.max() > 170


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "noise.png")
    assert (read_image(tmp_path / "noise.png", (48, 32)) == picture).all()


@pytest.mark.parametrize("source", [(1920, 1080), (1080, 1920), (33, 777), (64, 64), (7, 5)])
@pytest.mark.parametrize("size", [(960, 544), (16, 16), (16, 960)])
def test_resizing_covers_the_size_with_as_little_as_possible(source, size):
    width, height = cover(*source, size)
    assert width >= size[0] and height >= size[1]
    assert width == size[0] or height == size[1]
    assert abs(width - source[0] * max(size[0] / source[0], size[1] / source[1])) <= 0.5
    assert abs(height - source[1] * max(size[0] / source[0], size[1] / source[1])) <= 0.5


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".png", "RGB"), (".png", "L"), (".png", "P"), (".jpg", "RGB"), (".jpg", "L"), (".jpg", "CMYK"),
     (".webp", "RGB"), (".bmp", "RGB"), (".bmp", "P"), (".PNG", "RGB")],
)  # fmt: skip
def test_every_image_format_reads_as_the_same_colours(tmp_path, suffix, mode):
    path = tmp_path / f"grey{suffix}"
    image = Image.new("RGB", (48, 32), (120, 120, 120))
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(path)
    info = probe(path, FPS)
    assert (info.width, info.height, info.frames) == (48, 32, 1)
    picture = read_image(path, (32, 32))
    assert picture.shape == (1, 32, 32, 3) and picture.dtype == np.uint8
    assert (abs(picture.astype(int) - 120) <= 2).all()


def test_an_image_of_16_bits_keeps_its_brightness(tmp_path):
    Image.fromarray(np.full((32, 32), 120 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (abs(read_image(tmp_path / "deep.png", SIZE).astype(int) - 120) <= 1).all()


def test_an_image_is_turned_upright(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16, 0] = 220  # the left half is red, and the top once the image is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    info = probe(tmp_path / "turned.jpg", FPS)
    assert (info.width, info.height) == (16, 32)
    (upright,) = read_image(tmp_path / "turned.jpg", (16, 32))
    assert upright[:14, :, 0].min() > 180 and upright[18:, :, 0].max() < 40


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 100), (51, 224)])
def test_transparency_is_laid_over_white(tmp_path, suffix, alpha, expected):
    path = tmp_path / f"glass{suffix}"
    Image.new("RGBA", SIZE, (100, 100, 100, alpha)).save(path, **({"exact": True} if suffix == ".webp" else {}))
    assert (abs(read_image(path, SIZE).astype(int) - expected) <= 2).all()


def test_a_transparent_palette_colour_is_laid_over_white(tmp_path):
    image = Image.new("P", SIZE, 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "palette.png", transparency=0)
    Image.new("LA", SIZE, (50, 0)).save(tmp_path / "grey.png")
    for name in ("palette.png", "grey.png"):
        assert (read_image(tmp_path / name, SIZE) == 255).all()


def test_a_folder_of_images_is_a_video_at_the_models_rate(tmp_path):
    for index in range(10):
        Image.fromarray(flat(index)).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert probe(tmp_path, FPS) == probe(tmp_path, FPS, 60)
    assert (probe(tmp_path, FPS).width, probe(tmp_path, FPS).height, probe(tmp_path, FPS).frames) == (64, 48, 10)
    assert taken(tmp_path, 10) == list(range(10))
    with pytest.raises(UnreadableMedia, match="ends before frame 13"):
        read(tmp_path, (0, 5), (4, 9))


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BROKEN = {
    "text.mp4": lambda path, whole: path.write_text("not a video"),
    "empty.mp4": lambda path, whole: path.write_bytes(b""),
    "cut.mp4": lambda path, whole: path.write_bytes(whole.read_bytes()[:-200]),
    "sound.mp4": lambda path, whole: sound(path),
    "absent.mp4": lambda path, whole: None,
    "folder": lambda path, whole: path.mkdir(),
    "text.png": lambda path, whole: path.write_text("not an image"),
    "cut.png": lambda path, whole: cut_image(path),
    "cut.jpg": lambda path, whole: cut_image(path),
    "absent.webp": lambda path, whole: None,
}


def cut_image(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path, clip, name):
    path = tmp_path / name
    BROKEN[name](path, clip())
    if not name.startswith("cut.") or name == "cut.mp4":  # of an image only the header is looked at
        with pytest.raises(UnreadableMedia, match=r"\w+ \w+"):
            probe(path, FPS)
    with pytest.raises(UnreadableMedia, match=r"\w+ \w+"):
        read_image(path, SIZE) if path.suffix in (".png", ".jpg", ".webp") else read(path, (0, 1))


def test_a_video_of_an_unknown_codec_is_refused(tmp_path):
    path = write(tmp_path / "clip.mkv", range(FRAMES))
    whole = path.read_bytes()
    assert b"V_MPEG4/ISO/AVC" in whole
    path.write_bytes(whole.replace(b"V_MPEG4/ISO/AVC", b"V_XXXXX/XXX/XXX"))
    with pytest.raises(UnreadableMedia):
        probe(path, FPS)


def test_sixteen_bit_grey_with_a_transparent_value_keeps_its_grey(tmp_path):
    image = Image.fromarray(np.full((32, 32), 120 * 257, np.uint16))
    image.save(tmp_path / "grey.png", transparency=1)
    assert (read_image(tmp_path / "grey.png", (32, 32)) == 120).all()


@pytest.mark.parametrize("size", [(40, 1000), (1000, 40), (70, 50), (31, 33)])
def test_only_the_middle_that_is_kept_is_made_and_it_is_that_of_the_whole_image(tmp_path, size):
    rows, columns = np.mgrid[: size[1], : size[0]]
    picture = np.stack([128 + 90 * np.sin(rows / 9), 128 + 90 * np.cos(columns / 7), rows * 0 + 50], -1).astype(
        np.uint8
    )
    Image.fromarray(picture).save(tmp_path / "image.png")
    covering = cover(*size, (96, 64))
    left, top = (covering[0] - 96) // 2, (covering[1] - 64) // 2
    whole = np.asarray(Image.fromarray(picture).resize(covering, Image.Resampling.LANCZOS))
    expected = whole[top : top + 64, left : left + 96].astype(int)
    made = read_image(tmp_path / "image.png", (96, 64))[0].astype(int)
    assert np.abs(made - expected)[2:-2, 2:-2].max() <= 2  # at the rim less of what was cut off is mixed in


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    info = probe(tmp_path / "wide.mkv", 16)
    assert (info.width, info.height, info.frames) == (128, 48, 5)


@pytest.mark.parametrize("damage", ["zeros", "cut"])
def test_a_video_that_is_damaged_in_the_middle_is_refused_when_that_part_is_read(tmp_path, damage):
    path = write(tmp_path / "clip.mp4", range(FRAMES), movflags="faststart")
    whole = path.read_bytes()
    start = whole.index(b"mdat") + 4
    size = struct.unpack(">I", whole[start - 8 : start - 4])[0] - 8
    half = start + size // 2
    path.write_bytes(whole[:half] + (bytes(len(whole) - half) if damage == "zeros" else b""))
    with pytest.raises(UnreadableMedia, match=r"damaged|ends before"):
        read(path, (0, FRAMES))


def test_a_title_that_is_not_utf8_does_not_matter(tmp_path):
    path = write(tmp_path / "titled.mp4", range(4), title="a title of old")
    path.write_bytes(path.read_bytes().replace(b"a title of old", "café à la carte".encode("latin-1")[:14]))
    assert probe(path, FPS).frames == 4
    assert taken(path, 4) == list(range(4))


def turned(path, degrees):
    """The same clip as a phone writes it: pixels as before, and a display matrix that turns them."""
    corners = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]  # clockwise
    a, b, c, d = (struct.pack(">i", value << 16) for value in corners)
    zero = struct.pack(">i", 0)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # after version, times, ids, duration, layer, volume
    data[start : start + 36] = a + b + zero + c + d + zero + zero + zero + struct.pack(">i", 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (0, -1)), (180, (-1, -1)), (270, (-1, 0))])
def test_videos_that_phones_store_lying_are_turned_upright(tmp_path, degrees, corner):
    path = tmp_path / "phone.mp4"
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:24, :24] = 255  # a white corner, top left of the stored picture
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    turned(path, degrees)
    size = (96, 64) if degrees % 180 == 0 else (64, 96)
    info = probe(path, 16)
    assert (info.width, info.height) == size
    ((_, frames),) = read_windows(path, [Window(0, 5)], size, 16)
    assert frames.shape == (5, size[1], size[0], 3)
    for y in (0, -1):
        for x in (0, -1):
            assert (frames[0, y, x].mean() > 128) == ((y, x) == corner), (y, x)
