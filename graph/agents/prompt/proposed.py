"""What an LLM is told of the ranking's proposal, and of the domains that it may weigh."""

from collections.abc import Mapping
from typing import Any

from prunewright.graph.agents.base import Observation, quote_name
from prunewright.graph.agents.prompt.feedback import last_measured, percent, within
from prunewright.graph.agents.prompt.table import (
    PROJECTIONS,
    by_blocks,
    short_labels,
    thousandths,
)
from prunewright.graph.correction import depth_of, spans
from prunewright.state import LayerProfile
from prunewright.state.shown import one_line

MOST = 6
"""Layers named of those that are pruned most, and of those that are restored most."""
MAX_DOMAIN = 60
"""Characters of a domain's name."""


def proposal_words(observation: Observation, deltas: Mapping[str, float]) -> str:
    """A proposal in three lines: what it comes to, where it is spent, and its extremes."""
    if not deltas:
        return "The ranking proposes no change in this step."
    layers = {p.name: p for p in observation.profile.layers if p.name in deltas}
    sizes = {name: delta * layers[name].parameters for name, delta in deltas.items()}
    gain = sum(sizes.values()) / observation.prunable
    back = sum(delta < 0 for delta in deltas.values())
    change = f"{percent(observation.profile.predicted_change(deltas))} %"
    if domains := observation.profile.predicted_changes(deltas):
        parts = (f"{quote_name(n)} {percent(value)} %" for n, value in domains.items())
        change += f": {', '.join(parts)}"
    lines = [
        f"The proposal adds {gain:z.4f} (predicted change of the perplexity {change}): "
        f"{len(deltas) - back} layers pruned, {back} restored in part.",
        f"Where, in per cent of what changes: {_places(observation, layers, sizes)}.",
    ]
    order = sorted(deltas, key=lambda name: (-deltas[name], name))
    named = {
        "Pruned most": [name for name in order[:MOST] if deltas[name] > 0],
        "restored most": [name for name in order[: -MOST - 1 : -1] if deltas[name] < 0],
    }
    told = (
        f"{words}: {by_blocks(layers.values(), {n: thousandths(deltas[n]) for n in names}, MOST)}"
        for words, names in named.items()
        if names
    )
    return "\n".join([*lines, "; ".join(told)])


def domain_rows(observation: Observation) -> list[dict[str, Any]]:
    """By domain: name, perplexity dense and now, last measured change, bound and weight.

    What comes of earlier steps is None or "" without feedback; the rise that is rolled back is
    None where it is that of all; the weight is None where none changes the proposal.
    """
    last = last_measured(observation)
    measures = last.domains if last is not None else {}
    several = len(set(observation.bounds.values())) > 1
    rows = []
    for name, (dense, now) in observation.domains.items():
        change = error = None
        if name in measures:
            change, error = measures[name].change, measures[name].change_stderr
        rows.append(
            {
                "name": quote_name(one_line(name, MAX_DOMAIN)),
                "dense": dense,
                "perplexity": now if observation.feedback else None,
                "last_change": "" if change is None else f"{percent(change)}{within(error)} %",
                "bound": observation.bounds.get(name) if several else None,
                "weight": observation.weights.get(name, 1.0) if observation.weighable else None,
            }
        )
    return rows


def _places(
    observation: Observation, layers: Mapping[str, LayerProfile], sizes: Mapping[str, float]
) -> str:
    """What a proposal adds in each projection and third of the blocks: its part of all it moves."""
    blocks = 1 + max(p.block for p in observation.profile.layers)
    names = spans(blocks)
    groups: dict[str, float] = {}
    depths = dict.fromkeys(names, 0.0)
    labels = short_labels(list(dict.fromkeys(p.projection for p in observation.profile.layers)))
    for name, layer in layers.items():
        kind = labels[layer.projection]
        groups[kind] = groups.get(kind, 0.0) + sizes[name]
        depths[depth_of(layer.block, blocks)] += sizes[name]
    largest = sorted(groups, key=lambda kind: -abs(groups[kind]))[:PROJECTIONS]
    moved = sum(map(abs, sizes.values()))
    parts = [f"{kind} {100 * groups[kind] / moved:z.0f}" for kind in largest]
    thirds = (f"{names[depth]} {100 * size / moved:z.0f}" for depth, size in depths.items())
    return f"{', '.join(parts)}; blocks {', '.join(thirds)}"
