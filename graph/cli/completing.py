"""What the shell offers where a value is asked for. Nothing here may take long."""

from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from prunewright.graph.agents import CONTROLS, FILE_AGENTS
from prunewright.state import PruneConfig
from prunewright.state.config import CRITERIA, DEFAULT_AGENT

ALLOCATIONS = ("uniform", "owl", "alphapruning", "atp", "greedy", "evolutionary", "global")
"""The allocations by name: the modules that make them take seconds to import."""
_MOST = 200
"""Run directories that are offered at most."""


def values(*offered: str) -> Callable[[str], list[str]]:
    """What offers those of some values that begin as what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in offered if value.startswith(incomplete)]

    return complete


agents = values(
    "auto",
    *CONTROLS,
    DEFAULT_AGENT,
    "openai:",
    "anthropic:",
    "ollama:",
    *(f"{kind}:" for kind in FILE_AGENTS),
    "import:",
)
allocations = values(*ALLOCATIONS, "from:", "import:")
criteria = values(*CRITERIA, "import:")
devices = values("auto", "cpu", "cuda", "mps")
patterns = values("unstructured", "2:4", "4:8")


def settings(incomplete: str) -> list[str]:
    """The keys that --set takes."""
    return [key for key in _keys(PruneConfig) if key.startswith(incomplete)]


def _keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}="


def run_directories(incomplete: str) -> list[str]:
    """The runs in the folder that is typed, or in ``runs/`` where nothing is."""
    typed = incomplete or "runs/"
    folder = Path(typed) if typed.endswith("/") else Path(typed).parent
    try:
        found = [str(path.parent) for path in folder.glob("*/config.yaml")]
    except OSError:
        return []
    return sorted(path for path in found if path.startswith(typed))[:_MOST]
