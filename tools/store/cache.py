"""Copies of dense weights in the user's cache, and which of them processes use."""

import os
import shutil
import uuid
import weakref
from contextlib import suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from prunewright.state import StoreError

_SUFFIX = ".safetensors"


def cache_directory() -> Path:
    """Where converted models are kept: PRUNEWRIGHT_CACHE, or the user's cache directory."""
    return Path(os.environ.get("PRUNEWRIGHT_CACHE") or platformdirs.user_cache_dir("prunewright"))


def copy_file(name: str) -> Path:
    """The file of a copy of dense weights."""
    return cache_directory() / f"dense-{name}{_SUFFIX}"


class CopyInUse:
    """Keeps a copy from being deleted as long as this object, or its process, lives.

    A cache that cannot be written is left alone by `collect_copies`, too.
    """

    def __init__(self, copy: Path) -> None:
        file = copy.with_name(f"{copy.name}.{uuid.uuid4().hex[:12]}.lock")
        lock = FileLock(file, thread_local=False)
        with suppress(OSError):
            copy.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            weakref.finalize(self, _release, lock, file)


def collect_copies() -> tuple[int, int]:
    """Delete the copies of dense weights that no process uses; they are made again when needed.

    Returns:
        Files and bytes deleted.

    Raises:
        StoreError: the cache cannot be written.
    """
    files = size = 0
    try:
        for copy in {copy_file(name) for name in _names()}:
            if any(_held(lock) for lock in copy.parent.glob(f"{copy.name}.*.lock")):
                continue
            for scratch in copy.parent.glob(f"{copy.name}.*.tmp"):  # of a process that was killed
                files, size = files + 1, size + _size(scratch)
                shutil.rmtree(scratch)
            if copy.exists():
                files, size = files + 1, size + copy.stat().st_size
                copy.unlink()
    except OSError as error:
        raise StoreError(f"cannot clear {cache_directory()}: {error}") from error
    return files, size


def _names() -> set[str]:
    """Of all copies, whole or begun."""
    found = cache_directory().glob(f"dense-*{_SUFFIX}*")
    return {path.name.removeprefix("dense-").partition(_SUFFIX)[0] for path in found}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _release(lock: FileLock, file: Path) -> None:
    lock.release()
    with suppress(OSError):
        file.unlink(missing_ok=True)


def _held(file: Path) -> bool:
    """Whether a process holds a lock; the file of one that was killed is removed."""
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    _release(lock, file)
    return False
