"""What the allocations that give one sparsity to a whole block share."""

from collections.abc import Mapping

from prunewright.tools.allocation.counts import Allotment, exact_counts
from prunewright.tools.layers import Layer
from prunewright.tools.models import LoadedModel
from prunewright.tools.workbench import Workbench


def by_block(loaded: LoadedModel) -> dict[int, list[Layer]]:
    """The prunable layers of each decoder block, in the model's order."""
    blocks: dict[int, list[Layer]] = {}
    for layer in loaded.layers.values():
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def block_counts(bench: Workbench, wanted: Mapping[int, float]) -> Allotment:
    """Whole weights of every layer from the sparsity wanted of its block."""
    layers = bench.loaded.layers.values()
    return exact_counts(
        {layer.name: wanted[layer.block] for layer in layers},
        {layer.name: layer.numel for layer in layers},
        bench.request.target,
        bench.request.max_layer_sparsity,
    )


def weighted_mean(values: Mapping[int, float], weights: Mapping[int, int]) -> float:
    """The mean of some values, each with a weight."""
    return sum(values[key] * weights[key] for key in values) / sum(weights[key] for key in values)
