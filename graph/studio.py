"""What `langgraph.json` names: the graph for LangGraph's server, and where its threads are kept."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.runtime import Runtime

from prunewright.graph.builder import build_graph
from prunewright.graph.nodes import Node, run_directory
from prunewright.graph.stopping import call_cancellable
from prunewright.state import InputError, PruneContext, PruneState, PruneUpdate

DATABASE_VARIABLE = "PRUNEWRIGHT_STUDIO_DB"
"""Environment variable that says where the server keeps its threads."""
DATABASE = "runs/studio/state.sqlite"


def served(node: Node) -> Callable[[PruneState, Runtime[PruneContext]], Awaitable[PruneUpdate]]:
    """The node as the server runs it: in a thread that a cancelled run stops.

    While it works, the run's directory is locked against other processes.
    """

    def work(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
        directory = run_directory(runtime)
        with directory.locked():
            try:
                return node(state, runtime)
            except InputError:
                directory.abandon()
                raise

    async def wrapper(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
        return await call_cancellable(partial(work, state, runtime))

    return wrapper


@asynccontextmanager
async def checkpointer() -> AsyncIterator[AsyncSqliteSaver]:
    """The server's checkpoints, in a file that outlives it.

    The file is `DATABASE`, below the folder that the server was started in, or what the variable
    `DATABASE_VARIABLE` names.
    """
    path = Path(os.environ.get(DATABASE_VARIABLE) or DATABASE)
    path.parent.mkdir(parents=True, exist_ok=True)
    async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
        yield saver


graph = build_graph(wrap=served)
