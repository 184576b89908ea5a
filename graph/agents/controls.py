"""Agents without an LLM: the controls that an LLM has to beat."""

import random

from prunewright.graph.agents.base import Observation
from prunewright.state import COST_DELTAS, Decision, LayerDelta
from prunewright.state.decision import MAX_CHANGE


class GreedyAgent:
    """Spends each step's budget where the predicted loss cost a weight is lowest.

    Each layer offers slices of its next sparsity, at the marginal costs between the profile's
    `COST_DELTAS`; the cheapest slices are taken until the budget is full, which equalises the
    marginal price over the layers.
    """

    def decide(self, observation: Observation) -> Decision:
        """The cheapest slices that fill the budget."""
        slices = []
        for layer in observation.profile.layers:
            room = min(observation.max_delta, observation.max_layer_sparsity - layer.sparsity)
            start = cost = price = 0.0
            ends = [d for d in COST_DELTAS if d < room]
            for end in [*ends, room] if room > 1e-6 else []:
                total = layer.cost_of(end)
                # A later slice never goes before an earlier one of its layer.
                price = max(price, (total - cost) / ((end - start) * layer.parameters))
                slices.append((price, start, layer.name, end - start, layer.parameters))
                start, cost = end, total
        slices.sort()
        budget = _budget(observation)
        deltas: dict[str, float] = {}
        for _, _, name, width, parameters in slices:
            taken = min(width, budget / parameters)
            if taken <= 0:
                break
            deltas[name] = deltas.get(name, 0.0) + taken
            budget -= taken * parameters
        change = observation.profile.predicted_change(deltas)
        return _decision(
            deltas, f"Lowest predicted loss cost a weight over {len(deltas)} layers.", change
        )


class ZScoreAgent:
    """The paper's two z-scores alone: layers with the lowest z_s + z_g, each by ``max_delta``."""

    def decide(self, observation: Observation) -> Decision:
        """Whole layers in the order of z_s + z_g until the budget is full."""
        order = sorted(observation.profile.layers, key=lambda p: (p.z_s + p.z_g, p.name))
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
    """Every layer up to the same sparsity: uniform pruning, in steps."""

    def decide(self, observation: Observation) -> Decision:
        """The deltas that bring the layers to the highest level that the budget allows."""
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

    A control does not learn, and the same step again would be rolled back again.
    """
    return observation.budget * observation.prunable * 0.5**observation.stalls


def _fill(observation: Observation, order: list[str]) -> dict[str, float]:
    """Whole ``max_delta`` of each layer in order, the last one in part, within the budget."""
    room = observation.room()
    parameters = {p.name: p.parameters for p in observation.profile.layers}
    budget = _budget(observation)
    deltas: dict[str, float] = {}
    for name in order:
        delta = min(observation.max_delta, room[name], budget / parameters[name])
        if delta > 1e-9:
            deltas[name] = delta
            budget -= delta * parameters[name]
    return deltas


def _decision(deltas: dict[str, float], reasoning: str, change: float | None = None) -> Decision:
    layers = [LayerDelta(name=name, delta=delta) for name, delta in sorted(deltas.items())]
    if change is not None:
        change = min(change, MAX_CHANGE)
    return Decision(reasoning=reasoning, layers=layers, expected_ppl_change=change)
