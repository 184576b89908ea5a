"""c: what the next weights of a layer are predicted to cost (Optimal Brain Damage)."""

from prunewright.state.profile import COST_SIGNAL
from prunewright.tools.signals.base import Measured, Signal


def compute(found: Measured) -> float | None:
    """The predicted rise of the loss for a weight removed, nats.

    At the middle one of the deltas; with an N:M pattern for taking the dense layer to it, and None
    where it does not fit the layer.
    """
    if found.patterned:
        taken = found.pattern_gain * found.layer.numel
        return None if found.pattern_cost is None else found.pattern_cost / max(taken, 1.0)
    return found.for_a_weight(found.loss_cost)


SIGNAL = Signal(
    name=COST_SIGNAL,
    compute=compute,
    title="predicted loss cost",
    meaning="z-score of the cost; not every table has it.",
    gradients=True,
)
