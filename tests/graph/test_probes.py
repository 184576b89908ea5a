"""Probes: an answer that has moves measured, not applied, and is followed by another question."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import FakeGemini, FakeLLM, Reply
from typer.testing import CliRunner

from prunewright.graph import resume, run
from prunewright.graph.agents import Observation
from prunewright.graph.agents.chat.reading import answer_schema
from prunewright.graph.cli import app
from prunewright.graph.nodes.decide import probe_windows
from prunewright.state import AgentError, Decision, GroupDelta, LayerDelta, Move, Step, Trials
from prunewright.state.loading import validate_config
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.losses import change_with_error
from prunewright.tools.store.rundir import RunDirectory

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
DOWNS = {"projection": "mlp.down_proj", "from": 0, "to": 1, "delta": 0.05}
TOKENS = 2 * 48
"""Of a probe: two of eight guard windows."""
WINDOWS = {"calibration": 4, "gradient": 2, "guard": 8, "test": 3, "length": 48}


def move(*layers: tuple[str, float], groups: Any = ()) -> dict[str, Any]:
    return {"layers": [{"name": n, "delta": d} for n, d in layers], "groups": list(groups)}


def asks(llm: FakeLLM, *moves: dict[str, Any], **more: Any) -> Reply:
    """An answer that has moves measured."""
    return llm.text(json.dumps({"probes": list(moves)} | more))


@pytest.fixture
def pico(pico_config: dict[str, Any]) -> dict[str, Any]:
    """A run of one step."""
    return pico_config | {"max_steps": 1, "texts": {"windows": WINDOWS}}


@pytest.fixture
def config(pico: dict[str, Any], gemini: FakeGemini) -> dict[str, Any]:
    """A run of one step that Gemini decides."""
    return asking(pico, gemini)


def asking(pico: dict[str, Any], llm: FakeLLM) -> dict[str, Any]:
    return pico | {
        "agent": llm.agent,
        "agent_options": llm.options(),
        "asking": {"timeout": 30, "attempts": 3, "wait": 0.01},
    }


def only_step(out: Path) -> Step:
    (record,) = RunDirectory(out).read_trace()
    return record


def measured_directly(
    config: dict[str, Any], deltas: dict[str, float]
) -> tuple[float, float | None]:
    """Change of two guard windows with masks made, stored and applied as a step's are."""
    request = validate_config(config).request
    with workbench(request, Path(config["out"])) as bench:
        sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
        counts = {name: math.floor(delta * sizes[name] + 1e-6) for name, delta in deltas.items()}
        windows = bench.windows.guard[[0, 4]]
        losses = []
        for revision in (DENSE, bench.prune(DENSE, DENSE, counts)):
            bench.sync(revision)
            losses.append(bench.loaded.execution.window_losses(bench.head, windows))
    return change_with_error(losses[0], losses[1])


def test_moves_are_measured_and_the_llm_is_asked_again(
    pico: dict[str, Any], llm: FakeLLM, tmp_path: Path
) -> None:
    whole = {"reasoning": "Which?", "layers": [], "groups": [], "done": False, "lessons": []}
    llm.script = [
        asks(llm, move(("0.mlp.up_proj", 0.1)), move(("1.self_attn.q_proj", 0.15), groups=[DOWNS])),
        # With every key, as a provider that holds to the schema makes it say.
        asks(llm, move(("0.mlp.up_proj", 0.15)), **whole),
        llm.decision(("0.mlp.up_proj", 0.1)),
    ]
    config, out = asking(pico, llm), tmp_path / "run"
    metrics = run(config, out=out).metrics
    record = only_step(out)
    assert record.verdict == "accepted"
    assert record.invalid_answers == record.notes == []
    first, second, third = record.probes
    assert first.layers == pytest.approx({UP: 0.1}, abs=1e-3)
    downs = {f"model.layers.{block}.mlp.down_proj": 0.05 for block in (0, 1)}
    assert second.layers == pytest.approx({Q: 0.15} | downs, abs=2e-3)
    assert third.layers == pytest.approx({UP: 0.15}, abs=1e-3)
    config["out"] = str(tmp_path / "other")
    for probe in record.probes:
        assert (probe.refused, probe.tokens) == ("", TOKENS)
        assert (probe.change, probe.change_stderr) == measured_directly(config, probe.layers)
    assert (metrics.probes, metrics.tokens["probe"]) == (3, 3 * TOKENS)
    assert metrics.tokens["llm"] == record.llm_tokens == 300
    assert record.llm_calls == 3
    asked, told, last = (received.turns for received in llm.received)
    assert [role for role, _ in last] == ["user"]
    assert "at most 4 a step" in llm.received[0].system
    assert "probes" in llm.received[2].schema["properties"]
    assert "had measured" not in asked[0][1]
    # What was asked before is asked again, and the results come after it.
    assert told[0][1].startswith(asked[0][1])
    assert last[0][1].startswith(asked[0][1])
    assert f"on {TOKENS} tokens of the held-out text" in told[0][1]
    for number, probe in enumerate(record.probes, 1):
        (line,) = (x for x in last[0][1].splitlines() if x.startswith(f"{number}. "))
        assert probe.change is not None
        assert float(line.partition(": ")[2].split()[0]) == pytest.approx(
            100 * probe.change, abs=0.051
        )
    assert "\n1. mlp.up_proj 0 +.100: " in told[0][1]
    assert told[0][1].endswith("Probes left: 2.")
    assert last[0][1].endswith("Probes left: 1.")
    shown = " ".join(CliRunner().invoke(app, ["show", str(out), "--step", "1"]).stdout.split())
    assert f"(0.mlp.up_proj +0.100): {first.change:+.2%} ± {first.change_stderr:.2%}" in shown


