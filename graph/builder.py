"""The graph: seven nodes, two conditional edges, compiled."""

from collections.abc import Callable
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from prunewright.graph import nodes
from prunewright.graph.routing import route_guard, route_termination
from prunewright.state import PruneContext, PruneInput, PruneState


def build_graph(
    checkpointer: BaseCheckpointSaver[str] | None = None,
    wrap: Callable[[nodes.Node], Any] | None = None,
    context: type[PruneContext] = PruneContext,
) -> CompiledStateGraph[PruneState, PruneContext, PruneInput, PruneState]:
    """The compiled state machine.

    Args:
        checkpointer: where threads are kept; None lets the host (LangGraph's server) bring one.
        wrap: makes of each node what is run in its place; None leaves it as it is.
        context: schema of what says who decides and how.
    """
    wrapped: Callable[[nodes.Node], Any] = wrap or (lambda node: node)
    graph = StateGraph(PruneState, context_schema=context, input_schema=PruneInput)
    graph.add_node("profile", wrapped(nodes.profile))
    graph.add_node("agent_decide", wrapped(nodes.agent_decide))
    graph.add_node("apply_prune", wrapped(nodes.apply_prune))
    graph.add_node("evaluate_ppl", wrapped(nodes.evaluate_ppl))
    graph.add_node("rollback", wrapped(nodes.rollback))
    graph.add_node("reflect", wrapped(nodes.reflect))
    graph.add_node("finish", wrapped(nodes.finish))
    graph.add_edge(START, "profile")
    graph.add_edge("profile", "agent_decide")
    graph.add_edge("agent_decide", "apply_prune")
    graph.add_edge("apply_prune", "evaluate_ppl")
    graph.add_conditional_edges("evaluate_ppl", route_guard)
    graph.add_edge("rollback", "reflect")
    graph.add_conditional_edges("reflect", route_termination)
    graph.add_edge("finish", END)
    return graph.compile(checkpointer=checkpointer, name="prunewright")
