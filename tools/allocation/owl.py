"""OWL (Outlier Weighed Layerwise sparsity, arXiv 2310.05175): blocks with outliers keep more."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunewright.state.config import Options
from prunewright.state.run import DENSE
from prunewright.tools.allocation.blocks import block_counts, by_block, weighted_mean
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.criteria import LayerStatistics, split_experts, wanda
from prunewright.tools.model.head import Progress, told


class OwlOptions(Options):
    """OWL's two numbers."""

    lam: float = Field(0.08, gt=0, le=0.5, description="half of the spread of the sparsities")
    m: float = Field(5.0, gt=1, description="an outlier's score, as a multiple of the mean score")


def allocate(bench: Workbench, options: OwlOptions, progress: Progress | None = None) -> Allotment:
    """One sparsity a block, lower where more of the dense model's Wanda scores are outliers."""
    activations = bench.activations(DENSE, progress)
    blocks = by_block(bench.loaded)
    ratios = {}
    for block, layers in told("allocation", blocks.items(), len(blocks), progress):
        scores = [
            wanda.score(matrix, stats.input_square).reshape(-1)
            for layer, dense in zip(layers, bench.loaded.dense_layers(layers), strict=True)
            for matrix, stats in split_experts(
                layer.matrix(dense), LayerStatistics(activations.input_square[layer.name])
            )
        ]
        ratios[block] = outlier_ratio(scores, options.m)
    sizes = {block: sum(ly.numel for ly in layers) for block, layers in blocks.items()}
    wanted = owl_sparsities(ratios, sizes, bench.request.target, options.lam)
    found = block_counts(bench, wanted)
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    words = (
        f"OWL, lam {options.lam:g}, m {options.m:g}: outliers from {ratios[least]:.3f} % of block "
        f"{least}'s weights to {ratios[most]:.3f} % of block {most}'s; sparsities wanted from "
        f"{min(wanted.values()):.3f} to {max(wanted.values()):.3f}"
    )
    return Allotment(found.counts, [words, *found.notes])


def outlier_ratio(scores: list[Tensor], m: float) -> float:
    """D of a block: the percentage of its scores above m times their mean.

    Args:
        scores: of all the block's layers, in any shapes.
        m: see above.
    """
    count = sum(part.numel() for part in scores)
    mean = sum(float(part.cpu().sum(dtype=torch.float64)) for part in scores) / count
    return 100 * sum(int((part > m * mean).sum()) for part in scores) / count


def owl_sparsities(
    ratios: Mapping[int, float], sizes: Mapping[int, int], target: float, lam: float
) -> dict[int, float]:
    """s = target - (r - mean r) with r = 2 lam (D - min D) / (max D - min D), by block.

    The mean is weighted by the blocks' sizes: the paper's blocks are all of one size. Blocks
    with equal ratios are pruned alike.
    """
    low, high = min(ratios.values()), max(ratios.values())
    span = high - low or 1.0
    shifts = {block: 2 * lam * (ratio - low) / span for block, ratio in ratios.items()}
    mean = weighted_mean(shifts, sizes)
    return {block: target - (shift - mean) for block, shift in shifts.items()}
