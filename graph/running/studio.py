"""What `langgraph.json` names: the graph for LangGraph's server, and where its threads are kept."""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.runtime import Runtime
from pydantic import ConfigDict, Field, ValidationError

from prunewright.graph.agents import check_agent, greet_agent
from prunewright.graph.builder import build_graph
from prunewright.graph.nodes.common import Node, run_directory
from prunewright.graph.running.checkpoints import serve_checkpoints
from prunewright.graph.running.drive import has_ended
from prunewright.graph.running.stopping import call_cancellable, check_stop
from prunewright.graph.running.tracing import label
from prunewright.state import (
    InputError,
    PruneContext,
    PruneRequest,
    PruneState,
    PruneUpdate,
    PrunewrightError,
)
from prunewright.state.config import Name

DATABASE_VARIABLE = "PRUNEWRIGHT_STUDIO_DB"
"""Environment variable that says where the server keeps its threads."""
DATABASE = "runs/studio/state.sqlite"

_NODES = {
    "criterion": "profile",
    "agent": "agent_decide",
    "agent_options": "agent_decide",
    "goal": "agent_decide",
    "asking": "agent_decide",
    "feedback": "agent_decide",
    "signals": "agent_decide",
    "probes": "agent_decide",
    "prompts": "agent_decide",
    "guard": "evaluate_ppl",
    "max_steps": "reflect",
    "max_stalls": "reflect",
    "adapt": "finish",
}
"""The node at which Studio offers a key of the context."""


def _offer_at_nodes(schema: dict[str, Any]) -> None:
    for name in ("allocation", "allocation_options"):  # a baseline's
        schema["properties"].pop(name)
    for name, node in _NODES.items():
        schema["properties"][name]["langgraph_nodes"] = [node]


class RunError(RuntimeError):
    """A `PrunewrightError` for a client: of others than Python's own the server hides the words."""


class StudioContext(PruneContext):
    """Who decides and how, and what an assistant brings to the runs that it starts."""

    model_config = ConfigDict(json_schema_extra=_offer_at_nodes)

    agent: str = Field(
        "auto",
        description="auto (Gemini where its key is set, else greedy, which asks no LLM), "
        "provider:model, greedy, zscore, random, uniform, replay:FILE, exchange:DIR or "
        "import:package.module:Class",
    )
    criterion: Name | None = Field(
        None, description="the criterion of runs that this assistant starts; null: the request's"
    )


def served(node: Node) -> Callable[[PruneState, Runtime[StudioContext]], Awaitable[PruneUpdate]]:
    """The node as the server runs it: in a thread that a cancelled run stops.

    While it works, the run's directory is locked against other processes.
    """

    def work(state: PruneState, runtime: Runtime[StudioContext]) -> PruneUpdate:
        given = runtime.context or StudioContext()
        context = PruneContext(**given.model_dump(exclude={"criterion"}))
        plain = cast("Runtime[PruneContext]", runtime).override(context=context)
        directory = run_directory(plain)
        try:
            with directory.locked():
                try:
                    _check_goes_on(state, node.__name__)
                    fresh, who = "revision" not in state, ""
                    if fresh:
                        who = check_agent(context).words
                        greet_agent(context, lambda *_: check_stop())
                        request = state.get("request")
                        if given.criterion is not None and isinstance(request, dict):
                            request = {**request, "criterion": given.criterion}
                            state = {**state, "request": request}
                    # A request that the node will refuse has no labels.
                    with suppress(ValidationError):
                        label(PruneRequest.model_validate(state.get("request")), context)
                    update = node(state, plain)
                    if fresh:  # the assistant's name need not say it
                        update["summary"] += f"; who decides: {who}"
                    return update
                except Exception:
                    directory.abandon()
                    raise
        except PrunewrightError as error:
            raise RunError(_for_a_form(str(error))) from error

    async def wrapper(state: PruneState, runtime: Runtime[StudioContext]) -> PruneUpdate:
        return await call_cancellable(partial(work, state, runtime))

    return wrapper


def _check_goes_on(state: PruneState, node: str) -> None:
    """Refuse new input to a thread that takes no more steps.

    Raises:
        InputError: its run is finished, or is to be finished first.
    """
    if has_ended(state):
        raise InputError(
            f"the run of this thread has ended ({state['status']}): start a new thread, or fork "
            "from an earlier checkpoint"
        )
    if state.get("status", "running") != "running" and node != "finish":
        raise InputError(
            f"the run of this thread has taken its last step ({state['status']}): start it without "
            "input to finish it, or fork from an earlier checkpoint"
        )


def _for_a_form(words: str) -> str:
    """Advice that names options of the command line, for who has a form with keys of that name."""
    again = r"the thread again, without input, with \1 in its assistant's context"
    words = re.sub(r"prunewright resume \S+ --set (\S+)", again, words)
    return re.sub(r"--(?:set )?(?=[a-z])", "", words)


@asynccontextmanager
async def checkpointer() -> AsyncIterator[AsyncSqliteSaver]:
    """The server's checkpoints, in a file that outlives it.

    The file is `DATABASE`, below the folder that the server was started in, or what the variable
    `DATABASE_VARIABLE` names.
    """
    path = Path(os.environ.get(DATABASE_VARIABLE) or DATABASE)
    async with serve_checkpoints(path) as saver:
        yield saver


graph = build_graph(wrap=served, context=StudioContext)
