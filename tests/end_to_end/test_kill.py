"""kill -9 at any moment: `resume` comes to what the uninterrupted run came to."""

import json
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver

from prunewright.graph import build_graph

NODES = "prunewright.graph.nodes"
BENCH = "prunewright.tools.bench.workbench:Workbench"
RUN = "prunewright.tools.store.rundir:RunDirectory"
STEPS = "prunewright.tools.store.steps:StepLog"
RESULTS = "prunewright.tools.results"
SAVING = "prunewright.tools.saving.model"
MASKS = "prunewright.tools.store.revisions:write_atomic"
SAVER = "langgraph.checkpoint.sqlite:SqliteSaver"


def at(where: str, when: str = "after", nth: int = 1, **more: str | float) -> dict[str, Any]:
    return {"at": where, "when": when, "nth": nth, **more}


# What dies where, and the node that the run's last checkpoint then names as the next one.
CASES = {
    "config written": (
        at("prunewright.tools.store.rundir:write_atomic", match="config.yaml"),
        None,
    ),
    "before the first checkpoint": (at(f"{SAVER}.put", "before"), None),
    "model loading": (at("prunewright.tools.bench.workbench:load_windows"), "profile"),
    "before the manifest": (at("prunewright.tools.store.rundir:write_json", "before"), "profile"),
    "profile, step 0, file written": (at(f"{RUN}.write_step_file"), "profile"),
    "profile, step 3, in the activations": (
        at("prunewright.tools.bench.workbench:measure_activations", "after", 3, caller="profile"),
        "profile",
    ),
    "agent_decide, step 1": (at(f"{NODES}.decide:ask", nth=2), "agent_decide"),
    "apply_prune, step 0, a mask in hand": (
        at(MASKS, "before", 1, match="/masks/"),
        "apply_prune",
    ),
    "apply_prune, step 2, between masks and manifest": (
        at(MASKS, "before", 3, match="/manifests/"),
        "apply_prune",
    ),
    "evaluate_ppl, step 2": (at(f"{BENCH}.guard_losses", nth=4), "evaluate_ppl"),
    "rollback, before": (at(f"{BENCH}.sync", "before", caller="rollback"), "rollback"),
    "rollback, weights restored": (at(f"{BENCH}.sync", caller="rollback"), "rollback"),
    "reflect, step 1, before its line": (at(f"{STEPS}.append", "before", nth=2), "reflect"),
    "reflect, step 2, line written": (at(f"{STEPS}.append", nth=3), "reflect"),
    "finish, before anything": (at(f"{RESULTS}:complete", "before"), "finish"),
    "finish, saving the final model": (at(f"{SAVING}:rewrite"), "finish"),
    "finish, saved model not verified": (at(f"{SAVING}:_verify", "before"), "finish"),
    "finish, model in place, no metrics": (at(f"{RESULTS}:write_json", "before"), "finish"),
    "finish, all written": (at(f"{RESULTS}:finish"), "finish"),
    # The node's writes are stored, the checkpoint after it is not: no node is left to run.
    "between a node and its checkpoint": (at(f"{SAVER}.put", "before", 9, pause=0.5), ""),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_after_a_kill_equals_the_uninterrupted_run(
    name: str,
    reference: Path,
    reference_config: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    kill, node = CASES[name]
    out = tmp_path / "run"
    job = {"config": reference_config, "out": str(out)}
    died = submit(job | {"do": "run", "kill": kill})
    assert died == {"signal": signal.SIGKILL}
    assert next_node(out) == node
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(reference, out)
    assert [p for p in out.iterdir() if p.name.startswith(".saving")] == []
    tokens, before = answer["metrics"]["tokens"], metrics(reference)["tokens"]
    assert all(tokens[use] >= before[use] for use in before)  # work done again counts again


def test_a_run_may_be_killed_again_and_again(
    reference: Path,
    reference_config: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    job: dict[str, Any] = {"do": "run", "config": reference_config, "out": str(out)}
    for kill in (
        at(f"{NODES}.decide:ask"),
        at(f"{NODES}.decide:ask"),
        at(f"{BENCH}.guard_losses"),
        at(f"{BENCH}.sync", caller="rollback"),
        at(f"{STEPS}.append"),
        at(f"{SAVING}:_verify", "before"),
    ):
        assert submit(job | {"kill": kill}) == {"signal": signal.SIGKILL}
        job["do"] = "resume"
    answer = submit(job)
    assert "error" not in answer, answer
    same_run(reference, out)


def test_a_kill_between_the_last_node_and_its_checkpoint(
    reference: Path,
    reference_config: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    with closing(sqlite3.connect(reference / "state.sqlite")) as connection:
        (last,) = connection.execute("SELECT count(*) FROM checkpoints").fetchone()
    out = tmp_path / "run"
    job = {"config": reference_config, "out": str(out)}
    kill = at(f"{SAVER}.put", "before", last, pause=0.5)
    assert submit(job | {"do": "run", "kill": kill}) == {"signal": signal.SIGKILL}
    assert (out / "metrics.json").exists()
    assert next_node(out) == ""
    written = (out / "metrics.json").read_bytes()
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    assert (out / "metrics.json").read_bytes() == written  # the node was not run again
    same_run(reference, out)


def test_the_reference_run_rolls_back_and_reaches_its_target(reference: Path) -> None:
    trace = [json.loads(line) for line in (reference / "trace.jsonl").read_text().splitlines()]
    assert [step["verdict"] for step in trace[:3]] == ["accepted", "rolled_back", "accepted"]
    assert metrics(reference)["status"] == "target_reached"
    assert metrics(reference)["rollbacks"] == 1


def test_two_processes_come_to_the_same_revision_and_seeds_draw_other_windows(
    reference: Path,
    reference_config: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        job = {"do": "run", "config": reference_config | {"seed": seed}}
        answer = submit(job | {"out": str(tmp_path / name)})
        assert "error" not in answer, answer
    same_run(reference, tmp_path / "same")
    texts = [
        json.loads((path / "manifest.json").read_text())["texts"]
        for path in (reference, tmp_path / "other")
    ]
    assert texts[0]["calibration"]["sha256"] != texts[1]["calibration"]["sha256"]
    assert texts[0]["guard"]["sha256"] != texts[1]["guard"]["sha256"]
    assert texts[0]["test"] == texts[1]["test"]  # the first windows, whatever the seed


def metrics(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "metrics.json").read_text())
    return content


def next_node(out: Path) -> str | None:
    """The node that the last checkpoint names, read from a copy of the database."""
    if not (out / "state.sqlite").exists():
        return None
    copy = out.parent / "copy"
    copy.mkdir(exist_ok=True)
    for part in out.glob("state.sqlite*"):
        shutil.copy(part, copy)
    with closing(sqlite3.connect(copy / "state.sqlite", check_same_thread=False)) as connection:
        saver = SqliteSaver(connection)
        threads = {c.config["configurable"]["thread_id"] for c in saver.list(None)}
        if not threads:
            return None
        (thread,) = threads
        state = build_graph(saver).get_state({"configurable": {"thread_id": thread}})
        return ",".join(state.next)
