"""Wanda (arXiv 2306.11695): weight times input norm, compared inside each output row."""

from torch import Tensor

from prunewright.tools.masks import Group

GROUP: Group = "row"


def score(weight: Tensor, input_square: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, up to a constant factor that no comparison sees.

    Args:
        weight: [outputs, inputs].
        input_square: mean of x_j^2 over the calibration tokens [inputs].

    Returns:
        float32 [outputs, inputs].
    """
    return weight.float().abs() * input_square.float().sqrt()
