"""Probes: the real chat clients call a tool of a loopback server's choosing, then decide."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import CANARY, FakeGemini, FakeOpenAI, Received, Reply, serve
from typer.testing import CliRunner

from prunewright.graph import run
from prunewright.graph.cli import app
from prunewright.graph.nodes.decide import PROBE_WINDOWS
from prunewright.state import Step
from prunewright.state.loading import validate_config
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.losses import change_with_error
from prunewright.tools.store.rundir import RunDirectory

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


class ProbingGemini(FakeGemini):
    """Gemini that may call functions."""

    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        def words(content: dict[str, Any]) -> str:
            return "".join(part.get("text") or json.dumps(part) for part in content["parts"])

        turns = [(turn.get("role", ""), words(turn)) for turn in body["contents"]]
        schema = body["generationConfig"].get("responseJsonSchema", {})
        return words(body["systemInstruction"]), turns, schema

    def calls(self, *arguments: Any, name: str = "probe", reason: str = "STOP") -> Reply:
        """Calls of a function, one for each set of arguments."""
        parts = [{"functionCall": {"name": name, "args": args}} for args in arguments]
        reply = json.loads(self.text("-", reason).body)
        reply["candidates"][0]["content"]["parts"] = parts
        return Reply(json.dumps(reply).encode())


@pytest.fixture
def gemini(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbingGemini]:
    """The server and a canary for its key."""
    monkeypatch.setenv(ProbingGemini.variable, CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(ProbingGemini) as fake:
        assert isinstance(fake, ProbingGemini)
        yield fake


@pytest.fixture
def config(pico_config: dict[str, Any], gemini: ProbingGemini) -> dict[str, Any]:
    """A run of one step in which two probes may be taken."""
    return probing_config(pico_config, gemini)


def probing_config(pico: dict[str, Any], llm: Any) -> dict[str, Any]:
    return pico | {
        "agent": llm.agent,
        "agent_options": llm.options(),
        "asking": {"timeout": 30, "attempts": 3, "wait": 0.01},
        "max_steps": 1,
        "probes": 2,
    }


def trial(*layers: tuple[str, float], groups: Any = ()) -> dict[str, Any]:
    return {"layers": [{"name": n, "delta": d} for n, d in layers], "groups": list(groups)}


def only_step(out: Path) -> Step:
    (record,) = RunDirectory(out).read_trace()
    return record


def tools_of(received: Received) -> list[str]:
    """Names of the functions that a request to Gemini offers."""
    tools = received.body.get("tools") or []
    return [f["name"] for tool in tools for f in tool["functionDeclarations"]]


def measured_directly(config: dict[str, Any], deltas: dict[str, float]) -> tuple[float, float]:
    """Change of the first guard windows with masks made, stored and applied as a step's are."""
    request = validate_config(config).request
    with workbench(request, Path(config["out"])) as bench:
        sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
        counts = {name: math.floor(delta * sizes[name] + 1e-6) for name, delta in deltas.items()}
        windows = bench.windows.guard[:PROBE_WINDOWS]
        losses = []
        for revision in (DENSE, bench.prune(DENSE, DENSE, counts)):
            bench.sync(revision)
            losses.append(bench.loaded.execution.window_losses(bench.head, windows))
    return change_with_error(losses[0], losses[1])


