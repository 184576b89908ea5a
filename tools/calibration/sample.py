"""Estimates of a large layer from some of its weights, evenly spread."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from prunewright.tools.fast import kth_lowest

SAMPLE = 2**16
"""Weights of a layer that percentiles and loss costs are estimated on; all, if it has fewer."""


def sampled_rows(matrix: Tensor) -> slice:
    """Evenly spread rows that hold some `SAMPLE` weights of a matrix; all, if it has fewer."""
    step = min(math.ceil(matrix.numel() / SAMPLE), matrix.shape[0])
    return slice(step // 2, None, step)


@dataclass(frozen=True)
class Spread:
    """Some weights of a matrix, evenly spread over rows and columns alike.

    Attributes:
        stride: from one to the next in the flattened matrix, the first one included.
        rows: of each [n], int32.
        columns: of each [n], int32.
    """

    stride: int
    rows: Tensor
    columns: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """Its values there [n]: a view, if the matrix is contiguous."""
        return matrix.reshape(-1)[:: self.stride]


def even_spread(rows: int, inputs: int, device: torch.device) -> Spread:
    """At most `SAMPLE` weights of a matrix [rows, inputs]."""
    stride = math.ceil(rows * inputs / SAMPLE)
    while math.gcd(stride, inputs) > 1:
        stride += 1
    return Spread(stride, *_places(rows * inputs, inputs, stride, device))


@lru_cache(maxsize=8)  # a model has few shapes
def _places(numel: int, inputs: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of every ``stride``-th weight."""
    index = torch.arange(0, numel, stride, device=device)
    return (index // inputs).int(), (index % inputs).int()


def salience_percentile(weight: Tensor, input_square: Tensor, fraction: float = 0.1) -> float:
    """s of a layer: the 10th percentile of |W_ij| * ||X_j|| over its non-zero weights.

    ||X_j|| is the root mean square over tokens: the norm up to a factor that all layers share.
    Taken on an evenly spread sample of `SAMPLE` weights. 0 where no weight is left.

    Args:
        weight: live weights [..., outputs, inputs].
        input_square: E[x_j^2], [..., inputs].
        fraction: which percentile.
    """
    outputs, inputs = weight.shape[-2:]
    spread = even_spread(weight.numel() // inputs, inputs, weight.device)
    values = spread.of(weight).float().abs()
    columns = spread.columns
    if weight.ndim == 3:
        columns = columns + spread.rows // outputs * inputs  # its own norms for each expert
    norms = input_square.sqrt().reshape(-1).index_select(0, columns)
    active = int(torch.count_nonzero(values))
    if active == 0:
        return 0.0
    # The weights that are gone score zero, so they come first.
    rank = len(values) - active + 1 + math.floor(fraction * (active - 1))
    return float(kth_lowest((values * norms).unsqueeze(0), torch.tensor([rank])))
