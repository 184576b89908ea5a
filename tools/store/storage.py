"""Files that are either whole or absent, and the hashes that name them."""

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from prunewright.state import InputError, StoreError

_UNFINISHED = re.compile(r"\.writing-(?:(\d{1,9})-)?[0-9a-f]{32}")
"""The name of what is being written, with the number of the process; at first it had none."""


def sha256_bytes(data: bytes) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value; refuses NaN and infinities."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":")
    ).encode()


@contextmanager
def put_into_words(path: Path) -> Iterator[None]:
    """Say what a refused write means, and what to do about it.

    Args:
        path: what is written, or where.

    Raises:
        StoreError: the block met a full disk, a missing permission, or another refusal.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}. Nothing recorded so far is lost: "
            "free some space (or mend the permissions), then resume the run"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        StoreError: the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(unfinished_name())
    with put_into_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def unfinished_name() -> str:
    """A name for what is being written, to be renamed once it is whole."""
    return f".writing-{os.getpid()}-{uuid.uuid4().hex}"


def is_unfinished(path: Path) -> bool:
    """Whether a path has a name of `unfinished_name`."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished(directory: Path) -> None:
    """Remove from a directory what processes were killed over while they wrote it there.

    What a process that is still there is writing is left, and so is what has another name.
    """
    for path in directory.glob(".writing-*"):
        found = _UNFINISHED.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            if found[1] and is_alive(int(found[1]), path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_alive(number: int, path: Path) -> bool:
    """Whether the process that wrote a file is still there, and not another of its number.

    Raises:
        OSError: there is no such file.
    """
    try:
        process, written = psutil.Process(number), path.stat().st_mtime
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written + 1
    except psutil.AccessDenied:  # another user's
        return True
    except psutil.Error:
        return False


def share(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; a copy where the disk has no hard links.

    Raises:
        StoreError: missing, or the target cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
    except OSError as error:
        raise StoreError(
            f"cannot copy {source} to {target}: {error.strerror or error}. Free some space there "
            "(or mend the permissions), then try again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode("utf-8", "backslashreplace"))


def parse_json(text: str | bytes) -> Any:
    """The value of JSON of ours, which holds finite numbers only.

    Raises:
        ValueError: it is no such JSON.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file of a run directory.

    Raises:
        StoreError: missing, unreadable or not JSON, or a number is not finite.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged: not valid JSON ({error})") from error


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes whenever a file is replaced or grows.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return (found.st_ino, found.st_mtime_ns, found.st_size)


@contextmanager
def appearing(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """A file or directory that appears under its name once the block has ended well.

    Raises:
        InputError: something is there; an empty directory may be, where one is made.
        StoreError: it cannot be written.
    """
    scratch = path.with_name(unfinished_name())
    try:
        if path.exists() and not (directory and path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists and is not empty: give another place")
        remove_unfinished(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            scratch.mkdir()
        yield scratch
        for written in [scratch, *scratch.rglob("*")]:
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        if path.exists():
            path.rmdir()
        scratch.rename(path)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left there: free some "
            "space or mend the permissions, then try again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
