"""Agents without an LLM: the controls that an LLM has to beat."""

import math
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from prunewright.graph.agents.base import Observation
from prunewright.graph.agents.refining import RefiningAgent
from prunewright.graph.words.numbers import count
from prunewright.state import COST_DELTAS, Decision, LayerDelta, LayerProfile
from prunewright.state.decision import MAX_CHANGE

HESITATION = 1.2
"""By how much restoring weights must pay: a change of heart within the noise helps nobody."""


WHOLE = 1e-3
"""Weights by which a whole layer may exceed a budget: less than one, what rounding leaves."""


class GreedyAgent(RefiningAgent):
    """Brings the layers to where the next weight costs the same everywhere.

    Each layer offers slices of sparsity, at the marginal costs between the profile's
    `COST_DELTAS`, up and down: all that may be restored is thought of as restored, and the
    cheapest slices are then taken until the budget is full. So a layer that has become dear has
    weights restored where others are cheaper, if they are so by more than `HESITATION`. With a
    pattern layers are taken and restored as a whole, by their price.
    """

    def choose(self, observation: Observation) -> Decision:
        """The cheapest slices that fill the budget; with a pattern, whole layers."""
        if observation.pattern_sparsity is not None:
            return _settled(observation, _cheapest_whole(observation))
        prunable = {p.name: p.parameters for p in observation.profile.layers}
        slices = [
            piece for layer in observation.profile.layers for piece in _slices(layer, observation)
        ]
        slices.sort()
        budget = _budget(observation)
        deltas: dict[str, float] = {}
        for piece in slices:
            if piece.start < 0:
                budget += piece.width * prunable[piece.name]
                deltas[piece.name] = deltas.get(piece.name, 0.0) - piece.width
        for piece in slices:
            taken = min(piece.width, budget / prunable[piece.name])
            if taken <= 0:
                break
            deltas[piece.name] = deltas.get(piece.name, 0.0) + taken
            budget -= taken * prunable[piece.name]
        deltas = {name: delta for name, delta in deltas.items() if abs(delta) > 1e-9}
        return _settled(observation, deltas)


def _settled(observation: Observation, deltas: dict[str, float]) -> Decision:
    """The decision with the change that the costs predict for it."""
    loss = sum(p.cost_of(deltas.get(p.name, 0.0)) for p in observation.profile.layers)
    back = sum(delta < 0 for delta in deltas.values())
    words = f"Lowest predicted cost a weight: {count(len(deltas) - back, 'layer')} pruned further"
    words += f", {back} with weights restored." if back else "."
    return _decision(deltas, words, math.expm1(min(loss, 50.0)))


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
    budget = _budget(observation) + sum(size[n] for n in order if fixed[n] < 0)
    taken: set[str] = set()
    for name in order:
        if size[name] <= budget + WHOLE:
            taken.add(name)
            budget -= size[name]
    # Those that have the pattern and are taken stay; those not taken are restored.
    deltas = {n: fixed[n] for n in order if (fixed[n] > 0) == (n in taken)}
    gain = sum(math.copysign(size[name], delta) for name, delta in deltas.items())
    return deltas if gain > 0 else _fill(observation, order)


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


class ZScoreAgent:
    """The paper's two z-scores alone: layers with the lowest z_s + z_g, each by ``max_delta``."""

    def decide(self, observation: Observation) -> Decision:
        """Whole layers in the order of z_s + z_g until the budget is full."""

        def score(layer: LayerProfile) -> float:
            return layer.signals["z_s"] + layer.signals["z_g"]

        order = sorted(observation.profile.layers, key=lambda p: (score(p), p.name))
        deltas = _fill(observation, [p.name for p in order])
        return _decision(deltas, f"Lowest z_s + z_g: {len(deltas)} layers.")


class RandomAgent:
    """Layers drawn at random, each by ``max_delta``; the draw depends on the seed and the step."""

    def decide(self, observation: Observation) -> Decision:
        """Random layers until the budget is full."""
        names = [p.name for p in observation.profile.layers]
        random.Random(f"{observation.seed}/{observation.step}").shuffle(names)
        deltas = _fill(observation, names)
        return _decision(deltas, f"{len(deltas)} layers drawn at random.")


class UniformAgent:
    """Every layer up to the same sparsity: uniform pruning, in steps.

    With a pattern, which has one level only, the layers of blocks that are evenly spread.
    """

    def decide(self, observation: Observation) -> Decision:
        """The deltas that bring the layers to the highest level that the budget allows."""
        if observation.pattern_sparsity is not None:
            deltas = _fill(observation, _spread(observation.profile.layers))
            return _decision(deltas, f"{len(deltas)} layers of evenly spread blocks.")
        layers, budget = observation.profile.layers, _budget(observation)
        low, high = 0.0, observation.max_layer_sparsity
        # Layers above the level stay, so what the level costs is found by halving.
        for _ in range(60):
            level = (low + high) / 2
            cost = sum(
                p.parameters * min(max(0.0, level - p.sparsity), observation.max_delta)
                for p in layers
            )
            low, high = (level, high) if cost <= budget else (low, level)
        deltas = {
            p.name: min(low - p.sparsity, observation.max_delta)
            for p in layers
            if low - p.sparsity > 1e-9
        }
        return _decision(deltas, f"Every layer to a sparsity of {low:.4f}.")


def _budget(observation: Observation) -> float:
    """Weights that the step may prune; half as many after each step in a row rolled back.

    A control does not learn, and the same step again would be rolled back again. With a pattern
    it stays enough for the smallest layer.
    """
    budget = observation.budget * observation.prunable * 0.5**observation.stalls
    return max(budget, observation.smallest)


def _spread(layers: list[LayerProfile]) -> list[str]:
    """Names in an order whose every beginning is spread over the blocks: their bits reversed."""
    width = max(p.block for p in layers).bit_length()
    return [
        p.name for p in sorted(layers, key=lambda p: (f"{p.block:0{width}b}"[::-1], p.projection))
    ]


def _fill(observation: Observation, order: list[str]) -> dict[str, float]:
    """Whole ``max_delta`` of each layer in order, the last one in part, within the budget.

    With a pattern, whole layers in order: those that fit into what is left of the budget.
    """
    fixed = observation.fixed_deltas()
    room = observation.room()
    parameters = {p.name: p.parameters for p in observation.profile.layers}
    budget = _budget(observation)
    deltas: dict[str, float] = {}
    for name in order:
        delta = min(observation.max_delta, room[name], budget / parameters[name])
        if fixed is not None:
            delta = room[name] if room[name] * parameters[name] <= budget + WHOLE else 0.0
        if delta > 1e-9:
            deltas[name] = delta
            budget -= delta * parameters[name]
    return deltas


def _decision(deltas: dict[str, float], reasoning: str, change: float | None = None) -> Decision:
    layers = [LayerDelta(name=name, delta=delta) for name, delta in sorted(deltas.items())]
    if change is not None:
        change = min(change, MAX_CHANGE)
    return Decision(reasoning=reasoning, layers=layers, expected_ppl_change=change)
