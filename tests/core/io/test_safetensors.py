"""safetensors files, read and written beside the official library."""

import json
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from videolora.core.io import safetensors

DTYPES = sorted(safetensors.DTYPES)
METADATA = {"format": "pt", "title": "schön 光", "empty": ""}


def values(dtype, *shape):
    """Every bit pattern counts, so the values are random bytes."""
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def raw(tensor):
    return bytes(safetensors.tensor_bytes(tensor))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert raw(found[name]) == raw(value), name


@pytest.fixture
def tensors():
    made = {code: values(dtype, 3, 5) for code, dtype in safetensors.DTYPES.items()}
    made |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "odd": values(torch.uint8, 7)}
    made |= {
        "turned": values(torch.float32, 4, 6).T,
        "every second": values(torch.bfloat16, 8)[::2],
        "schön.光": torch.ones(2),
    }
    return made


def test_the_official_library_reads_what_is_saved(tmp_path, tensors):
    safetensors.save(tmp_path / "a.safetensors", tensors, METADATA)
    same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == METADATA


def test_what_the_official_library_saves_is_read(tmp_path, tensors):
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors", METADATA)
    found, metadata = safetensors.load(tmp_path / "a.safetensors")
    same(found, tensors)
    assert metadata == METADATA


def test_a_file_survives_saving_and_loading_with_nothing_in_it(tmp_path, tensors):
    for each, metadata in ((tensors, METADATA), ({}, METADATA), ({}, {}), (tensors, {})):
        safetensors.save(tmp_path / "a.safetensors", each, metadata)
        found, read = safetensors.load(tmp_path / "a.safetensors")
        same(found, each)
        assert read == metadata and list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_the_header_tells_shapes_dtypes_and_places_without_the_data(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    safetensors.save(path, tensors, METADATA)
    header = safetensors.read_header(path)
    content = path.read_bytes()
    assert list(header.tensors) == list(tensors) and header.metadata == METADATA
    for name, info in header.tensors.items():
        assert (info.shape, info.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        assert content[info.start : info.stop] == raw(tensors[name]) and info.nbytes == len(raw(tensors[name]))
    assert min(info.start for info in header.tensors.values()) % 256 == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path, tensors):
    for name in ("a", "b"):
        safetensors.save(tmp_path / name, tensors, METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "cut.safetensors"
    safetensors.save(path, {"weight": torch.ones(40), "bias": torch.ones(3)}, {})
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) - 172, len(whole) - 12, len(whole) - 1):
        path.write_bytes(whole[:length])
        for read in (safetensors.read_header, safetensors.load):
            with pytest.raises(ValueError, match=r"cut\.safetensors is (truncated|not a safetensors file)"):
                read(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"it should have {len(whole)} bytes and has {len(whole) - 1}\."):
        safetensors.read_header(path)


def entry(**changes):
    return {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"garbage!",
        b'{"weight": ',
        b"\xff\xfe{}",
        b"[" * 200_000,
        [1, 2],
        "weight",
        {"weight": 3},
        {"weight": {"dtype": "F32"}},
        entry(dtype="F33"),
        entry(dtype=32),
        entry(shape=[5]),
        entry(shape=4),
        entry(shape=["4"]),
        entry(shape=[-1, -4]),
        entry(shape=[4.0]),
        entry(data_offsets=[0, 12]),
        entry(data_offsets=[-16, 0]),
        entry(data_offsets=[16, 0]),
        entry(data_offsets=[0.0, 16.0]),
        entry(data_offsets=[0, 16, 32]),
        entry(data_offsets=None),
        {**entry(), "__metadata__": ["a"]},
        {**entry(), "__metadata__": "a"},
        {**entry(), "__metadata__": {"a": 1}},
    ],
)
def test_a_header_that_makes_no_sense_is_refused_by_name(tmp_path, header):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a safetensors file"):
        safetensors.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"<!DOCTYPE html><html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(64)]
)
def test_another_kind_of_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.safetensors is not a safetensors file"):
        safetensors.read_header(tmp_path / "other.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "shrinking.safetensors"
    safetensors.save(path, {"weight": torch.ones(40)}, {})
    info = safetensors.read_header(path).tensors["weight"]
    with open(path, "r+b") as file:
        file.truncate(info.stop - 1)
    with open(path, "rb") as file, pytest.raises(ValueError, match=r"shrinking\.safetensors ended early"):
        safetensors.read_tensor(file, info)


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save(path, {"weight": torch.ones(4)}, {})
    before = path.read_bytes()
    layout = [("weight", (8,), torch.float32)]
    with pytest.raises(KeyboardInterrupt), safetensors.writing(path, layout, {}) as file:
        file.write(bytes(16))
        raise KeyboardInterrupt
    wrong = pytest.raises(AssertionError, match="wrote 16 bytes of data where the header says 32")
    with wrong, safetensors.writing(path, layout, {}) as file:
        file.write(bytes(16))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sendfile", [True, False])
def test_bytes_are_copied_to_the_end_of_what_is_written(tmp_path, monkeypatch, sendfile):
    if not sendfile:
        monkeypatch.setattr(sys, "platform", "win32")
    content = bytes(range(256)) * 300
    (tmp_path / "source").write_bytes(content)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb") as target:
        target.write(b"before")
        safetensors.copy_bytes(source, target, 1000, 70000)
        target.write(b"between")
        safetensors.copy_bytes(source, target, 5, 5)
        safetensors.copy_bytes(source, target, 0, 3)
        assert target.tell() == 6 + 69000 + 7 + 3
        with pytest.raises(ValueError, match="source ended early"):
            safetensors.copy_bytes(source, target, len(content) - 10, len(content) + 1)
    expected = b"before" + content[1000:70000] + b"between" + content[:3]
    assert (tmp_path / "target").read_bytes()[: len(expected)] == expected


def test_a_hash_of_tensors_depends_on_names_and_values_only(tmp_path):
    a, b = torch.ones(3), torch.zeros(2)
    known = safetensors.sha256_of_tensors({"a": a, "b": b})
    assert known == safetensors.sha256_of_tensors({"b": b.clone(), "a": a.clone()})
    others = [{"a": a, "c": b}, {"a": b, "b": a}, {"a": a}, {"a": a, "b": b + 1}, {"a": a, "b": b.bfloat16()}]
    assert len({known, *map(safetensors.sha256_of_tensors, others)}) == 6
