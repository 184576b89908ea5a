"""g of arXiv 2601.09694: how large the loss gradient of a layer's weights is."""

from prunewright.tools.signals.base import Measured, Signal


def compute(found: Measured) -> float:
    """The mean over samples and non-zero weights of |dL/dW_ij|."""
    return found.gradient


SIGNAL = Signal(
    name="z_g",
    compute=compute,
    title="gradient",
    meaning="z-score of the mean gradient magnitude. Negative: the loss hardly feels this layer.",
    gradients=True,
)
