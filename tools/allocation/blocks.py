"""What the allocations that give one sparsity to a whole block share."""

from collections.abc import Mapping

from prunewright.tools.allocation.counts import Allotment, Bounds, exact_counts
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel


def by_block(loaded: LoadedModel) -> dict[int, list[Layer]]:
    """The prunable layers of each decoder block, in the model's order."""
    blocks: dict[int, list[Layer]] = {}
    for layer in loaded.layers.values():
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def block_counts(bench: Workbench, wanted: Mapping[int, float]) -> Allotment:
    """Whole weights of every layer from the sparsity wanted of its block."""
    layers = bench.loaded.layers
    return layer_counts(bench, {name: wanted[layer.block] for name, layer in layers.items()})


def layer_counts(bench: Workbench, wanted: Mapping[str, float]) -> Allotment:
    """Whole weights of every layer from the sparsity wanted of it."""
    return exact_counts(wanted, layer_bounds(bench), bench.request.target)


def layer_bounds(bench: Workbench) -> Bounds:
    """What each layer of a model may give."""
    sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
    return Bounds(sizes, bench.dense_zeros, bench.request.max_layer_sparsity)


def weighted_mean(values: Mapping[int, float], weights: Mapping[int, int]) -> float:
    """The mean of some values, each with a weight."""
    return sum(values[key] * weights[key] for key in values) / sum(weights[key] for key in values)
