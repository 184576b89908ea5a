"""Sparsities as whole numbers of weights."""

import math


def most_zeros(target: float, total: int) -> int:
    """The largest number of weights whose share of ``total`` is not above a target sparsity.

    By the share itself, as it is reported: a product of floats may lie on the other side of a
    whole number.
    """
    count = math.floor(target * total)
    if (count + 1) / total <= target:
        return count + 1
    return count if count / total <= target else count - 1
