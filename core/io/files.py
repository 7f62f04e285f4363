"""Writing that never leaves half a file, names that never leave their folder, identities of files."""

from __future__ import annotations

import errno
import filecmp
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_BLOCK = 1 << 20
_FULL_HASH_BYTES = 64 * _BLOCK  # larger files are identified by their size and this much of their content


_DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it replaces `path` only when the block ends without an error.

    Raises OSError that names the target: on a full or read-only disk the file that stood there is unchanged. What a
    killed process left behind is removed.
    """
    temporary = path.with_name(f".{_short(path.name)}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        try:
            yield temporary
        except OSError as error:
            raise (_unwritable(path, error) if error.errno in _DISK_ERRORS else error) from error
        try:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            _replace(temporary, path)
        except OSError as error:
            raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def written_once(targets: Sequence[Path], make: Callable[[Sequence[Path]], str]) -> str:
    """Write files that may not replace others: `make` writes them and returns a report, which is returned.

    Where one of them is there already all are made beside it, and it must be the same: doing something twice is no error.
    """
    if len(set(targets)) < len(targets):
        raise ValueError(f"{targets[0].name} would be written twice: the files must have different names.")
    if not any(target.exists() for target in targets):
        return make(targets)
    with tempfile.TemporaryDirectory(dir=targets[0].parent, prefix=".") as folder:
        again = [Path(folder, str(index), target.name) for index, target in enumerate(targets)]
        text = make(again)
        for made, target in zip(again, targets, strict=True):
            if target.exists() and not filecmp.cmp(made, target, shallow=False):
                raise ValueError(
                    f"{target} exists already and is something else. Choose another name, or delete it first."
                )
        for made, target in zip(again, targets, strict=True):
            if not target.exists():
                shutil.move(made, target)
            text = text.replace(str(made), str(target))
    return text


def _unwritable(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"could not write {path}: {error.strerror or error}. Nothing was overwritten; "
        "free some space or choose a folder that can be written, then run again",
    )


def _short(name: str) -> str:
    """A name that leaves room for more: file systems count bytes."""
    return name if len(name.encode()) <= 180 else digest(name)


def _remove_left_over(path: Path) -> None:
    for old in path.parent.glob(f".{glob.escape(_short(path.name))}.*.tmp"):
        pid = old.name.split(".")[-2].split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            old.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Rename over `target`. On Windows that fails while somebody reads it, which passes."""
    for _ in range(20):
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(0.05)
    return os.replace(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; ValueError names the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def digest(value: Any) -> str:
    """A short stable name of a JSON value: the same on every machine and run."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """What identifies a file's content: a hash of all of it up to 64 MiB, of evenly spread MiBs and the size above.

    Reading a 28 GB checkpoint whole would take longer than caching a data set with it.
    """
    size = path.stat().st_size
    hasher = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= _FULL_HASH_BYTES:
            while block := file.read(_BLOCK):
                hasher.update(block)
        else:
            samples = _FULL_HASH_BYTES // _BLOCK
            for index in range(samples):
                file.seek((size - _BLOCK) * index // (samples - 1))
                hasher.update(file.read(_BLOCK))
    return hasher.hexdigest()


_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')  # includes the colon of a Windows drive
_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


def inside(root: Path, name: str) -> Path:
    """`root` / `name`, or ValueError when that would not be a plain relative path below `root` on any system."""
    parts = name.replace("\\", "/").split("/")
    if (
        not name.strip()
        or name.startswith(("/", "\\", "~"))
        or _FORBIDDEN.search(name)
        or any(part in ("", ".", "..") or part != part.strip() or part.endswith(".") for part in parts)
        or any(part.split(".")[0].lower() in _RESERVED for part in parts)
    ):
        raise ValueError(
            f"'{name}' is not a usable name: give a name such as 'my_lora' or 'folder/my_lora', "
            "without a drive, '..', a leading '/' or any of <>:\"|?*."
        )
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"'{name}' leads out of {root} through a link. Choose another name.")
    return path
