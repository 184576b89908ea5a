"""Magnitude pruning: the smallest weights of a layer go."""

from torch import Tensor

from prunewright.tools.masks import Group

GROUP: Group = "layer"


def score(weight: Tensor) -> Tensor:
    """|W|, float32, [outputs, inputs]."""
    return weight.float().abs()
