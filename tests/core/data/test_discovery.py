"""The files and captions of a data set."""

import json
import re
from pathlib import Path

import pytest
from videolora.core.data.config import DatasetConfig
from videolora.core.data.discovery import find_items, media_files


def find(folder, kind="video", **settings):
    return find_items(DatasetConfig(kind=kind, folder=folder, cache=folder / "cache", **settings))


def find_rows(folder, *rows, kind="video", encoding="utf-8"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = folder / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode(encoding))
    return find_items(DatasetConfig(kind=kind, jsonl=path, cache=folder / "cache"), lambda written: folder / written)


def place(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a caption of " + name if name.endswith((".txt", ".caption")) else "")


def test_items_are_sorted_and_captions_stripped(tmp_path):
    place(tmp_path, "b.mp4", "a.MOV", "c.v2.webm", "b.txt", "c.v2.txt", "notes.txt", "still.png", "sub.mp4/x.mp4")
    (tmp_path / "a.txt").write_text("\n  a red disk, “schön”  \n", encoding="utf-8")
    items = find(tmp_path)
    assert [(item.source.name, item.key, item.caption) for item in items] == [
        ("a.MOV", "a", "a red disk, “schön”"),
        ("b.mp4", "b", "a caption of b.txt"),
        ("c.v2.webm", "c.v2", "a caption of c.v2.txt"),
    ]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("video", f"a.{ext}") for ext in ("mp4", "webm", "avi", "mkv", "mov", "flv", "wmv", "m4v", "mpg", "mpeg", "MP4")]
    + [("image", f"a.{ext}") for ext in ("png", "jpg", "jpeg", "webp", "bmp", "avif", "JPG")],
)
def test_every_known_kind_of_file_is_found(tmp_path, kind, name):
    place(tmp_path, name, "a.txt")
    (item,) = find(tmp_path, kind)
    assert item.source == tmp_path / name
    with pytest.raises(ValueError, match=f"holds no {'image' if kind == 'video' else 'video'}s"):
        find(tmp_path, "image" if kind == "video" else "video")


def test_captions_have_the_extension_that_was_asked_for(tmp_path):
    place(tmp_path, "a.mp4", "a.txt", "a.caption")
    assert find(tmp_path, caption_extension=".caption")[0].caption == "a caption of a.caption"


def test_a_caption_extension_without_its_dot_is_explained(tmp_path):
    place(tmp_path, "a.mp4", "a.txt")
    with pytest.raises(ValueError, match="caption_extension"):
        find(tmp_path, caption_extension="txt")


def test_an_empty_or_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} holds no videos.*\.mp4"):
        find(tmp_path)
    with pytest.raises(ValueError, match="absent does not exist"):
        find(tmp_path / "absent")
    with pytest.raises(ValueError, match="absent does not exist"):
        media_files(tmp_path / "absent", frozenset((".png",)))


