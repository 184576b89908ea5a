"""Predicted costs: what the loss would rise by if a layer were sparser."""

from itertools import pairwise

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
    """Predicted rise of the mean token loss over the dense layer at each sparsity level.

    The sum, over the weights that the criterion would prune, of the saliency of
    `criteria.fisher`. Large layers are estimated on a spread of whole rows (criteria that
    compare inside rows) or of single weights (others), scaled by the known saliency of all
    rows. Zeros of the layer's own count in the levels and cost nothing.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: with gradients.
        criterion: which weights would go.
        levels: sparsities in [0, 1].

    Returns:
        Nats a token, one a level.
    """
    totals = [0.0] * len(levels)
    wide = wide_dtype(weight.device)
    experts = split_experts(weight, statistics)
    counts = read_at_once(count_zeros(matrix) for matrix, _ in experts)
    zeros = [count / matrix.numel() for count, (matrix, _) in zip(counts, experts, strict=True)]
    shares = [even_level(zeros, level) for level in levels]
    rule = find_criterion(criterion)
    for matrix, stats in experts:
        assert stats.gradient_square is not None
        if rule.group == "row":
            rows, saliency, scale = _sampled_rows(matrix, stats)
            if rule.follows_saliency:
                ordered = ascending(saliency)
            else:
                order = rule.score(matrix[rows], stats.rows(rows)).argsort(dim=1)
                ordered = saliency.gather(1, order)
            running = ordered.sum(dim=0, dtype=wide).cumsum(0)
            own = (matrix[rows] == 0).float().mean(dim=1).tolist() if any(zeros) else []
            counts = [round(even_level(own, level) * len(running)) for level in shares]
        else:
            spread = even_spread(matrix.shape[0], matrix.shape[1], matrix.device)
            inputs = stats.input_square.index_select(0, spread.columns)
            factors = fisher.damped(stats.gradient_square).index_select(0, spread.rows)
            saliency = fisher.saliency(spread.of(matrix), inputs, factors)
            if rule.follows_saliency:
                ordered = ascending(saliency)
            else:
                ordered = saliency[spread.of(rule.score(matrix, stats)).argsort()]
            running = ordered.cumsum(0, dtype=wide)
            scale = matrix.numel() / len(ordered)
            counts = [round(level * len(running)) for level in shares]
        losses = [scale * float(running[n - 1]) if n else 0.0 for n in counts]
        totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
    return totals


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
        rows, saliency, scale = _sampled_rows(matrix, stats)
        mask = nm_mask(rule.score(matrix[rows], stats.rows(rows)), *pattern)
        total += scale * float(saliency.masked_fill(~mask, 0).sum(dtype=wide_dtype(weight.device)))
    return total


def _sampled_rows(matrix: Tensor, stats: LayerStatistics) -> tuple[slice, Tensor, float]:
    """The `sampled_rows`, their saliency, and all rows' over theirs."""
    assert stats.gradient_square is not None
    factors = fisher.damped(stats.gradient_square)
    rows = sampled_rows(matrix)
    saliency = fisher.saliency(matrix[rows], stats.input_square, factors[rows].unsqueeze(1))
    whole = matrix.float().square() @ stats.input_square @ factors
    sampled = float(saliency.sum(dtype=wide_dtype(matrix.device)))
    return rows, saliency, 0.5 * float(whole) / max(sampled, 1e-300)
