"""Prunewright: one LLM prunes another, step by step, with rollback, resume and a trace.

What a notebook or script needs is here and is imported when it is asked for: torch takes
seconds. The parts are `prunewright.graph`, `prunewright.tools` and `prunewright.state`.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunewright.graph.running.drive import RunResult
    from prunewright.graph.running.forking import fork
    from prunewright.graph.running.runner import baseline, resume, run, save
    from prunewright.graph.running.study import compare
    from prunewright.state import PruneConfig, PrunewrightError, load_config
    from prunewright.tools.store.trace import Trace, load_trace

_HOMES = {
    "RunResult": "graph.running.drive",
    "baseline": "graph.running.runner",
    "fork": "graph.running.forking",
    "resume": "graph.running.runner",
    "run": "graph.running.runner",
    "save": "graph.running.runner",
    "compare": "graph.running.study",
    "PruneConfig": "state",
    "PrunewrightError": "state",
    "load_config": "state",
    "Trace": "tools.store.trace",
    "load_trace": "tools.store.trace",
}

__all__ = [
    "PruneConfig",
    "PrunewrightError",
    "RunResult",
    "Trace",
    "__version__",
    "baseline",
    "compare",
    "fork",
    "load_config",
    "load_trace",
    "resume",
    "run",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then.

    Raises:
        AttributeError: there is nothing of that name.
    """
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
