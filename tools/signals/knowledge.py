"""k: what the next weights of a layer are predicted to cost the right answers to questions."""

from prunewright.state.profile import KNOWLEDGE_SIGNAL
from prunewright.tools.signals.base import Measured, Signal


def compute(found: Measured) -> float | None:
    """The predicted rise of the answers' loss for a weight removed, nats.

    As c, at the middle one of the deltas, with the gradients of the answers' tokens in place of
    the text's. None with an N:M pattern, for which it is not predicted.
    """
    if found.patterned or found.knowledge_cost is None:
        return None
    return found.for_a_weight(found.knowledge_cost)


SIGNAL = Signal(
    name=KNOWLEDGE_SIGNAL,
    compute=compute,
    title="predicted cost of right answers",
    meaning="z-score of the predicted cost of the right answers to questions of fact. Negative: "
    "pruning the layer costs few of them.",
    gradients=True,
)
