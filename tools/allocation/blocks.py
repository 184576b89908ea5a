"""What the allocations that give one sparsity to a whole block share."""

from collections.abc import Mapping

from prunewright.tools.layers import Layer
from prunewright.tools.models import LoadedModel


def by_block(loaded: LoadedModel) -> dict[int, list[Layer]]:
    """The prunable layers of each decoder block, in the model's order."""
    blocks: dict[int, list[Layer]] = {}
    for layer in loaded.layers.values():
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def weighted_mean(values: Mapping[int, float], weights: Mapping[int, int]) -> float:
    """The mean of some values, each with a weight."""
    return sum(values[key] * weights[key] for key in values) / sum(weights[key] for key in values)
