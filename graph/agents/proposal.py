"""The ranking's proposal: what the predicted costs alone would do in a step, and edits of it."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from prunewright.graph.agents.base import Observation
from prunewright.state import COST_DELTAS, Decision, FromRanking, LayerDelta, LayerProfile
from prunewright.state.decision import SHOWN

HESITATION = 1.2
"""By how much restoring weights must pay: a change of heart within the noise helps nobody."""
WHOLE = 1e-3
"""Weights by which a whole layer may exceed a budget: less than one, what rounding leaves."""


def rank(observation: Observation, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Deltas by layer that bring the layers to where the next weight costs the same everywhere.

    Each layer offers slices of sparsity, at the marginal costs between the profile's
    `COST_DELTAS`, up and down: all that may be restored is thought of as restored, and the
    cheapest slices are then taken until the budget is full. So a layer that has become dear has
    weights restored where others are cheaper, if they are so by more than `HESITATION`. With a
    pattern layers are taken and restored as a whole, by their price.

    Args:
        observation: the step's.
        weights: how much each domain counts, not all 0; None: as in the run.
    """
    profile = observation.profile
    if weights is not None:
        profile = profile.at_weights(weights)
    if observation.pattern_sparsity is not None:
        return _cheapest_whole(replace(observation, profile=profile))
    prunable = {p.name: p.parameters for p in profile.layers}
    slices = sorted(piece for layer in profile.layers for piece in _slices(layer, observation))
    left = budget(observation)
    deltas: dict[str, float] = {}
    for piece in slices:
        if piece.start < 0:
            left += piece.width * prunable[piece.name]
            deltas[piece.name] = deltas.get(piece.name, 0.0) - piece.width
    for piece in slices:
        taken = min(piece.width, left / prunable[piece.name])
        if taken <= 0:
            break
        deltas[piece.name] = deltas.get(piece.name, 0.0) + taken
        left -= taken * prunable[piece.name]
    return {name: delta for name, delta in deltas.items() if abs(delta) > 1e-9}


