"""Who decides: an LLM, a control without one, or the user's own class. One string names each.

LangChain and torch take seconds to import, so the agents that need them are imported when they are
made.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunewright.graph.agents.base import Agent, InvalidAnswerError, Observation, Refusal
from prunewright.graph.agents.chat.providers import check_access
from prunewright.graph.agents.controls import (
    BalanceAgent,
    GreedyAgent,
    RandomAgent,
    UniformAgent,
    ZScoreAgent,
)
from prunewright.state import InputError, PruneContext, Spent
from prunewright.state.config import DEFAULT_AGENT
from prunewright.state.plugins import IMPORT, Registry
from prunewright.tools.signals import find_signals

__all__ = [
    "Agent",
    "InvalidAnswerError",
    "Observation",
    "Refusal",
    "check_agent",
    "greet_agent",
    "make_agent",
    "resolve_agent",
]

CONTROLS: dict[str, type[Agent]] = {
    "greedy": GreedyAgent,
    "balance": BalanceAgent,
    "zscore": ZScoreAgent,
    "random": RandomAgent,
    "uniform": UniformAgent,
}
REGISTRY: Registry[type[Agent]] = Registry(
    kind="agent",
    group="prunewright.agents",
    known=CONTROLS,
    fits=lambda found: inspect.isclass(found) and callable(getattr(found, "decide", None)),
    must="is no class with a method decide(observation)",
    form="package.module:Class",
)
_REMOVED = {
    "adaptive": ", as it was no better: use greedy",
    "local": ": serve the model (Ollama, llama.cpp, vLLM) and ask it as ollama:MODEL, or as "
    "openai:MODEL with agent_options.base_url",
}
"""Agents of earlier versions, and what to use in their place."""
FILE_AGENTS = {
    "replay": "the decisions of an earlier trace",
    "exchange": "whoever answers the files in a directory",
}


@dataclass(frozen=True)
class ResolvedAgent:
    """What an agent string stands for here and now."""

    name: str
    why: str

    @property
    def words(self) -> str:
        """The name and why it is this one."""
        return f"{self.name} ({self.why})"


def resolve_agent(name: str, options: Mapping[str, Any] | None = None) -> ResolvedAgent:
    """Turn ``auto`` into a name, and refuse a name that cannot work, before anything costs time.

    Args:
        name: as in the configuration.
        options: its ``agent_options``, which may make a key needless.

    Raises:
        InputError: unknown name, missing package or missing key.
    """
    if name == "auto":
        if os.environ.get("GOOGLE_API_KEY") or os.environ.get("GEMINI_API_KEY"):
            return ResolvedAgent(DEFAULT_AGENT, "agent auto: a Gemini key is set")
        return ResolvedAgent(
            "greedy", "agent auto: no GOOGLE_API_KEY or GEMINI_API_KEY is set, so no LLM is asked"
        )
    if name in CONTROLS:
        return ResolvedAgent(name, "a control without an LLM")
    if _own(name) is not None:
        return ResolvedAgent(name, "the user's own class")
    kind, _, path = name.partition(":")
    if kind in _REMOVED:
        raise InputError(f"the agent {name!r} no longer exists{_REMOVED[kind]}")
    if ":" not in name:
        raise InputError(
            f"unknown agent {name!r}{_hint(name)}; known: auto, {', '.join(REGISTRY.names())}, "
            f"provider:model (such as {DEFAULT_AGENT}), replay:FILE, exchange:DIR, "
            "import:package.module:Class"
        )
    if kind in FILE_AGENTS:
        if not path:
            raise InputError(f"the agent {name!r} names no path after {kind}:")
        return ResolvedAgent(name, FILE_AGENTS[kind])
    unusual = check_access(name, options)
    return ResolvedAgent(name, f"an LLM; {unusual}" if unusual else "an LLM")


def check_agent(context: PruneContext) -> ResolvedAgent:
    """As `resolve_agent`, and that agent and options go together: before anything costs time.

    An agent is built and dropped, which asks nobody; a class of the user's is not.

    Raises:
        InputError: as `resolve_agent`, an unknown provider, options that do not fit, signals or
            templates of the prompt that cannot work, or an allocation, which is a baseline's.
    """
    # Earlier versions wrote uniform into the configuration of every run.
    if context.allocation not in (None, "uniform") or context.allocation_options:
        raise InputError(
            f"allocation {context.allocation} is for `prunewright baseline`: in a run the agent "
            "shares the target out. Leave allocation and allocation_options away, or use baseline"
        )
    resolved = resolve_agent(context.agent, context.agent_options)
    from prunewright.graph.agents.prompt.build import check_prompts

    find_signals(context.signals)
    check_prompts(context.prompts)
    if (own := _own(resolved.name)) is not None:
        _options(resolved.name, own, context.agent_options)
    else:
        make_agent(context)
    return resolved


def greet_agent(context: PruneContext, progress: Callable[[str, int, int], None]) -> None:
    """Ask an LLM a small question, so that a run it cannot decide ends before the model is loaded.

    Nobody else is asked anything. The call counts towards no budget.

    Args:
        context: who decides.
        progress: told under the label ``agent`` before the question and after the answer.

    Raises:
        InputError: as `check_agent`.
        AgentError: no answer; the message names the address, or the variable of the key.
    """
    name = resolve_agent(context.agent, context.agent_options).name
    kind, colon, _ = name.partition(":")
    if not colon or kind in {*FILE_AGENTS, "import"}:
        return
    from prunewright.graph.agents.chat.agent import LLMAgent

    unbounded = context.asking.model_copy(update={"max_calls": None, "max_tokens": None})
    agent = LLMAgent(name, context.agent_options, unbounded)
    progress("agent", 0, 1)
    agent.greet()
    progress("agent", 1, 1)


def make_agent(context: PruneContext, spent: Spent | None = None) -> tuple[str, Agent]:
    """The agent of a context and its resolved name.

    Args:
        context: who decides, and the budget for asking.
        spent: what the run has spent of the budget before.

    Raises:
        InputError: as `check_agent`.
    """
    name = resolve_agent(context.agent, context.agent_options).name
    if name in CONTROLS:
        return name, _control(name, context.agent_options)
    if (found := _own(name)) is not None:
        return name, found(**_options(name, found, context.agent_options))
    kind, _, path = name.partition(":")
    if kind == "replay":
        from prunewright.graph.agents.replay import ReplayAgent

        return name, ReplayAgent(path, context.out)
    if kind == "exchange":
        from prunewright.graph.agents.exchange import ExchangeAgent

        return name, ExchangeAgent(path, context.agent_options)
    from prunewright.graph.agents.chat.agent import LLMAgent

    return name, LLMAgent(
        name, context.agent_options, context.asking, spent, context.out or "RUN_DIR"
    )


def _control(name: str, options: Mapping[str, Any]) -> Agent:
    """A control, with those of the options that it has: the others are an LLM's.

    Raises:
        InputError: it cannot refine and is to, or its options are none.
    """
    made = CONTROLS[name]
    known = inspect.signature(made).parameters
    if options.get("refine") and "refine" not in known:
        raise InputError(f"agent {name} does not refine: leave agent_options.refine away")
    return made(**{key: value for key, value in options.items() if key in known})


def _hint(name: str) -> str:
    if name.startswith("gemini"):
        return f"; did you mean google_genai:{name}?"
    close = difflib.get_close_matches(name, [*REGISTRY.names(), "auto"], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _options(name: str, found: type[Agent], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a class of the user's is made with, which it must take."""
    try:
        signature = inspect.signature(found)
    except ValueError:  # a class of an extension module tells nothing
        return options
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InputError(f"agent {name} does not take these agent_options: {error}") from error
    return options


def _own(name: str) -> type[Agent] | None:
    """A class from outside; None for a control, a provider's model, or what reads files."""
    known = name in CONTROLS or name in _REMOVED or (":" in name and not name.startswith(IMPORT))
    return None if known else REGISTRY.own(name)
