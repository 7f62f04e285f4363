"""Files of torch, which could hold any program."""

import os
import warnings

import pytest
import torch
from videolora.core.io import torch_file

FORMATS = {"zip": True, "legacy": False}
TENSORS = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)}


def save(path, content, kind="zip"):
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin"])
def test_tensors_are_read_by_name(tmp_path, kind, name):
    torch.testing.assert_close(torch_file.load(save(tmp_path / name, TENSORS, kind)), TENSORS, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"module": tensors, "global_step": 3},
        lambda tensors: {"model": tensors},
        lambda tensors: {"state_dict": tensors, "epoch": 1},
        lambda tensors: {"module": {"state_dict": tensors}},
        lambda tensors: {**tensors, "epoch": 1, "name": "a model"},
    ],
)
def test_wrappers_and_what_is_no_tensor_are_taken_off(tmp_path, wrap):
    path = save(tmp_path / "model.pth", wrap(TENSORS))
    torch.testing.assert_close(torch_file.load(path), TENSORS, rtol=0, atol=0)


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, kind):
    folder = tmp_path / "created by the file"
    path = save(tmp_path / "evil.pth", {"weight": torch.ones(2), "payload": Malicious(str(folder))}, kind)
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        torch_file.load(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()  # the file really was malicious


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    path = save(tmp_path / "cut.pth", TENSORS, kind)
    whole = path.read_bytes()
    unexplained = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in [*range(64), *range(64, len(whole), 7), len(whole) - 1]:
            path.write_bytes(whole[:length])
            try:
                torch_file.load(path)
                unexplained[length] = "loaded"
            except ValueError as error:
                assert "cut.pth cannot be read: it is truncated" in str(error)
            except Exception as error:
                unexplained.setdefault(type(error).__name__, length)
    assert not unexplained


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"<html>not found</html>", b"PK\x03\x04" + bytes(60)])
def test_another_kind_of_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth cannot be read"):
        torch_file.load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "no tensors"),
        ({"a": 1}, "no tensors"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"model\.pth .*{message}"):
        torch_file.load(save(tmp_path / "model.pth", content))


def test_names_that_are_no_texts_are_left_out(tmp_path):
    assert list(torch_file.load(save(tmp_path / "model.pth", {0: torch.ones(2), "a": torch.ones(2)}))) == ["a"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [({"a": torch.ones(2)}, "legacy"), ({"a": torch.eye(3).to_sparse()}, "zip"), ({"a": torch.ones(3, 2).T}, "zip"),
     ({"a": torch.ones(2, dtype=torch.complex64)}, "zip"), ({"a": torch.ones(2, device="meta")}, "zip")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_do_not_lie_in_the_file_as_they_are_cannot_be_copied(tmp_path, content, kind):
    path = save(tmp_path / "model.pth", content, kind)
    with pytest.raises(ValueError, match=r"model\.pth: 'a' is stored in a way that cannot be copied"):
        torch_file.read_header(path)


@pytest.mark.parametrize("version", ["2.5.1+cu121", "2.4.0", "1.13.1"])
def test_a_torch_that_can_be_tricked_is_not_used(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match=r"Update torch to 2\.6 or newer"):
        torch_file.load(save(tmp_path / "model.pth", TENSORS))
