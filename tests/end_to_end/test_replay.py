"""A trace reruns to the same final revision without whoever decided."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import resume, run
from prunewright.state import AgentError, InputError

Submit = Callable[[dict[str, Any]], dict[str, Any]]


def trace_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eventful(
    reference_config: dict[str, Any], submit: Submit, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with a step rolled back, one refused, one empty and one that restores."""
    out = tmp_path_factory.mktemp("eventful") / "run"
    config = reference_config | {"agent": "import:scripted_agents:Eventful", "max_stalls": 5}
    answer = submit({"do": "run", "config": config, "out": str(out)})
    assert answer["metrics"]["status"] == "target_reached", answer
    return out


@pytest.fixture
def replaying(eventful: Path, reference_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A configuration that replays that run from a copy."""
    shutil.copytree(eventful, tmp_path / "copied")
    return reference_config | {"agent": f"replay:{tmp_path / 'copied'}", "max_stalls": 5}


def assert_replayed(tmp_path: Path, again: str) -> None:
    first, second = trace_of(tmp_path / "copied"), trace_of(tmp_path / again)
    assert [step["verdict"] for step in first[:5]] == [
        *("accepted", "rolled_back", "empty", "empty", "accepted"),
    ]
    assert min(first[4]["applied"].values()) < -0.01
    for one, other in zip(first, second, strict=True):
        for key in ("verdict", "decision", "applied", "revision", "candidate_perplexity"):
            assert one[key] == other[key], (one["step"], key)
        assert [note for note in other["notes"] if note.startswith("replay")] == []
    a, b = (json.loads((tmp_path / p / "metrics.json").read_text()) for p in ("copied", again))
    assert a["revision"] == b["revision"]
    assert b["method"]["agent"].startswith("replay:")


def test_a_replay_ends_at_the_same_revision(replaying: dict[str, Any], tmp_path: Path) -> None:
    run(replaying, out=tmp_path / "again")
    assert_replayed(tmp_path, "again")


def test_a_trace_alone_is_enough(replaying: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(tmp_path / "copied" / "trace.jsonl", tmp_path / "trace of q4.jsonl")
    run(replaying | {"agent": f"replay:{tmp_path / 'trace of q4.jsonl'}"}, out=tmp_path / "again")
    assert_replayed(tmp_path, "again")


def test_a_trace_that_ends_early_stops_the_run_which_goes_on(
    replaying: dict[str, Any], tmp_path: Path
) -> None:
    lines = (tmp_path / "copied" / "trace.jsonl").read_text().splitlines(keepends=True)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(lines[:4]))
    with pytest.raises(AgentError, match=r"the trace has ended: .*short\.jsonl holds 4"):
        run(replaying | {"agent": f"replay:{short}"}, out=tmp_path / "again")
    assert len(trace_of(tmp_path / "again")) == 4
    # With the whole trace it goes on where it stopped.
    resume(tmp_path / "again", agent=replaying["agent"])
    assert_replayed(tmp_path, "again")


def test_another_configuration_is_noted_where_it_tells(
    replaying: dict[str, Any], tmp_path: Path
) -> None:
    # A guard that lets the harmful step pass: the sparsity of the next step is another.
    run(replaying | {"guard": {"max_increase": 9.0}, "max_steps": 3}, out=tmp_path / "loose")
    notes = [" ".join(step["notes"]) for step in trace_of(tmp_path / "loose")]
    assert notes[:2] == ["", ""]
    assert "an earlier step ended otherwise" in notes[2]
    # Other masks of the same sparsity.
    run(replaying | {"criterion": "magnitude", "max_steps": 2}, out=tmp_path / "magnitude")
    notes = [" ".join(step["notes"]) for step in trace_of(tmp_path / "magnitude")]
    assert "request.criterion was wanda, is magnitude" in notes[0]
    assert "the masks before this step are not the trace's" in notes[1]


def test_bounds_that_a_decision_breaks_stop_the_run(
    replaying: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(AgentError, match=r"step 1 of .* does not fit this run.*above the limit"):
        run(replaying | {"step": 0.02}, out=tmp_path / "tight")
    assert not (tmp_path / "tight" / "trace.jsonl").exists()


def test_a_trace_of_another_model_is_refused_before_anything_is_pruned(
    replaying: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "other.jsonl"
    text = (tmp_path / "copied" / "trace.jsonl").read_text()
    other = text.replace("layers.1.mlp", "layers.47.mlp")
    path.write_text(other)
    with pytest.raises(InputError, match=r"line 1: .* damaged: its seal .* leaves the seal out"):
        run(replaying | {"agent": f"replay:{path}"}, out=tmp_path / "other")
    path.write_text(re.sub(r',"seal":"\w+"', "", other))
    with pytest.raises(InputError, match=r"belongs to another model: .*layers\.47\.mlp"):
        run(replaying | {"agent": f"replay:{path}"}, out=tmp_path / "other")
    assert not (tmp_path / "other" / "revisions").exists()


def test_a_trace_that_cannot_be_read_is_refused_before_anything_is_computed(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1: not a step of a trace: step: Field required"):
        run(config | {"agent": f"replay:{tmp_path / 'bad.jsonl'}"}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
