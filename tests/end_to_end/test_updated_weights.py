"""Runs whose revisions carry weights: rolled back, killed, resumed, forked and saved as others."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from prunewright.graph import baseline, fork, run
from prunewright.graph.cli import app
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.criteria import CRITERIA
from prunewright.tools.store.rundir import RunDirectory

Submit = Callable[[dict[str, Any]], dict[str, Any]]
WAYS = {
    "sparsegpt": {"criterion": "sparsegpt"},
    "obs, reconstructed": {"criterion": "obs", "reconstruct": True},
}

WINDOWS = {"calibration": 16, "gradient": 16, "guard": 8, "test": 8, "length": 48}
TEXTS: dict[str, Any] = {"windows": WINDOWS}
"""Enough of them that what is solved for is better on the guard text, too, and so is kept."""


@pytest.fixture(autouse=True)
def _importable(config: dict[str, Any]) -> None:
    """The agents of the tests can be imported."""


@pytest.fixture(params=WAYS)
def settings(request: pytest.FixtureRequest, reference_config: dict[str, Any]) -> dict[str, Any]:
    return reference_config | WAYS[request.param] | {"max_delta": 0.9, "texts": TEXTS}


def layers(config: dict[str, Any], directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The prunable weights of the dense model and of a saved one."""
    dense, saved = (
        load_file(path / "model.safetensors") for path in (Path(config["model"]), directory)
    )
    names = [n for n in dense if "_proj" in n]
    return {n: dense[n] for n in names}, {n: saved[n] for n in names}


def final(path: Path) -> str:
    return str(json.loads((path / "metrics.json").read_text())["revision"])


def at(where: str, nth: int, **more: str) -> dict[str, Any]:
    return {"at": where, "when": "before", "nth": nth, **more}


def test_a_run_is_rolled_back_killed_resumed_and_forked_with_its_weights(
    settings: dict[str, Any],
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    answer = submit({"do": "run", "config": settings, "out": str(whole)})
    assert "error" not in answer, answer
    records = RunDirectory(whole).read_trace()
    assert "rolled_back" in [record.verdict for record in records]
    assert answer["metrics"]["status"] == "target_reached"
    dense, saved = layers(settings, whole / "model")
    zeros = sum(int((weight == 0).sum()) for weight in saved.values())
    total = sum(weight.numel() for weight in saved.values())
    assert zeros / total == pytest.approx(settings["target"], abs=0.001)
    assert answer["metrics"]["sparsity"] == zeros / total
    moved = [n for n in saved if bool((saved[n] != dense[n])[saved[n] != 0].any())]
    assert len(moved) >= len([n for n in saved if (saved[n] == 0).any()]) - 1

    out = tmp_path / "killed"
    job = {"config": settings, "out": str(out)}
    masks = "prunewright.tools.store.revisions:write_atomic"
    for do, kill in (
        ("run", at(masks, 4, match="/masks/")),
        ("resume", at("prunewright.tools.bench.workbench:Workbench.sync", 1, caller="rollback")),
    ):
        assert submit(job | {"do": do, "kill": kill}) == {"signal": signal.SIGKILL}
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(whole, out)

    fork(whole, 2, out=tmp_path / "fork")
    assert final(tmp_path / "fork") == final(whole)


def test_reconstruction_lowers_the_perplexity_of_the_same_masks(
    reference_config: dict[str, Any], tmp_path: Path
) -> None:
    config = reference_config | {"target": 0.5, "criterion": "wanda", "texts": TEXTS}
    plain = baseline(config, out=tmp_path / "plain")
    better = baseline(config | {"reconstruct": True}, out=tmp_path / "better")
    assert better.metrics.perplexity.guard.final < plain.metrics.perplexity.guard.final
    assert better.metrics.perplexity.test.final < plain.metrics.perplexity.test.final
    _, one = layers(config, plain.model_directory)
    _, two = layers(config, better.model_directory)
    assert all(torch.equal(one[n] == 0, two[n] == 0) for n in one)
    assert better.metrics.sparsity == plain.metrics.sparsity


@pytest.mark.parametrize(
    ("criterion", "reconstruct"),
    [
        *((criterion, "false") for criterion in sorted(CRITERIA)),
        ("wanda", "true"),
        ("sparsegpt", "true"),
    ],
)
def test_a_pattern_holds_in_the_saved_model_with_each_criterion(
    reference_config: dict[str, Any], tmp_path: Path, criterion: str, reconstruct: str
) -> None:
    out = tmp_path / "nm"
    values = [f"model={reference_config['model']}", "dtype=float32", f"reconstruct={reconstruct}"]
    windows = {"calibration": 2, "gradient": 2, "guard": 2, "test": 2, "length": 48}
    values += [f"texts.windows.{key}={value}" for key, value in windows.items()]
    options = [part for value in values for part in ("--set", value)]
    result = CliRunner().invoke(
        app,
        ["baseline", "--criterion", criterion, "--pattern", "2:4", *options, "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    _, saved = layers(reference_config, out / "model")
    for weight in saved.values():
        assert set((weight != 0).reshape(-1, 4).sum(-1).tolist()) == {2}


@pytest.mark.parametrize(("criterion", "matters"), [("sparsegpt", True), ("obs", False)])
def test_shrinkage_is_sparsegpts(
    reference_config: dict[str, Any], tmp_path: Path, criterion: str, matters: bool
) -> None:
    config = reference_config | {"criterion": criterion}
    usual = baseline(config, out=tmp_path / "usual")
    published = baseline(config | {"shrinkage": 0.0}, out=tmp_path / "published")
    assert (published.metrics.revision != usual.metrics.revision) is matters


def test_a_layer_of_another_dtype_is_refused(
    reference_config: dict[str, Any], tmp_path: Path
) -> None:
    config = reference_config | WAYS["sparsegpt"]
    run(config | {"agent": "greedy"}, out=tmp_path / "run")
    revision = final(tmp_path / "run")
    request = RunDirectory(tmp_path / "run").config().request
    other = request.model_copy(update={"dtype": "bfloat16"})
    bench = Workbench(other)
    with workbench(request, tmp_path / "run") as ours:
        bench.store = ours.store
    dense = {n: bench.loaded.weight(layer).clone() for n, layer in bench.loaded.layers.items()}
    with pytest.raises(Exception, match=r"torch\.float32.*loaded as torch\.bfloat16"):
        bench.sync(revision)
    assert all(torch.equal(dense[n], bench.loaded.weight(bench.loaded.layers[n])) for n in dense)
