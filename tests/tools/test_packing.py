"""Archives give back every byte, take what they should, and refuse what is not theirs."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from prunewright.graph import baseline
from prunewright.graph.cli import app
from prunewright.state import InputError, StoreError
from prunewright.tools import packing
from prunewright.tools.packing import MANIFEST, pack_model, unpack_model
from prunewright.tools.storage import canonical_json, sha256_bytes

WEIGHTS = "model.safetensors"
PACKED = "model.packed.safetensors"


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
    again = unpack_model(tmp_path / "archive", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(model)
    assert sizes.model == again.model == sum(map(len, contents(model).values()))
    assert sizes.archive == again.archive
    assert sizes.archive == sum(
        len(data) for name, data in contents(tmp_path / "archive").items() if name != MANIFEST
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "back", "model"]


def test_what_an_archive_holds(model: Path, tmp_path: Path) -> None:
    """Masks and kept values, read by the safetensors library itself."""
    sizes = pack_model(model, tmp_path / "archive")
    original = load_file(model / WEIGHTS)
    packed = load_file(tmp_path / "archive" / PACKED)
    names = {key.partition("/")[2] for key in packed if "/" in key}
    assert names == set(original)
    before = after = 0
    for name, tensor in original.items():
        width = tensor.element_size()
        bits = tensor.reshape(-1).view(torch.uint8).numpy().reshape(-1, width).any(axis=1)
        smaller = (len(bits) + 7) // 8 + int(bits.sum()) * width < len(bits) * width
        assert (f"mask/{name}" in packed) == smaller, name
        if smaller:
            mask, kept = packed[f"mask/{name}"], packed[f"kept/{name}"]
            assert np.array_equal(np.packbits(bits), mask.numpy())
            chosen = tensor.reshape(-1)[torch.from_numpy(bits)]
            assert kept.dtype == tensor.dtype
            assert torch.equal(kept.view(torch.uint8), chosen.view(torch.uint8)), name
            before += tensor.nbytes
            after += mask.nbytes + kept.nbytes
        else:
            whole = packed[f"whole/{name}"]
            assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape)
    assert (sizes.pruned, sizes.packed) == (before, after)
    # -0.0 is no zero: only the row of +0.0 was left out.
    assert packed["kept/negative zeros"].numel() == 12 * 7
    assert "mask/all zero" in packed
    assert packed["kept/all zero"].numel() == 0
    assert "whole/dense" in packed


def test_a_pruned_run_by_the_command_line(pico_config: dict[str, Any], tmp_path: Path) -> None:
    baseline(pico_config | {"dtype": "bfloat16", "target": 0.45}, out=tmp_path / "run")
    runner = CliRunner()
    packed = runner.invoke(
        app, ["pack", str(tmp_path / "run"), str(tmp_path / "archive"), "--json"]
    )
    assert packed.exit_code == 0, packed.output
    sizes = json.loads(packed.stdout)
    assert sizes["packed"] / sizes["pruned"] == pytest.approx(0.55 + 1 / 16, abs=0.002)
    assert sizes["archive"] < sizes["model"]
    back = runner.invoke(app, ["unpack", str(tmp_path / "archive"), str(tmp_path / "back")])
    assert back.exit_code == 0, back.output
    assert contents(tmp_path / "back") == contents(tmp_path / "run" / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    # No loader takes the packed weights for a model's.
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "archive")
    again = runner.invoke(app, ["unpack", str(tmp_path / "archive"), str(tmp_path / "back")])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_shards_stay_shards(pico_models: Callable[..., Path], tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(pico_models())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter[parameter.abs() < 0.1] = 0
    source.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shards = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    pack_model(tmp_path / "model", tmp_path / "archive")
    assert sorted(p.name for p in (tmp_path / "archive").glob("*.safetensors")) == [
        name.replace(".safetensors", ".packed.safetensors") for name in shards
    ]
    unpack_model(tmp_path / "archive", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_only_pieces_are_in_memory(tmp_path: Path) -> None:
    """Peak memory of packing and unpacking stays far below one large tensor."""
    (tmp_path / "model").mkdir()
    values = torch.randn(32 * 2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[::2] = 0
    save_file({"large": values}, tmp_path / "model" / WEIGHTS)
    code = (
        "import resource, sys\n"
        "from prunewright.tools.packing import pack_model, unpack_model\n"
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


@pytest.mark.parametrize("name", [PACKED, "config.json", MANIFEST])
def test_no_flipped_bit_and_no_cut_passes(name: str, model: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    pack_model(model, archive)
    data = (archive / name).read_bytes()
    draw = random.Random(name)
    places = {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(60))}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        (archive / name).write_bytes(flipped)
        with pytest.raises(StoreError, match=r"damaged|names"):
            unpack_model(archive, tmp_path / "back")
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (archive / name).write_bytes(data[:length])
        with pytest.raises(StoreError, match="damaged"):
            unpack_model(archive, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]


def forge(archive: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter an archive's manifest and give it the hash that fits."""
    content = json.loads((archive / MANIFEST).read_bytes())
    content.pop("sha256")
    change(content)
    digest = sha256_bytes(canonical_json(content))
    (archive / MANIFEST).write_bytes(canonical_json(content | {"sha256": digest}))


