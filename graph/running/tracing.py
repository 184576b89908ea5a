"""What LangSmith is told of a run, where its environment variables switch it on.

LangChain's tracer does the sending; without ``LANGSMITH_TRACING`` there is none, and nothing here
does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs, var_child_runnable_config
from langchain_core.tracers import LangChainTracer
from langgraph.config import get_config

from prunewright.state import PruneContext, PruneRequest


def labels(request: PruneRequest, context: PruneContext) -> RunnableConfig:
    """Tags and metadata of a run's traces."""
    return {
        "tags": [request.criterion, context.agent],
        "metadata": {
            "model": request.model,
            "agent": context.agent,
            "criterion": request.criterion,
            "target": request.target,
        },
    }


@contextmanager
def labelled(request: PruneRequest, context: PruneContext) -> Iterator[None]:
    """Inside a node, label its trace, those above it up to the run's, and those that it begins.

    For a graph that was started by others, who do not know what is in its input.
    """
    config, given = get_config(), labels(request, context)
    for run in _open_runs(config.get("callbacks")):
        # What is added while a run is open goes out with its end.
        run.add_tags([tag for tag in given["tags"] if tag not in (run.tags or [])])
        run.add_metadata(given["metadata"])
    token = var_child_runnable_config.set(merge_configs(config, given))
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _open_runs(callbacks: Any) -> Iterator[Any]:
    """The traces, if there are any, of what is at work here: the innermost first."""
    for handler in getattr(callbacks, "handlers", []):
        name = getattr(callbacks, "parent_run_id", None)
        while isinstance(handler, LangChainTracer) and name is not None:
            run = handler.run_map.get(str(name))
            if run is None:
                break
            yield run
            name = run.parent_run_id