def test_clips_without_a_caption_are_counted_and_named(tmp_path):
    place(tmp_path, "a.mp4", "b.mp4", "c.mp4", "b.txt")
    with pytest.raises(ValueError, match=r"2 of 3 videos .*: a\.mp4 \(a\.txt is missing\), c\.mp4 .* text file"):
        find(tmp_path)
    place(tmp_path, *(f"d{index}.mp4" for index in range(9)))
    with pytest.raises(ValueError, match=r"11 of 12 .* and 6 more"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n\t", "empty"), (b"", "empty"), (b"\xef\xbb\xbf\n", "empty"), ("café".encode("latin-1"), "UTF-8")],
)
def test_an_unusable_caption_is_named(tmp_path, content, message):
    place(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt is (not )?{message}"):
        find(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    place(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes("a disk".encode("utf-8-sig"))
    assert find(tmp_path)[0].caption == "a disk"
    row = {"video_path": "a.mp4", "caption": "a square"}
    assert find_rows(tmp_path, row, encoding="utf-8-sig")[0].caption == "a square"


def test_a_folder_of_images_with_a_caption_beside_it_is_a_clip_and_other_folders_are_not(tmp_path):
    place(tmp_path, "a.mp4", "a.txt", "walk/0.png", "walk/1.png", "walk.txt", "stills/0.png", "cache/a.safetensors")
    assert [(item.source.name, item.caption) for item in find(tmp_path)] == [
        ("a.mp4", "a caption of a.txt"), ("walk", "a caption of walk.txt"),
    ]  # fmt: skip


def test_a_new_caption_leaves_the_keys_as_they_are(tmp_path):
    place(tmp_path, "a.mp4", "a.webm", "a.txt")
    keys = [item.key for item in find(tmp_path)]
    (tmp_path / "a.txt").write_text("another caption")
    assert [item.key for item in find(tmp_path)] == keys


def test_files_that_share_a_stem_have_different_keys_that_do_not_change(tmp_path):
    place(tmp_path, "a.mp4", "a.webm", "b.mp4", "a.txt", "b.txt")
    keys = [item.key for item in find(tmp_path)]
    assert keys == [item.key for item in find(tmp_path)]
    assert len(set(keys)) == 3 and keys[2] == "b"
    assert all(key.startswith("a-") for key in keys[:2])


def test_rows_of_a_jsonl_file_are_items_in_order_of_their_paths(tmp_path):
    place(tmp_path, "two/a.mp4", "one/a.mp4", "frames/0.png")
    items = find_rows(
        tmp_path,
        {"video_path": "two/a.mp4", "caption": " second "},
        "",
        {"video_path": "one/a.mp4", "caption": "first", "note": 3},
        {"video_path": "frames", "caption": "a folder of frames"},
    )
    assert [(item.source, item.caption) for item in items] == [
        (tmp_path / "frames", "a folder of frames"),
        (tmp_path / "one/a.mp4", "first"),
        (tmp_path / "two/a.mp4", "second"),
    ]
    assert len({item.key for item in items}) == 3


def test_one_clip_with_two_captions_is_two_items_with_their_own_keys(tmp_path):
    place(tmp_path, "a.mp4")
    items = find_rows(tmp_path, *({"video_path": "a.mp4", "caption": text} for text in ("a disk", "a red disk")))
    assert len({item.key for item in items}) == 2


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\u2029"])
def test_only_line_feeds_separate_the_rows(tmp_path, mark):
    place(tmp_path, "a.mp4")
    (item,) = find_rows(tmp_path, {"video_path": "a.mp4", "caption": f"a{mark}b"})
    assert item.caption == f"a{mark}b"


def test_all_unusable_rows_are_named_at_once(tmp_path):
    place(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=r"line 1: .*gone\.mp4.*line 2: .*JSON"):
        find_rows(
            tmp_path, {"video_path": "gone.mp4", "caption": "x"}, "{", {"video_path": "a.mp4", "caption": "a disk"}
        )


def test_image_rows_have_their_own_field(tmp_path):
    place(tmp_path, "a.png")
    (item,) = find_rows(tmp_path, {"image_path": "a.png", "caption": "a disk"}, kind="image")
    assert (item.source, item.key) == (tmp_path / "a.png", "a")
    with pytest.raises(ValueError, match='"image_path" and "caption"'):
        find_rows(tmp_path, {"video_path": "a.png", "caption": "a disk"}, kind="image")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{video_path: a.mp4}", "is not JSON"),
        ("[1, 2]", '"video_path" and "caption"'),
        ({"caption": "a disk"}, '"video_path" and "caption"'),
        ({"video_path": "a.mp4"}, '"video_path" and "caption"'),
        ({"video_path": "a.mp4", "caption": 3}, '"video_path" and "caption"'),
        ({"video_path": "a.mp4", "caption": " "}, "the caption is empty"),
        ({"video_path": "gone.mp4", "caption": "a disk"}, "gone.mp4 does not exist"),
        ({"video_path": "a.mp4", "caption": "a disk", "control_path": "b.mp4"}, "control data is not supported"),
    ],
)
def test_an_error_in_a_row_names_the_file_and_the_line(tmp_path, row, message):
    place(tmp_path, "a.mp4")
    good = {"video_path": "a.mp4", "caption": "a disk"}
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3\b.*" + re.escape(message)):
        find_rows(tmp_path, good, "", row, good)


def test_a_jsonl_file_that_is_empty_or_not_utf8_is_named(tmp_path):
    place(tmp_path, "a.mp4")
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
        find_rows(tmp_path, "", " ")
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        find_rows(tmp_path, {"video_path": "a.mp4", "caption": "café"}, encoding="latin-1")


def test_a_jsonl_file_that_does_not_exist_is_named():
    with pytest.raises(OSError, match=r"absent\.jsonl"):
        find_items(DatasetConfig(kind="video", jsonl=Path("absent.jsonl"), cache=Path("cache")))
