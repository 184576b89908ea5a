"""Predicted costs: what the loss would rise by if a layer were sparser."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from prunewright.tools.calibration.observed import wide_dtype
from prunewright.tools.calibration.sample import even_spread, sampled_rows
from prunewright.tools.criteria import LayerStatistics, find_criterion, fisher, split_experts
from prunewright.tools.fast import ascending, count_zeros, read_at_once
from prunewright.tools.masks import nm_mask

CROWDING = 2.0
"""Exponent of `crowded_costs`.

Chosen on the guard text with benchmarks/crowding.py: SmolLM2-135M, Wanda masks, 45 %, C4:
perplexity 53.1 for 0 and 51.2 for 2 (uniform 55.0).
"""


def crowding_exponent(reconstruct: bool) -> float:
    """The exponent of `crowded_costs` for a run.

    None where the kept weights are solved for: they make up for more in a layer that gives more.
    Compared on held-out text, one seed and only these two: SmolLM2-135M, `obs`, reconstructed, one
    shot, 45 %, 8 C4 windows, perplexity on other C4 / WikiText-2 validation windows: 61.1 / 25.3
    for 0, 61.9 / 25.5 for 2.
    """
    return 0.0 if reconstruct else CROWDING


def crowded_costs(
    levels: list[float], losses: list[float], mean: float, exponent: float
) -> list[float]:
    """Predicted change of the loss from the first level to each other one, crowding included.

    A prediction that adds up single weights is too low where much of a layer goes. So what it
    says of the slice between two levels is multiplied by ((1 - mean) / (1 - lower level)) to the
    power of ``exponent``: dearer in layers that are above the model's mean, cheaper below it.

    Args:
        levels: sparsities of one layer, rising or falling from where it is.
        losses: predicted rise of the loss over the dense layer at each level, nats.
        mean: the model's sparsity.
        exponent: `crowding_exponent`.

    Returns:
        Absolute changes, nats, never negative, for each level but the first.
    """
    total, costs = 0.0, []
    for (near, loss), (far, next_loss) in pairwise(zip(levels, losses, strict=True)):
        factor = (max(1.0 - mean, 0.05) / max(1.0 - min(near, far), 0.05)) ** exponent
        total += abs(next_loss - loss) * factor
        costs.append(total)
    return costs


def predict_losses(
    weight: Tensor, statistics: LayerStatistics, criterion: str, levels: list[float]
) -> list[float]:
    """`predict_each` of the one loss that the statistics are of: nats a token, one a level."""
    return predict_each(weight, statistics, criterion, levels, ())[0]


def predict_each(
    weight: Tensor,
    statistics: LayerStatistics,
    criterion: str,
    levels: list[float],
    others: Sequence[Tensor],
) -> list[list[float]]:
    """Predicted rise of the mean token loss over the dense layer at each sparsity level.

    The sum, over the weights that the criterion would prune, of the saliency of
    `criteria.fisher`. Large layers are estimated on a spread of whole rows (criteria that
    compare inside rows) or of single weights (others), scaled by the known saliency of all
    rows. Zeros of the layer's own count in the levels and cost nothing.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: with gradients; they say which weights would go.
        criterion: which weights would go.
        levels: sparsities in [0, 1].
        others: E[d_i^2] of other losses, each [outputs] or [experts, outputs], whose rise is
            predicted for the same weights.

    Returns:
        Nats a token, one a level: of the loss that the statistics are of, then of each other one.
    """
    totals = [[0.0] * len(levels) for _ in range(1 + len(others))]
    wide = wide_dtype(weight.device)
    experts = split_experts(weight, statistics)
    counts = read_at_once(count_zeros(matrix) for matrix, _ in experts)
    zeros = [count / matrix.numel() for count, (matrix, _) in zip(counts, experts, strict=True)]
    shares = [even_level(zeros, level) for level in levels]
    rule = find_criterion(criterion)
    for expert, (matrix, stats) in enumerate(experts):
        assert stats.gradient_square is not None
        factors = fisher.damped(stats.gradient_square)
        # What each row's saliency is of another loss, over what it is of the one that ranks it.
        ratios = [
            _damped(square, expert) / factors.clamp(min=torch.finfo(factors.dtype).tiny)
            for square in others
        ]
        if rule.group == "row":
            rows, saliency, scales = _sampled_rows(matrix, stats, ratios)
            if rule.follows_saliency:
                ordered = ascending(saliency)
            else:
                order = rule.score(matrix[rows], stats.rows(rows)).argsort(dim=1)
                ordered = saliency.gather(1, order)
            running = [ordered.sum(dim=0, dtype=wide).cumsum(0)]
            running += [(ratio[rows] @ ordered).cumsum(0, dtype=wide) for ratio in ratios]
            own = (matrix[rows] == 0).float().mean(dim=1).tolist() if any(zeros) else []
            counts = [round(even_level(own, level) * ordered.shape[1]) for level in shares]
        else:
            spread = even_spread(matrix.shape[0], matrix.shape[1], matrix.device)
            inputs = stats.input_square.index_select(0, spread.columns)
            saliency = fisher.saliency(
                spread.of(matrix), inputs, factors.index_select(0, spread.rows)
            )
            if rule.follows_saliency and not ratios:
                ordered = ascending(saliency)
            else:
                scores = saliency if rule.follows_saliency else spread.of(rule.score(matrix, stats))
                order = scores.argsort()
                ordered = saliency[order]
            running = [ordered.cumsum(0, dtype=wide)]
            for ratio in ratios:
                each = ordered * ratio.index_select(0, spread.rows[order])
                running.append(each.cumsum(0, dtype=wide))
            scales = [matrix.numel() / len(ordered)] * len(running)
            counts = [round(level * len(ordered)) for level in shares]
        for total, scale, sums in zip(totals, scales, running, strict=True):
            for index, n in enumerate(counts):
                total[index] += scale * float(sums[n - 1]) if n else 0.0
    return totals


def _damped(square: Tensor, expert: int) -> Tensor:
    return fisher.damped(square if square.ndim == 1 else square[expert])


def even_level(own: list[float], level: float) -> float:
    """The sparsity of most parts of one size, so that all together have that of ``level``.

    Parts with more zeros of their own keep them, and the others have as much less: what
    `masks.even_shares` gives, in fractions.

    Args:
        own: sparsity that each part has by itself.
        level: of all parts together.
    """
    rest = level * len(own)
    for index, most in enumerate(sorted(own, reverse=True)):
        if most <= (even := rest / (len(own) - index)):
            return even if index else level
        rest -= most
    return 0.0 if own else level


def predict_pattern_loss(
    weight: Tensor, statistics: LayerStatistics, criterion: str, pattern: tuple[int, int]
) -> float:
    """Predicted rise of the mean token loss over the dense layer for its N:M mask.

    As `predict_losses`, on a spread of whole rows whatever the criterion: groups lie in rows.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: with gradients.
        criterion: which weights of a group would go.
        pattern: ``(keep_n, group_m)``; the inputs divide into groups.

    Returns:
        Nats a token.
    """
    total, rule = 0.0, find_criterion(criterion)
    for matrix, stats in split_experts(weight, statistics):
        rows, saliency, (scale,) = _sampled_rows(matrix, stats, [])
        mask = nm_mask(rule.score(matrix[rows], stats.rows(rows)), *pattern)
        total += scale * float(saliency.masked_fill(~mask, 0).sum(dtype=wide_dtype(weight.device)))
    return total


def _sampled_rows(
    matrix: Tensor, stats: LayerStatistics, ratios: list[Tensor]
) -> tuple[slice, Tensor, list[float]]:
    """The `sampled_rows`, their saliency, and all rows' over theirs.

    Args:
        matrix: dense weights [outputs, inputs].
        stats: of it, with gradients.
        ratios: of other losses, what each row's saliency is times as large as [outputs]; all rows'
            over the sampled ones' is told of each of them, too.
    """
    assert stats.gradient_square is not None
    factors = fisher.damped(stats.gradient_square)
    rows = sampled_rows(matrix)
    saliency = fisher.saliency(matrix[rows], stats.input_square, factors[rows].unsqueeze(1))
    strengths = matrix.float().square() @ stats.input_square
    wholes = [strengths @ factors, *(strengths @ (factors * ratio) for ratio in ratios)]
    parts = [saliency.sum(dtype=wide_dtype(matrix.device))]
    parts += [ratio[rows] @ saliency.sum(dim=1) for ratio in ratios]
    scales = [0.5 * float(w) / max(float(p), 1e-300) for w, p in zip(wholes, parts, strict=True)]
    return rows, saliency, scales