def propose(
    observation: Observation, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """As `rank`, for an agent that may not know what its earlier steps came to.

    Without feedback the budget is therefore not halved after rollbacks.
    """
    return rank(observation if observation.feedback else replace(observation, stalls=0), weights)


def budget(observation: Observation) -> float:
    """Weights that a step may prune; half as many after each step in a row rolled back.

    A ranking does not learn, and the same step again would be rolled back again. With a pattern
    it stays enough for the smallest layer.
    """
    most = observation.budget * observation.prunable * 0.5**observation.stalls
    return max(most, observation.smallest)


def fill(observation: Observation, order: list[str]) -> dict[str, float]:
    """Whole ``max_delta`` of each layer in order, the last one in part, within the budget.

    With a pattern, whole layers in order: those that fit into what is left of the budget.
    """
    fixed = observation.fixed_deltas()
    room = observation.room()
    parameters = {p.name: p.parameters for p in observation.profile.layers}
    left = budget(observation)
    deltas: dict[str, float] = {}
    for name in order:
        delta = min(observation.max_delta, room[name], left / parameters[name])
        if fixed is not None:
            delta = room[name] if room[name] * parameters[name] <= left + WHOLE else 0.0
        if delta > 1e-9:
            deltas[name] = delta
            left -= delta * parameters[name]
    return deltas


class Taken(NamedTuple):
    """A decision that took the proposal, with all its deltas."""

    decision: Decision
    ranking: FromRanking
    notes: list[str]
    problems: list[str]


def take(edits: Decision, observation: Observation, by_name: int) -> Taken:
    """The proposal with a decision's layers added to it.

    What only groups name is kept to the bounds of each layer, as their deltas meet another
    proposal in each. Where the whole would pass the step's budget, what the edits prune stays and
    all other pruning is scaled down.

    Args:
        edits: takes the proposal; its layers have full names, its groups are expanded.
        observation: the step's.
        by_name: how many of the layers, the first ones, were named one by one.
    """
    problems = _not_taken(edits, observation)
    weights = _weights(edits, observation)
    deltas = {} if problems else propose(observation, weights or None)
    notes = [] if deltas or problems else ["the ranking proposes no change"]
    added = _fixed(edits, observation)
    twice = Counter(item.name for item in edits.layers) - Counter(added.keys())
    problems += [f"layer {name[:80]} is named twice" for name in twice]
    named = {item.name for item in edits.layers[:by_name]}
    for name, low, high in _bounds(observation):
        if name in added and name not in named:
            before = deltas.get(name, 0.0)
            added[name] = min(max(before + added[name], low), high) - before
    whole = deltas | {name: deltas.get(name, 0.0) + edit for name, edit in added.items()}
    scale = _scale(whole, added, observation)
    if scale < 1:
        kept = {name for name, delta in whole.items() if name in added or delta < 0}
        whole = {n: delta if n in kept else scale * delta for n, delta in whole.items()}
        notes.append(f"to keep to the step, what was not edited was scaled by {scale:.4f}")
    # More than the whole layer is as much too far, and no delta can say it.
    layers = [
        LayerDelta(name=n, delta=min(max(d, -1.0), 1.0))
        for n, d in sorted(whole.items())
        if abs(d) > 1e-9
    ]
    decided = {
        "reasoning": edits.reasoning,
        "accept": None,
        "weights": None,
        "layers": layers,
        # At the target an exchange is all that there is.
        "rebalance": edits.rebalance or observation.budget <= 0,
    }
    ranking = FromRanking(
        weights=weights, edits={n: e for n, e in added.items() if abs(e) > 1e-9}, scale=scale
    )
    return Taken(edits.model_copy(update=decided), ranking, notes, problems)


def _not_taken(answer: Decision, observation: Observation) -> list[str]:
    """Why a step's proposal, or its weights, cannot be had."""
    if not observation.costs_shown:
        return ["there is no proposal in this run, which hides the predicted costs: name layers"]
    if not answer.weights:
        return []
    if not observation.weighable:
        return ["this run has no costs by domain: leave weights out"]
    known = observation.profile.domains
    unknown = [f"weights: unknown domain {n[:80]!r}" for n in answer.weights if n not in known]
    if unknown:
        return [*unknown, f"its domains are {', '.join(known)}"]
    return [] if any(_weights(answer, observation).values()) else ["weights: all are 0"]


def _weights(answer: Decision, observation: Observation) -> dict[str, float]:
    """The weights of all domains where an answer gives some, else none."""
    if not answer.weights:
        return {}
    own = {name: observation.weights.get(name, 1.0) for name in observation.profile.domains}
    return own | answer.weights


def _fixed(edits: Decision, observation: Observation) -> dict[str, float]:
    """Edits by layer; with a pattern its sparsity means the whole layer, whatever that takes."""
    fixed, whole = observation.fixed_deltas(), observation.pattern_sparsity or 0.0
    return {
        # What cannot be chosen keeps its edit, and is refused.
        name: math.copysign(fixed[name], delta)
        if fixed is not None and fixed.get(name) and abs(abs(delta) - whole) <= SHOWN
        else delta
        for name, delta in edits.deltas.items()
    }


def _bounds(observation: Observation) -> Iterator[tuple[str, float, float]]:
    """Each layer with the lowest and the highest delta that a step may give it."""
    if observation.pattern_sparsity is None:
        most, room = observation.max_delta, observation.room()
        for layer in observation.profile.layers:
            yield layer.name, -min(most, layer.pruned), min(most, room[layer.name])


def _scale(
    whole: Mapping[str, float], added: Mapping[str, float], observation: Observation
) -> float:
    """What the pruning outside of edits must be multiplied by; 1 where no factor would do."""
    parameters = {p.name: p.parameters for p in observation.profile.layers}
    free = {n: d * parameters[n] for n, d in whole.items() if d > 0 and n not in added}
    held = sum(d * parameters.get(n, 0) for n, d in whole.items() if n not in free)
    room, wanted = observation.budget * observation.prunable - held, sum(free.values())
    if not added or observation.pattern_sparsity is not None or not 0 <= room < wanted:
        return 1.0
    return room / wanted


def _cheapest_whole(observation: Observation) -> dict[str, float]:
    """With a pattern: the cheapest layers that fill the budget, pruned ones thought restored.

    Where that would gain no sparsity, because what is restored is not filled again, layers are
    pruned only.
    """
    fixed = observation.fixed_deltas() or {}
    layers = [p for p in observation.profile.layers if fixed[p.name]]
    size = {p.name: abs(fixed[p.name]) * p.parameters for p in layers}
    price = {
        p.name: abs(p.cost_of(fixed[p.name])) / size[p.name] / (HESITATION if p.patterned else 1.0)
        for p in layers
    }
    order = sorted(price, key=lambda name: (price[name], name))
    left = budget(observation) + sum(size[n] for n in order if fixed[n] < 0)
    taken: set[str] = set()
    for name in order:
        if size[name] <= left + WHOLE:
            taken.add(name)
            left -= size[name]
    # Those that have the pattern and are taken stay; those not taken are restored.
    deltas = {n: fixed[n] for n in order if (fixed[n] > 0) == (n in taken)}
    gain = sum(math.copysign(size[name], delta) for name, delta in deltas.items())
    return deltas if gain > 0 else fill(observation, order)


class _Slice(NamedTuple):
    """Part of a layer's sparsity, at its price: loss for a weight, nats."""

    price: float
    start: float
    """Where it begins, relative to the layer's sparsity now; negative: it is pruned already."""
    name: str
    width: float


def _slices(layer: LayerProfile, observation: Observation) -> Iterator[_Slice]:
    """The slices of a layer that may change in this step."""
    room = min(observation.max_delta, observation.max_layer_sparsity - layer.sparsity)
    back = min(observation.max_delta, layer.pruned)
    scale = 1 / layer.parameters
    price = 0.0
    for start, end in _steps(room):
        # A later slice never goes before an earlier one of its layer.
        price = max(price, scale * (layer.cost_of(end) - layer.cost_of(start)) / (end - start))
        yield _Slice(price, start, layer.name, end - start)
    price = math.inf
    for start, end in _steps(back):
        gain = scale * (layer.cost_of(-start) - layer.cost_of(-end)) / (end - start)
        price = min(price, gain / HESITATION)
        yield _Slice(price, -end, layer.name, end - start)


def _steps(length: float) -> Iterator[tuple[float, float]]:
    """From 0 to a length by way of the `COST_DELTAS`."""
    if length > 1e-6:
        yield from pairwise([0.0, *(d for d in COST_DELTAS if d < length), length])
