"""Families whose weights are stacked, shared or left dense, from a baseline to the saved file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunewright.graph import baseline

DENSE = {
    "DbrxConfig": "router",
    "JetMoeConfig": "router",
    "Llama4TextConfig": "router",
    "Zamba2Config": "conv1d",
    "HrmTextConfig": "embed_tokens",
    "DeepseekV32Config": "indexer",
}


@pytest.mark.parametrize("family", DENSE)
def test_the_saved_file_has_the_zeros_that_are_reported_and_what_is_left_dense_as_it_was(
    family: str,
    pico_models: Callable[..., Path],
    pico_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = pico_models(family)
    changes = {"model": str(model), "criterion": "fisher"}
    found = baseline(pico_config | changes, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    record = json.loads((tmp_path / "run" / "trace.jsonl").read_text().splitlines()[0])
    assert set(manifest["notes"]) <= set(record["notes"])
    named = any(DENSE[family] in note for note in manifest["notes"])
    assert named == (family != "HrmTextConfig")
    before = load_file(model / "model.safetensors")
    after = load_file(found.model_directory / "model.safetensors")
    assert after.keys() == before.keys()
    left = [name for name in before if DENSE[family] in name]
    assert left
    assert all(torch.equal(before[name], after[name]) for name in left)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    zeros = sum(int((after[n] == 0).sum()) for n in changed)
    prunable = manifest["model"]["prunable_weights"]
    # Where blocks share a parameter the file may hold it under one name: it is counted once.
    assert sum(before[n].numel() for n in changed) == prunable
    assert zeros == round(found.metrics.sparsity * prunable)
    assert found.metrics.sparsity == pytest.approx(0.3, abs=0.001)
