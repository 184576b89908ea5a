"""Probes: trials that a chat model may have measured before it decides, by a tool it calls.

Tools and a response format do not go together with every provider (Gemini 2 refuses both in one
request). So a step is asked for in two phases: first with the tool and no format, until the
model calls it no more, then with the format and no tool, the results told in words.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from pydantic import BaseModel, ConfigDict, Field

from prunewright.graph.agents.base import InvalidAnswerError, Probes, quote_name
from prunewright.graph.agents.chat.reading import plain_schema, read_strictly
from prunewright.state import Decision, GroupDelta, LayerDelta, ModelProfile, ProbeReport
from prunewright.state.decision import MAX_GROUPS, MAX_LAYERS

TOOL = "probe"
MAX_SHOWN = 12
"""Layers of a trial that are named when its result is told."""


class Trial(BaseModel):
    """Arguments of the tool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[LayerDelta] = Field([], max_length=MAX_LAYERS)
    groups: list[GroupDelta] = Field(
        [], max_length=MAX_GROUPS, description="several layers at once: a projection, from to"
    )


def probe_tool() -> dict[str, Any]:
    """The tool as `BaseChatModel.bind_tools` takes it."""
    schema = plain_schema(Trial)
    del schema["title"], schema["description"]
    return {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Measure by how much the perplexity would change if these layers were "
            "changed by these deltas, together, from where the model is now. The deltas keep to "
            "the rules of a decision. It is a trial on a small part of the held-out text: the "
            "model stays as it is.",
            "parameters": schema,
        },
    }


def take_probes(
    messages: Sequence[BaseMessage],
    probes: Probes,
    ask: Callable[[list[BaseMessage]], AIMessage],
    withheld: Callable[[AIMessage], str],
) -> list[str]:
    """The first phase: let a chat model call the tool until it is ready or no probe is left.

    Args:
        messages: the step's prompt.
        probes: what may be measured; holds the reports afterwards.
        ask: sends messages to the model with the tool bound.
        withheld: why an answer is not whole; "" if it is.

    Returns:
        What the trace must tell: probes asked for beyond the bound, an answer that was cut off.
    """
    talk = _with(
        messages,
        f"Before you decide you may call the tool {TOOL} up to {probes.left} times. Do not decide "
        "yet: call it, or say READY if you need no measurement; you are then asked for the "
        "decision.",
    )
    while probes.left > 0:
        answer = ask(talk)
        if reason := withheld(answer):
            return [f"no more probes: the model's answer was cut off or withheld ({reason})"]
        calls = [*answer.tool_calls, *answer.invalid_tool_calls]
        if not calls:
            break
        talk.append(answer)
        for index, call in enumerate(calls):
            if probes.left <= 0:
                return [f"{len(calls) - index} probes beyond the bound were not measured"]
            report = probes.take(_trial(call))
            content = f"{_outcome(report)}; probes left: {probes.left}"
            talk.append(ToolMessage(content, tool_call_id=call["id"] or "", name=TOOL))
    return []


def with_results(
    messages: Sequence[BaseMessage], reports: Sequence[ProbeReport], profile: ModelProfile
) -> list[BaseMessage]:
    """The messages of the second phase: a step's prompt with what its probes came to."""
    if not reports:
        return list(messages)
    short = {layer.name: quote_name(layer.short_name) for layer in profile.layers}
    lines = [f"- {_layers(report, short)}{_outcome(report)}" for report in reports]
    words = "You had these trials measured, each from where the model is now:"
    return _with(messages, "\n".join([words, *lines]))


def _with(messages: Sequence[BaseMessage], words: str) -> list[BaseMessage]:
    """The messages with words added to the first of the user's, which is the step's."""
    first = next(i for i, m in enumerate(messages) if isinstance(m, HumanMessage))
    added = HumanMessage(f"{messages[first].text}\n\n{words}")
    return [*messages[:first], added, *messages[first + 1 :]]


def _trial(call: Any) -> Decision | str:
    """A call's arguments as a trial, or what is wrong with the call.

    Args:
        call: LangChain's ``ToolCall``, or ``InvalidToolCall`` with arguments that are no JSON.
    """
    if call["name"] != TOOL:
        return f"there is no tool {str(call['name'])[:80]!r}, only {TOOL!r}"
    try:
        arguments = call["args"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        trial = read_strictly(Trial, text)
    except InvalidAnswerError as error:
        return str(error)
    except (TypeError, ValueError, RecursionError) as error:
        return f"the arguments are not JSON: {str(error)[:200]}"
    # Give-backs alone are a fair question.
    return Decision(reasoning="", layers=trial.layers, groups=trial.groups, rebalance=True)


def _outcome(report: ProbeReport) -> str:
    if report.refused:
        return f"refused, nothing was measured: {report.refused}"
    if report.change is None:
        return "the perplexity is not finite"
    noise = "" if report.change_stderr is None else f" (noise {report.change_stderr:.2%})"
    return f"perplexity {report.change:+.2%}{noise} on {report.tokens} tokens"


def _layers(report: ProbeReport, short: dict[str, str]) -> str:
    shown = [f"{short[n]} {delta:+.3f}" for n, delta in list(report.layers.items())[:MAX_SHOWN]]
    if len(report.layers) > MAX_SHOWN:
        shown.append(f"and {len(report.layers) - MAX_SHOWN} more")
    return ", ".join(shown) + ": " if shown else ""
