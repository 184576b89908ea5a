"""Fork and time travel: the model is the one of the step, and so is all that follows."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from typer.testing import CliRunner

from prunewright.graph import baseline, build_graph, fork, resume, run
from prunewright.graph.cli import app
from prunewright.state import InputError, PruneConfig, StoreError
from prunewright.tools.store.rundir import RunDirectory

Submit = Callable[[dict[str, Any]], dict[str, Any]]


def trace(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


def manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return content


def final(path: Path) -> str:
    return str(json.loads((path / "metrics.json").read_text())["revision"])


def contents(path: Path) -> dict[str, str]:
    """Hash of every file."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(autouse=True)
def _importable(config: dict[str, Any]) -> None:
    """The agents of the tests can be imported."""


def test_a_fork_without_changes_ends_as_the_run_did(
    reference: Path, same_run: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    before = contents(reference)
    for step in (0, 1, 2):  # the start, after an accepted step, after a rolled-back one
        out = tmp_path / str(step)
        fork(reference, step, out=out)
        same_run(reference, out)
        thread = manifest(reference)["thread"]
        parent = {"directory": str(reference), "thread": thread, "step": step}
        assert manifest(out)["parent"] == parent
        assert manifest(out)["thread"] != thread
    assert contents(reference) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_fork_of_a_fork_equals_a_run_that_took_the_same_decisions(
    reference: Path, reference_config: dict[str, Any], tmp_path: Path
) -> None:
    fork(reference, 2, out=tmp_path / "one", agent="zscore", max_steps=30)
    # Before the step at which the fork began, and after it.
    fork(tmp_path / "one", 1, out=tmp_path / "early", agent="uniform")
    fork(tmp_path / "one", 3, out=tmp_path / "two", agent="random")
    agents = [step["agent"] for step in trace(tmp_path / "two")]
    assert agents[:3] == ["import:scripted_agents:HarmfulOnce"] * 2 + ["zscore"]
    assert set(agents[3:]) == {"random"}
    assert trace(tmp_path / "two")[:3] == trace(tmp_path / "one")[:3]
    for name in ("two", "early"):
        again = reference_config | {"agent": f"replay:{tmp_path / name}"}
        run(again, out=tmp_path / f"{name} again")
        assert final(tmp_path / name) == final(tmp_path / f"{name} again")
    assert len({final(p) for p in (reference, tmp_path / "one", tmp_path / "two")}) == 3
    assert manifest(tmp_path / "two")["parent"]["thread"] == manifest(tmp_path / "one")["thread"]


def test_a_run_that_ended_too_early_goes_on_as_a_fork(reference: Path, tmp_path: Path) -> None:
    fork(reference, 1, out=tmp_path / "short", max_steps=3)
    words = r"nothing is left to do after step 3 .*max_steps is used up"
    with pytest.raises(InputError, match=words):
        fork(tmp_path / "short", 3, out=tmp_path / "more")
    fork(tmp_path / "short", 3, out=tmp_path / "more", max_steps=40)
    assert trace(tmp_path / "more") == trace(reference)
    assert final(tmp_path / "more") == final(reference)


def test_a_fork_may_begin_while_the_run_is_at_work_elsewhere(
    reference: Path,
    reference_config: dict[str, Any],
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    # Killed in its third step: its log is open, as it is while a process writes to it.
    kill = {"at": "prunewright.graph.nodes.decide:ask", "when": "before", "nth": 3}
    out = tmp_path / "run"
    submit({"do": "run", "config": reference_config, "out": str(out), "kill": kill})
    before = {k: v for k, v in contents(out).items() if not k.endswith("-shm")}
    fork(out, 2, out=tmp_path / "fork")
    same_run(reference, tmp_path / "fork")
    assert {k: v for k, v in contents(out).items() if not k.endswith("-shm")} == before
    with pytest.raises(InputError, match="has 2 steps so far, so no step 3"):
        fork(out, 3, out=tmp_path / "late")
    resume(out)
    same_run(reference, out)


def test_what_cannot_be_forked(
    reference: Path, reference_config: dict[str, Any], tmp_path: Path
) -> None:
    steps, out = len(trace(reference)), tmp_path / "fork"
    with pytest.raises(InputError, match=f"has {steps} steps so far, so no step 99"):
        fork(reference, 99, out=out)
    with pytest.raises(InputError, match="after step -1: steps count from 0"):
        fork(reference, -1, out=out)
    with pytest.raises(InputError, match="the target sparsity is reached"):
        fork(reference, steps, out=out)
    with pytest.raises(InputError, match="needs a new run"):
        fork(reference, 1, out=out, target=0.2)
    with pytest.raises(InputError, match="did you mean greedy"):
        fork(reference, 1, out=out, agent="greeedy")
    with pytest.raises(InputError, match="holds another run"):
        fork(reference, 1, out=reference)
    with pytest.raises(InputError, match="not a run directory"):
        fork(tmp_path, 1, out=out)
    baseline(reference_config, out=tmp_path / "baseline")
    with pytest.raises(InputError, match="holds a baseline"):
        fork(tmp_path / "baseline", 0, out=out)
    copy = Path(shutil.copytree(reference, tmp_path / "copy"))
    (copy / "state.sqlite").unlink()
    with pytest.raises(InputError, match="has no checkpoints of its own"):
        fork(copy, 1, out=out)
    shutil.copy(reference / "state.sqlite", copy)
    mask = next((copy / "revisions" / "manifests").iterdir())
    mask.unlink()
    with pytest.raises(StoreError, match=mask.name):
        fork(copy, steps - 1, out=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baseline", "copy"]


def test_the_command(reference: Path, tmp_path: Path) -> None:
    arguments = ["fork", str(reference), "--step", "2", "--out", str(tmp_path / "fork")]
    result = CliRunner().invoke(app, [*arguments, "--set", "agent=uniform", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["revision"] == final(tmp_path / "fork")
    assert "after step 2" in result.stderr
    refused = CliRunner().invoke(app, [*arguments[:3], "77", "--out", str(tmp_path / "no")])
    assert refused.exit_code == 2
    assert "so no step 77" in refused.stderr


def test_time_travel_inside_a_thread_has_the_weights_of_the_step(
    reference: Path, reference_config: dict[str, Any], tmp_path: Path
) -> None:
    """As Studio does it: an old checkpoint of the same thread, its state edited or not."""
    settled = PruneConfig.model_validate(reference_config)
    context = settled.context.model_copy(update={"out": str(tmp_path / "run")})
    graph = build_graph(InMemorySaver())
    thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
    request: Any = settled.request.model_dump(mode="json")
    graph.invoke({"request": request}, thread, context=context)
    assert final(tmp_path / "run") == final(reference)
    history = list(graph.get_state_history(thread))

    def before(node: str, step: int) -> Any:
        return next(s for s in history if s.next == (node,) and s.values.get("step") == step)

    # Another agent from after the second step on.
    other = context.model_copy(update={"agent": "uniform"})
    graph.invoke(None, before("profile", 2).config, context=other)
    fork(reference, 2, out=tmp_path / "fork", agent="uniform")
    assert final(tmp_path / "run") == final(tmp_path / "fork") != final(reference)

    # The first decision edited, which every later one then differs by.
    old = before("apply_prune", 0)
    report = old.values["proposal"]
    kept = report["decision"]["layers"][1:]
    too_much = [{"name": kept[0]["name"], "delta": 0.9}]
    for layers, words in ((too_much, "0.9"), (kept, "")):
        edited = report | {"decision": report["decision"] | {"layers": layers}}
        at = graph.update_state(old.config, {"proposal": edited}, as_node="agent_decide")
        if words:
            with pytest.raises(InputError, match=f"cannot be applied: .*{words}.*edit it again"):
                graph.invoke(None, at, context=context)
        else:
            graph.invoke(None, at, context=context)
    first = trace(tmp_path / "run")[0]
    assert first["decision"]["layers"] == kept
    run(reference_config | {"agent": f"replay:{tmp_path / 'run'}"}, out=tmp_path / "again")
    assert final(tmp_path / "run") == final(tmp_path / "again") != final(reference)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_while_a_fork_is_made_leaves_nothing_for_long(
    reference: Path,
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
    when: str,
) -> None:
    out, kill = tmp_path / "fork", {"at": "prunewright.graph.running.forking:_write_checkpoints"}
    job = {"do": "fork", "of": str(reference), "step": 1, "out": str(out)}
    assert submit(job | {"kill": kill | {"when": when}}) == {"signal": signal.SIGKILL}
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".forking-")
    # Another that is at work just now is not touched.
    busy = RunDirectory(tmp_path / ".forking-by-another")
    with busy.locked():
        assert "error" not in submit(job)
        assert set(tmp_path.iterdir()) == {out, busy.path}
    same_run(reference, out)
    assert RunDirectory(out).holder() is None
    assert not RunDirectory(out).holder_file.exists()
