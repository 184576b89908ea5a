"""The state machine that prunes, and how to run it."""

from prunewright.graph.builder import build_graph
from prunewright.graph.runner import RunResult, baseline, resume, run

__all__ = ["RunResult", "baseline", "build_graph", "resume", "run"]
