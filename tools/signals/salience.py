"""s of arXiv 2601.09694: how small the least important tenth of a layer's weights is."""

from prunewright.tools.signals.base import Measured, Signal


def compute(found: Measured) -> float:
    """The 10th percentile of |W_ij| * ||X_j|| over the layer's non-zero weights."""
    # Only where it is computed: a prompt that shows it needs no torch.
    from prunewright.tools.calibration.sample import salience_percentile

    return salience_percentile(found.live, found.statistics.input_square)


SIGNAL = Signal(
    name="z_s",
    compute=compute,
    title="activation-weighted magnitude",
    meaning="z-score of the 10th percentile of |weight| * ||input||. Negative: many weights hardly "
    "matter.",
)
