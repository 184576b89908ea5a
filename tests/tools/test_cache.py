"""Copies of dense weights: kept while a process uses them, deleted on request, made again."""

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prunewright.graph.cli import app
from prunewright.tools.model.loading import LoadedModel, load_model


@pytest.fixture
def renamed(
    pico_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A model whose tensors lack the prefix of the body, and an empty cache."""
    monkeypatch.setenv("PRUNEWRIGHT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "renamed"
    shutil.copytree(pico_models(), model)
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    return model


def load(model: Path) -> LoadedModel:
    return load_model(str(model), dtype="float32", device="cpu")


def collect() -> str:
    result = CliRunner().invoke(app, ["gc", "--cache"])
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_a_copy_in_use_stays_and_goes_afterwards(renamed: Path, tmp_path: Path) -> None:
    loaded = load(renamed)
    layer = next(iter(loaded.layers.values()))
    (copy,) = (tmp_path / "cache").glob("dense-*.safetensors")
    size = copy.stat().st_size
    assert collect() == "0 files deleted, 0 bytes"
    assert torch.equal(loaded.dense(layer), loaded.weight(layer))
    del loaded
    gc.collect()
    other = tmp_path / "cache" / "not-ours.safetensors"
    other.write_bytes(b"kept")
    assert collect() == f"1 files deleted, {size:,} bytes"
    assert list((tmp_path / "cache").iterdir()) == [other]
    assert torch.equal((again := load(renamed)).dense(layer), again.weight(layer))


def test_what_a_killed_process_left_goes(renamed: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from prunewright.tools.model import loading as models\n"
        "save = models.save_file\n"
        "def killed(tensors, path):\n"
        "    save(tensors, path)\n"
        "    os._exit(9)\n"
        "models.save_file = killed\n"
        "models.load_model(sys.argv[1], dtype='float32', device='cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(renamed)], check=False)
    assert done.returncode == 9
    assert len(list((tmp_path / "cache").iterdir())) >= 1
    assert collect().startswith("1 files deleted")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--cache", "runs/none"]])
def test_gc_is_told_one_thing(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["gc", *arguments])
    assert result.exit_code == 2
    assert "one of the two" in result.output
