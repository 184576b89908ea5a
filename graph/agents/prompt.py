"""The prompt of one step: rules, state and table, then what was refused and why."""

import math
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from prunewright.graph.agents.base import Observation, quote_name
from prunewright.state import COST_DELTAS, LayerProfile

MAX_ROWS = 256
"""Layers shown in one prompt."""


def prompt(observation: Observation, rows: int = MAX_ROWS) -> list[BaseMessage]:
    """The messages of one step: rules, state and table, then refused answers and why.

    Args:
        observation: what the agent may see.
        rows: layers shown at most.
    """
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("prunewright.graph.agents") / "prompts"

    def render(name: str, **values: Any) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        return environment.from_string(text).render(**values).strip()

    system = render(
        "system.md",
        criterion=observation.criterion,
        max_increase=observation.max_increase,
        max_delta=observation.max_delta,
        max_layer_sparsity=observation.max_layer_sparsity,
    )
    step = render(
        "step.md",
        o=observation,
        budget=floor_digits(observation.budget),
        rows=table_rows(observation, rows),
        deltas=" / ".join(f"{d:g}" for d in COST_DELTAS),
    )
    messages: list[BaseMessage] = [SystemMessage(system), HumanMessage(step)]
    for refusal in observation.refusals:
        if refusal.answer:
            messages.append(AIMessage(refusal.answer[:20_000]))
        problems = "\n".join(f"- {problem}" for problem in refusal.problems)
        messages.append(
            HumanMessage(
                f"That answer was refused and nothing was pruned:\n{problems}\n"
                "Answer again with a whole, corrected JSON object."
            )
        )
    return messages


def table_rows(observation: Observation, rows: int = MAX_ROWS) -> list[str]:
    """One line for each of the `shown_layers`."""
    return [_row(p, observation.prunable) for p in shown_layers(observation, rows)]


def shown_layers(observation: Observation, rows: int = MAX_ROWS) -> list[LayerProfile]:
    """The layers with room left that the table holds; with more than ``rows``, the cheapest."""
    room = observation.room()
    layers = [p for p in observation.profile.layers if room[p.name] > 1e-6]
    if len(layers) > rows:
        cheapest = sorted(layers, key=lambda p: p.loss_cost[0] / p.parameters)[:rows]
        kept = {p.name for p in cheapest}
        layers = [p for p in layers if p.name in kept]
    return layers


def _row(layer: LayerProfile, prunable: int) -> str:
    # Per cent of perplexity for one per cent of the model's sparsity.
    costs = "/".join(
        f"{cost / (delta * layer.parameters / prunable):.2g}"
        for cost, delta in zip(layer.loss_cost, COST_DELTAS, strict=True)
    )
    return " | ".join(
        [
            quote_name(layer.short_name),
            f"{100 * layer.parameters / prunable:.4g}",
            f"{layer.sparsity:.3f}",
            f"{layer.z_s:.2f}",
            f"{layer.z_g:.2f}",
            f"{layer.z_c:.2f}",
            costs,
        ]
    )


def floor_digits(value: float, digits: int = 4) -> str:
    """A bound as it may be shown: rounded down, so that who keeps to it is not refused."""
    if value <= 0:
        return "0"
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return f"{math.floor(value * scale + 1e-6) / scale:.{digits}g}"
