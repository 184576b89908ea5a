"""Start, resume and fork runs in this process: what the command line and notebooks call."""

import logging
import shlex
import shutil
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.types import Command
from pydantic_core import to_jsonable_python

from prunewright.graph.agents import check_agent, greet_agent
from prunewright.graph.builder import build_graph
from prunewright.graph.routing import termination
from prunewright.graph.running.checkpoints import read_checkpoints, write_checkpoints
from prunewright.graph.running.logs import log_progress
from prunewright.graph.running.notebook import NotebookBar, in_notebook
from prunewright.graph.running.stopping import check_stop, iterate_stoppable, stop_on_signals
from prunewright.graph.running.tracing import labels
from prunewright.graph.whole_layers import check_request
from prunewright.state import (
    STATUS_WORDS,
    InputError,
    PruneConfig,
    PruneInput,
    PruneRequest,
    PruneState,
    PruneUpdate,
    ReviewAnswer,
    ReviewPendingError,
    ReviewRequest,
    StoreError,
    load_config,
    validate_config,
)
from prunewright.state.config import BASELINE, CRITERIA
from prunewright.state.metrics import Metrics
from prunewright.state.review import HOW
from prunewright.state.shown import clean
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunewright.tools.model.head import Progress

_log = logging.getLogger("prunewright")

_REVISIONS = ("revision", "gradient_revision", "candidate")
"""The keys of the state that name a revision."""

