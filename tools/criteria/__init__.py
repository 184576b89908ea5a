"""Criteria: which weights inside a layer go. One file each, one line each in the registry."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from prunewright.state import InputError
from prunewright.state.plugins import Registry
from prunewright.tools.criteria import fisher, gblm, magnitude, obs, sparsegpt, wanda
from prunewright.tools.fast import count_zeros, read_at_once
from prunewright.tools.masks import (
    Group,
    check_count,
    even_shares,
    nm_mask,
    unstructured_mask,
    zero_places,
)


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration tells of one layer; a fused tensor of experts leads with [experts, ...].

    Attributes:
        input_square: E[x_j^2] over the tokens that reached the layer [inputs], float32.
        gradient_square: E[d_i^2] [outputs], float32; None where no gradients were taken.
        weight_gradient_square: mean over samples of the squared gradient of the mean token loss
            [outputs, inputs], float32; None where it was not asked for.
    """

    input_square: Tensor
    gradient_square: Tensor | None = None
    weight_gradient_square: Tensor | None = None

    def expert(self, index: int) -> "LayerStatistics":
        """Those of one matrix of a fused tensor of experts."""
        ours = (self.gradient_square, self.weight_gradient_square)
        taken = (None if values is None else values[index] for values in ours)
        return LayerStatistics(self.input_square[index], *taken)

    def rows(self, part: slice) -> "LayerStatistics":
        """Those of some outputs of a matrix."""
        ours = (self.gradient_square, self.weight_gradient_square)
        return LayerStatistics(self.input_square, *(None if v is None else v[part] for v in ours))


@dataclass(frozen=True)
class Criterion:
    """A scoring function of one matrix and the group inside which its scores compete.

    Attributes:
        group: inside which scores compete.
        score: of a matrix [outputs, inputs] and its statistics.
        needs_gradients: whether ``gradient_square`` or ``weight_gradient_square`` is read.
        follows_saliency: whether, inside the group, weights go in the order of `fisher.saliency`.
        by_weight: whether it is the latter, which takes a number a weight to keep.
        dampings: not empty if masks come out of a sweep that changes the kept weights, too
            (`sparsegpt.prune`): what it tries. ``score`` then only stands in where a mask's effect
            is predicted.
        shrinks: whether that sweep shrinks X^T X as the request's ``shrinkage`` says.

    Raises:
        ValueError: no such group.
    """

    group: Group
    score: Callable[[Tensor, LayerStatistics], Tensor]
    needs_gradients: bool = False
    follows_saliency: bool = False
    by_weight: bool = False
    dampings: tuple[float, ...] = ()
    shrinks: bool = False

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise ValueError(f"the group of a criterion is row or layer, not {self.group!r}")

    @property
    def solves(self) -> bool:
        """Whether its masks come out of a sweep that changes the kept weights."""
        return bool(self.dampings)


def _taken(gradients: Tensor | None) -> Tensor:
    if gradients is None:
        raise ValueError("this criterion needs gradients, which were not taken")
    return gradients


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude.GROUP, lambda w, _: magnitude.score(w)),
    "wanda": Criterion(
        wanda.GROUP, lambda w, s: wanda.score(w, s.input_square), follows_saliency=True
    ),
    "gblm": Criterion(
        gblm.GROUP,
        lambda w, s: gblm.score(w, s.input_square, _taken(s.weight_gradient_square)),
        needs_gradients=True,
        by_weight=True,
    ),
    "fisher": Criterion(
        fisher.GROUP,
        lambda w, s: fisher.score(w, s.input_square, _taken(s.gradient_square)),
        needs_gradients=True,
        follows_saliency=True,
    ),
    "sparsegpt": Criterion(
        sparsegpt.GROUP,
        lambda w, s: sparsegpt.score(w, s.input_square),
        dampings=sparsegpt.DAMPINGS,
        shrinks=True,
    ),
    "obs": Criterion(
        obs.GROUP,
        lambda w, s: obs.score(w, s.input_square, _taken(s.gradient_square)),
        needs_gradients=True,
        follows_saliency=True,
        dampings=obs.DAMPINGS,
    ),
}


REGISTRY = Registry(
    kind="criterion",
    group="prunewright.criteria",
    known=CRITERIA,
    fits=lambda found: isinstance(found, Criterion),
    must="is no prunewright.tools.criteria.Criterion",
)


def find_criterion(name: str) -> Criterion:
    """The criterion that a configuration names.

    Raises:
        InputError: unknown, or it cannot be imported.
    """
    found = REGISTRY.find(name)
    if name in CRITERIA:
        return found

    def score(weight: Tensor, statistics: LayerStatistics) -> Tensor:
        scores = found.score(weight, statistics)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"the criterion {name!r} must give each weight a score: asked for was a tensor of "
                f"the shape {tuple(weight.shape)}, given {given}"
            )
        return scores.float()

    return replace(found, score=score)


def prune_mask(
    weight: Tensor,
    statistics: LayerStatistics,
    criterion: str,
    *,
    pruned: int | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """The mask of one layer, True where a weight goes.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: the layer's, with the same leading dimension.
        criterion: which weights go.
        pruned: number of weights to prune, those that are zero already included (unstructured);
            experts share it equally.
        pattern: ``(keep_n, group_m)`` instead.

    Raises:
        InputError: the criterion is unknown, or one from outside gives no scores.
        ValueError: neither or both of ``pruned`` and ``pattern``, or a count out of range.
    """
    if (pruned is None) == (pattern is None):
        raise ValueError("give the number of weights to prune, or a pattern")
    rule = find_criterion(criterion)
    matrices = split_experts(weight, statistics)
    shares = expert_shares(pruned, [matrix for matrix, _ in matrices])
    masks = []
    for share, (matrix, stats) in zip(shares, matrices, strict=True):
        scores, own = rule.score(matrix, stats), zero_places(matrix)
        if pattern is not None:
            masks.append(nm_mask(scores, *pattern, own))
        else:
            assert share is not None
            masks.append(unstructured_mask(scores, share, rule.group, own))
    return masks[0] if weight.ndim == 2 else torch.stack(masks)


def expert_shares(pruned: int | None, experts: list[Tensor]) -> list[int | None]:
    """How many of a layer's pruned weights each of its experts gives; None if no count is given.

    Equal, to one weight, but for experts that have more zeros already (`even_shares`).

    Raises:
        ValueError: more are zero already than shall be pruned.
    """
    if pruned is None or len(experts) == 1:
        return [pruned] * len(experts)
    zeros = read_at_once(count_zeros(expert) for expert in experts)
    check_count(pruned, sum(zeros), sum(expert.numel() for expert in experts))
    return list(even_shares(pruned, torch.tensor(zeros)).tolist())


def split_experts(
    weight: Tensor, statistics: LayerStatistics
) -> list[tuple[Tensor, LayerStatistics]]:
    """The single matrices of a layer with their statistics: one, or one an expert."""
    if weight.ndim == 2:
        return [(weight, statistics)]
    return [(matrix, statistics.expert(index)) for index, matrix in enumerate(weight)]
