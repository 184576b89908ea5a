"""One ranking of all weights of all layers by the saliency of the criterion ``fisher``."""

from collections.abc import Callable

import torch
from torch import Tensor

from prunewright.state.config import Options
from prunewright.state.run import DENSE
from prunewright.tools.allocation.blocks import layer_bounds
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.calibration.profile import statistics_of
from prunewright.tools.criteria import CRITERIA, split_experts
from prunewright.tools.model.head import Progress

Scores = Callable[[], list[Tensor]]
"""A layer's scores, not negative, float32, in parts; computed again at each call."""


class GlobalOptions(Options):
    """None."""


def allocate(bench: Workbench, _: GlobalOptions, progress: Progress | None = None) -> Allotment:
    """How many of each layer's weights are among the model's least salient.

    The saliency is a predicted rise of the loss, so it compares across layers (Optimal Brain
    Damage, LeCun et al. 1989). Inside the layers the criterion in use decides: with ``fisher``
    the masks are those of the one ranking.
    """
    request = bench.request
    gradients = bench.gradients(DENSE, progress)
    activations = bench.activations(DENSE, progress)
    score = CRITERIA["fisher"].score
    layers = bench.loaded.layers

    def scores_of(name: str) -> Scores:
        def scores() -> list[Tensor]:
            statistics = statistics_of(name, activations, gradients)
            dense = layers[name].matrix(bench.loaded.dense(layers[name]))
            parts = split_experts(dense, statistics)
            if not bounds.least[name]:
                return [score(part, stats) for part, stats in parts]
            return [score(part, stats)[part != 0] for part, stats in parts]

        return scores

    bounds = layer_bounds(bench)
    least, most, ceiling = bounds.least, bounds.most, bounds.ceiling
    # The layers' own zeros are given; the rest is ranked.
    rooms = {name: most[name] - least[name] for name in layers}
    total = bounds.total(request.target) - sum(least.values())
    taken = lowest_counts({name: scores_of(name) for name in layers}, rooms, total, progress)
    counts = {name: least[name] + count for name, count in taken.items()}
    full = [name for name in layers if counts[name] == most[name]]
    shares = {name: counts[name] / layer.numel for name, layer in layers.items()}
    notes = [
        "global: one ranking by the saliency of fisher; sparsities from "
        f"{min(shares.values()):.3f} to {max(shares.values()):.3f}"
    ]
    if full:
        notes.append(f"{len(full)} of {len(layers)} layers were held at a sparsity of {ceiling:g}")
    return Allotment(counts, notes)


def lowest_counts(
    layers: dict[str, Scores],
    caps: dict[str, int],
    total: int,
    progress: Progress | None = None,
) -> dict[str, int]:
    """How many of each layer's scores are among the lowest ``total``, with a bound for each layer.

    What a bound keeps from one layer is taken from the others. Ties go to the earlier layer. A
    radix selection on the bits of float32, whose order is that of numbers that are not negative:
    one pass for the upper half, one for the lower, so that no layer's scores need be kept.

    Args:
        layers: the scores of each layer by name.
        caps: the most that each may give.
        total: at most the sum of the caps.
        progress: told after each layer.
    """
    most = torch.tensor([caps[name] for name in layers])
    counts = torch.zeros(len(layers), dtype=torch.int64)
    prefix = 0
    for level in range(2):
        histograms = torch.zeros(len(layers), _BINS, dtype=torch.int64)
        for index, scores in enumerate(layers.values()):
            for part in scores():
                bits = part.contiguous().view(torch.int32).reshape(-1)
                upper = bits >> _SHIFT
                kept = upper if level == 0 else bits[upper == prefix] & (_BINS - 1)
                histograms[index] += torch.bincount(kept, minlength=_BINS).cpu()
            if progress is not None:
                progress("allocation", level * len(layers) + index + 1, 2 * len(layers))
        running = counts.unsqueeze(1) + histograms.cumsum(dim=1)
        reached = torch.minimum(running, most.unsqueeze(1)).sum(dim=0) >= total
        bin_of_threshold = int(reached.int().argmax())
        if bin_of_threshold:
            counts = running[:, bin_of_threshold - 1]
        prefix = bin_of_threshold
    ties = torch.minimum(running[:, prefix], most)
    counts = torch.minimum(counts, most)
    found = {}
    left = total - int(counts.sum())
    for name, below, upto in zip(layers, counts.tolist(), ties.tolist(), strict=True):
        taken = min(left, upto - below)
        found[name] = below + taken
        left -= taken
    return found


_SHIFT = 16
_BINS = 2**_SHIFT
