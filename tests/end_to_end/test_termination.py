"""How runs end, and on which sparsity."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import run
from prunewright.tools.store.rundir import RunDirectory

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
    # To the weight.
    weights = RunDirectory(tmp_path / "run").manifest()["model"]["prunable_weights"]
    assert metrics.sparsity * weights == pytest.approx(math.floor(target * weights), abs=1e-6)
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
    """With 42 layers of 256 weights, rounding each down would miss by 0.2 %."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6}
    model = make_model(**shape, num_attention_heads=2, num_key_value_heads=2)
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


ALL_BUT_A_BIT = {"layers": {"*": 0.1496}}
SWAP = {"layers": {"0.mlp.up_proj": -0.1, "1.mlp.up_proj": 0.1}, "rebalance": True}
SWAP_BACK = {"layers": {"0.mlp.up_proj": 0.05, "1.mlp.up_proj": -0.05}, "rebalance": True}


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]


@pytest.fixture
def scripted(config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A function that makes the configuration of a run whose decisions are given."""

    def make(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
        agent = {"agent": "import:scripted_agents:Steps", "agent_options": {"steps": list(steps)}}
        bounds = {"target": 0.15, "step": 0.2, "guard": {"max_increase": 1e6}}
        return config | agent | bounds | changes

    return make


@pytest.mark.parametrize(
    ("changes", "filled"),
    [
        ({}, True),
        ({"max_delta": 0.1497}, False),
        ({"criterion": "magnitude", "max_delta": 0.16}, True),
    ],
)
def test_a_step_that_would_end_just_below_the_target_is_filled_up_where_there_is_room(
    changes: dict[str, Any],
    filled: bool,
    scripted: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    metrics = run(scripted(ALL_BUT_A_BIT, **changes), out=tmp_path / "run").metrics
    weights = RunDirectory(tmp_path / "run").manifest()["model"]["prunable_weights"]
    assert metrics.status == REACHED
    assert metrics.steps == 1
    assert (round(metrics.sparsity * weights) == math.floor(0.15 * weights)) == filled
    assert metrics.sparsity <= 0.15
    (step,) = steps_of(tmp_path / "run")
    assert any("to land on the target" in note for note in step["notes"]) == filled


def test_a_step_that_does_not_end_the_run_is_applied_as_it_is(
    scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    goes_on = ALL_BUT_A_BIT | {"done": False}
    run(scripted(goes_on, goes_on | {"layers": {"*": 0.0008}}, max_steps=2), out=tmp_path / "run")
    first, last = steps_of(tmp_path / "run")
    assert 0.149 < first["sparsity"] < 0.1497
    assert last["sparsity"] == pytest.approx(0.15, abs=6e-5)


def test_an_agent_may_go_on_past_the_target_and_ends_the_run_itself(
    scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    fill = {"layers": {"*": 0.15}}
    back = {"layers": {"*": -0.05}, "rebalance": True, "done": False}
    refill = {"layers": {"*": 0.05}, "done": False}
    steps = [fill | {"done": False}, SWAP | {"done": False}, back, refill, SWAP_BACK]
    metrics = run(scripted(*steps, max_steps=9), out=tmp_path / "run").metrics
    trace = steps_of(tmp_path / "run")
    assert (metrics.status, metrics.steps) == (REACHED, 5)
    assert [round(step["sparsity"], 2) for step in trace] == [0.15, 0.15, 0.1, 0.15, 0.15]
    assert all(step["sparsity"] <= 0.15 for step in trace)
    assert {step["verdict"] for step in trace} == {"accepted"}
    swapped = next(v for n, v in trace[1]["applied"].items() if "0.mlp.up_proj" in n)
    assert swapped == pytest.approx(-0.1, abs=1e-3)


@pytest.mark.parametrize(("limit", "steps"), [({"max_steps": 3}, 3), ({"max_stalls": 2}, 3)])
def test_past_the_target_a_run_ends_with_its_steps_or_when_nothing_more_comes(
    limit: dict[str, Any], steps: int, scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    empty = {"layers": {}, "done": False}
    answers = [{"layers": {"*": 0.15}, "done": False}, empty]
    metrics = run(scripted(*answers, **limit), out=tmp_path / "run").metrics
    assert (metrics.status, metrics.steps) == (REACHED, steps)


def test_gradients_are_taken_again_after_a_step_that_restores_weights(
    scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    more = {"layers": {"*": 0.02}}
    mixed = {"layers": {"0.mlp.up_proj": -0.01, "1.mlp.up_proj": 0.05}}
    config = scripted(more, mixed, more, more, more, profile={"gradient_every": 10}, max_steps=5)
    run(config, out=tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    profiles = [directory.read_profile(step["profile"]) for step in steps_of(tmp_path / "run")]
    assert [profile.gradient_step for profile in profiles] == [0, 0, 2, 2, 2]
    assert profiles[2].gradient_revision == profiles[2].revision
    assert profiles[4].gradient_revision == profiles[2].revision


@pytest.mark.parametrize("step", [0.011, 0.03])
def test_steps_that_divide_the_target_reach_it_without_one_for_what_rounding_loses(
    step: float, config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"target": 3 * step, "step": step, "agent": "uniform"}
    config |= {"guard": {"max_increase": 1e6}, "criterion": "magnitude"}
    metrics = run(config, out=tmp_path / "run").metrics
    weights = RunDirectory(tmp_path / "run").manifest()["model"]["prunable_weights"]
    missing = math.floor(3 * step * weights) - round(metrics.sparsity * weights)
    assert (metrics.status, metrics.steps) == (REACHED, 3)
    assert 0 < missing <= 3
