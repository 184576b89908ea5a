"""The state machine that prunes, and how to run it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunewright.graph.builder import build_graph
    from prunewright.graph.running.drive import RunResult
    from prunewright.graph.running.forking import fork
    from prunewright.graph.running.runner import baseline, resume, run

__all__ = ["RunResult", "baseline", "build_graph", "fork", "resume", "run"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds, and `--help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {
        "RunResult": "running.drive",
        "build_graph": "builder",
        "fork": "running.forking",
    }
    home = homes.get(name, "running.runner")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