def test_two_probes_then_the_decision(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    group = {"projection": "mlp.down_proj", "from": 0, "to": 1, "delta": 0.05}
    gemini.script = [
        gemini.calls(trial(("0.mlp.up_proj", 0.1))),
        gemini.calls(trial(("1.self_attn.q_proj", 0.15), groups=[group])),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    out = tmp_path / "run"
    metrics = run(config, out=out).metrics
    record = only_step(out)
    assert record.verdict == "accepted"
    assert record.invalid_answers == record.notes == []
    first, second = record.probes
    assert first.layers == pytest.approx({UP: 0.1}, abs=1e-3)
    downs = {f"model.layers.{block}.mlp.down_proj": 0.05 for block in (0, 1)}
    assert second.layers == pytest.approx({Q: 0.15} | downs, abs=2e-3)
    config["out"] = str(tmp_path / "other")
    for probe in record.probes:
        assert probe.refused == ""
        assert (probe.change, probe.change_stderr) == measured_directly(config, probe.layers)
        assert probe.tokens == 2 * 48
    assert metrics.tokens["probe"] == 2 * 2 * 48
    assert metrics.tokens["llm"] == record.llm_tokens == 300
    assert record.llm_calls == 3
    # Two phases: the tool without a response format, then the format without a tool.
    assert [tools_of(received) for received in gemini.received] == [["probe"], ["probe"], []]
    assert [bool(received.schema) for received in gemini.received] == [False, False, True]
    asked, told, last = gemini.received
    assert "call the tool probe up to 2 times" in asked.turns[0][1]
    assert f"perplexity {first.change:+.2%} (noise {first.change_stderr:.2%})" in told.turns[2][1]
    assert "probes left: 1" in told.turns[2][1]
    assert [role for role, _ in last.turns] == ["user"]
    for probe in record.probes:
        assert f"perplexity {probe.change:+.2%}" in last.turns[0][1]
    assert "- 0.mlp.up_proj +0.100: perplexity" in last.turns[0][1]
    assert "the tool probe" not in last.turns[0][1]
    shown = " ".join(CliRunner().invoke(app, ["show", str(out), "--step", "1"]).stdout.split())
    assert f"(0.mlp.up_proj +0.100): {first.change:+.2%} ± {first.change_stderr:.2%}" in shown


def test_the_tool_asks_for_what_a_decision_names(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    gemini.script = [gemini.text("READY"), gemini.decision(("0.mlp.up_proj", 0.1))]
    run(config, out=tmp_path / "run")
    (tool,) = gemini.received[0].body["tools"]
    (function,) = tool["functionDeclarations"]
    schema = function.get("parametersJsonSchema") or function["parameters"]
    layers, groups = (schema["properties"][key]["items"] for key in ("layers", "groups"))
    assert set(layers["properties"]) == {"name", "delta"}
    assert set(groups["properties"]) == {"projection", "from", "to", "delta"}
    # Ready at once: no probe, and nothing of it in the second phase.
    assert only_step(tmp_path / "run").probes == []
    assert len(gemini.received) == 2
    assert "measured" not in gemini.received[1].turns[0][1].split("\nname |")[0]


def test_calls_beyond_the_bound_are_not_measured_and_noted(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    gemini.script = [
        gemini.calls(*(trial((f"{i % 2}.mlp.up_proj", 0.1)) for i in range(5))),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    metrics = run(config, out=tmp_path / "run").metrics
    record = only_step(tmp_path / "run")
    assert len(record.probes) == 2
    assert record.notes == ["3 probes beyond the bound were not measured"]
    assert metrics.tokens["probe"] == 2 * 2 * 48
    assert len(gemini.received) == 2


REFUSED: list[tuple[Any, str]] = [
    (trial(("9.nowhere", 0.1)), "unknown layer '9.nowhere': use a name from the table"),
    (trial(("0.mlp.up_proj", 0.6)), "delta 0.6 is not within 0.15 of 0"),
    (trial(("0.mlp.up_proj", -0.1)), "restores more than 0.000"),
    (trial(("0.mlp.up_proj", 0.1), ("0.mlp.up_proj", 0.1)), "is named twice"),
    (trial(groups=[{"projection": "mlp", "from": 0, "to": 1, "delta": 0.1}]), "no such projection"),
    (trial(("0.mlp.up_proj", 1e-7)), "the deltas come to no weight"),
    (trial(), "name at least one layer"),
    ({}, "name at least one layer"),
    ({"layers": "all of them"}, "layers: Input should be a valid array"),
    ({"layers": [{"name": "0.mlp.up_proj", "delta": "much"}]}, "layers.0.delta: Input should be"),
    ({"layers": [], "windows": 99}, "windows: Extra inputs are not permitted"),
]


def test_refused_calls_are_told_why_and_count(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    gemini.script = [
        gemini.calls(*(arguments for arguments, _ in REFUSED)),
        gemini.calls({"cmd": "rm"}, name="shell"),
        gemini.calls(trial(("0.mlp.up_proj", 0.1))),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    count = len(REFUSED)
    metrics = run(config | {"probes": count + 2}, out=tmp_path / "run").metrics
    *refused, unknown, measured = only_step(tmp_path / "run").probes
    answers = gemini.received[1].body["contents"][2]["parts"]
    for probe, part, (arguments, words) in zip(refused, answers, REFUSED, strict=True):
        assert words in probe.refused, arguments
        assert (probe.change, probe.tokens) == (None, 0)
        assert probe.refused in json.dumps(part["functionResponse"], ensure_ascii=False)
        assert probe.refused in gemini.received[-1].turns[0][1]
    assert "probes left: 2" in json.dumps(answers[-1])
    assert unknown.refused == "there is no tool 'shell', only 'probe'"
    assert measured.refused == ""
    assert metrics.tokens["probe"] == 2 * 48
    assert len(gemini.received) == 4


def test_a_call_that_was_cut_off_is_not_measured(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    gemini.script = [
        gemini.calls(trial(("0.mlp.up_proj", 0.1)), reason="MAX_TOKENS"),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    run(config, out=tmp_path / "run")
    record = only_step(tmp_path / "run")
    assert record.verdict == "accepted"
    assert record.probes == []
    (note,) = record.notes
    assert "cut off or withheld (finish reason MAX_TOKENS)" in note


def test_failures_are_retried_and_repairs_take_no_probes(
    config: dict[str, Any], gemini: ProbingGemini, tmp_path: Path
) -> None:
    gemini.script = [
        gemini.error(503, "busy"),
        gemini.calls(trial(("0.mlp.up_proj", 0.1))),
        gemini.text("READY"),
        gemini.decision(("0.mlp.up_proj", 0.9)),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    run(config, out=tmp_path / "run")
    record = only_step(tmp_path / "run")
    assert record.verdict == "accepted"
    assert len(record.probes) == len(record.invalid_answers) == 1
    assert record.notes[0].startswith("try 1 failed")
    assert record.llm_calls == 5
    assert [bool(tools_of(received)) for received in gemini.received] == [True] * 3 + [False] * 2
    # What was measured is told again with what was wrong.
    repaired = gemini.received[-1].turns
    assert "- 0.mlp.up_proj +0.100: perplexity" in repaired[0][1]
    assert "not within 0.15 of 0" in repaired[2][1]


def test_probes_leave_the_live_model_and_the_store_as_they_were(
    config: dict[str, Any],
    gemini: ProbingGemini,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    seen: list[tuple[dict[str, torch.Tensor], dict[str, int], list[Path]]] = []
    original = Workbench.trial_losses

    def look(bench: Workbench) -> None:
        weights = {n: p.detach().clone() for n, p in bench.loaded.model.named_parameters()}
        seen.append((weights, bench.zeros(), sorted((out / "revisions").rglob("*"))))

    def trial_losses(self: Workbench, *args: Any) -> list[float]:
        look(self)
        losses = original(self, *args)
        look(self)
        return losses

    monkeypatch.setattr(Workbench, "trial_losses", trial_losses)
    group = {"projection": "mlp.down_proj", "from": 0, "to": 1, "delta": 0.05}
    gemini.script = [
        gemini.text("READY"),
        gemini.decision(("0.mlp.up_proj", 0.1)),
        # From a revision that is not dense, and with weights restored.
        gemini.calls(trial(("0.mlp.up_proj", -0.1), groups=[group])),
        gemini.calls(trial(("0.mlp.up_proj", 0.05))),
        gemini.decision(("1.mlp.up_proj", 0.1)),
    ]
    run(config | {"max_steps": 2}, out=out)
    assert len(seen) == 4
    weights, zeros, files = seen[0]
    assert zeros[UP] > 0
    for other_weights, other_zeros, other_files in seen[1:]:
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
        assert (other_zeros, other_files) == (zeros, files)
    given_back = RunDirectory(out).read_trace()[1].probes[0]
    assert given_back.layers[UP] == pytest.approx(-0.1, abs=1e-3)
    assert given_back.change is not None


def test_malformed_arguments_of_openai_are_refused(
    pico_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class ProbingOpenAI(FakeOpenAI):
        def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
            first, *rest = body["messages"]
            turns = [(message["role"], message["content"] or "") for message in rest]
            return first["content"], turns, body.get("response_format", {})

        def calls(self, *arguments: str) -> Reply:
            made = [
                {"id": f"c{i}", "type": "function", "function": {"name": "probe", "arguments": a}}
                for i, a in enumerate(arguments)
            ]
            return self.text("", "tool_calls", content=None, tool_calls=made)

    monkeypatch.setenv(ProbingOpenAI.variable, CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(ProbingOpenAI) as llm:
        assert isinstance(llm, ProbingOpenAI)
        llm.script = [
            llm.calls('{"layers": [{"name": "0.mlp.up', '{"layers": []}'),
            llm.calls(json.dumps(trial(("0.mlp.up_proj", 0.1)))),
            llm.decision(("0.mlp.up_proj", 0.1)),
        ]
        run(probing_config(pico_config, llm) | {"probes": 3}, out=tmp_path / "run")
        record = only_step(tmp_path / "run")
        assert record.verdict == "accepted"
        empty, cut, measured = record.probes
        assert empty.refused == "name at least one layer"
        assert "JSON" in cut.refused
        assert measured.change is not None
        # Each call has its answer, or OpenAI would refuse the next request.
        answered = [m for m in llm.received[1].body["messages"] if m["role"] == "tool"]
        assert {m["tool_call_id"]: "name at least" in m["content"] for m in answered} == {
            "c0": False,
            "c1": True,
        }
        assert "tools" not in llm.received[2].body