_FORKING = ".forking-"
"""Begins the name of a directory that is to become a fork."""

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with ``updates`` (a node's name and update) or ``custom`` (progress, step, metrics).

A step's ``step`` counts from 0, as in trace.jsonl; what people read counts from 1. A baseline,
which has no nodes, says ``begun`` once its model is loaded. Where nobody is named, a notebook
shows a bar.
"""

Reviewer = Callable[[ReviewRequest], ReviewAnswer | dict[str, Any]]
"""Asks a person about a decision; a dict holds the keys of a `ReviewAnswer`."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run; printed or shown by a notebook it says what came out.

    Attributes:
        directory: the run directory.
        metrics: what metrics.json holds.
    """

    directory: Path
    metrics: Metrics

    @property
    def model_directory(self) -> Path | None:
        """The pruned model, a plain Hugging Face directory; None if it would be the dense one."""
        return RunDirectory(self.directory).model if self.metrics.saved else None

    def _rows(self) -> list[tuple[str, str]]:
        """What came out, each with its name."""
        found, test = self.metrics, self.metrics.perplexity.test
        change = test.final / test.dense - 1
        ended = found.status.replace("_", " ")
        return [
            ("ended", f"{ended}, {found.steps} steps, {found.rollbacks} rolled back"),
            ("sparsity", f"{found.sparsity:.4f}"),
            ("test perplexity", f"{test.dense:.3f} dense, {test.final:.3f} pruned ({change:+.1%})"),
            ("model", str(self.model_directory or "none saved: it would be the dense one")),
            ("run", str(self.directory)),
        ]

    def __repr__(self) -> str:
        words = ", ".join(f"{name}: {value}" for name, value in self._rows())
        return clean(f"<RunResult {words}>")

    def _repr_html_(self) -> str:
        """The rows as a table; names of files are untrusted."""
        rows = (
            f"<tr><th style='text-align: left'>{name}</th><td>{escape(clean(value))}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table>{''.join(rows)}</table>"


def run(
    config: PruneConfig | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    reviewer: Reviewer | None = None,
    *,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> RunResult:
    """Prune a model step by step, as the configuration says, and save the result.

    A model that is loaded already stands in for the configuration's ``model``. It is written once
    to ``dense/`` in the run directory, checked to load as it is in memory, and pruned from there as
    any local model: the run loads a copy of its own, in the configuration's dtype and on its
    device. The object itself is not changed; the result is in `RunResult.model_directory`. That
    takes room for the dense model on disk, and for both copies in memory. Hooks and what else is
    no weight are left behind.

    Args:
        config: a `PruneConfig`, its keys as a dict, or the path of a YAML file.
        out: run directory, new or empty; default ``runs/<time>-<id>``.
        on_event: told of progress and updates.
        reviewer: asked before each decision is applied, where the configuration says ``review``.
        model: a transformers model, whole in memory: not quantised, without adapters, nothing
            offloaded.
        tokenizer: the model's; both or neither.

    Raises:
        InputError: the configuration, the model, a text or the directory cannot be used.
        AgentError: the agent could not be asked; `resume` goes on from there.
        ReviewPendingError: a decision waits for a person and there is no reviewer; `resume`
            goes on from there.
        PrunewrightError: another failure; its message says what to do.
    """
    settled = _settle(config)
    check_agent(settled.context)
    thread = _new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    settled, write = _given(directory, settled, model, tokenizer)
    with directory.begun(settled, write):
        return _drive(directory, settled, thread, on_event, reviewer)


def resume(
    run_directory: str | Path,
    on_event: OnEvent | None = None,
    reviewer: Reviewer | None = None,
    **changes: Any,
) -> RunResult:
    """Go on with a run from its last checkpoint; one that reached its target is only reported.

    So is one that ended before it, unless a change is given. With a higher ``target`` a finished
    run goes on from its last revision: its trace goes on, and ``model/`` and metrics.json become
    those of the new end. To keep the first result as it is, `fork` the run.

    Args:
        run_directory: the run's directory.
        on_event: told of progress and updates.
        reviewer: as for `run`; a decision that waits is asked about first.
        changes: a higher ``target``; keys of the config's context (agent, guard, max_steps ...).

    Raises:
        InputError: no run there, a target that is not higher, or a change to what defines the run.
        StoreError: a file of the run is missing or damaged.
        ReviewPendingError: as for `run`.
    """
    directory = RunDirectory(run_directory)
    if directory.config().agent == BASELINE and directory.metrics_file.exists():
        if "target" in changes:
            raise InputError(f"{directory.path} holds a baseline, which is one shot: begin another")
        if changes:
            _tell_unused(directory)
        return RunResult(directory.path, load_metrics(directory))
    with directory.locked():
        config = _changed(directory, changes)
        if edited := directory.edited():
            words = "%s was edited since the run was last at work, which goes on with it: %s"
            _log.warning(words, directory.config_file, edited)
        thread = directory.thread() or _new_thread()
        if config.agent == BASELINE:
            return _prune_once(directory, directory.locate(config), thread, on_event)
        if directory.started:
            _check_database(directory, thread)
        reopen = bool(edited) or config != directory.config()
        return _drive(directory, config, thread, on_event, reviewer, reopen=reopen)


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
    config = parent.locate(_changed(parent, changes | {"out": None}))
    check_agent(config.context)
    before = parent.thread()
    if before is None or (step is not None and step < 0):
        what = "nothing was computed in it yet" if before is None else "steps count from 0"
        raise InputError(f"{parent.path} cannot be forked after step {step}: {what}")
    chain = [] if step == 0 else _checkpoints(parent, before, step)
    state = cast(PruneState, chain[0].checkpoint["channel_values"]) if chain else None
    if state is not None:
        _check_open(parent, state, config)
    thread = _new_thread()
    directory = RunDirectory(out or parent.path.parent / thread)
    if Path(config.model) == parent.dense.absolute():
        config = config.model_copy(update={"model": str(directory.dense.absolute())})
    directory.check_free()
    revisions = {
        values[name]
        for values in (found.checkpoint["channel_values"] for found in chain)
        for name in _REVISIONS
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
            return _drive(scratch, config, thread, on_event, reviewer)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _tell_unused(directory: RunDirectory) -> None:
    """Say that a finished run takes no changes."""
    _log.warning(
        "the run in %s is finished: nothing of it is changed. To go on to a higher target: "
        "prunewright resume %s --target ...; from an earlier step: prunewright fork %s --step N "
        "--set ...",
        directory.path,
        place := shlex.quote(str(directory.path)),
        place,
    )


def _remove_half_forks(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they made a fork there."""
    for path in folder.glob(f"{_FORKING}*"):
        # Whoever is still at work there holds its lock.
        with suppress(InputError, StoreError), RunDirectory(path).locked():
            shutil.rmtree(path, ignore_errors=True)


def _changed(directory: RunDirectory, changes: dict[str, Any]) -> PruneConfig:
    """A run's configuration with some keys of its context changed, or its target raised."""
    directory.check_format()
    config = directory.config()
    if not directory.begun_with(config.request):
        raise StoreError(
            f"{directory.config_file} is not what the run began with: restore the values that "
            f"{directory.manifest_file} holds under request"
        )
    if not changes:
        return config
    changed = validate_config(config.model_dump() | changes)
    if "target" in changes:
        _check_higher(directory, config.target, changed)
    request = changed.request.model_copy(update={"target": config.target})
    if request != config.request:
        _check_moved(directory, config.request, request)
    return changed


def _check_higher(directory: RunDirectory, before: float, now: PruneConfig) -> None:
    """Let a run's target rise, since no step gives back what another target would not have taken.

    Raises:
        InputError: it does not rise, or its other bounds rule it out.
    """
    if now.target <= before:
        words = (
            f"can only rise: {now.target:g} needs a new run"
            if now.target < before
            else "stays so: leave it out, or give a higher one"
        )
        raise InputError(f"the target of {directory.path} is {before:g} and {words}")
    check_request(now.request)


def _check_moved(directory: RunDirectory, before: PruneRequest, now: PruneRequest) -> None:
    """Let nothing of a request change but where the model and the texts lie.

    Raises:
        InputError: something else changes, or what lies there has another content.
    """
    words = (
        "only who decides and how can change on a resumed or forked run (agent, guard, "
        "max_steps ...), where the same model and texts lie, and the target, to a higher one; what "
        "defines it, such as model or criterion, needs a new run"
    )
    if now.identity() != before.identity() or not directory.manifest_file.exists():
        raise InputError(words)
    from prunewright.tools.bench.workbench import workbench

    request = directory.locate(now)
    with workbench(request, directory.path) as bench:
        try:
            directory.check(request, bench.facts())
        except StoreError as error:
            raise InputError(f"{words}: {error}") from error


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
            # A step ends with `reflect`, which leaves no profile.
            ended = values["step"] if values.get("profile") is None and "step" in values else 0
            most = max(most, ended)
            if chain or (ended == step if step is not None else ended):
                chain.append(found)
            found = saver.get_tuple(found.parent_config) if found.parent_config else None
    if not chain and step is not None:
        raise InputError(f"{directory.path} has {most} steps so far, so no step {step}")
    return chain


def _check_open(directory: RunDirectory, state: PruneState, config: PruneConfig) -> None:
    """Refuse to fork where nothing would be left to do.

    Raises:
        InputError: saying why.
    """
    raised = _is_raised(state, config)
    status = termination(
        sparsity=state["sparsity"],
        target=config.target,
        steps=state["step"],
        max_steps=config.max_steps,
        # Whoever goes on with a run without progress begins to count again.
        stalls=0 if raised or state["status"] == "stalled" else state["stalls"],
        max_stalls=config.max_stalls,
        # A run that has reached its target has, whatever else is changed.
        nothing_fits=state["status"] == "target_reached" and not raised,
        done=state["status"] != "running",
    )
    if status != "running":
        raise InputError(
            f"nothing is left to do after step {state['step']} of {directory.path}: "
            f"{STATUS_WORDS[status]}. Fork from an earlier step, or change what ends it "
            "(max_steps, max_stalls, a higher target)"
        )


def _is_raised(state: PruneState, config: PruneConfig) -> bool:
    """Whether a configuration's target is above that of a checkpoint."""
    before = state["request"].get("target")
    return isinstance(before, int | float) and config.target > before


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
            build_graph(saver).update_state(at, _reopened(state, config), as_node="reflect")


def _reopened(state: PruneState, config: PruneConfig) -> PruneUpdate:
    """What makes a state that has ended go on.

    One that stalled, or whose target is raised, begins to count its stalls anew.
    """
    if _is_raised(state, config):
        request = config.request.model_dump(mode="json")
        return {"status": "running", "result": None, "stalls": 0, "request": request}
    stalls = 0 if state["status"] == "stalled" else state["stalls"]
    return {"status": "running", "result": None, "stalls": stalls}


def baseline(
    config: PruneConfig | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    *,
    model: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> RunResult:
    """Prune in one shot, as the allocation says; leaves the same files as `run`.

    Args:
        config: as for `run`; target or pattern, criterion and allocation say what is done.
        out: run directory, new or empty; default ``runs/<time>-<id>``.
        on_event: told of progress.
        model: as for `run`.
        tokenizer: as for `run`.

    Raises:
        InputError: the configuration, the model, a text or the directory cannot be used.
        PrunewrightError: another failure; its message says what to do.
    """
    from prunewright.tools.allocation import resolve_allocation  # torch takes seconds

    settled = _settle(config).model_copy(update={"agent": BASELINE})
    resolve_allocation(settled.allocation, settled.allocation_options, settled.pattern)
    thread = _new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    settled, write = _given(directory, settled, model, tokenizer)
    with directory.begun(settled, write):
        return _prune_once(directory, settled, thread, on_event)


def save(run_directory: str | Path, on_event: OnEvent | None = None) -> RunResult:
    """Make the pruned model of a finished run from its masks again, where it was deleted.

    Args:
        run_directory: the run's directory.
        on_event: told of progress.

    Raises:
        InputError: no finished run there, it pruned nothing, or it has its model.
        StoreError: a file of the run is missing or damaged, or the model cannot be written.
    """
    from prunewright.tools.bench.workbench import workbench
    from prunewright.tools.results import save_pruned

    directory = RunDirectory(run_directory)
    config = directory.config()
    if not directory.metrics_file.exists():
        raise InputError(
            f"the run in {directory.path} is not finished: "
            f"prunewright resume {shlex.quote(str(directory.path))}"
        )
    metrics = load_metrics(directory)
    if not metrics.saved:
        raise InputError(f"the run in {directory.path} pruned nothing: its model is the dense one")
    if directory.model.exists():
        raise InputError(f"{directory.model} is there already")
    request = directory.locate(config.request)
    with stop_on_signals(), directory.locked(), workbench(request, directory.path) as bench:
        directory.check(request, bench.facts())
        losses = bench.guard_losses(metrics.revision, _progress(on_event))
        save_pruned(directory, bench, metrics, losses)
    return RunResult(directory.path, metrics)


def collect_garbage(run_directory: str | Path) -> tuple[int, int]:
    """Delete the revisions of a run that no checkpoint of any of its threads refers to.

    Returns:
        Files and bytes deleted.

    Raises:
        InputError: no run there, or another process works on it.
        StoreError: a file of the run is missing or damaged; nothing is deleted.
    """
    directory = RunDirectory(run_directory)
    config = directory.config()
    keep: set[str] = set()
    with directory.locked():
        if directory.started and config.agent != BASELINE:
            _check_kept_here(directory)
        if directory.database.exists():
            with read_checkpoints(directory.database) as saver:
                for found in saver.list(None):
                    values = list(found.checkpoint["channel_values"].items())
                    values += [(name, value) for _, name, value in found.pending_writes or ()]
                    keep |= {value for name, value in values if name in _REVISIONS and value}
        return directory.collect_garbage(keep)


def _progress(on_event: OnEvent | None) -> "Progress":
    """Tells of progress, and stops where a person or the system asks for it."""

    def progress(label: str, done: int, total: int) -> None:
        check_stop()
        log_progress(label, done, total)
        if on_event is not None:
            on_event("custom", {"progress": {"label": label, "done": done, "total": total}})

    return progress


def _prune_once(
    directory: RunDirectory, config: PruneConfig, thread: str, on_event: OnEvent | None
) -> RunResult:
    from prunewright.tools.baseline import prune_once

    on_event = _shown(directory, config, on_event)
    progress = _progress(on_event)

    def begun() -> None:
        if on_event is not None:
            on_event("custom", {"begun": True})

    with stop_on_signals():
        _log_begin(directory, config, "begins")
        result = _finished(directory, prune_once(directory, config, thread, progress, begun))
    if on_event is not None:
        on_event("custom", {"metrics": result.metrics.model_dump(mode="json")})
    return result


def _shown(
    directory: RunDirectory, config: PruneConfig, on_event: OnEvent | None
) -> OnEvent | None:
    """Who is told of events: whom the caller names, else a bar where a notebook can show one."""
    if on_event is None and in_notebook():
        return NotebookBar(directory, config.target)
    return on_event


def _settle(config: PruneConfig | dict[str, Any] | str | Path) -> PruneConfig:
    if isinstance(config, str | Path):
        config = load_config(config)
    settled = validate_config(config) if isinstance(config, dict) else config
    if settled.criterion not in CRITERIA:  # refused before anything is loaded
        from prunewright.tools.criteria import find_criterion  # torch takes seconds

        find_criterion(settled.criterion)
    return settled


def _given(
    directory: RunDirectory,
    config: PruneConfig,
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase | None",
) -> tuple[PruneConfig, Callable[[Path], None] | None]:
    """The configuration with a model in memory for its own, and what writes that to a directory.

    Raises:
        InputError: it cannot be used.
    """
    if model is None and tokenizer is None:
        return config, None
    from prunewright.tools.model.given import check_given, write_given  # torch takes seconds

    check_given(model, tokenizer)
    assert model is not None
    assert tokenizer is not None
    write = partial(write_given, model, tokenizer, trust_remote_code=config.trust_remote_code)
    return config.model_copy(update={"model": str(directory.dense.absolute())}), write


def _new_thread() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _check_kept_here(directory: RunDirectory) -> None:
    """Refuse a run whose checkpoints are not in its directory.

    Raises:
        StoreError: they are not.
    """
    if not directory.database.exists():
        raise StoreError(
            f"{directory.database} is missing: without its checkpoints a run can neither go on nor "
            "say which masks it needs. Those of LangGraph's server are kept by it: such a run goes "
            "on there"
        )


def _check_database(directory: RunDirectory, thread: str) -> None:
    """Look at the checkpoints read-only: opening a damaged database for writing would alter it.

    Raises:
        StoreError: missing, damaged, or without the run's checkpoints.
    """
    _check_kept_here(directory)
    database = directory.database
    uri = f"{database.resolve().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise StoreError(f"{database} is damaged: {verdict}")
            found = connection.execute(
                "SELECT 1 FROM checkpoints WHERE thread_id = ? LIMIT 1", (thread,)
            ).fetchone()
    except sqlite3.Error as error:
        raise StoreError(f"{database} is damaged: {error}") from error
    if found is None:
        raise StoreError(f"{database} is damaged: it no longer holds the run's checkpoints")


def _drive(
    directory: RunDirectory,
    config: PruneConfig,
    thread: str,
    on_event: OnEvent | None,
    reviewer: Reviewer | None,
    *,
    reopen: bool = False,
) -> RunResult:
    """Run the graph until it ends.

    Args:
        directory: the run's.
        config: its configuration, changed or not.
        thread: its name.
        on_event: as for `run`.
        reviewer: as for `run`.
        reopen: go on with a run that has ended before its target.
    """
    context = directory.locate(config.context).model_copy(update={"out": str(directory.path)})
    options: RunnableConfig = {
        "configurable": {"thread_id": thread},
        "recursion_limit": 6 * config.max_steps + 10,
        "run_name": "prunewright",
        **labels(config.request, config.context),
    }
    with write_checkpoints(directory.database) as saver:
        graph = build_graph(saver)
        state = graph.get_state(options)
        started = bool(state.values)
        # Not `state.next`: it is empty, too, when a kill fell between the last node's writes
        # and the checkpoint after it.
        status = state.values.get("status", "running")
        found = cast(PruneState, state.values)
        raised = started and _is_raised(found, config)
        if not raised and (status == "target_reached" or (status != "running" and not reopen)):
            if config != directory.config():
                _tell_unused(directory)
            return RunResult(directory.path, load_metrics(directory))
        check_agent(context)
        on_event = _shown(directory, config, on_event)
        with stop_on_signals():
            greet_agent(context, _progress(on_event))
        if status != "running":
            _check_open(directory, found, config)
        if raised:
            directory.raise_target(config, found.get("step", 0))
        if status != "running":
            graph.update_state(options, _reopened(found, config), as_node="reflect")
        directory.metrics_file.unlink(missing_ok=True)
        directory.keep(config)
        # JSON, as Studio sends it: the state holds plain values only.
        request: Any = config.request.model_dump(mode="json")
        _log_begin(directory, config, "goes on" if started else "begins")
        given: PruneInput | Command[Any] | None = None if started else {"request": request}
        while True:
            stream = partial(
                graph.stream,
                given,
                options,
                context=context,
                stream_mode=["updates", "custom"],
                durability="sync",
            )
            with stop_on_signals(), closing(iterate_stoppable(stream)) as events:
                for mode, event in events:
                    if on_event is not None:
                        on_event(str(mode), cast(dict[str, Any], event))
            waiting = graph.get_state(options).interrupts
            if not waiting:
                break
            given = Command(resume=_ask_person(directory, reviewer, waiting[0].value))
    return _finished(directory, load_metrics(directory))


def _log_begin(directory: RunDirectory, config: PruneConfig, what: str) -> None:
    facts = {
        "model": config.model,
        "agent": config.agent,
        "criterion": config.criterion,
        "target": config.target,
    }
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    _log.info("the run %s in %s: %s", what, directory.path, words, extra=_run(directory) | facts)


def _finished(directory: RunDirectory, metrics: Metrics) -> RunResult:
    test, seconds = metrics.perplexity.test, metrics.seconds["total"]
    _log.info(
        "the run is finished: %s, sparsity %.4f, test perplexity %.3f to %.3f, %.1f s",
        metrics.status,
        metrics.sparsity,
        test.dense,
        test.final,
        seconds,
        extra=_run(directory) | {"status": metrics.status, "seconds": seconds},
    )
    return RunResult(directory.path, metrics)


def _run(directory: RunDirectory) -> dict[str, Any]:
    return {"run": str(directory.path)}


def _ask_person(directory: RunDirectory, reviewer: Reviewer | None, waiting: Any) -> dict[str, Any]:
    """The answer to a review's request, as JSON values.

    Raises:
        ReviewPendingError: there is nobody to ask.
        InputError: the reviewer gives no answer, or again the one that was just refused.
    """
    request = ReviewRequest.model_validate(waiting)
    if reviewer is None:
        raise ReviewPendingError(
            f"the decision of step {request.step} waits for a review, and nothing is pruned until "
            "then. Go on with someone to ask, prunewright resume "
            f"{directory.path} in a terminal or resume({str(directory.path)!r}, reviewer=...) in "
            "Python, or without a review: --set review=false"
        )
    answer = to_jsonable_python(reviewer(request))
    if not isinstance(answer, dict) or not answer:
        raise InputError(f"the reviewer answered {answer!r:.80}: {HOW}")
    if request.problems and answer == request.refused:
        raise InputError(f"the reviewer's answer was refused: {'; '.join(request.problems)}")
    return answer
