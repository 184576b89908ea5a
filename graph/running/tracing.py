"""What LangSmith is told of a run, where its environment variables switch it on.

LangChain's tracer does the sending; without ``LANGSMITH_TRACING`` there is none, and nothing here
does anything.
"""

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.runnables import RunnableConfig
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


def label(request: PruneRequest, context: PruneContext) -> None:
    """Inside a node, label its trace, those above it up to the run's, and those that it begins.

    For a graph that was started by others, who do not know what is in its input.
    """
    callbacks, given = get_config().get("callbacks"), labels(request, context)
    if not isinstance(callbacks, BaseCallbackManager):
        return
    callbacks.add_tags(given["tags"])
    callbacks.add_metadata(given["metadata"])
    for tracer in callbacks.handlers:
        run_id = callbacks.parent_run_id
        while isinstance(tracer, LangChainTracer) and run_id is not None:
            run = tracer.run_map.get(str(run_id))
            if run is None:
                break
            # What is added while a run is open is sent with its end.
            run.add_tags([tag for tag in given["tags"] if tag not in (run.tags or [])])
            run.add_metadata(given["metadata"])
            run_id = run.parent_run_id
