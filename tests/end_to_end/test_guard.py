"""Steps that do harm: rolled back bit for bit, recorded, told to the agent."""

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from langgraph.checkpoint.sqlite import SqliteSaver
from safetensors.torch import load_file, save_file

from prunewright.graph import run
from prunewright.graph.agents import Observation
from prunewright.graph.agents.controls import GreedyAgent
from prunewright.graph.agents.prompt.build import prompt
from prunewright.state import Decision, InputError, Step
from prunewright.state.loading import validate_config
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.store.rundir import RunDirectory


def records(path: Path) -> list[Step]:
    return RunDirectory(path).read_trace()


def read_groups(text: str) -> dict[str, float]:
    """Deltas by short name from ``mlp.up_proj 0-1 +.100, 2 +.050; ...``."""
    found = {}
    for part in text.split("; "):
        projection, _, rest = part.partition(" ")
        for item in rest.split(", "):
            span, delta = item.split(" ")
            first, _, last = span.partition("-")
            for block in range(int(first), int(last or first) + 1):
                found[f"{block}.{projection}"] = float(delta)
    return found


def live_weights(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in bench.loaded.model.named_parameters()}


def test_a_harmful_step_is_rolled_back_bit_for_bit(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Observation] = []
    live: list[dict[str, torch.Tensor]] = []
    request = validate_config(config).request

    def decide(self: Any, observation: Observation) -> Decision:
        seen.append(observation)
        with workbench(request, tmp_path / "run") as bench:
            live.append(live_weights(bench))
        if observation.step != 1:
            return GreedyAgent().decide(observation)
        import scripted_agents

        harm: Decision = scripted_agents.harmful(observation)
        return harm

    monkeypatch.setattr("scripted_agents.HarmfulOnce.decide", decide)
    config["agent"] = "import:scripted_agents:HarmfulOnce"
    result = run(config, out=tmp_path / "run")
    steps = records(tmp_path / "run")
    bad = steps[1]
    assert [s.verdict for s in steps][:3] == ["accepted", "rolled_back", "accepted"]
    assert result.metrics.rollbacks == 1
    # Before and after the harmful step the live model is the same, to the bit.
    for name, before in live[1].items():
        assert torch.equal(before, live[2][name]), name
    assert any(not torch.equal(live[0][name], live[1][name]) for name in live[0])
    assert bad.revision == steps[0].revision
    assert bad.candidate not in (None, bad.revision)
    assert bad.sparsity == bad.sparsity_before == steps[2].sparsity_before
    assert bad.candidate_perplexity is not None
    rise = bad.candidate_perplexity / bad.perplexity_before - 1
    assert rise > config["guard"]["max_increase"]
    assert f"{rise:.1%}" in bad.reason
    assert bad.change == pytest.approx(rise, rel=1e-6)
    assert steps[2].perplexity_before == bad.perplexity_before
    # The agent is told what broke: every layer with its delta.
    assert seen[2].history[1] == bad
    told = str(prompt(seen[2])[1].content)
    line = next(line for line in told.splitlines() if "was rolled back" in line)
    assert line.startswith(f"Step 2 was rolled back: {bad.reason}. It was ")
    assert read_groups(line.rpartition("It was ")[2]) == {
        name.removeprefix("model.layers."): pytest.approx(delta, abs=6e-4)
        for name, delta in bad.applied.items()
    }


def test_without_feedback_the_agent_is_told_nothing(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Observation] = []
    original = GreedyAgent.decide

    def decide(self: GreedyAgent, observation: Observation) -> Decision:
        seen.append(observation)
        return original(self, observation)

    monkeypatch.setattr(GreedyAgent, "decide", decide)
    run(config | {"feedback": False}, out=tmp_path / "run")
    assert len(seen) > 1
    assert all(not o.feedback and o.history == () for o in seen)


