"""guard.max_price through a run: recomputed from the trace and the stored profiles."""

import math
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import run
from prunewright.graph.agents import Observation
from prunewright.state import Decision, StepRecord
from prunewright.tools.rundir import RunDirectory

PROJECTIONS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BAD = {f"1.{projection}": 0.85 for projection in PROJECTIONS}
"""Nearly all of one block: it costs some nine times what is predicted weight by weight."""
GOOD = {f"0.{projection}": 0.7 for projection in PROJECTIONS}
"""This costs about twice its prediction, and noise."""
MAX_PRICE = 1.5


@pytest.fixture
def listed(config: dict[str, Any]) -> dict[str, Any]:
    """Bad, good, bad with little noise, and no bound but the price."""
    windows = config["texts"]["windows"] | {"guard": 24}
    return config | {
        "agent": "import:listed_agent:Listed",
        "agent_options": {"steps": [BAD, GOOD, BAD]},
        "criterion": "magnitude",
        "guard": {"max_increase": 10.0, "max_price": MAX_PRICE},
        "max_steps": 3,
        "max_delta": 0.9,
        "step": 0.5,
        "target": 0.8,
        "texts": {"windows": windows},
    }


def cost(directory: RunDirectory, record: StepRecord) -> float:
    """The prediction for what was applied, from the step's profile."""
    layers = {p.name: p for p in directory.read_profile(record.profile).layers}
    return sum(layers[name].cost_of(delta) for name, delta in record.applied.items())


def test_dear_steps_are_rolled_back_and_the_agent_is_told(
    listed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import listed_agent

    seen: list[Observation] = []
    original = listed_agent.Listed.decide

    def decide(self: Any, observation: Observation) -> Decision:
        seen.append(observation)
        decision: Decision = original(self, observation)
        return decision

    monkeypatch.setattr(listed_agent.Listed, "decide", decide)
    metrics = run(listed, out=tmp_path / "run").metrics
    directory = RunDirectory(tmp_path / "run")
    records = directory.read_trace()
    measured = predicted = 0.0
    for record in records:
        assert record.change is not None
        assert record.change_stderr is not None
        rise = math.log1p(record.change)
        error = record.change_stderr / (1 + record.change)
        expected = cost(directory, record) * (measured / predicted if predicted else 1.0)
        assert (record.verdict == "rolled_back") == (rise - 2 * error > MAX_PRICE * expected)
        if record.verdict == "accepted":
            measured, predicted = measured + rise, predicted + cost(directory, record)
            assert record.reason == ""
        else:
            assert record.reason == (
                f"the loss rose by {rise:.2g} (noise {error:.2g}), {rise / expected:.3g} times "
                f"the {expected:.2g} predicted for it after correction: "
                f"more than guard.max_price {MAX_PRICE}"
            )
    verdicts = [record.verdict for record in records]
    assert verdicts == ["rolled_back", "accepted", "rolled_back"]
    assert seen[1].history[0].reason == records[0].reason
    # What the good step taught is in the bound of the step after it.
    assert measured / predicted > 1.1
    assert metrics.rollbacks == 2
    assert metrics.sparsity == records[1].sparsity > records[0].sparsity == 0


def test_without_max_price_the_same_steps_are_accepted(
    listed: dict[str, Any], tmp_path: Path
) -> None:
    run(listed | {"guard": {"max_increase": 10.0}, "max_steps": 2}, out=tmp_path / "run")
    records = RunDirectory(tmp_path / "run").read_trace()
    assert [record.verdict for record in records] == ["accepted"] * 2
