"""Sparsity that is restored: exact weights, rebalancing, and resuming after it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunewright.graph import run
from prunewright.state import Step
from prunewright.state.run import DENSE
from prunewright.tools.store.revisions import RevisionStore
from prunewright.tools.store.rundir import RunDirectory

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
GATE, Q = "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj"


def listed(
    config: dict[str, Any], *steps: dict[str, float], rebalance: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A run of these steps and no other, none of which the guard undoes."""
    return config | {
        "agent": "import:listed_agent:Listed",
        "agent_options": {"steps": list(steps), "rebalance": list(rebalance)},
        "asking": {"repairs": 0},
        "guard": {"max_increase": 10.0},
        "max_steps": len(steps),
        "target": 0.8,
    }


def steps_of(out: Path) -> list[Step]:
    return RunDirectory(out).read_trace()


def check_saved(config: dict[str, Any], out: Path, zeros: dict[str, float]) -> None:
    """The saved model's layers have these sparsities and else, bit for bit, the dense weights."""
    dense = load_file(Path(config["model"]) / "model.safetensors")
    saved = load_file(out / "model" / "model.safetensors")
    assert dense.keys() == saved.keys()
    for key, before in dense.items():
        after = saved[key]
        kept = (after != 0) | (before == 0)
        assert torch.equal(after[kept].view(torch.int32), before[kept].view(torch.int32)), key
        sparsity = zeros.get(key.removesuffix(".weight"), 0.0)
        assert abs(int((~kept).sum()) - sparsity * kept.numel()) <= 1, key


def test_restored_weights_are_bit_for_bit_the_dense_ones(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = listed(config, {UP: 0.4, DOWN: 0.3}, {UP: -0.25, Q: 0.45, GATE: 0.3})
    metrics = run(config, out=tmp_path / "run").metrics
    first, second = steps_of(tmp_path / "run")
    assert [first.verdict, second.verdict] == ["accepted", "accepted"]
    assert second.applied == pytest.approx({UP: -0.25, Q: 0.45, GATE: 0.3}, abs=1e-3)
    assert second.sparsity > first.sparsity == second.sparsity_before
    assert metrics.sparsity == second.sparsity
    check_saved(config, tmp_path / "run", {UP: 0.15, DOWN: 0.3, Q: 0.45, GATE: 0.3})


def test_a_layer_that_gives_back_all_it_is_shown_to_have_has_no_mask(
    config: dict[str, Any], tmp_path: Path
) -> None:
    # 0.3 of 2,048 weights are 614, a sparsity of 0.2998 that every table rounds to 0.300.
    config = listed(config, {UP: 0.4, DOWN: 0.3}, {DOWN: -0.3, Q: 0.5, UP: 0.1})
    run(config, out=tmp_path / "run")
    first, second = steps_of(tmp_path / "run")
    store = RevisionStore(tmp_path / "run" / "revisions")
    assert set(store.manifest(first.revision)) == {UP, DOWN}
    assert set(store.manifest(second.revision)) == {UP, Q}
    assert second.applied[DOWN] == pytest.approx(-614 / 2048)
    check_saved(config, tmp_path / "run", {UP: 0.5, Q: 0.5})


def test_a_rebalancing_step_may_lose_sparsity(config: dict[str, Any], tmp_path: Path) -> None:
    config = listed(config, {UP: 0.4}, {UP: -0.3, Q: 0.1}, rebalance=(1,))
    metrics = run(config, out=tmp_path / "run").metrics
    first, second = steps_of(tmp_path / "run")
    assert second.verdict == "accepted"
    assert second.decision.rebalance
    assert second.invalid_answers == []
    assert 0 < second.sparsity < first.sparsity
    assert metrics.sparsity == second.sparsity
    assert (metrics.steps, metrics.rollbacks) == (2, 0)
    check_saved(config, tmp_path / "run", {UP: 0.1, Q: 0.1})


def test_a_step_that_loses_sparsity_without_saying_so_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = listed(config, {UP: 0.4}, {UP: -0.3, Q: 0.1})
    run(config, out=tmp_path / "run")
    first, second = steps_of(tmp_path / "run")
    assert second.verdict == "empty"
    assert "say rebalance: true" in second.reason
    assert second.revision == first.revision


def test_a_model_that_gives_back_everything_is_the_dense_one(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = listed(config, {UP: 0.4, Q: 0.1}, {UP: -0.4, Q: -0.1}, rebalance=(1,))
    metrics = run(config, out=tmp_path / "run").metrics
    assert metrics.revision == DENSE
    assert metrics.sparsity == 0
    assert metrics.perplexity.guard.final == metrics.perplexity.guard.dense
    assert not metrics.saved
    assert "As everything was restored, no model is saved" in metrics.reason
    assert not (tmp_path / "run" / "model").exists()


Submit = Callable[[dict[str, Any]], dict[str, Any]]
BENCH = "prunewright.tools.bench.workbench:Workbench"
STORE = "prunewright.tools.store"


@pytest.mark.parametrize(
    "kill",
    [
        {
            "at": "prunewright.tools.store.revisions:write_atomic",
            "when": "before",
            "match": "/masks/",
        },
        {"at": f"{BENCH}.guard_losses", "when": "after"},
        {"at": "prunewright.graph.nodes.decide:ask", "when": "after"},
    ],
    ids=["a mask of the step in hand", "the step measured", "the step after it decided"],
)
def test_a_run_killed_at_a_regrowth_step_resumes_to_the_same_revision(
    kill: dict[str, Any],
    config: dict[str, Any],
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    # Step 0 stores two masks; the guard is measured of the dense model and after each step.
    steps = {UP: 0.4, DOWN: 0.3}, {UP: -0.25, Q: 0.45, GATE: 0.3}, {DOWN: -0.3, UP: 0.4}
    config = listed(config, *steps)
    whole = submit({"do": "run", "config": config, "out": str(tmp_path / "whole")})
    assert "error" not in whole, whole
    job = {"config": config, "out": str(tmp_path / "run")}
    died = submit(job | {"do": "run", "kill": kill | {"nth": 3}})
    assert died == {"signal": signal.SIGKILL}
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    assert answer["metrics"]["revision"] == whole["metrics"]["revision"]
    same_run(tmp_path / "whole", tmp_path / "run")
    assert [r.verdict for r in steps_of(tmp_path / "run")] == ["accepted"] * 3
