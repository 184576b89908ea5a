"""Every layer alike: what all other allocations are compared with."""

import math

from prunewright.state.config import Options
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.perplexity import Progress
from prunewright.tools.workbench import Workbench


class UniformOptions(Options):
    """None."""


def allocate(bench: Workbench, _: UniformOptions, progress: Progress | None = None) -> Allotment:
    """The floor of the target in each layer, as Wanda's code takes it (arXiv 2306.11695).

    So no layer is above the target, and the total is below it by less than one weight a layer.
    """
    target = bench.request.target
    return Allotment(
        {n: math.floor(target * layer.numel) for n, layer in bench.loaded.layers.items()}, []
    )
