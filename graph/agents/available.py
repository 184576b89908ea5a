"""Who can decide on this machine, and what the others lack."""

import os
from dataclasses import dataclass

from prunewright.graph.agents import CONTROLS, REGISTRY, resolve_agent
from prunewright.graph.agents.chat.transport import address
from prunewright.state import InputError
from prunewright.state.config import DEFAULT_AGENT
from prunewright.state.shown import one_line

SECONDS = 1.0
"""How long Ollama's server may take to say what it has."""
NAMED = 5
"""Models of it that are told."""

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
    """Every kind of agent; keys are looked for and never shown, and Ollama's server is asked."""
    rows = []
    installed = {name: name for name in REGISTRY.names() if name not in CONTROLS}
    for name, tried in (_TRIED | installed).items():
        try:
            found = resolve_agent(tried)
            words = found.words if name == "auto" else found.why
            if tried.startswith("ollama:"):
                words = _ollama()
            rows.append(Available(name, True, words))
        except InputError as error:
            rows.append(Available(name, False, str(error)))
    return [*rows, Available("import:package.module:Class", True, "the user's own class")]


def _ollama() -> str:
    """The models of Ollama's server.

    Raises:
        InputError: none answers where its client looks for one.
    """
    from ollama import Client

    try:
        found = Client(timeout=SECONDS).list().models
    except Exception as error:  # whatever answers there, or does not
        where = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
        server = address(where if "://" in where else f"http://{where}")
        raise InputError(
            f"no Ollama answers at {server} ({one_line(str(error), 80, '...')}): start it with "
            "`ollama serve`, set OLLAMA_HOST, or name another (agent_options.base_url)"
        ) from None
    names = ", ".join(sorted(str(model.model) for model in found)[:NAMED])
    names = one_line(names, 200, "...")
    return f"an LLM; the server has {names}" if names else "an LLM; the server has no model yet"
