"""Who decides: an LLM, a control without one, or the user's own class. One string names each."""

import difflib
import importlib
import os
from dataclasses import dataclass

from prunewright.graph.agents.base import Agent, InvalidAnswerError, Observation, Refusal
from prunewright.graph.agents.controls import (
    GreedyAgent,
    RandomAgent,
    UniformAgent,
    ZScoreAgent,
)
from prunewright.graph.agents.llm import LLMAgent, check_access
from prunewright.state import InputError, PruneContext
from prunewright.state.config import DEFAULT_AGENT

__all__ = ["Agent", "InvalidAnswerError", "Observation", "Refusal", "make_agent", "resolve_agent"]

CONTROLS: dict[str, type[Agent]] = {
    "greedy": GreedyAgent,
    "zscore": ZScoreAgent,
    "random": RandomAgent,
    "uniform": UniformAgent,
}


@dataclass(frozen=True)
class ResolvedAgent:
    """What an agent string stands for here and now."""

    name: str
    why: str


def resolve_agent(name: str) -> ResolvedAgent:
    """Turn ``auto`` into a name, and refuse a name that cannot work, before anything costs time.

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
    if name.startswith("import:"):
        _imported(name)
        return ResolvedAgent(name, "the user's own class")
    if ":" not in name:
        close = difflib.get_close_matches(name, [*CONTROLS, "auto"], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"unknown agent {name!r}{hint} Known: auto, {', '.join(CONTROLS)}, provider:model "
            f"(such as {DEFAULT_AGENT}), import:package.module:Class"
        )
    check_access(name)
    return ResolvedAgent(name, "an LLM")


def make_agent(context: PruneContext) -> tuple[str, Agent]:
    """The agent of a context and its resolved name.

    Raises:
        InputError: as `resolve_agent`, or options that the agent does not take.
    """
    name = resolve_agent(context.agent).name
    if name in CONTROLS:
        return name, CONTROLS[name]()
    try:
        if name.startswith("import:"):
            return name, _imported(name)(**context.agent_options)
        return name, LLMAgent(name, context.agent_options, context.asking)
    except TypeError as error:
        raise InputError(f"agent {name} does not take these agent_options: {error}") from error


def _imported(name: str) -> type[Agent]:
    module, _, attribute = name.removeprefix("import:").rpartition(":")
    if not module:
        raise InputError(f"{name!r} is not of the form import:package.module:Class")
    try:
        found: type[Agent] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot import the agent {name!r}: {error}") from error
    if not callable(getattr(found, "decide", None)):
        raise InputError(f"the agent {name!r} has no method decide(observation)")
    return found
