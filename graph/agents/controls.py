"""Agents without an LLM: the controls that an LLM has to beat."""

import math
import random
from collections.abc import Mapping

from prunewright.graph.agents.base import Observation
from prunewright.graph.agents.proposal import budget, fill, rank
from prunewright.graph.agents.refining import RefiningAgent
from prunewright.graph.words.numbers import count
from prunewright.state import Decision, LayerDelta, LayerProfile
from prunewright.state.decision import MAX_CHANGE

BALANCE = 5.0
"""By how much a domain's weight rises with its loss, e-folds a nat."""


class GreedyAgent(RefiningAgent):
    """Follows the ranking by predicted cost: see `prunewright.graph.agents.proposal.rank`."""

    def choose(self, observation: Observation) -> Decision:
        """The cheapest slices that fill the budget; with a pattern, whole layers."""
        return _ranked(observation)


class BalanceAgent(RefiningAgent):
    """Follows the ranking at weights that rise with what each domain has lost so far.

    A domain's weight is the run's times exp(`BALANCE` * loss), normalised to a mean of 1, where
    the loss is log(perplexity / dense perplexity). That is the multiplicative weights update
    (Arora, Hazan and Kale, 2012) of all steps together, so that it needs no memory.
    """

    def choose(self, observation: Observation) -> Decision:
        """As `GreedyAgent`, at these weights; with one domain it is the same."""
        if len(observation.profile.domains) < 2:
            return _ranked(observation)
        weights = balanced(observation)
        told = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        return _ranked(observation, weights, f"Weights after what each has lost: {told}. ")


def balanced(observation: Observation) -> dict[str, float]:
    """The weights of `BalanceAgent` by domain, their mean 1."""
    names = observation.profile.domains
    lost = {n: math.log(now / dense) for n, (dense, now) in observation.domains.items()}
    most = max((lost.get(n, 0.0) for n in names), default=0.0)
    raised = {
        n: observation.weights.get(n, 1.0) * math.exp(BALANCE * (lost.get(n, 0.0) - most))
        for n in names
    }
    mean = sum(raised.values()) / len(raised)
    return {n: weight / mean for n, weight in raised.items()}


def _ranked(
    observation: Observation, weights: Mapping[str, float] | None = None, words: str = ""
) -> Decision:
    """What the ranking does, with the change that the costs predict for it."""
    deltas = rank(observation, weights)
    loss = sum(p.cost_of(deltas.get(p.name, 0.0)) for p in observation.profile.layers)
    back = sum(delta < 0 for delta in deltas.values())
    words += f"Lowest predicted cost a weight: {count(len(deltas) - back, 'layer')} pruned further"
    words += f", {back} with weights restored." if back else "."
    return _decision(deltas, words, math.expm1(min(loss, 50.0)))


class ZScoreAgent:
    """The paper's two z-scores alone: layers with the lowest z_s + z_g, each by ``max_delta``."""

    def decide(self, observation: Observation) -> Decision:
        """Whole layers in the order of z_s + z_g until the budget is full."""

        def score(layer: LayerProfile) -> float:
            return layer.signals["z_s"] + layer.signals["z_g"]

        order = sorted(observation.profile.layers, key=lambda p: (score(p), p.name))
        deltas = fill(observation, [p.name for p in order])
        return _decision(deltas, f"Lowest z_s + z_g: {len(deltas)} layers.")


class RandomAgent:
    """Layers drawn at random, each by ``max_delta``; the draw depends on the seed and the step."""

    def decide(self, observation: Observation) -> Decision:
        """Random layers until the budget is full."""
        names = [p.name for p in observation.profile.layers]
        random.Random(f"{observation.seed}/{observation.step}").shuffle(names)
        deltas = fill(observation, names)
        return _decision(deltas, f"{len(deltas)} layers drawn at random.")


class UniformAgent:
    """Every layer up to the same sparsity: uniform pruning, in steps.

    With a pattern, which has one level only, the layers of blocks that are evenly spread.
    """

    def decide(self, observation: Observation) -> Decision:
        """The deltas that bring the layers to the highest level that the budget allows."""
        if observation.pattern_sparsity is not None:
            deltas = fill(observation, _spread(observation.profile.layers))
            return _decision(deltas, f"{len(deltas)} layers of evenly spread blocks.")
        layers, most = observation.profile.layers, budget(observation)
        low, high = 0.0, observation.max_layer_sparsity
        # Layers above the level stay, so what the level costs is found by halving.
        for _ in range(60):
            level = (low + high) / 2
            cost = sum(
                p.parameters * min(max(0.0, level - p.sparsity), observation.max_delta)
                for p in layers
            )
            low, high = (level, high) if cost <= most else (low, level)
        deltas = {
            p.name: min(low - p.sparsity, observation.max_delta)
            for p in layers
            if low - p.sparsity > 1e-9
        }
        return _decision(deltas, f"Every layer to a sparsity of {low:.4f}.")


def _spread(layers: list[LayerProfile]) -> list[str]:
    """Names in an order whose every beginning is spread over the blocks: their bits reversed."""
    width = max(p.block for p in layers).bit_length()
    return [
        p.name for p in sorted(layers, key=lambda p: (f"{p.block:0{width}b}"[::-1], p.projection))
    ]


def _decision(deltas: dict[str, float], reasoning: str, change: float | None = None) -> Decision:
    layers = [LayerDelta(name=name, delta=delta) for name, delta in sorted(deltas.items())]
    if change is not None:
        change = min(change, MAX_CHANGE)
    return Decision(reasoning=reasoning, layers=layers, expected_ppl_change=change)
