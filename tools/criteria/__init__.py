"""Criteria: which weights inside a layer go. One file each, one line each in the registry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunewright.state.config import CriterionName
from prunewright.tools.criteria import fisher, magnitude, wanda
from prunewright.tools.masks import Group, nm_mask, unstructured_mask


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration tells of one layer; a fused tensor of experts leads with [experts, ...].

    Attributes:
        input_square: E[x_j^2] over the tokens that reached the layer [inputs], float32.
        gradient_square: E[d_i^2] [outputs], float32; None where no gradients were taken.
    """

    input_square: Tensor
    gradient_square: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A scoring function of one matrix and the group inside which its scores compete."""

    group: Group
    needs_gradients: bool
    score: Callable[[Tensor, LayerStatistics], Tensor]


def _gradients(statistics: LayerStatistics) -> Tensor:
    if statistics.gradient_square is None:
        raise ValueError("this criterion needs gradients, which were not taken")
    return statistics.gradient_square


CRITERIA: dict[CriterionName, Criterion] = {
    "magnitude": Criterion(magnitude.GROUP, False, lambda w, _: magnitude.score(w)),
    "wanda": Criterion(wanda.GROUP, False, lambda w, s: wanda.score(w, s.input_square)),
    "fisher": Criterion(
        fisher.GROUP, True, lambda w, s: fisher.score(w, s.input_square, _gradients(s))
    ),
}


def prune_mask(
    weight: Tensor,
    statistics: LayerStatistics,
    criterion: CriterionName,
    *,
    pruned: int | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """The mask of one layer, True where a weight goes.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: the layer's, with the same leading dimension.
        criterion: which weights go.
        pruned: number of weights to prune (unstructured); experts share it equally.
        pattern: ``(keep_n, group_m)`` instead.

    Raises:
        ValueError: neither or both of ``pruned`` and ``pattern``, or a count out of range.
    """
    if (pruned is None) == (pattern is None):
        raise ValueError("give the number of weights to prune, or a pattern")
    rule = CRITERIA[criterion]
    matrices = split_experts(weight, statistics)
    masks = []
    for index, (matrix, stats) in enumerate(matrices):
        scores = rule.score(matrix, stats)
        if pattern is not None:
            masks.append(nm_mask(scores, *pattern))
        else:
            assert pruned is not None
            share = pruned * (index + 1) // len(matrices) - pruned * index // len(matrices)
            masks.append(unstructured_mask(scores, share, rule.group))
    return masks[0] if weight.ndim == 2 else torch.stack(masks)


def split_experts(
    weight: Tensor, statistics: LayerStatistics
) -> list[tuple[Tensor, LayerStatistics]]:
    """The single matrices of a layer with their statistics: one, or one an expert."""
    if weight.ndim == 2:
        return [(weight, statistics)]
    gradients = statistics.gradient_square
    return [
        (matrix, LayerStatistics(inputs, None if gradients is None else gradients[index]))
        for index, (matrix, inputs) in enumerate(zip(weight, statistics.input_square, strict=True))
    ]
