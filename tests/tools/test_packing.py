"""Archives give back every byte, take what they should, and refuse what is not theirs."""

import errno
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prunewright.graph import baseline
from prunewright.graph.cli import app
from prunewright.state import InputError, StoreError
from prunewright.tools.store import packing
from prunewright.tools.store.packing import pack_model, unpack_model

WEIGHTS = "model.safetensors"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with tensors of many dtypes, some with zeros, and other files."""
    directory = tmp_path / "model"
    (directory / "more").mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)

    def sparse(*shape: int, zeros: float = 0.45) -> torch.Tensor:
        values = torch.randn(shape, generator=draw)
        return values.masked_fill(torch.rand(shape, generator=draw) < zeros, 0)

    signed = sparse(13, 7)
    signed[signed == 0] = -0.0
    signed[0] = 0
    save_file(
        {
            "bf16": sparse(40, 33).bfloat16(),
            "f16": sparse(8, 8).half(),
            "f32": sparse(5, 3),
            "f64": sparse(3, 3).double(),
            "i8": (sparse(9, 9) * 50).to(torch.int8),
            "i64": (sparse(31) * 50).long(),
            "bool": sparse(77) != 0,
            "fp8": sparse(16, 16).to(torch.float8_e4m3fn),
            "negative zeros": signed.bfloat16(),
            "nan": torch.full((24,), torch.nan).masked_fill(torch.arange(24) % 2 == 0, 0),
            "dense": torch.randn(6, 6, generator=draw),
            "all zero": torch.zeros(10, 10),
            "nothing": torch.zeros(0, 4),
            "one": torch.tensor(3.0),
            "odd/näme": sparse(4, 4),
        },
        directory / WEIGHTS,
        metadata={"format": "pt", "note": "kept"},
    )
    (directory / "config.json").write_text('{"model_type": "none"}')
    (directory / "more" / "card.md").write_bytes(bytes(range(256)))
    return directory


@pytest.mark.parametrize("piece", [8, 64, 2**20])
def test_every_byte_comes_back(
    model: Path, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PIECE", piece)
    sizes = pack_model(model, tmp_path / "archive")
    assert unpack_model(tmp_path / "archive", tmp_path / "back") == sizes
    assert contents(tmp_path / "back") == contents(model)
    assert sizes.model == sum(map(len, contents(model).values()))
    assert sizes.archive == (tmp_path / "archive").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "back", "model"]


def test_half_of_a_half_precision_model_takes_a_bit_and_eleven_for_what_is_left(
    tmp_path: Path,
) -> None:
    """Normal values have some 2.6 bits of entropy in their exponents, 8 of sign and mantissa."""
    (tmp_path / "model").mkdir()
    values = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[torch.rand(2**20, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    save_file({"weight": values}, tmp_path / "model" / WEIGHTS)
    sizes = pack_model(tmp_path / "model", tmp_path / "archive")
    assert 8 * sizes.archive / 2**20 == pytest.approx(1 + 0.5 * 10.6, rel=0.03)


def test_a_pruned_run_by_the_command_line(pico_config: dict[str, Any], tmp_path: Path) -> None:
    baseline(pico_config | {"dtype": "bfloat16", "target": 0.45}, out=tmp_path / "run")
    runner = CliRunner()
    packed = runner.invoke(
        app, ["pack", str(tmp_path / "run"), str(tmp_path / "archive"), "--json"]
    )
    assert packed.exit_code == 0, packed.output
    sizes = json.loads(packed.stdout)
    assert sizes["archive"] < sizes["model"]
    back = runner.invoke(app, ["unpack", str(tmp_path / "archive"), str(tmp_path / "back")])
    assert back.exit_code == 0, back.output
    assert contents(tmp_path / "back") == contents(tmp_path / "run" / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    again = runner.invoke(app, ["unpack", str(tmp_path / "archive"), str(tmp_path / "back")])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_only_pieces_are_in_memory(tmp_path: Path) -> None:
    """Peak memory of packing and unpacking stays far below one large tensor."""
    (tmp_path / "model").mkdir()
    values = torch.randn(32 * 2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[::2] = 0
    save_file({"large": values}, tmp_path / "model" / WEIGHTS)
    code = (
        "import resource, sys\n"
        "from prunewright.tools.store.packing import pack_model, unpack_model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack_model(sys.argv[1], sys.argv[2]); unpack_model(sys.argv[2], sys.argv[3])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    places = [str(tmp_path / name) for name in ("model", "archive", "back")]
    done = subprocess.run(
        [sys.executable, "-c", code, *places], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < values.nbytes / 2
    assert (tmp_path / "back" / WEIGHTS).stat().st_size == (
        tmp_path / "model" / WEIGHTS
    ).stat().st_size


def test_no_flipped_bit_and_no_cut_passes(model: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    pack_model(model, archive)
    data = archive.read_bytes()
    draw = random.Random(0)
    for place in {0, 8, 9, 10, len(data) - 1, *(draw.randrange(len(data)) for _ in range(150))}:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        archive.write_bytes(flipped)
        with pytest.raises((StoreError, InputError), match=r"damaged|no archive"):
            unpack_model(archive, tmp_path / "back")
    for length in (0, 1, len(data) // 2, len(data) - 1):
        archive.write_bytes(data[:length])
        with pytest.raises((StoreError, InputError), match=r"damaged|no archive"):
            unpack_model(archive, tmp_path / "back")
    archive.write_bytes(data + b"more")
    with pytest.raises(StoreError, match="damaged"):
        unpack_model(archive, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]


def forge(archive: Path, name: str, pieces: bytes, content: bytes) -> None:
    """An archive of one file, its hashes right."""
    data = b"PWPACK2\n" + struct.pack("<HQ", len(name.encode()), len(content)) + name.encode()
    data += pieces + hashlib.sha256(content).digest() + struct.pack("<HQ", 0, 0)
    archive.write_bytes(data + hashlib.sha256(data).digest())


def piece(content: bytes, count: int | None = None) -> bytes:
    """A piece of single bytes; ``count`` lies about how many."""
    block = zstandard.compress(content, 1)
    numbers = struct.pack("<BII", 1, len(content) if count is None else count, 0)
    return numbers + struct.pack("<I", len(block)) + block


def test_a_forged_archive_whose_parts_fit_is_read(tmp_path: Path) -> None:
    forge(tmp_path / "archive", "a/file.txt", piece(b"words"), b"words")
    unpack_model(tmp_path / "archive", tmp_path / "back")
    assert contents(tmp_path / "back") == {"a/file.txt": b"words"}


@pytest.mark.parametrize(
    "path", ["../out", "/absolute/out", "a/../../out", "a//b", ".", "C:\\out", "x\0y"]
)
def test_no_path_leads_out(path: str, tmp_path: Path) -> None:
    forge(tmp_path / "archive", path, piece(b"words"), b"words")
    with pytest.raises(StoreError, match=r"names|damaged"):
        unpack_model(tmp_path / "archive", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive"]


@pytest.mark.parametrize(
    "pieces",
    [
        piece(bytes(2**26), 5),
        piece(b"words", 2**32 - 1),
        piece(b"words", 0),
        piece(b"words", 6),
        piece(b"words and more"),
        struct.pack("<BII", 3, 5, 0) + piece(b"words")[9:],
        struct.pack("<BIII", 1, 5, 0, 2**32 - 1),
        b"",
    ],
)
def test_a_forged_piece_is_refused(pieces: bytes, tmp_path: Path) -> None:
    forge(tmp_path / "archive", "file.txt", pieces, b"words")
    with pytest.raises(StoreError, match="damaged"):
        unpack_model(tmp_path / "archive", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_packed(model: Path, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "archive")
    (tmp_path / "empty").mkdir()
    for source, target, words in (
        (tmp_path / "nowhere", tmp_path / "x", "is not a directory"),
        (tmp_path / "empty", tmp_path / "x", "holds no"),
        (tmp_path / "archive", tmp_path / "x", "is not a directory"),
        (model, tmp_path / "archive", "is not empty"),
    ):
        with pytest.raises(InputError, match=words):
            pack_model(source, target)
    for source in (model, model / "config.json"):
        with pytest.raises(InputError, match=r"is no archive|is not a file"):
            unpack_model(source, tmp_path / "x")
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(StoreError, match="not a whole safetensors file"):
        pack_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    unpack_model(tmp_path / "archive", tmp_path / "empty")  # an empty place will do


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_model(model, tmp_path / "archive")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for call in (
        lambda: pack_model(model, tmp_path / "x"),
        lambda: unpack_model(tmp_path / "archive", tmp_path / "x"),
    ):
        with pytest.raises(StoreError, match="No space left on device"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]
