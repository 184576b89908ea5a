"""A run that goes on from a step of another, in a directory of its own."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple

from prunewright.graph.agents import check_agent
from prunewright.graph.builder import build_graph
from prunewright.graph.running.checkpoints import read_checkpoints, write_checkpoints
from prunewright.graph.running.drive import (
    OnEvent,
    Reviewer,
    RunResult,
    changed_config,
    check_open,
    drive,
    reopened,
)
from prunewright.state import (
    InputError,
    PruneConfig,
    PruneState,
    StoreError,
)
from prunewright.state.config import BASELINE
from prunewright.state.run import new_thread
from prunewright.tools.store.rundir import RunDirectory

REVISIONS = ("revision", "gradient_revision", "candidate")
"""The keys of the state that name a revision."""

_FORKING = ".forking-"
"""Begins the name of a directory that is to become a fork."""


def fork(
    run_directory: str | Path,
    step: int | None = None,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    reviewer: Reviewer | None = None,
    **changes: Any,
) -> RunResult:
    """Go on from just after a step of a run, in a directory of its own, with the model as it was.

    The run stays as it is, and may be going on in another process meanwhile.

    Args:
        run_directory: of a step-by-step run, finished or not; a fork, too.
        step: steps of it that are taken over, rolled-back and empty ones included; 0 starts
            from the dense model; None takes all that have ended.
        out: the new run's directory, new or empty; default: beside the run's, ``<time>-<id>``.
        on_event: told of progress and updates.
        reviewer: as for `run`.
        changes: as for `resume`.

    Raises:
        InputError: no run there, a baseline, no such step, a change to what defines the run, or
            nothing is left to do after that step.
        StoreError: a file of the run is missing or damaged.
        ReviewPendingError: as for `run`.
    """
    parent = RunDirectory(run_directory)
    if parent.config().agent == BASELINE:
        raise InputError(f"{parent.path} holds a baseline: it has no steps to fork from")
    config = parent.locate(changed_config(parent, changes | {"out": None}))
    check_agent(config.context)
    before = parent.thread()
    if before is None or (step is not None and step < 0):
        what = "nothing was computed in it yet" if before is None else "steps count from 0"
        raise InputError(f"{parent.path} cannot be forked after step {step}: {what}")
    chain = [] if step == 0 else _checkpoints(parent, before, step)
    state = cast(PruneState, chain[0].checkpoint["channel_values"]) if chain else None
    if state is not None:
        check_open(parent, state, config)
    thread = new_thread()
    directory = RunDirectory(out or parent.path.parent / thread)
    if parent.dense.is_dir():  # however the run was named, and wherever it was moved to
        config = config.model_copy(update={"model": str(directory.dense.absolute())})
    directory.check_free()
    revisions = {
        values[name]
        for values in (found.checkpoint["channel_values"] for found in chain)
        for name in REVISIONS
        if values.get(name)
    }
    _remove_half_forks(directory.path.parent)
    scratch = RunDirectory(directory.path.with_name(f"{_FORKING}{thread}"))
    half = scratch.path
    try:
        with scratch.locked():
            history = state["history"] if state is not None else []
            parent.branch(scratch, config, thread, history, revisions, directory.path)
            if chain:
                _write_checkpoints(scratch, thread, chain, config)
            scratch.move(directory.path)  # the lock goes along
            return drive(scratch, config, thread, on_event, reviewer)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _remove_half_forks(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they made a fork there."""
    for path in folder.glob(f"{_FORKING}*"):
        # Whoever is still at work there holds its lock.
        with suppress(InputError, StoreError), RunDirectory(path).locked():
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(directory: RunDirectory, thread: str, step: int | None) -> list[CheckpointTuple]:
    """A run's checkpoints from the one just after a step, or its last one, back to its first.

    Only those that the newest one descends from: what was forked off inside the thread, as Studio
    does, is another story.

    Raises:
        InputError: there is none just after that step.
        StoreError: the database is damaged.
    """
    if not directory.database.exists():
        raise InputError(
            f"{directory.path} has no checkpoints of its own: a run of LangGraph's server is "
            "forked there"
        )
    chain: list[CheckpointTuple] = []
    most = 0
    with read_checkpoints(directory.database) as saver:
        found = saver.get_tuple({"configurable": {"thread_id": thread}})
        while found is not None:
            values = found.checkpoint["channel_values"]
            # A step ends with `reflect`, which leaves no profile, nor does `finish`.
            ended = values["step"] if values.get("profile") is None and "step" in values else 0
            most = max(most, ended)
            if chain or (ended == step if step is not None else ended):
                chain.append(found)
            found = saver.get_tuple(found.parent_config) if found.parent_config else None
    if not chain and step is not None:
        raise InputError(f"{directory.path} has {most} steps so far, so no step {step}")
    return chain


def _write_checkpoints(
    directory: RunDirectory, thread: str, chain: list[CheckpointTuple], config: PruneConfig
) -> None:
    """Give a fork its history: the newest checkpoint first, from which it goes on."""
    with write_checkpoints(directory.database) as saver:
        at: RunnableConfig = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        for found in reversed(chain):
            # No writes of the nodes after it: they are the other run's.
            at = saver.put(at, found.checkpoint, found.metadata, {})
        state = cast(PruneState, chain[0].checkpoint["channel_values"])
        if state["status"] != "running":
            # It was the last step: what follows is decided again.
            build_graph(saver).update_state(at, reopened(state, config), as_node="reflect")