def test_rollbacks_in_a_row_end_the_run_and_leave_no_copy_of_the_dense_model(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"agent": "import:scripted_agents:Harmful", "guard": {"max_increase": 1e-4}}
    metrics = run(config | {"max_stalls": 2}, out=tmp_path / "run").metrics
    assert (metrics.status, metrics.steps, metrics.rollbacks) == ("stalled", 2, 2)
    assert metrics.sparsity == 0
    assert not (tmp_path / "run" / "model").exists()


def test_an_accepted_step_starts_the_count_of_stalls_again(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"agent": "import:scripted_agents:HarmfulOnce", "max_stalls": 2}
    config["agent_options"] = {"step": 0}
    metrics = run(config, out=tmp_path / "run").metrics
    assert metrics.rollbacks == 1
    assert metrics.status == "target_reached"


def test_the_total_rise_is_bounded(config: dict[str, Any], tmp_path: Path) -> None:
    bound = 0.03
    config["guard"] = {"max_increase": 10.0, "max_total_increase": bound}
    metrics = run(config | {"target": 0.6, "max_layer_sparsity": 0.9}, out=tmp_path / "run").metrics
    assert metrics.status == "stalled"
    guard = metrics.perplexity.guard
    assert guard.final <= guard.dense * (1 + bound)
    steps = records(tmp_path / "run")
    # Greedy halves its step after each rollback; three in a row end the run.
    assert [record.verdict for record in steps[-3:]] == ["rolled_back"] * 3
    for record in (r for r in steps if r.verdict == "rolled_back"):
        assert record.candidate_perplexity is not None
        assert record.candidate_perplexity > guard.dense * (1 + bound)
        assert "over the dense model" in record.reason


def stored_states(out: Path) -> Iterator[dict[str, Any]]:
    """The values of every checkpoint of a run."""
    with closing(sqlite3.connect(out / "state.sqlite", check_same_thread=False)) as connection:
        for item in SqliteSaver(connection).list(None):
            yield item.checkpoint["channel_values"]


def with_scaled_head(source: Path, target: Path, factor: float) -> Path:
    """The model with its logits multiplied, so that losses are, and exp overflows."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * factor
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_all_json_is_finite(path: Path) -> int:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a file of the run")

    files = [*path.rglob("*.json"), path / "trace.jsonl"]
    for file in files:
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [None]:
            text = file.read_text() if line is None else line
            json.loads(text, parse_constant=refuse)
    return len(files)


def test_a_perplexity_that_overflows_is_rolled_back_and_enters_no_file(
    config: dict[str, Any], tmp_path: Path
) -> None:
    # With large logits the loss grows in proportion to them: bring the dense one to 650 nats,
    # just below 709.8, where exp overflows. Harm then takes it beyond.
    source = Path(config["model"])
    trial = with_scaled_head(source, tmp_path / "trial", 100.0)
    bench = Workbench(validate_config(config | {"model": str(trial)}).request)
    losses = bench.guard_losses(DENSE)
    factor = 100.0 * 650 / (sum(losses) / len(losses))
    model = with_scaled_head(source, tmp_path / "model", factor)
    config |= {"model": str(model), "agent": "import:scripted_agents:HarmfulOnce"}
    config |= {"agent_options": {"step": 0}, "step": 0.3, "max_delta": 0.9, "target": 0.3}
    config |= {"guard": {"max_increase": 1e300}, "max_steps": 2}
    out = tmp_path / "run"
    metrics = run(config, out=out).metrics
    bad = records(out)[0]
    assert bad.verdict == "rolled_back"
    assert "not finite" in bad.reason
    assert bad.candidate_perplexity is bad.change is bad.change_stderr is None
    assert metrics.rollbacks >= 1
    assert metrics.perplexity.guard.dense > math.exp(600)
    assert assert_all_json_is_finite(out) > 5
    checkpoints = list(stored_states(out))
    assert len(checkpoints) > 8
    for state in checkpoints:
        json.dumps(state, allow_nan=False)


def test_a_model_that_is_broken_from_the_start_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = with_scaled_head(Path(config["model"]), tmp_path / "broken", 1e38)
    with pytest.raises(InputError, match="broken before any pruning"):
        run(config | {"model": str(model)}, out=tmp_path / "run")
