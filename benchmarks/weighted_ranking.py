"""An agent that ranks layers at weights of its own, whatever those of calibration and masks are.

With it configs/studies/smollm2-knowledge.yaml asks what the ranking alone is worth:

    PYTHONPATH=benchmarks prunewright compare configs/studies/smollm2-knowledge.yaml
"""

from prunewright.graph.agents.base import Observation
from prunewright.graph.agents.proposal import rank
from prunewright.state import Decision, LayerDelta


class WeightedRanking:
    """`greedy`, but only the ranking reads these weights."""

    def __init__(self, **weights: float) -> None:
        """Take the weights by domain."""
        self._weights = weights

    def decide(self, observation: Observation) -> Decision:
        """The cheapest slices at the weights."""
        deltas = rank(observation, self._weights)
        return Decision(
            reasoning=f"Lowest predicted cost at the weights {self._weights}.",
            layers=[LayerDelta(name=name, delta=delta) for name, delta in sorted(deltas.items())],
        )
