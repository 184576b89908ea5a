"""Files are whole or absent."""

import errno
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from prunewright.state import StoreError
from prunewright.tools.store.storage import (
    canonical_json,
    read_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert contents(path.parent) == {"file": b"two"}


def test_a_file_gets_the_permissions_that_any_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "atomic")}
    assert len(modes) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new(
    call: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(StoreError, match=r"cannot write .*file: No space left.*resume the run"):
        write_atomic(path, b"new")
    assert contents(tmp_path) == ({} if before is None else {"file": before})


def test_an_interrupt_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert contents(tmp_path) == {}


def test_a_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"new")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_bytes(data) == expected
    assert sha256_file(tmp_path / "file") == expected


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json([value])


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"text": "naïve \U0001f600", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert json.loads((tmp_path / "v.json").read_text(encoding="utf-8")) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", math.nan)
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1} x', b"\xff\xfe\x00"])
def test_damaged_json_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"v\.json is damaged"):
        read_json(path)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*none\.json: No such file"):
        read_json(tmp_path / "none.json")
