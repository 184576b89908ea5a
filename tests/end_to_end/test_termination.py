"""How runs end, and on which sparsity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import run

REACHED = "target_reached"


@pytest.mark.parametrize(
    ("target", "agent", "step"),
    [
        (0.1, "greedy", 0.95),
        (0.123456, "uniform", 0.05),
        (1 / 3, "random", 0.07),
        (0.29, "zscore", 0.29),
        (0.0501, "greedy", 0.05),
        (0.7, "uniform", 0.3),
        (0.9, "greedy", 0.4),
    ],
)
def test_the_target_is_met_and_never_passed(
    target: float, agent: str, step: float, config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"target": target, "agent": agent, "step": step, "guard": {"max_increase": 1e6}}
    config |= {"max_delta": 0.9, "criterion": "magnitude"}
    metrics = run(config, out=tmp_path / "run").metrics
    assert metrics.status == REACHED
    assert target - 0.001 <= metrics.sparsity <= target
    trace = [json.loads(x) for x in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    previous = 0.0
    for record in trace:
        assert record["sparsity_before"] == previous
        assert record["sparsity"] - previous <= step + 1e-6
        previous = record["sparsity"]
        # In whole weights, of which the smallest layer has 512.
        assert max(record["applied"].values()) < 0.9 + 1 / 512
    assert previous == metrics.sparsity


@pytest.mark.parametrize("agent", ["uniform", "greedy"])
def test_layers_of_a_few_weights_still_land(
    agent: str, make_model: Callable[..., Path], config: dict[str, Any], tmp_path: Path
) -> None:
    """With 42 layers of 64 weights or so, rounding each down would miss by 0.6 %."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 6}
    model = make_model(**shape, num_attention_heads=2, num_key_value_heads=1)
    config |= {"model": str(model), "agent": agent, "guard": {"max_increase": 1e6}}
    metrics = run(config | {"target": 0.317}, out=tmp_path / "run").metrics
    assert metrics.status == REACHED
    assert 0.316 <= metrics.sparsity <= 0.317


def test_no_layer_passes_its_ceiling(config: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config |= {"target": 0.3, "max_layer_sparsity": 0.33, "guard": {"max_increase": 1e6}}
    run(config, out=tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    layers = {n: w for n, w in weights.items() if "_proj" in n}
    assert len(layers) == 14
    zeros = {n: int((w == 0).sum()) for n, w in layers.items()}
    assert all(zeros[n] < 0.33 * w.numel() + 1 for n, w in layers.items())  # in whole weights
    assert any(zeros[n] > 0.32 * w.numel() for n, w in layers.items())


@pytest.mark.parametrize(
    ("changes", "status", "steps"),
    [
        ({"max_steps": 2}, "max_steps", 2),
        ({"max_steps": 1}, "max_steps", 1),
        ({"max_steps": 3}, REACHED, 3),
        ({"agent": "import:scripted_agents:Idle"}, "stalled", 3),
        (
            {"agent": "import:scripted_agents:Idle", "agent_options": {"after": 2}},
            "stalled",
            5,
        ),
        ({"agent": "import:scripted_agents:Idle", "max_stalls": 1}, "stalled", 1),
        ({"agent": "import:scripted_agents:Idle", "max_steps": 2}, "max_steps", 2),
        ({"agent": "import:scripted_agents:Speck", "max_stalls": 2}, "stalled", 2),
        ({"agent": "import:scripted_agents:Wrong", "max_stalls": 2}, "stalled", 2),
    ],
)
def test_status_in_metrics(
    changes: dict[str, Any], status: str, steps: int, config: dict[str, Any], tmp_path: Path
) -> None:
    metrics = run(config | {"guard": {"max_increase": 1e6}} | changes, out=tmp_path / "run").metrics
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (stored["status"], stored["steps"]) == (status, steps)
    assert metrics.model_dump(mode="json") == stored
    assert stored["rollbacks"] == 0
    trace = [json.loads(x) for x in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    empty = [record for record in trace if record["verdict"] == "empty"]
    assert stored["decisions"] == steps - len(empty)
    assert all(record["reason"] and record["candidate"] is None for record in empty)
    if "Wrong" in changes.get("agent", ""):
        assert stored["invalid_answers"] == 3 * steps  # the first answer and two repairs
        assert "unknown layer" in empty[0]["reason"]
    if "Speck" in changes.get("agent", ""):
        assert "no weight" in empty[0]["reason"]
