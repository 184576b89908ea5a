"""What every node needs: its request, its run, who watches, and how long it takes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langgraph.runtime import Runtime
from pydantic import ValidationError

from prunewright.graph.running.logs import log_fields
from prunewright.graph.running.stopping import call_alone, check_stop, reporter
from prunewright.graph.whole_layers import check_request
from prunewright.state import InputError, PruneContext, PruneRequest, PruneState, PruneUpdate
from prunewright.state.loading import describe_validation_error
from prunewright.tools.store.rundir import RunDirectory

if TYPE_CHECKING:
    from prunewright.tools.bench.workbench import Workbench
    from prunewright.tools.model.head import Progress

_log = logging.getLogger("prunewright")

_IMPORTING = threading.Lock()

INTERVAL = 0.1
"""Seconds between two reports of progress: each wakes other threads."""
NO_THREAD = "default"
"""Stands for the thread where the graph runs without a checkpointer."""

Node = Callable[[PruneState, Runtime[PruneContext]], PruneUpdate]


@dataclass(frozen=True)
class Work:
    """What a node works by.

    Attributes:
        request: what the run does.
        context: who decides, and how.
        run: its directory.
        thread: its name.
        progress: tells whoever watches how far it is.
        tell: sends them an event.
    """

    request: PruneRequest
    context: PruneContext
    run: RunDirectory
    thread: str
    progress: "Progress"
    tell: Callable[[dict[str, Any]], None]

    @contextmanager
    def live_model(self) -> Iterator["Workbench"]:
        """The model of this process, which must be the one that the run began with.

        Raises:
            StoreError: it, a text or the request is another.
        """
        # Not at the top: torch takes seconds. One thread at a time: of what two runs of a server
        # import at once one may find parts, transformers' among them, half made.
        with _IMPORTING:
            from prunewright.tools.bench.workbench import workbench

        with workbench(self.request, self.run.path, self.progress) as bench:
            if self.run.manifest_file.exists():
                self.run.check(self.request, bench.facts())
            yield bench


def node(work: Callable[[PruneState, Work], PruneUpdate]) -> Node:
    """A node of the graph, of what it does.

    It computes in a thread of its own, is logged, and adds its wall time to the state's
    ``seconds``.
    """
    name = work.__name__

    def run_node(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
        check_stop()
        began, run = time.perf_counter(), run_directory(runtime)
        # What comes after the last step is told with that one.
        step = state.get("step", 0) + (name != "finish")
        with log_fields(run=str(run.path), step=step, node=name):
            _log.info("%s begins", name)
            try:
                update = call_alone(lambda: work(state, _work(state, runtime, run)))
            except Exception as error:
                _log.info("%s did not end: %s", name, type(error).__name__)
                raise
            seconds = time.perf_counter() - began
            told: dict[str, Any] = {"seconds": seconds}
            if update.get("history"):
                told["verdict"] = update["history"][-1]["verdict"]
            words = update.get("summary") or "nothing to do"
            _log.info("%s took %.2f s: %s", name, seconds, words, extra=told)
        return {**update, "seconds": {name: seconds}}

    # Not `functools.wraps`: LangGraph reads the parameters, and these are the wrapper's own.
    run_node.__name__, run_node.__qualname__, run_node.__doc__ = name, name, work.__doc__
    return run_node


def _work(state: PruneState, runtime: Runtime[PruneContext], run: RunDirectory) -> Work:
    """What a node works by; as the first node's input the request is what a user sent.

    Raises:
        InputError: the request is invalid, its pattern rules out its target or its other bounds,
            the guard bounds other domains, or the directory holds another thread's run.
        StoreError: it is not that of the run's configuration.
    """
    value: Any = state.get("request")
    if value is None:
        raise InputError('the input has no "request": what the run shall do, at least {}')
    if isinstance(value, PruneRequest):
        request = value
    else:
        try:
            request = PruneRequest.model_validate(value)
        except ValidationError as error:
            raise InputError(describe_validation_error(error, PruneRequest)) from None
    check_request(request)
    thread = thread_of(runtime)
    request = run.settle(thread, request)
    tell, context = runtime.stream_writer, context_of(runtime)
    try:
        context.guard.bounds(request.texts.domains("guard"))
    except ValueError as error:
        raise InputError(str(error)) from None
    return Work(request, context, run, thread, reporter(tell, INTERVAL), tell)


def context_of(runtime: Runtime[PruneContext]) -> PruneContext:
    """Who decides, and how."""
    return runtime.context or PruneContext()


def thread_of(runtime: Runtime[PruneContext]) -> str:
    """The run's name."""
    info = runtime.execution_info
    return (info.thread_id if info else None) or NO_THREAD


def run_directory(runtime: Runtime[PruneContext]) -> RunDirectory:
    """The run's directory: what the context says, or one of the thread's name."""
    out = context_of(runtime).out
    return RunDirectory(out if out else f"runs/{thread_of(runtime)}")


def spent_by(bench: "Workbench", before: dict[str, int]) -> dict[str, float]:
    """Tokens run through the model since, by use."""
    return {k: v - before[k] for k, v in bench.tokens.items() if v != before[k]}
