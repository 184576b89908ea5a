"""Start and resume runs in this process: what the command line and notebooks call."""

import logging
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunewright.graph.agents import check_agent
from prunewright.graph.running.checkpoints import read_checkpoints
from prunewright.graph.running.drive import (
    OnEvent,
    Reviewer,
    RunResult,
    changed_config,
    drive,
    finished,
    log_begin,
    progress_of,
    shown,
    tell_unused,
)
from prunewright.graph.running.forking import REVISIONS
from prunewright.graph.running.stopping import stop_on_signals
from prunewright.state import (
    InputError,
    PruneConfig,
    StoreError,
    load_config,
    validate_config,
)
from prunewright.state.config import BASELINE, CRITERIA
from prunewright.state.run import new_thread
from prunewright.tools.store.finishing import read_finishing
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger("prunewright")


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
    thread = new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    settled, write = _given(directory, settled, model, tokenizer)
    with directory.begun(settled, write):
        return drive(directory, settled, thread, on_event, reviewer)


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
            tell_unused(directory)
        return RunResult(directory.path, load_metrics(directory))
    with directory.locked():
        config = changed_config(directory, changes)
        if edited := directory.edited():
            words = "%s was edited since the run was last at work, which goes on with it: %s"
            _log.warning(words, directory.config_file, edited)
        thread = directory.thread() or new_thread()
        if config.agent == BASELINE:
            directory.keep(config)
            return _prune_once(directory, directory.locate(config), thread, on_event)
        if directory.started:
            _check_database(directory, thread)
        reopen = bool(edited) or config != directory.config()
        return drive(directory, config, thread, on_event, reviewer, reopen=reopen)


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
    resolve_allocation(settled.one_shot, settled.allocation_options, settled.pattern)
    thread = new_thread()
    directory = RunDirectory(out or settled.out or Path("runs") / thread)
    settled, write = _given(directory, settled, model, tokenizer)
    with directory.begun(settled, write):
        return _prune_once(directory, settled, thread, on_event)


def save(run_directory: str | Path) -> RunResult:
    """Make the pruned model of a finished run from its masks again, where it was deleted.

    Args:
        run_directory: the run's directory.

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
        bench.sync(metrics.revision)
        save_pruned(directory, bench, metrics)
    return RunResult(directory.path, metrics)


def collect_garbage(run_directory: str | Path) -> tuple[int, int]:
    """Delete the revisions of a run that no checkpoint of any of its threads, nor its end, needs.

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
        if directory.metrics_file.exists():
            keep.add(load_metrics(directory).revision)
        for file in (directory.finishing_file, directory.control_file):
            if (ending := read_finishing(file)) is not None:
                keep |= {one.stage.revision for one in ending.done}
        if directory.database.exists():
            with read_checkpoints(directory.database) as saver:
                for found in saver.list(None):
                    values = list(found.checkpoint["channel_values"].items())
                    values += [(name, value) for _, name, value in found.pending_writes or ()]
                    keep |= {value for name, value in values if name in REVISIONS and value}
        return directory.collect_garbage(keep)


def _prune_once(
    directory: RunDirectory, config: PruneConfig, thread: str, on_event: OnEvent | None
) -> RunResult:
    from prunewright.tools.baseline import prune_once

    on_event = shown(directory, config, on_event)
    progress = progress_of(on_event)

    def tell(event: dict[str, Any]) -> None:
        if on_event is not None:
            on_event("custom", event)

    with stop_on_signals():
        log_begin(directory, config, "begins")
        result = finished(directory, prune_once(directory, config, thread, progress, tell))
    tell({"metrics": result.metrics.model_dump(mode="json")})
    return result


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
