"""Who can decide on this machine, and what the others lack."""

from dataclasses import dataclass

from prunewright.graph.agents import CONTROLS, REGISTRY, resolve_agent
from prunewright.state import InputError
from prunewright.state.config import DEFAULT_AGENT

# What stands for an agent, and the name that is tried for it.
_TRIED = {
    "auto": "auto",
    **{name: name for name in CONTROLS},
    "google_genai:MODEL": DEFAULT_AGENT,
    "openai:MODEL": "openai:MODEL",
    "anthropic:MODEL": "anthropic:MODEL",
    "ollama:MODEL": "ollama:MODEL",
    "replay:FILE": "replay:FILE",
    "exchange:DIR": "exchange:DIR",
}


@dataclass(frozen=True)
class Available:
    """One kind of agent.

    Attributes:
        name: the string that names it in a configuration.
        ready: whether nothing is missing: no package, no key.
        words: what it is, or what is missing and the command that mends it.
    """

    name: str
    ready: bool
    words: str


def available() -> list[Available]:
    """Every kind of agent; keys are looked for and never shown."""
    rows = []
    installed = {name: name for name in REGISTRY.names() if name not in CONTROLS}
    for name, tried in (_TRIED | installed).items():
        try:
            found = resolve_agent(tried)
            words = found.words if name == "auto" else found.why
            rows.append(Available(name, True, words))
        except InputError as error:
            rows.append(Available(name, False, str(error)))
    return [*rows, Available("import:package.module:Class", True, "the user's own class")]