@pytest.mark.parametrize(
    "path", ["../out", "/absolute/out", "a/../../out", "a//b", "", ".", "C:\\out", "x\0y", MANIFEST]
)
def test_no_path_leads_out(path: str, model: Path, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "archive")
    forge(tmp_path / "archive", lambda content: content["files"][0].update(path=path))
    with pytest.raises(StoreError, match=r"names|damaged"):
        unpack_model(tmp_path / "archive", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=2),
        lambda content: content.update(more=1),
        lambda content: content["files"].append(content["files"][0]),
        lambda content: content["files"][0].update(sha256="0" * 64),
        lambda content: content["files"][0].update(bytes=1),
        lambda content: content["files"][0].update(sha256=7),
        lambda content: content.update(files={}),
        lambda content: content["files"][0].update(path="absent.json"),
    ],
)
def test_a_forged_manifest_is_refused(
    change: Callable[[dict[str, Any]], None], model: Path, tmp_path: Path
) -> None:
    pack_model(model, tmp_path / "archive")
    forge(tmp_path / "archive", change)
    with pytest.raises(StoreError):
        unpack_model(tmp_path / "archive", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("what", ["mask", "kept", "header", "more kept", "wide header"])
def test_forged_tensors_are_refused(what: str, model: Path, tmp_path: Path) -> None:
    """A packed file with hashes that fit, whose parts do not."""
    archive = tmp_path / "archive"
    pack_model(model, archive)
    tensors = load_file(archive / PACKED)
    if what == "more kept":
        kept = tensors["kept/bf16"]
        tensors["kept/bf16"] = torch.cat([kept, kept])
    elif what == "mask":
        tensors["mask/bf16"] = torch.full_like(tensors["mask/bf16"], 255)
    elif what == "wide header":
        header = bytes(tensors["header"].tolist()).replace(b'"shape":[40,33]', b'"shape":[4033]')
        tensors["header"] = torch.tensor(list(header), dtype=torch.uint8)
    else:
        key = "header" if what == "header" else "kept/bf16"
        del tensors[key]
    save_file(tensors, archive / PACKED)
    data = (archive / PACKED).read_bytes()

    def change(content: dict[str, Any]) -> None:
        (entry,) = (file for file in content["files"] if file["path"] == WEIGHTS)
        entry.update(packed_bytes=len(data), packed_sha256=sha256_bytes(data))

    forge(archive, change)
    with pytest.raises(StoreError, match="damaged"):
        unpack_model(archive, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]


def test_what_cannot_be_packed(model: Path, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "archive")
    (tmp_path / "empty").mkdir()
    for source, target, words in (
        (tmp_path / "nowhere", tmp_path / "x", "is not a directory"),
        (tmp_path / "empty", tmp_path / "x", "holds no"),
        (tmp_path / "archive", tmp_path / "x", "is an archive already"),
        (model, tmp_path / "archive", "is not empty"),
        (model, model / "config.json", "is not empty"),
    ):
        with pytest.raises(InputError, match=words):
            pack_model(source, target)
    with pytest.raises(InputError, match="is no archive"):
        unpack_model(model, tmp_path / "x")
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(StoreError, match="not a whole safetensors file"):
        pack_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    unpack_model(tmp_path / "archive", tmp_path / "empty")  # an empty place will do
    with safe_open(tmp_path / "empty" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_model(model, tmp_path / "archive")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shutil, "copyfile", full)
    for call in (
        lambda: pack_model(model, tmp_path / "x"),
        lambda: unpack_model(tmp_path / "archive", tmp_path / "x"),
    ):
        with pytest.raises(StoreError, match="No space left on device"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archive", "model"]
