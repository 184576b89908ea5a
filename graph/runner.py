"""Start, resume and fork runs in this process: what the command line and notebooks call."""

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver

from prunewright.graph.agents import check_agent
from prunewright.graph.builder import build_graph
from prunewright.graph.stopping import check_stop, iterate_stoppable, stop_on_signals
from prunewright.state import (
    InputError,
    PruneConfig,
    PruneInput,
    StoreError,
    load_config,
    validate_config,
)
from prunewright.state.metrics import Metrics
from prunewright.tools.baseline import BASELINE, prune_once
from prunewright.tools.rundir import RunDirectory
from prunewright.tools.storage import write_atomic
from prunewright.tools.trace import load_metrics

_REVISIONS = ("revision", "gradient_revision", "candidate")
"""The keys of the state that name a revision."""

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with ``updates`` (a node's name and update) or ``custom`` (progress, step, metrics)."""

Reviewer = Callable[[ReviewRequest], ReviewAnswer | dict[str, Any]]
"""Asks a person about a decision; a dict holds the keys of a `ReviewAnswer`."""


class RunResult:
    """A finished run.

    Attributes:
        directory: the run directory.
        metrics: what metrics.json holds.
    """

    def __init__(self, directory: Path, metrics: Metrics) -> None:
        self.directory = directory
        self.metrics = metrics

    @property
    def model_directory(self) -> Path:
        """The pruned model, a plain Hugging Face directory."""
        return RunDirectory(self.directory).model


def run(
    config: PruneConfig | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
    review: Reviewer | None = None,
) -> RunResult:
    """Prune a model step by step, as the configuration says, and save the result.

    Args:
        config: a `PruneConfig`, its keys as a dict, or the path of a YAML file.
        out: run directory, new or empty; default ``runs/<time>-<id>``.
        on_event: told of progress and updates.
        review: asked before each decision is applied, where the configuration says ``review``.

    Raises:
        InputError: the configuration, the model, a text or the directory cannot be used.
        AgentError: the agent could not be asked; `resume` goes on from there.
        ReviewPendingError: a decision waits for a person and there is no ``review``; `resume`
            goes on from there.
        PrunewrightError: another failure; its message says what to do.
    """
    settled = _settle(config)
    check_agent(settled.context)
    thread = _new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    directory.create(settled)
    with _abandoned_if_refused(directory):
        return _drive(directory, settled, thread, on_event, review)


def resume(
    run_directory: str | Path,
    on_event: OnEvent | None = None,
    reviewer: Reviewer | None = None,
    **changes: Any,
) -> RunResult:
    """Go on with a run from its last checkpoint; a finished one is only reported.

    Args:
        run_directory: the run's directory.
        on_event: told of progress and updates.
        changes: keys of the config's context to change (agent, guard, max_steps ...).

    Raises:
        InputError: no run there, or a change to what defines the run.
        StoreError: a file of the run is missing or damaged.
    """
    directory = RunDirectory(run_directory)
    config = directory.config()
    if changes:
        changed = validate_config(config.model_dump() | changes)
        if changed.request != config.request:
            raise InputError(
                "only who decides and how can change on a resumed run (agent, guard, "
                "max_steps ...); what defines it, such as model or target, needs a new run"
            )
        config = changed
    thread = directory.thread() or _new_thread()
    if not directory.begun_with(config.request):
        raise StoreError(
            f"{directory.config_file} is not what the run began with: put back the values that "
            f"{directory.manifest_file} holds under request"
        )
    if config.agent == BASELINE:
        if directory.metrics_file.exists():
            return RunResult(directory.path, load_metrics(directory))
        return _prune_once(directory, config, thread, on_event)
    if directory.started:
        _check_database(directory, thread)
    return _drive(directory, config, thread, on_event)


def baseline(
    config: PruneConfig | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Prune every layer alike in one shot; leaves the same files as `run`.

    Args:
        config: as for `run`; target or pattern, and criterion, say what is done.
        out: run directory, new or empty; default ``runs/<time>-<id>``.
        on_event: told of progress.

    Raises:
        InputError: the configuration, the model, a text or the directory cannot be used.
        PrunewrightError: another failure; its message says what to do.
    """
    settled = _settle(config).model_copy(update={"agent": BASELINE})
    thread = _new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    directory.create(settled)
    with _abandoned_if_refused(directory):
        return _prune_once(directory, settled, thread, on_event)


def collect_garbage(run_directory: str | Path) -> tuple[int, int]:
    """Delete the revisions of a run that no checkpoint of any of its threads refers to.

    Returns:
        Files and bytes deleted.

    Raises:
        InputError: no run there, or another process works on it.
        StoreError: a file of the run is missing or damaged; nothing is deleted.
    """
    directory = RunDirectory(run_directory)
    directory.config()
    keep: set[str] = set()
    with directory.locked():
        if directory.database.exists():
            with read_checkpoints(directory) as saver:
                for found in saver.list(None):
                    values = list(found.checkpoint["channel_values"].items())
                    values += [(name, value) for _, name, value in found.pending_writes or ()]
                    keep |= {value for name, value in values if name in _REVISIONS and value}
        return directory.collect_garbage(keep)


@contextmanager
def read_checkpoints(directory: RunDirectory) -> Iterator[SqliteSaver]:
    """A run's checkpoints, to read only; another process may be writing them.

    Raises:
        StoreError: missing or damaged, when it is opened or while it is read.
    """
    path = directory.database.resolve()
    # Without a log nobody writes, and a reader that says so leaves no files of its own behind.
    still = not path.with_name(f"{path.name}-wal").exists()
    uri = f"{path.as_uri()}?mode=ro{'&immutable=1' if still else ''}"
    try:
        with closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as database:
            saver = SqliteSaver(database)
            saver.is_setup = True  # nothing is written
            yield saver
    except (sqlite3.Error, ValueError, TypeError, LookupError) as error:
        raise StoreError(f"{directory.database} cannot be read: {error}") from error


@contextmanager
def _abandoned_if_refused(directory: RunDirectory) -> Iterator[None]:
    """A run that is refused before anything was computed leaves no directory behind."""
    try:
        yield
    except InputError:
        directory.abandon()
        raise


def _prune_once(
    directory: RunDirectory, config: PruneConfig, thread: str, on_event: OnEvent | None
) -> RunResult:
    def progress(label: str, done: int, total: int) -> None:
        check_stop()
        if on_event is not None:
            on_event("custom", {"progress": {"label": label, "done": done, "total": total}})

    with stop_on_signals(), directory.locked():
        return RunResult(directory.path, prune_once(directory, config, thread, progress))


def _settle(config: PruneConfig | dict[str, Any] | str | Path) -> PruneConfig:
    if isinstance(config, str | Path):
        return load_config(config)
    return validate_config(config) if isinstance(config, dict) else config


def _new_thread() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _check_database(directory: RunDirectory, thread: str) -> None:
    """Look at the checkpoints read-only: opening a damaged database for writing would alter it.

    Raises:
        StoreError: missing, damaged, or without the run's checkpoints.
    """
    database = directory.database
    if not database.exists():
        raise StoreError(f"{database} is missing: the run cannot go on without it")
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
    directory: RunDirectory, config: PruneConfig, thread: str, on_event: OnEvent | None
) -> RunResult:
    context = config.context.model_copy(update={"out": str(directory.path)})
    options: RunnableConfig = {
        "configurable": {"thread_id": thread},
        "recursion_limit": 6 * config.max_steps + 10,
        "run_name": "prunewright",
        "tags": [config.criterion, config.agent],
        "metadata": {"model": config.model, "target": config.target},
    }
    try:
        with (
            stop_on_signals(),
            directory.locked(),
            closing(sqlite3.connect(directory.database, check_same_thread=False)) as connection,
        ):
            saver = SqliteSaver(connection)
            graph = build_graph(saver)
            try:
                state = graph.get_state(options)
            except (ValueError, TypeError, LookupError) as error:
                raise StoreError(f"{directory.database} is damaged: {error}") from error
            started = bool(state.values)
            # Not `state.next`: it is empty, too, when a kill fell between the last node's writes
            # and the checkpoint after it.
            if state.values.get("status", "running") != "running":
                return RunResult(directory.path, load_metrics(directory))
            check_agent(config.context)
            if directory.config() != config:
                write_atomic(directory.config_file, config.to_yaml().encode())
            # JSON, as Studio sends it: the state holds plain values only.
            request: Any = config.request.model_dump(mode="json")
            start: PruneInput | None = None if started else {"request": request}
            stream = partial(
                graph.stream,
                start,
                options,
                context=context,
                stream_mode=["updates", "custom"],
                durability="sync",
            )
            with closing(iterate_stoppable(stream)) as events:
                for mode, event in events:
                    if on_event is not None:
                        on_event(str(mode), cast(dict[str, Any], event))
    except sqlite3.Error as error:
        raise StoreError(
            f"{directory.database}: {error}. Nothing recorded so far is lost: free some space "
            f"if the disk is full, then: prunewright resume {directory.path}"
        ) from error
    return RunResult(directory.path, load_metrics(directory))
