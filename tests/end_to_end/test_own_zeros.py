"""Models that have zeros before any step: they count, stay, and the target is met to the weight."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from prunewright.graph import RunResult, baseline, run
from prunewright.graph.cli import app
from prunewright.state import InputError
from prunewright.tools.allocation import ALLOCATIONS
from prunewright.tools.store.rundir import RunDirectory

TARGET = 0.45
Make = Callable[..., Path]


def _scattered(weight: Tensor) -> Tensor:
    return weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() * 3 // 10).values


def _lines(weight: Tensor, dim: int) -> Tensor:
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    gone.narrow(dim, 0, weight.shape[dim] // 4).fill_(True)
    return gone


def _halves(weight: Tensor) -> Tensor:
    groups = weight.abs().unflatten(-1, (-1, 4))
    return (groups <= groups.kthvalue(2, dim=-1, keepdim=True).values).flatten(-2)


# What is zero of a weight, by how the model was made: those of all layers, or of some.
KINDS: dict[str, Callable[[str, Tensor], Tensor]] = {
    "pruned before": lambda _, w: _scattered(w),
    "rows": lambda _, w: _lines(w, -2),
    "columns": lambda _, w: _lines(w, -1),
    "some layers half zero": lambda n, w: (
        _lines(w, -2) | _lines(w.flip(-2), -2).flip(-2)
        if ".0.self_attn" in n
        else _lines(w, -2) & False
    ),
    "a layer and an expert all zero": lambda n, w: torch.full(
        w.shape, "0.mlp.experts.3" in n or "1.self_attn.k_proj" in n
    ),
    "rows, and a layer and an expert all zero": lambda n, w: (
        _lines(w, -2) | ("0.mlp.experts.3" in n or "1.self_attn.k_proj" in n)
    ),
    "some layers 2:4": lambda n, w: _halves(w) if ".0.self_attn" in n else torch.zeros_like(w) > 0,
    "2:4": lambda _, w: _halves(w),
}


@pytest.fixture
def make(pico_models: Callable[..., Path], tmp_path: Path) -> Make:
    """A function that saves a pico model of a family with zeros of a kind, of either sign."""

    def made(kind: str, family: str = "LlamaConfig") -> Path:
        directory = tmp_path / "model"
        shutil.copytree(pico_models(family), directory)
        stored = load_file(directory / "model.safetensors")
        for name in prunable(stored):
            gone = KINDS[kind](name, stored[name])
            stored[name] = torch.where(gone, 0.0 * stored[name], stored[name])
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
        return directory

    return made


def prunable(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if "_proj" in name]


def zeros(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((tensors[name] == 0).sum()) for name in prunable(tensors)}


def before_and_after(model: Path, result: RunResult) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dense, saved = (load_file(d / "model.safetensors") for d in (model, result.model_directory))
    assert all(bool((saved[n][dense[n] == 0] == 0).all()) for n in prunable(dense))
    return dense, saved


@pytest.fixture
def settings(pico_config: dict[str, Any]) -> dict[str, Any]:
    windows = {"calibration": 2, "gradient": 1, "guard": 2, "test": 1, "length": 32}
    guard = {"max_increase": 1e9}
    return pico_config | {"target": TARGET, "guard": guard, "texts": {"windows": windows}}


def total(dense: dict[str, Tensor]) -> int:
    return sum(dense[name].numel() for name in prunable(dense))


def assert_met(model: Path, result: RunResult, target: float = TARGET) -> None:
    dense, saved = before_and_after(model, result)
    found = sum(zeros(saved).values())
    assert found == math.floor(target * total(dense))
    assert result.metrics.sparsity == found / total(dense)
    assert result.metrics.dense_sparsity == sum(zeros(dense).values()) / total(dense)


@pytest.mark.parametrize(
    ("kind", "criterion", "family", "agent"),
    [
        ("pruned before", "wanda", "LlamaConfig", "greedy"),
        ("rows", "wanda", "LlamaConfig", "uniform"),
        ("columns", "gblm", "LlamaConfig", "greedy"),
        ("rows", "sparsegpt", "LlamaConfig", "random"),
        ("columns", "sparsegpt", "Qwen3MoeConfig", "greedy"),
        ("some layers half zero", "magnitude", "LlamaConfig", "zscore"),
        ("a layer and an expert all zero", "wanda", "Qwen3MoeConfig", "greedy"),
        ("a layer and an expert all zero", "obs", "Qwen3MoeConfig", "uniform"),
        ("some layers 2:4", "fisher", "LlamaConfig", "greedy"),
    ],
)
def test_a_run_meets_the_target_and_keeps_to_its_bounds(
    kind: str,
    criterion: str,
    family: str,
    agent: str,
    make: Make,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = make(kind, family)
    changes = {"model": str(model), "criterion": criterion, "agent": agent}
    result = run(settings | changes, tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert_met(model, result)
    directory = RunDirectory(tmp_path / "run")
    records = directory.read_trace()
    assert "are zero in the model itself" in " ".join(records[0].notes)
    added: dict[str, float] = {}
    for record in records:
        profile = {p.name: p for p in directory.read_profile(record.profile).layers}
        for name, delta in record.applied.items():
            assert abs(delta) <= 0.15 + 1 / profile[name].parameters
            added[name] = added.get(name, 0.0) + delta
            assert added[name] >= -1e-9  # nothing that the dense model has is restored
        # What is told of the layers is finite, and all-zero ones cost nothing.
        assert all(
            math.isfinite(sum([*p.measured.values(), *p.signals.values(), *p.loss_cost]))
            for p in profile.values()
        )
        assert all(p.loss_cost == (0, 0, 0) for p in profile.values() if p.dense_sparsity == 1)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_every_allocation_meets_the_target(
    allocation: str, make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make("rows, and a layer and an expert all zero", "Qwen3MoeConfig")
    options = {"evolutionary": {"tokens": 2000, "offspring": 2, "screen": 8, "windows": 1}}
    changes = {
        "model": str(model),
        "allocation": allocation,
        "allocation_options": options.get(allocation, {}),
    }
    result = baseline(settings | changes, tmp_path / "run")
    dense, saved = before_and_after(model, result)
    # Uniform takes the floor of each layer.
    missing = math.floor(TARGET * total(dense)) - sum(zeros(saved).values())
    assert 0 <= missing < (len(prunable(dense)) if allocation == "uniform" else 1)
    if allocation == "global":
        again = settings | {"model": str(model), "allocation": f"from:{result.directory}"}
        repeated = baseline(again, tmp_path / "again")
        assert repeated.metrics.revision == result.metrics.revision


@pytest.mark.parametrize(
    ("criterion", "reconstruct"),
    [("magnitude", False), ("gblm", True), ("sparsegpt", True), ("obs", False)],
)
def test_each_way_to_prune_keeps_the_zeros_and_meets_the_target(
    criterion: str, reconstruct: bool, make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make("pruned before")
    changes = {"model": str(model), "criterion": criterion, "reconstruct": reconstruct}
    result = baseline(settings | changes | {"allocation": "owl"}, tmp_path / "run")
    assert_met(model, result)


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [("pruned before", "wanda"), ("rows", "sparsegpt"), ("some layers 2:4", "fisher")],
)
def test_a_pattern_counts_only_what_it_takes(
    kind: str, criterion: str, make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make(kind)
    changes = {"model": str(model), "pattern": "2:4", "target": 0.5, "criterion": criterion}
    result = run(settings | changes | {"step": 0.2}, tmp_path / "run")
    assert result.metrics.status == "target_reached"
    dense, saved = before_and_after(model, result)
    sizes, counts = zeros(dense), zeros(saved)
    whole = {
        n: int((dense[n] == 0).unflatten(-1, (-1, 4)).sum(-1).clamp(min=2).sum()) for n in counts
    }
    assert all(counts[n] in (sizes[n], whole[n]) for n in counts)
    # As near to the target as whole layers come: no layer that is left fits under it.
    left = math.floor(0.5 * total(dense)) - sum(counts.values())
    assert left >= 0
    assert all(whole[n] - sizes[n] > left for n in counts if counts[n] < whole[n])
    if left > 0.001 * total(dense):
        last = RunDirectory(tmp_path / "run").read_trace()[-1]
        assert "is missing to the target" in last.notes[-1]
    if kind == "some layers 2:4":
        assert left == 0
    shot = baseline(settings | changes, tmp_path / "shot")
    assert zeros(before_and_after(model, shot)[1]) == whole


def test_a_target_that_is_there_already_is_refused_before_anything_is_asked(
    make: Make, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("2:4")
    (tmp_path / "never_asked.py").write_text(
        "class Nobody:\n    def decide(self, _): raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = [
        (run, {"target": 0.2}, "target 0.2 is reached before any step"),
        (run, {"target": 1e-5}, "target 1e-05 comes to none of the"),
        (run, {"target": 0.5}, "a sparsity of 0.5000. Give a higher target"),
        (baseline, {"target": 0.3}, "target 0.3 is reached before any step"),
        (run, {"target": 0.45, "pattern": "2:4"}, "every layer .* fits has it already"),
        (baseline, {"pattern": "2:4"}, "every layer .* that pattern 2:4 fits has it already"),
    ]
    for start, changes, words in refused:
        nobody = {"model": str(model), "agent": "import:never_asked:Nobody"}
        with pytest.raises(InputError, match=words):
            start(settings | nobody | changes, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_zeros_that_were_there_are_named_wherever_the_sparsity_is(
    make: Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, out = make("pruned before"), tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings | {"model": str(model)}))
    for command in ("run", "baseline"):
        shown = CliRunner().invoke(app, [command, "--config", str(config), "--out", str(out)])
        assert shown.exit_code == 0, shown.output
        words = " ".join(shown.output.split())
        share = sum(zeros(load_file(model / "model.safetensors")).values())
        assert json.loads((out / "manifest.json").read_text())["model"]["zero_weights"] == share
        assert "prunable weights, 29.9" in words.partition("step 1")[0]
        assert "% were before" in words
        assert "in the dense model already" in (out / "report.html").read_text()
        assert "% in the base model already" in " ".join(
            (out / "model/README.md").read_text().split()
        )
        shutil.rmtree(out)
