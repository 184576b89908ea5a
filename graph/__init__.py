"""The state machine that prunes, and how to run it."""

from prunewright.graph.builder import build_graph
from prunewright.graph.runner import RunResult, resume, run

__all__ = ["RunResult", "build_graph", "resume", "run"]
