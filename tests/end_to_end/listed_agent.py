"""Not a test: an agent that is told what to do, named ``import:listed_agent:Listed``."""

from typing import Any

from prunewright.graph.agents import Observation
from prunewright.state import Decision, LayerDelta


class Listed:
    """Takes its deltas from a list, a step each; after its end it chooses nothing.

    Args:
        steps: layer to delta for each step.
        rebalance: indices of the steps that are meant to gain no sparsity.
    """

    def __init__(
        self, steps: list[dict[str, float]], rebalance: tuple[int, ...] = (), **_: Any
    ) -> None:
        self.steps = steps
        self.rebalance = rebalance

    def decide(self, observation: Observation) -> Decision:
        step = observation.step
        deltas = self.steps[step] if step < len(self.steps) else {}
        layers = [LayerDelta(name=name, delta=delta) for name, delta in deltas.items()]
        rebalance = step in self.rebalance
        return Decision(reasoning="As listed.", layers=layers, rebalance=rebalance)
