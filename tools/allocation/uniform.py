"""Every layer alike: what all other allocations are compared with."""

import math

from prunewright.state.config import Options
from prunewright.tools.allocation.blocks import layer_bounds
from prunewright.tools.allocation.counts import Allotment, exact_counts
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress


class UniformOptions(Options):
    """None."""


def allocate(bench: Workbench, _: UniformOptions, progress: Progress | None = None) -> Allotment:
    """The floor of the target in each layer, as Wanda's code takes it (arXiv 2306.11695).

    So no layer is above the target, and the total is below it by less than one weight a layer.
    Where some have more zeros of their own, the others are pruned as much less.
    """
    return uniform_counts(bench, bench.request.target)


def uniform_counts(bench: Workbench, target: float) -> Allotment:
    """As `allocate`, for any sparsity that is not below that of the model's own zeros."""
    layers = bench.loaded.layers
    counts = {name: math.floor(target * layer.numel) for name, layer in layers.items()}
    if all(bench.dense_zeros[name] <= count for name, count in counts.items()):
        return Allotment(counts, [])
    return exact_counts(dict.fromkeys(layers, target), layer_bounds(bench), target)