def test_without_probes_left_they_are_not_offered_and_refused(
    config: dict[str, Any],
    gemini: FakeGemini,
    tmp_path: Path,
    make_observation: Callable[..., Observation],
) -> None:
    up, q = move(("0.mlp.up_proj", 0.1)), move(("1.self_attn.q_proj", 0.1))
    gemini.script = [
        asks(gemini, up),
        asks(gemini, q, up),
        asks(gemini, up),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    metrics = run(config | {"probes": 2}, out=tmp_path / "run").metrics
    record = only_step(tmp_path / "run")
    assert record.verdict == "accepted"
    assert [probe.refused for probe in record.probes] == ["", "", "no probe was left for it"]
    assert (metrics.probes, metrics.tokens["probe"]) == (2, 2 * TOKENS)
    assert record.invalid_answers == ["no probes are left in this step: decide"]
    third, fourth = gemini.received[2:]
    schemas = [answer_schema(make_observation(max_probes=most)) for most in (2, 0)]
    assert [r.schema for r in gemini.received] == [schemas[0]] * 2 + [schemas[1]] * 2
    assert third.turns[0][1].endswith("No probes are left in this step: decide.")
    # What was measured is told again with what was wrong.
    assert fourth.turns[0] == third.turns[0]
    assert json.loads(fourth.turns[1][1]) == {"probes": [up]}
    assert "no probes are left" in fourth.turns[2][1]
    assert gemini.received[0].system == fourth.system


def test_probes_may_be_turned_off(
    config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.script = [
        asks(gemini, move(("0.mlp.up_proj", 0.1))),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    metrics = run(config | {"probes": 0}, out=tmp_path / "run").metrics
    record = only_step(tmp_path / "run")
    assert record.invalid_answers == ["no probes are left in this step: decide"]
    assert (record.probes, metrics.probes, metrics.tokens.get("probe", 0)) == ([], 0, 0)
    assert "probe" not in gemini.received[0].system
    assert "probes" not in gemini.received[0].schema["properties"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (move(("9.nowhere", 0.1)), "unknown layer '9.nowhere': use a name from the table"),
    (move(("0.mlp.up_proj", 0.6)), "delta 0.6 is not within 0.15 of 0"),
    (move(("0.mlp.up_proj", -0.1)), "restores more than 0.000"),
    (move(("0.mlp.up_proj", 0.1), ("0.mlp.up_proj", 0.1)), "is named twice"),
    (move(groups=[{"projection": "mlp", "from": 0, "to": 1, "delta": 0.1}]), "no such projection"),
    (move(("0.mlp.up_proj", 1e-7)), "the deltas come to no weight"),
    (move(), "name at least one layer"),
]


def test_a_refused_move_says_why_and_counts(
    config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    moves = [refused for refused, _ in REFUSED]
    gemini.script = [
        asks(gemini, *moves[:4]),
        asks(gemini, *moves[4:], move(("0.mlp.up_proj", 0.1))),
        gemini.decision(("0.mlp.up_proj", 0.1)),
    ]
    metrics = run(config | {"probes": len(REFUSED) + 2}, out=tmp_path / "run").metrics
    record = only_step(tmp_path / "run")
    *refused, measured = record.probes
    told = gemini.received[-1].turns[0][1]
    for number, (probe, (value, words)) in enumerate(zip(refused, REFUSED, strict=True), 1):
        assert words in probe.refused, value
        assert (probe.change, probe.tokens, probe.layers) == (None, 0, {})
        assert f"\n{number}. refused: {probe.refused}\n" in told
    assert told.endswith("Probes left: 1.")
    assert measured.refused == ""
    assert (metrics.probes, metrics.tokens["probe"]) == (1, TOKENS)
    assert record.invalid_answers == []


def test_probes_leave_the_live_model_and_the_store_as_they_were(
    config: dict[str, Any], gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    gemini.script = [
        gemini.decision(("0.mlp.up_proj", 0.1)),
        # From a revision that is not dense, and with weights restored.
        asks(gemini, move(("0.mlp.up_proj", -0.1), groups=[DOWNS]), move(("0.mlp.up_proj", 0.05))),
        gemini.decision(("1.mlp.up_proj", 0.1)),
    ]
    run(config | {"max_steps": 2}, out=out)
    assert len(seen) == 4
    weights, zeros, files = seen[0]
    assert zeros[UP] > 0
    for other_weights, other_zeros, other_files in seen[1:]:
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
        assert (other_zeros, other_files) == (zeros, files)
    restored = RunDirectory(out).read_trace()[1].probes[0]
    assert restored.layers[UP] == pytest.approx(-0.1, abs=1e-3)
    assert restored.change is not None


class Curious:
    """Has every layer measured at once, then prunes one; its reasoning is what it was told."""

    def decide(self, observation: Observation) -> Decision | Trials:
        names = [layer.name for layer in observation.profile.layers]
        if not observation.probes:
            every = Move(layers=[LayerDelta(name=name, delta=0.15) for name in names])
            blocks = {"from": 0, "to": 1}
            groups = [GroupDelta(projection="mlp.down_proj", delta=0.01, **blocks)]
            return Trials(moves=[every, Move(groups=groups)])
        changes = [probe.change for probe in observation.probes]
        words = f"{observation.tries}, {observation.probes_left}, {changes}"
        return Decision(reasoning=words, layers=[LayerDelta(name=names[0], delta=0.1)])


def test_ones_own_class_may_probe_and_a_move_may_exceed_the_step(
    pico: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    # Each layer by 0.15, where the step may add 0.1 to the model, and 0.12 reach the target.
    agent = {"agent": "import:test_probes:Curious", "target": 0.12}
    metrics = run(pico | agent, out=tmp_path / "run").metrics
    record = only_step(tmp_path / "run")
    every, few = record.probes
    assert list(every.layers.values()) == pytest.approx([0.15] * 14, abs=2e-3)
    assert len(few.layers) == 2
    assert metrics.probes == 2
    assert record.decision.reasoning == f"1, 2, {[every.change, few.change]}"


def test_a_step_that_broke_off_is_measured_again_and_counted_once(
    pico: dict[str, Any], tmp_path: Path
) -> None:
    """By files: what was answered is read again, and the run's tokens hold each probe once."""
    seat, out = tmp_path / "seat", tmp_path / "run"
    config = pico | {"agent": f"exchange:{seat}", "agent_options": {"timeout": 1.5}}

    def answer(number: int, value: dict[str, Any]) -> str:
        (prompt,) = seat.glob(f"step-0001-try-{number}-*.prompt.md")
        stem = prompt.name.removesuffix(".prompt.md")
        (seat / f"{stem}.answer.json").write_text(json.dumps(value))
        schema = json.loads((seat / f"{stem}.schema.json").read_text())
        assert "probes" in schema["properties"]
        return prompt.read_text()

    with pytest.raises(AgentError, match="try-0"):
        run(config, out=out)
    answer(0, {"probes": [move(("0.mlp.up_proj", 0.1))]})
    with pytest.raises(AgentError, match="try-1"):
        resume(out)
    told = answer(1, json.loads(FakeLLM.answer(("0.mlp.up_proj", 0.1))))
    metrics = resume(out).metrics
    (probe,) = only_step(out).probes
    assert f"1. mlp.up_proj 0 +.100: {100 * (probe.change or 0):+.2f}".replace("0.", ".") in (
        told.replace("0.", ".")
    )
    assert metrics.tokens["probe"] == TOKENS
    assert len(list(seat.glob("*.prompt.md"))) == 2


@pytest.mark.parametrize(
    ("guard", "domains", "windows"),
    [
        (16, 1, [0, 4, 8, 12]),
        (15, 1, [0, 3, 7, 11]),
        (3, 1, [0, 1]),
        (1, 1, [0]),
        # Three domains take turns; of each the same rounds.
        (12, 3, [0, 1, 2, 6, 7, 8]),
        (48, 3, [0, 1, 2, 12, 13, 14, 24, 25, 26, 36, 37, 38]),
    ],
)
def test_a_probe_is_measured_on_windows_that_are_spread(
    guard: int, domains: int, windows: list[int]
) -> None:
    assert probe_windows(guard, domains) == windows
