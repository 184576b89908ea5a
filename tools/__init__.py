"""What the nodes use: models, texts, profiling, criteria, revisions, results. No LangGraph."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunewright.tools.store.trace import Trace, load_trace

__all__ = ["Trace", "load_trace"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prunewright.tools.store import trace

    return getattr(trace, name)
