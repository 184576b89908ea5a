"""What a signal is, and what it may be computed from."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunewright.state.profile import COST_DELTAS, SIGNAL_NAME

if TYPE_CHECKING:  # torch takes seconds, and a prompt needs none of it
    from torch import Tensor

    from prunewright.tools.criteria import LayerStatistics
    from prunewright.tools.model.layers import Layer


@dataclass(frozen=True)
class Measured:
    """What is known of one layer when its signals are computed.

    Attributes:
        layer: its name, block, projection, shape and number of weights.
        dense: its dense weights [outputs, inputs], or [experts, outputs, inputs].
        live: its weights at the profile's revision, likewise.
        statistics: what calibration tells of it, with gradients.
        gradient: mean over samples and non-zero weights of |dL/dW|.
        sparsity: its fraction of zeros.
        dense_sparsity: the part of it that the dense model has.
        loss_cost: predicted rise of the mean token loss, nats, for each of the
            `prunewright.state.COST_DELTAS` that are pruned further.
        pattern_cost: that for taking the dense layer to the run's N:M pattern; None in an
            unstructured run, and where the pattern does not fit the layer.
        pattern_gain: sparsity that the pattern adds to the dense layer; 0 likewise.
        patterned: whether the run has an N:M pattern.
        knowledge_cost: ``loss_cost`` of the right answers to questions; None where no signal asks.
    """

    layer: "Layer"
    dense: "Tensor"
    live: "Tensor"
    statistics: "LayerStatistics"
    gradient: float
    sparsity: float
    dense_sparsity: float
    loss_cost: tuple[float, ...]
    pattern_cost: float | None
    pattern_gain: float
    patterned: bool
    knowledge_cost: tuple[float, ...] | None = None

    def for_a_weight(self, costs: tuple[float, ...]) -> float:
        """What the middle one of some costs by delta comes to for each weight it removes, nats."""
        added = min(self.sparsity + COST_DELTAS[1], 1.0) - self.sparsity
        return costs[1] / max(self.layer.numel * added, 1.0)


def two_digits(score: float) -> str:
    """A z-score with two digits behind the point."""
    return f"{score:z.2f}"


@dataclass(frozen=True)
class Signal:
    """A number of each layer that says how safe it is to prune, shown as its z-score.

    Attributes:
        name: ``z_`` and a few letters, as it heads a column.
        compute: the number, from what was measured of the layer alone; None where it has none,
            which counts as a z-score of 0. The lower, the safer.
        title: what it is, in a few words, for plots.
        meaning: one line of the prompt: what it is, and what a low value says.
        format: the z-score as tables show it.
        gradients: whether it rests on gradients, whose age the prompt then tells.

    Raises:
        ValueError: the name has another form.
    """

    name: str
    compute: Callable[[Measured], float | None]
    title: str
    meaning: str
    format: Callable[[float], str] = two_digits
    gradients: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(SIGNAL_NAME, self.name):
            raise ValueError(f"a signal's name is z_ and small letters, not {self.name!r}")


def z_scores(values: Sequence[float | None]) -> list[float]:
    """(value - mean) / (std + 1e-8) over the values (arXiv 2601.09694), std of the population.

    A scale far below the paper's constant would flatten all scores to zero, so the values are
    first divided by their largest magnitude, which leaves z-scores as they are otherwise. None
    takes no part and has a score of 0.
    """
    known = [value for value in values if value is not None]
    scale = max(map(abs, known), default=0.0)
    if scale == 0 or not all(map(math.isfinite, known)):
        return [0.0] * len(values)
    scaled = [v / scale for v in known]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in scaled) / len(scaled))
    return [0.0 if v is None else (v / scale - mean) / (std + 1e-8) for v in values]
