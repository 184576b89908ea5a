"""k: what the next weights of a layer are predicted to cost the right answers to questions."""

from prunewright.state.profile import COST_DELTAS, KNOWLEDGE_SIGNAL
from prunewright.tools.signals.base import Measured, Signal


def compute(found: Measured) -> float | None:
    """The predicted rise of the answers' loss for a weight removed, nats.

    As c, at the middle one of the deltas, with the gradients of the answers' tokens in place of
    the text's. None with an N:M pattern, for which it is not predicted.
    """
    if found.patterned or found.knowledge_cost is None:
        return None
    added = min(found.sparsity + COST_DELTAS[1], 1.0) - found.sparsity
    return found.knowledge_cost[1] / max(found.layer.numel * added, 1.0)


SIGNAL = Signal(
    name=KNOWLEDGE_SIGNAL,
    compute=compute,
    title="predicted cost of right answers",
    meaning="z-score of the predicted cost of the right answers to questions of fact. Negative: "
    "pruning the layer costs few of them.",
    gradients=True,
)
