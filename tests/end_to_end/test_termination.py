"""How runs end, and on which sparsity."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import resume, run
from prunewright.tools.signatures import find_signatures
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import layer_sparsities, read_story

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


PROJECTIONS = [
    *(f"self_attn.{kind}_proj" for kind in "qkvo"),
    *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
]
ALL_BUT_A_BIT = {"layers": {"*": 0.1496}}


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


def test_an_agent_may_go_on_at_the_target_and_the_best_revision_there_is_the_result(
    scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A step that lands just below is filled up in the middle of a run, too: it may be the best."""
    fill = {"layers": {"*": 0.3996}, "done": False}
    # One block takes nearly all that the other one has.
    harm = {"layers": {f"{b}.{p}": d for b, d in ((0, 0.35), (1, -0.35)) for p in PROJECTIONS}}
    harm |= {"rebalance": True, "done": False}
    back = {"layers": {"0.mlp.up_proj": -0.05}, "rebalance": True, "done": False}
    steps = [fill, harm, back, {"layers": {"0.mlp.up_proj": 0.05}}]
    out = tmp_path / "run"
    metrics = run(scripted(*steps, max_steps=9, target=0.4, step=0.5), out=out).metrics
    trace = steps_of(out)
    assert (metrics.status, metrics.steps) == (REACHED, 4)
    assert {step["verdict"] for step in trace} == {"accepted"}
    weights = RunDirectory(out).manifest()["model"]["prunable_weights"]
    assert round(trace[0]["sparsity"] * weights) == math.floor(0.4 * weights)
    assert trace[1]["sparsity"] == trace[3]["sparsity"] == trace[0]["sparsity"]
    assert trace[2]["sparsity"] < trace[1]["sparsity"] - 0.005
    first, last = trace[0], trace[-1]
    assert last["candidate_perplexity"] > first["candidate_perplexity"]
    assert last["kept"] == {"step": 0, "perplexity": first["candidate_perplexity"]}
    assert (last["revision"], last["sparsity"]) == (first["revision"], first["sparsity"])
    assert last["candidate"] != last["revision"]
    assert metrics.revision == first["revision"]
    assert metrics.perplexity.guard.final == first["candidate_perplexity"]
    assert metrics.sparsity == first["sparsity"]
    assert any("ends with the revision of step 1, the best" in note for note in last["notes"])
    assert "the best is kept, that of step 1" in metrics.reason
    # The saved model has its zeros, and what is read from the directory tells of those.
    story = read_story(RunDirectory(out))
    assert set(layer_sparsities(story).values()) == set(first["applied"].values())
    # On to a higher target it goes from there.
    higher = resume(out, target=0.45, agent="greedy", agent_options={})
    onward = steps_of(out)[4]
    assert higher.metrics.status == REACHED
    assert onward["sparsity_before"] == first["sparsity"]
    assert onward["perplexity_before"] == first["candidate_perplexity"]
    profile = RunDirectory(out).read_profile(onward["profile"])
    assert profile.revision == profile.gradient_revision == first["revision"]


def test_two_returns_to_the_target_that_gain_nothing_end_the_run(
    scripted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    # Back and forth between the same masks: nothing can be gained.
    fill = {"layers": {"*": 0.15}, "done": False}
    back = {"layers": {"*": -0.05}, "rebalance": True, "done": False}
    refill = {"layers": {"*": 0.05}, "done": False}
    steps = [fill, back, refill, back, refill, back]
    config = scripted(*steps, criterion="magnitude", max_steps=9)
    metrics = run(config, out=tmp_path / "run").metrics
    assert (metrics.status, metrics.steps) == (REACHED, 5)
    trace = steps_of(tmp_path / "run")
    assert len({step["revision"] for step in trace}) == 2
    assert trace[-1]["kept"] is None
    assert find_signatures(RunDirectory(tmp_path / "run").read_trace()) == {}


@pytest.mark.parametrize(("refine", "most", "steps"), [(0, 9, 2), (1, 9, 4), (1, 3, 2)])
def test_greedy_refines_at_the_target(
    refine: int, most: int, steps: int, config: dict[str, Any], tmp_path: Path
) -> None:
    """A cycle is begun where its two steps are left."""
    config |= {"target": 0.2, "max_steps": most, "guard": {"max_increase": 1e6}}
    config |= {"agent_options": {"refine": refine}, "profile": {"gradient_every": 9}}
    metrics = run(config, out=tmp_path / "run").metrics
    trace = RunDirectory(tmp_path / "run").read_trace()
    assert (metrics.status, metrics.steps) == (REACHED, steps)
    at = [step.candidate_perplexity for step in trace if step.candidate_perplexity]
    if steps == 2:
        return
    restored, again = trace[2:]
    before = RunDirectory(tmp_path / "run").read_profile(restored.profile)
    assert before.gradient_revision == before.revision == trace[1].candidate
    assert restored.applied.keys() == {p.name for p in before.layers if p.pruned > 0}
    assert all(-0.05 - 1e-9 <= delta < 0 for delta in restored.applied.values())
    assert restored.decision.rebalance
    assert again.decision.done
    profile = RunDirectory(tmp_path / "run").read_profile(again.profile)
    assert profile.gradient_revision == restored.candidate
    assert metrics.perplexity.guard.final == min(at[1], at[3])
    assert metrics.sparsity == trace[1].sparsity


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
