"""Atomic writing, names that stay in their folder, identities of files."""

import errno
import os

import pytest
from videolora.core.io.files import atomic, digest, fingerprint, inside, read_json, write_json, written_once

MIB = 1 << 20


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_as_a_whole_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "lora.bin"
    for text in (b"first", b"second"):
        with atomic(target) as temporary:
            assert temporary.parent == target.parent  # a rename is atomic only within one disk
            temporary.write_bytes(text)
            assert not target.exists() or target.read_bytes() == b"first"
        assert content(target.parent) == {"lora.bin": text}
        if text == b"first":
            os.link(target, tmp_path / "still open")  # stands for somebody who is reading the old file
    assert (tmp_path / "still open").read_bytes() == b"first"


def test_files_that_may_not_replace_others_are_found_again_where_they_are_the_same(tmp_path):
    folder = tmp_path / "new"
    one, two = folder / "one.bin", folder / "two.bin"

    def writing(*contents):
        def make(targets):
            for target, content in zip(targets, contents, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            return " and ".join(map(str, targets))

        return make

    for _ in range(2):
        assert written_once([one, two], writing(b"1", b"2")) == f"{one} and {two}"
        assert content(folder) == {"one.bin": b"1", "two.bin": b"2"}
        one.unlink()  # as if the first time had been interrupted
    written_once([one, two], writing(b"1", b"2"))
    with pytest.raises(ValueError, match=r"two\.bin exists already and is something else"):
        written_once([one, two], writing(b"1", b"other"))
    assert content(folder) == {"one.bin": b"1", "two.bin": b"2"}
    with pytest.raises(ValueError, match=r"one\.bin would be written twice"):
        written_once([one, one], writing(b"1", b"2"))


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("no"), Stopped(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("written", [b"", b"half of"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, written):
    target = tmp_path / "lora.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic(target) as temporary:
        if written:
            temporary.write_bytes(written)
        raise error
    assert content(tmp_path) == {"lora.bin": b"old"}


def test_a_full_disk_is_reported_with_the_target_and_the_remedy(tmp_path):
    target = tmp_path / "lora.bin"
    message = r"could not write .*lora\.bin: No space left.*free some space"
    with pytest.raises(OSError, match=message) as raised, atomic(target) as temporary:
        temporary.write_bytes(b"half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC
    assert content(tmp_path) == {}


@pytest.mark.parametrize("below", ["lora.bin", "folder/lora.bin"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, below):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(OSError, match=r"could not write .*lora\.bin"), atomic(tmp_path / "file" / below) as temporary:
        temporary.write_bytes(b"new")
    assert content(tmp_path) == {"file": b"in the way"}


def test_a_folder_of_the_same_name_is_not_replaced(tmp_path):
    (tmp_path / "lora.bin").mkdir()
    with pytest.raises(OSError, match=r"could not write .*lora\.bin"), atomic(tmp_path / "lora.bin") as temporary:
        temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.bin"]


def test_json_comes_back_and_is_readable(tmp_path):
    value = {"steps": [1, 2.5, None, True], "name": "schön 光"}
    write_json(tmp_path / "state.json", value)
    assert read_json(tmp_path / "state.json") == value
    assert "schön 光" in (tmp_path / "state.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, bad):
    write_json(tmp_path / "state.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "state.json", {"loss": bad})
    assert content(tmp_path) == {"state.json": b"1"}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_a_file_that_is_not_json_is_named(tmp_path, raw):
    (tmp_path / "state.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"state\.json is not a JSON file"):
        read_json(tmp_path / "state.json")


@pytest.mark.parametrize(
    "name",
    ["my_lora", "folder/my_lora", "a/b/c", "my lora", "v1.2", ".hidden", "...a", "light-光", "console", "com", "com10",
     "a~b", "nullable/aux1"],
)  # fmt: skip
def test_a_plain_name_leads_below_its_root(tmp_path, name):
    path = inside(tmp_path, name)
    assert path == tmp_path.joinpath(*name.split("/"))


def test_a_backslash_separates_folders_on_every_system(tmp_path):
    assert inside(tmp_path, "folder\\my_lora") == tmp_path / "folder" / "my_lora"


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../b", "a/../b", "a/..", "a\\..\\b", "a/./b", "a//b", "a/", "/x", "\\x", "\\\\server\\x",
     "C:\\x", "C:x", "C:/x", "c:", "~", "~/x", "~root", "a ", " a", "a/ b", "a /b", "a.", "a./b", "...", "a\n", "a\tb",
     "a\x00b", "a\x1fb", "a<b", "a>b", 'a"b', "a|b", "a?b", "a*b", "a:stream", "con", "CON", "con.txt", "a/nul", "NUL/a",
     "prn", "aux.tar.gz", "com1", "LPT9.log"],
)  # fmt: skip
def test_a_name_that_is_not_plain_on_every_system_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not a usable name"):
        inside(tmp_path / "root", name)


def test_a_name_that_leads_out_through_a_link_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "within").symlink_to(root, target_is_directory=True)
    for name in ("out", "out/my_lora"):
        with pytest.raises(ValueError, match="leads out of"):
            inside(root, name)
    assert inside(root, "within/my_lora") == root / "within" / "my_lora"


def test_the_root_itself_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert inside(tmp_path / "link", "my_lora") == tmp_path / "link" / "my_lora"


@pytest.mark.parametrize("size", [0, 1, 1000, MIB, MIB + 1, 3 * MIB])
def test_any_byte_of_a_file_changes_its_fingerprint(tmp_path, size):
    path = tmp_path / "clip.mp4"
    raw = bytearray(size)
    path.write_bytes(raw)
    seen = {fingerprint(path)}
    for place in {0, size // 2, size - 1} & set(range(size)):
        raw[place] ^= 1
        path.write_bytes(raw)
        seen.add(fingerprint(path))
        raw[place] ^= 1
    path.write_bytes(raw + b"\x00")
    seen.add(fingerprint(path))
    assert len(seen) == 2 + min(size, 3)
    path.write_bytes(raw)
    assert fingerprint(path) in seen
    path.rename(tmp_path / "renamed.mp4")
    assert fingerprint(tmp_path / "renamed.mp4") in seen  # the content counts, not the name


def test_a_large_file_is_known_by_its_size_and_its_content_from_start_to_end(tmp_path):
    path = tmp_path / "model.safetensors"
    size = 640 * MIB

    def sparse(size, place=None):
        with open(path, "wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"\x01" * (20 * MIB if 0 < place < size - 1 else 1))
        return fingerprint(path)

    whole = sparse(size)
    assert sparse(size) == whole
    different = [sparse(size + 1), sparse(size - 1), sparse(size, 0), sparse(size, size - 1), sparse(size, size // 2)]
    assert len({whole, *different}) == 6


def test_a_digest_depends_on_the_value_alone():
    assert digest({"b": [1, 2.5, "光"], "a": None}) == digest({"a": None, "b": (1, 2.5, "光")})
    values = [[], {}, "", 0, "0", [0], [[0]], None, "null", False, {"a": 1}, {"a": 2}, {"b": 1}]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_a_digest_is_the_same_in_every_process_and_release():
    known = digest(["clip", {"width": 832, "height": 480}, 16])
    assert known == "451c0457659c35bf"
