"""The seven nodes. Each is thin: it calls tools and returns the part of the state that it changes.

A node may run again after a crash, so all it writes outside the state is content-addressed or
replaced as a whole.
"""

from prunewright.graph.nodes.apply import apply_prune
from prunewright.graph.nodes.common import Node
from prunewright.graph.nodes.decide import agent_decide
from prunewright.graph.nodes.evaluate import evaluate_ppl, rollback
from prunewright.graph.nodes.finish import finish
from prunewright.graph.nodes.profile import profile
from prunewright.graph.nodes.reflect import reflect

__all__ = [
    "Node",
    "agent_decide",
    "apply_prune",
    "evaluate_ppl",
    "finish",
    "profile",
    "reflect",
    "rollback",
]
