"""A run that goes from node to node until it ends: what `run`, `resume` and `fork` share."""

import logging
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.types import Command
from pydantic_core import to_jsonable_python

from prunewright.graph.agents import check_agent, greet_agent
from prunewright.graph.builder import build_graph
from prunewright.graph.routing import termination
from prunewright.graph.running.checkpoints import write_checkpoints
from prunewright.graph.running.notebook import NotebookBar, in_notebook
from prunewright.graph.running.stopping import iterate_stoppable, reporter, stop_on_signals
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
    validate_config,
)
from prunewright.state.config import BASELINE
from prunewright.state.metrics import Metrics
from prunewright.state.review import HOW
from prunewright.state.run import Status
from prunewright.state.shown import clean
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

if TYPE_CHECKING:
    from prunewright.tools.model.head import Progress

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with ``updates`` (a node's name and update) or ``custom`` (progress, step, finishing,
stage, metrics).

A step's ``step`` counts from 0, as in trace.jsonl; what people read counts from 1. A baseline,
which has no nodes, says ``begun`` once its model is loaded. Where nobody is named, a notebook
shows a bar.
"""

Reviewer = Callable[[ReviewRequest], ReviewAnswer | dict[str, Any]]
"""Asks a person about a decision; a dict holds the keys of a `ReviewAnswer`."""

_log = logging.getLogger("prunewright")

_DECIDED = {"apply_prune", "evaluate_ppl", "rollback", "reflect", "finish"}
"""The nodes that come after the agent was asked, in a step or at the end."""


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


def drive(
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
        found = cast(PruneState, state.values)
        # Not `state.next`: it is empty, too, when a kill fell between the last node's writes
        # and the checkpoint after it.
        steps_over, ended = found.get("status", "running") != "running", has_ended(found)
        raised = started and is_raised(found, config)
        if ended and not raised and (found["status"] == "target_reached" or not reopen):
            if config != directory.config():
                tell_unused(directory)
            return RunResult(directory.path, load_metrics(directory))
        if ended or (steps_over and raised):
            check_open(directory, found, config)
        # One that was killed at its end goes on there, unless a change lets it take more steps.
        changed = steps_over and (raised or reopen)
        going_on = ended or (changed and ends_now(found, config) == "running")
        check_agent(context)
        on_event = shown(directory, config, on_event)
        # A step that is decided may be the last, for which nobody is asked any more.
        if going_on or not (steps_over or _DECIDED & {*state.next}):
            with stop_on_signals():
                greet_agent(context, progress_of(on_event))
        if raised:
            directory.raise_target(config, found.get("step", 0))
        if going_on:
            graph.update_state(options, reopened(found, config), as_node="reflect")
            directory.finishing_file.unlink(missing_ok=True)
        directory.metrics_file.unlink(missing_ok=True)
        directory.keep(config)
        # JSON, as Studio sends it: the state holds plain values only.
        request: Any = config.request.model_dump(mode="json")
        log_begin(directory, config, "goes on" if started else "begins")
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
    return finished(directory, load_metrics(directory))


def finished(directory: RunDirectory, metrics: Metrics) -> RunResult:
    """What a finished run came to, told to the log."""
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


def log_begin(directory: RunDirectory, config: PruneConfig, what: str) -> None:
    """Tell the log which run does what now: it begins, or goes on."""
    facts = {
        "model": config.model,
        "agent": config.agent,
        "criterion": config.criterion,
        "target": config.target,
    }
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    _log.info("the run %s in %s: %s", what, directory.path, words, extra=_run(directory) | facts)


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


def progress_of(on_event: OnEvent | None) -> "Progress":
    """Tells a caller of progress, and stops where a person or the system asks for it."""
    return reporter(partial(on_event, "custom") if on_event is not None else lambda _: None)


def shown(directory: RunDirectory, config: PruneConfig, on_event: OnEvent | None) -> OnEvent | None:
    """Who is told of events: whom the caller names, else a bar where a notebook can show one."""
    if on_event is None and in_notebook():
        return NotebookBar(directory, config.target)
    return on_event


def tell_unused(directory: RunDirectory) -> None:
    """Say that a finished run or baseline takes no changes."""
    place, baseline = shlex.quote(str(directory.path)), directory.config().agent == BASELINE
    ways = f"To train its kept weights: prunewright adapt {place}; "
    if baseline:
        ways += "for anything else begin another"
    else:
        ways += (
            f"to go on to a higher target: prunewright resume {place} --target ...; from an "
            f"earlier step: prunewright fork {place} --step N --set ..."
        )
    kind = "baseline" if baseline else "run"
    _log.warning("the %s in %s is finished: nothing of it is changed. %s", kind, place, ways)


def changed_config(directory: RunDirectory, changes: dict[str, Any]) -> PruneConfig:
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
    """Let a run's target rise, since no step restores what another target would not have taken.

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


def check_open(directory: RunDirectory, state: PruneState, config: PruneConfig) -> None:
    """Refuse to fork where nothing would be left to do.

    Raises:
        InputError: saying why.
    """
    status = ends_now(state, config)
    if status != "running":
        raise InputError(
            f"nothing is left to do after step {state['step']} of {directory.path}: "
            f"{STATUS_WORDS[status]}. Fork from an earlier step, or change what ends it "
            "(max_steps, max_stalls, a higher target)"
        )


def has_ended(state: PruneState) -> bool:
    """Whether a run is finished, and not only over its last step."""
    return state.get("result") is not None


def ends_now(state: PruneState, config: PruneConfig) -> Status:
    """How a run that goes on from a checkpoint would end before its first step, or that it runs."""
    raised, best = is_raised(state, config), state.get("best")
    return termination(
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
        fruitless=None if raised or best is None else best["fruitless"],
    )


def is_raised(state: PruneState, config: PruneConfig) -> bool:
    """Whether a configuration's target is above that of a checkpoint."""
    before = state["request"].get("target")
    return isinstance(before, int | float) and config.target > before


def reopened(state: PruneState, config: PruneConfig) -> PruneUpdate:
    """What makes a state whose last step was taken go on.

    One that stalled, or whose target is raised, begins to count its stalls again.
    """
    if is_raised(state, config):
        request = config.request.model_dump(mode="json")
        fresh: PruneUpdate = {"status": "running", "result": None, "stalls": 0, "best": None}
        return {**fresh, "request": request}
    stalls = 0 if state["status"] == "stalled" else state["stalls"]
    return {"status": "running", "result": None, "stalls": stalls}
