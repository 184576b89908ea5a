"""The agent `greedy` in one shot: the cheapest predicted weights first, on dense statistics."""

import math
from itertools import pairwise

from prunewright.state.config import Options
from prunewright.state.run import DENSE
from prunewright.tools.allocation.blocks import layer_counts
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.calibration.costs import crowded_costs, crowding_exponent, predict_losses
from prunewright.tools.calibration.profile import statistics_of
from prunewright.tools.model.head import Progress, told

WIDTH = 0.025
"""Sparsity of one slice of a layer."""


class GreedyOptions(Options):
    """None."""


def allocate(bench: Workbench, _: GreedyOptions, progress: Progress | None = None) -> Allotment:
    """The lowest total of the layers' predicted costs, as the profile has them, at the target.

    Each layer offers slices of sparsity at the rise of the loss that the profile predicts for
    them; the cheapest a weight are taken first. A later slice of a layer never goes before an
    earlier one, so its price is at least theirs, and the total is the least there is.
    """
    request = bench.request
    gradients = bench.gradients(DENSE, progress)
    activations = bench.activations(DENSE, progress)
    layers = bench.loaded.layers
    steps = math.ceil(request.max_layer_sparsity / WIDTH - 1e-9)
    levels = [min(WIDTH * step, request.max_layer_sparsity) for step in range(steps + 1)]
    exponent = crowding_exponent(request.reconstruct != "none")
    slices = []
    for name, layer in told("allocation", layers.items(), len(layers), progress):
        statistics = statistics_of(name, activations, gradients)
        dense = layer.matrix(bench.loaded.dense(layer))
        losses = predict_losses(dense, statistics, request.criterion, levels)
        costs = [0.0, *crowded_costs(levels, losses, request.target, exponent)]
        slices += _slices(name, layer.numel, levels, costs)
    budget = request.target * bench.loaded.prunable
    wanted = dict.fromkeys(layers, 0.0)
    predicted = 0.0
    for price, start, name, width in sorted(slices):
        taken = min(width, budget / layers[name].numel)
        if taken <= 0:
            break
        wanted[name] = start + taken
        predicted += price * taken * layers[name].numel
        budget -= taken * layers[name].numel
    found = layer_counts(bench, wanted)
    words = (
        f"greedy: predicted rise of the loss {predicted:.4f} nats a token; sparsities from "
        f"{min(wanted.values()):.3f} to {max(wanted.values()):.3f}"
    )
    return Allotment(found.counts, [words, *found.notes])


def _slices(
    name: str, size: int, levels: list[float], costs: list[float]
) -> list[tuple[float, float, str, float]]:
    """A layer's slices: price a weight (nats), where it starts, the layer, its width."""
    price, found = 0.0, []
    for (start, cost), (end, next_cost) in pairwise(zip(levels, costs, strict=True)):
        price = max(price, (next_cost - cost) / (size * (end - start)))
        found.append((price, start, name, end - start))
    return found
