"""A finished run that goes on to a higher target, in its directory or in another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from prunewright import baseline, fork, resume, run
from prunewright.graph.cli import app
from prunewright.state import InputError, StoreError
from prunewright.tools.store.rundir import RunDirectory

Submit = Callable[[dict[str, Any]], dict[str, Any]]


def trace(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


def sparsities(path: Path) -> dict[str, float]:
    """Share of zeros of each layer of a saved model."""
    stored = load_file(path / "model" / "model.safetensors")
    return {
        name.removesuffix(".weight"): int((tensor == 0).sum()) / tensor.numel()
        for name, tensor in stored.items()
        if name.endswith("proj.weight")
    }


@pytest.fixture(scope="module")
def finished(reference_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has reached 0.2."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = run(reference_config | {"agent": "greedy", "target": 0.2}, out=out)
    assert result.metrics.status == "target_reached"
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_it_goes_on_where_it_is_and_keeps_what_it_had(finished: Path, copy: Path) -> None:
    steps, before = trace(finished), json.loads((finished / "metrics.json").read_text())
    metrics = resume(copy, target=0.3).metrics
    assert metrics.status == "target_reached"
    assert metrics.sparsity == pytest.approx(0.3, abs=1e-3)
    assert trace(copy)[: len(steps)] == steps
    assert len(trace(copy)) == metrics.steps > len(steps)
    # What it had come to is kept; the model is that of the new end.
    (first,) = copy.glob(f"steps/{len(steps):04d}-metrics-*.json")
    assert json.loads(first.read_text()) == before
    # From the model of the first end the later steps lead to the new one.
    expected = sparsities(finished)
    for step in trace(copy)[len(steps) :]:
        for name, delta in step["applied"].items() if step["verdict"] == "accepted" else ():
            expected[name] += delta
    assert sparsities(copy) == pytest.approx(expected)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["targets"] == [
        {"target": 0.2, "step": 0},
        {"target": 0.3, "step": len(steps)},
    ]
    # A fork from before has the higher target from its first own step on.
    fork(copy, 1, out=copy.parent / "fork")
    manifest = json.loads((copy.parent / "fork" / "manifest.json").read_text())
    assert manifest["targets"] == [{"target": 0.2, "step": 0}, {"target": 0.3, "step": 1}]
    # And once more, and then it is finished again.
    assert resume(copy, target=0.4).metrics.sparsity == pytest.approx(0.4, abs=1e-3)
    assert resume(copy).metrics.sparsity == pytest.approx(0.4, abs=1e-3)


def test_a_fork_leaves_the_first_result_and_ends_as_the_run_would(
    finished: Path, copy: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    there = fork(finished, out=tmp_path / "fork", target=0.3).metrics
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    here = resume(copy, target=0.3).metrics
    assert (there.revision, there.steps) == (here.revision, here.steps)
    assert trace(tmp_path / "fork") == trace(copy)
    # The decisions, taken by a run that had the target from the start, give the same masks.
    config = RunDirectory(copy).config().model_dump() | {"agent": f"replay:{copy}", "out": None}
    assert run(config, out=tmp_path / "again").metrics.revision == here.revision


def test_a_run_that_was_stopped_may_go_on_to_a_higher_target(
    reference_config: dict[str, Any], finished: Path, submit: Submit, tmp_path: Path, copy: Path
) -> None:
    out = tmp_path / "stopped"
    config = reference_config | {"agent": "greedy", "target": 0.2}
    kill = {"at": "prunewright.graph.nodes.decide:ask", "when": "before", "nth": 2}
    submit({"do": "run", "config": config, "out": str(out), "kill": kill})
    assert not (out / "metrics.json").exists()
    metrics = resume(out, target=0.3).metrics
    assert metrics.status == "target_reached"
    assert metrics.sparsity == pytest.approx(0.3, abs=1e-3)
    assert trace(out)[0] == trace(finished)[0]


@pytest.mark.parametrize(
    "kill",
    [
        {"at": "prunewright.tools.store.rundir:write_json", "when": "after"},
        {"at": "prunewright.tools.store.rundir:RunDirectory.raise_target", "when": "after"},
        {"at": "prunewright.graph.running.drive:reopened", "when": "before"},
        {"at": "prunewright.tools.store.rundir:RunDirectory.keep", "when": "before"},
        {"at": "prunewright.graph.nodes.decide:ask", "when": "before"},
        {"at": "prunewright.tools.results:save_model", "when": "before"},
    ],
    ids=["manifest", "config", "state", "reopened", "step", "end"],
)
def test_a_kill_while_the_target_rises_loses_nothing(
    kill: dict[str, Any], copy: Path, finished: Path, submit: Submit, tmp_path: Path
) -> None:
    expected = fork(finished, out=tmp_path / "expected", target=0.3).metrics
    job = {"do": "resume", "of": str(copy), "out": str(copy), "changes": {"target": 0.3}}
    submit(job | {"kill": kill})
    # A kill before the configuration was written leaves the run at its first target.
    raised = RunDirectory(copy).config().target == 0.3
    metrics = (resume(copy) if raised else resume(copy, target=0.3)).metrics
    assert metrics.revision == expected.revision
    assert trace(copy) == trace(tmp_path / "expected")


def test_what_does_not_rise_is_refused_and_changes_nothing(
    reference_config: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    one_shot = baseline(reference_config | {"target": 0.2}, out=tmp_path / "one").directory
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (copy, {"target": 0.2}, "is 0.2 and stays so: leave it out, or give a higher one"),
        (copy, {"target": 0.1}, "is 0.2 and can only rise: 0.1 needs a new run"),
        (copy, {"target": 30}, "a fraction is asked for: 30 % is 0.3"),
        (copy, {"target": 0.3, "criterion": "magnitude"}, "criterion, needs a new run"),
        (copy, {"target": 0.3, "max_steps": 1}, "max_steps is used up"),
        (one_shot, {"target": 0.3}, "one shot: begin another"),
    ]
    for place, changes, words in refused:
        with pytest.raises(InputError, match=words):
            resume(place, **changes)
    for step in (None, 1):
        with pytest.raises(InputError, match="can only rise"):
            fork(copy, step, out=tmp_path / "fork", target=0.1)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "fork").exists()


def test_a_target_that_was_edited_by_hand_is_refused(copy: Path) -> None:
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("target: 0.2", "target: 0.3"))
    with pytest.raises(StoreError, match="not what the run began with"):
        resume(copy)


def test_the_command_line_takes_the_target(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.output

    assert "can only rise" in invoke("resume", str(copy), "--target", "0.1", code=2)
    other = tmp_path / "other"
    output = invoke("fork", str(copy), "-t", "0.3", "--out", str(other))
    assert "after its last step" in output
    assert RunDirectory(other).config().target == 0.3
    assert "30.0%" in invoke("resume", str(copy), "-t", "0.3")
    assert trace(copy) == trace(other)
