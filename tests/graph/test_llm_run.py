"""Whole runs on a pico model, decided by a Gemini on the loopback that reads only its prompt."""

import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from loopback import FakeGemini
from typer.testing import CliRunner

from prunewright.graph import resume, run
from prunewright.graph.cli import app
from prunewright.state import AgentError, InputError
from prunewright.tools.store.trace import load_trace


@pytest.fixture
def llm_config(pico_config: dict[str, Any], gemini: FakeGemini) -> dict[str, Any]:
    """A pico run that asks the loopback Gemini."""
    return pico_config | {
        "agent": gemini.agent,
        "agent_options": gemini.options(),
        "asking": {"timeout": 30, "attempts": 3, "wait": 0.01, "repairs": 2},
    }


def trace_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "trace.jsonl").read_text().splitlines()]


def assert_no_key(directory: Path, key: str) -> None:
    """No file of a run holds the key."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"trace.jsonl", "state.sqlite", "config.yaml"} <= {path.name for path in files}
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_who_always_accepts_ends_with_the_masks_of_greedy(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.otherwise = gemini.text('{"reasoning": "", "accept": true}', tokens=30)
    accepting = run(llm_config, out=tmp_path / "llm")
    greedy = run(llm_config | {"agent": "greedy", "agent_options": {}}, out=tmp_path / "greedy")
    assert accepting.metrics.sparsity == greedy.metrics.sparsity
    trace, control = trace_of(accepting.directory), trace_of(greedy.directory)
    # Revisions are named by their masks.
    assert [step["revision"] for step in trace] == [step["revision"] for step in control]
    assert all(step["ranking"] == {"weights": {}, "edits": {}, "scale": 1.0} for step in trace)
    assert all(step["ranking"] is None for step in control)
    assert len(gemini.received) == len(trace) > 2
    again = run(
        llm_config | {"agent": f"replay:{accepting.directory}", "agent_options": {}},
        out=tmp_path / "again",
    )
    assert trace_of(again.directory)[-1]["revision"] == trace[-1]["revision"]
    shown = CliRunner().invoke(app, ["show", str(accepting.directory), "--step", "1"])
    assert "taken as it is" in shown.stdout
    assert load_trace(accepting.directory).history["proposal"].unique() == ["as it is"]
    assert "taken as it is" in (accepting.directory / "report.html").read_text(encoding="utf-8")


def test_a_run_with_mishaps_reaches_its_target(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.script = [
        gemini.sensible,
        gemini.text('{"reasoning": "I was about to say', tokens=55),
        gemini.sensible,
        gemini.error(429, f"quota used up by {gemini.key}", "RESOURCE_EXHAUSTED"),
        gemini.sensible,
    ]
    gemini.otherwise = gemini.sensible
    result = run(llm_config, out=tmp_path / "run")

    metrics = result.metrics
    assert metrics.status == "target_reached"
    assert 0.299 <= metrics.sparsity <= 0.3
    assert metrics.method == {"agent": gemini.agent, "criterion": "wanda"}

    trace = trace_of(result.directory)
    assert len(trace) == metrics.steps == metrics.decisions >= 3
    first, second, third, *rest = trace
    assert (first["invalid_answers"], first["notes"], first["llm_tokens"]) == ([], [], 100)
    assert len(second["invalid_answers"]) == 1
    assert "JSON" in second["invalid_answers"][0]
    assert second["llm_tokens"] == 155
    assert third["invalid_answers"] == []
    assert third["notes"][0].startswith("try 1 failed: GoogleRateLimitError")
    assert "[redacted]" in third["notes"][0]
    assert all(record["verdict"] == "accepted" for record in trace)
    assert metrics.invalid_answers == 1
    assert metrics.tokens["llm"] == 100 * len(trace) + 55
    assert metrics.tokens["llm"] == sum(record["llm_tokens"] for record in trace)
    assert len(gemini.received) == len(trace) + 2
    assert all(record["invalid_answers"] == [] for record in rest)

    # What it chose is what was pruned, and each prompt shows the state that the last step left.
    shown = {row["name"]: row for row in gemini.received[0].table}
    for item in first["decision"]["layers"]:
        assert item["name"].removeprefix("model.layers.") in shown
        assert first["applied"][item["name"]] == pytest.approx(item["delta"], abs=2e-3)
    again = {str(row["name"]): float(row["sparsity"]) for row in gemini.received[1].table}
    for name, added in first["applied"].items():
        assert again[name.removeprefix("model.layers.")] == pytest.approx(added, abs=6e-4)
    again_text = gemini.received[1].turns[0][1]
    assert re.search(r"\nThe latest steps, .*:\n1: .*, predicted .*, expected \+1\.0\n", again_text)
    assert "Your reasoning then: The cheapest layers of the table." in again_text
    assert_no_key(result.directory, gemini.key)


def test_without_feedback_no_earlier_step_is_shown(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.otherwise = gemini.sensible
    result = run(llm_config | {"feedback": False, "target": 0.15}, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert len(gemini.received) >= 2
    for received in gemini.received:
        _, text = received.turns[0]
        assert "atest steps" not in text
        assert "reasoning then" not in text
        assert re.search(r"held-out text: dense [\d.]+\.\n", text)


def test_a_refused_key_stops_the_run_and_it_goes_on_from_there(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    gemini.script = [gemini.sensible]
    gemini.otherwise = gemini.error(401, f"bad key {gemini.key}", "UNAUTHENTICATED")
    with pytest.raises(AgentError, match="401 UNAUTHENTICATED") as caught:
        run(llm_config, out=out)
    assert gemini.key not in "".join(traceback.format_exception(caught.value))
    assert len(gemini.received) == 2
    before = trace_of(out)
    assert len(before) == 1
    assert not (out / "metrics.json").exists()
    assert_no_key(out, gemini.key)

    # Still refused: nothing is lost by trying.
    with pytest.raises(AgentError, match="401 UNAUTHENTICATED"):
        resume(out)
    assert trace_of(out) == before

    gemini.otherwise = gemini.sensible
    result = resume(out)
    assert result.metrics.status == "target_reached"
    assert 0.299 <= result.metrics.sparsity <= 0.3
    trace = trace_of(out)
    assert trace[0] == before[0]
    assert [record["step"] for record in trace] == list(range(len(trace)))
    assert result.metrics.tokens["llm"] == 100 * len(trace)
    assert_no_key(out, gemini.key)


def test_a_used_up_budget_stops_the_run_and_a_larger_one_goes_on(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    gemini.otherwise = gemini.sensible
    asking = llm_config["asking"]
    with pytest.raises(AgentError, match=r"asking\.max_calls"):
        run(llm_config | {"asking": asking | {"max_calls": 2}}, out=out)
    assert len(gemini.received) == len(trace_of(out)) == 2
    with pytest.raises(AgentError, match=r"asking\.max_tokens"):
        resume(out, asking=asking | {"max_tokens": 250})
    assert [record["llm_tokens"] for record in trace_of(out)] == [100, 100, 100]
    result = resume(out, asking=asking | {"max_calls": 100, "max_tokens": 10_000})
    assert result.metrics.status == "target_reached"
    assert result.metrics.llm_calls == len(gemini.received) == result.metrics.steps


def test_a_run_may_go_on_with_another_agent(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    gemini.script = [gemini.sensible]
    gemini.otherwise = gemini.error(403, "no", "PERMISSION_DENIED")
    with pytest.raises(AgentError):
        run(llm_config, out=out)
    result = resume(out, agent="uniform")
    assert result.metrics.status == "target_reached"
    agents = [record["agent"] for record in trace_of(out)]
    assert agents == [gemini.agent] + ["uniform"] * (len(agents) - 1)


def test_an_agent_that_never_answers_well_stalls_the_run(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.otherwise = gemini.decision(("99.lm_head", 0.1), tokens=20)
    result = run(llm_config | {"max_stalls": 2}, out=tmp_path / "run")
    assert result.metrics.status == "stalled"
    assert result.metrics.sparsity == 0
    assert result.metrics.decisions == 0
    assert result.metrics.invalid_answers == 6
    assert result.metrics.tokens["llm"] == 120
    trace = trace_of(result.directory)
    assert [record["verdict"] for record in trace] == ["empty", "empty"]
    assert "unknown layer '99.lm_head'" in trace[0]["reason"]
    assert "unknown layer '99.lm_head'" in gemini.received[3].turns[0][1]


def test_options_that_cannot_work_are_refused_before_anything_is_done(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    options = gemini.options(temperature=99)
    with pytest.raises(InputError, match="temperature must be in the range"):
        run(llm_config | {"agent_options": options}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert gemini.received == []


def test_a_change_on_one_guard_window_is_told_without_an_error(
    llm_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.otherwise = gemini.text('{"reasoning": "", "accept": true}', tokens=30)
    windows = llm_config["texts"]["windows"] | {"guard": 1}
    config = llm_config | {"texts": llm_config["texts"] | {"windows": windows}}
    result = run(config, out=tmp_path / "run")
    trace = trace_of(result.directory)
    assert all(step["change"] is not None and step["change_stderr"] is None for step in trace)
    last = gemini.received[-1].turns[0][1]
    assert re.search(r"last measured change [+-][0-9.]+ %\.", last)
    assert re.search(r"\n2: .*, perplexity [0-9.]+, [+-][0-9.]+, predicted", last)
    shown = CliRunner().invoke(app, ["show", str(result.directory), "--step", "2"])
    assert "±" not in shown.stdout
