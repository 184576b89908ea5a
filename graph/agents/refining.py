"""What a control does once the target is reached: restore a part of every layer, prune again."""

import math
from abc import ABC, abstractmethod

from prunewright.graph.agents.base import Observation
from prunewright.graph.routing import at_target
from prunewright.state import Decision, InputError, LayerDelta

RESTORED = 0.05
"""Sparsity that is restored in every layer."""


class RefiningAgent(ABC):
    """A control that may go on at the target.

    In a cycle `RESTORED` of every layer is restored, and as much is pruned again on statistics
    that are taken anew.
    """

    # So that a class of one's own need not call `__init__`.
    _refine = 0

    def __init__(self, refine: int = 0) -> None:
        """Make it.

        Args:
            refine: cycles, 0 or more.

        Raises:
            InputError: it is no such number.
        """
        if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
            raise InputError(f"agent_options.refine: {refine!r} is no number of cycles, 0 or more")
        self._refine = refine

    def decide(self, observation: Observation) -> Decision:
        """What it chooses; at the target, while cycles are left that fit, what is restored.

        Raises:
            InputError: it is to refine whole layers.
        """
        best = observation.best
        if self._refine and observation.pattern_sparsity is not None:
            raise InputError(
                "agent_options.refine restores a part of every layer, and a pattern takes layers "
                "as a whole: leave one of the two away"
            )
        # Cycles that are left once this step, or the one after a restoring step, is at the target.
        left = self._refine - (0 if best is None else best["returns"] + 1)
        there = best is not None and at_target(observation.sparsity, observation.target)
        if there and left >= 0 and _fits(observation, observation.steps_left):
            return _restored(observation)
        decision = self.choose(observation)
        if left > 0 and _fits(observation, observation.steps_left - 1):
            return decision.model_copy(update={"done": False})
        return decision

    @abstractmethod
    def choose(self, observation: Observation) -> Decision:
        """The step without regard to refining."""


def _fits(observation: Observation, steps: int) -> bool:
    """Whether so many steps are enough to restore a part of every layer and prune it again."""
    return steps > math.ceil(RESTORED / observation.max_step - 1e-9)


def _restored(observation: Observation) -> Decision:
    """A part of every layer restored, as far as steps have pruned it."""
    most = min(RESTORED, observation.max_delta)
    backs = {p.name: min(most, p.pruned) for p in observation.profile.layers}
    deltas = {name: -back for name, back in backs.items() if back > 1e-9}
    return Decision(
        reasoning=f"{most:.0%} of every layer restored, to be pruned again on fresh gradients.",
        layers=[LayerDelta(name=name, delta=delta) for name, delta in sorted(deltas.items())],
        expected_ppl_change=observation.profile.predicted_change(deltas),
        rebalance=True,
        done=False,
    )
