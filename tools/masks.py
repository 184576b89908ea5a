"""Masks from scores: exact counts per row, per layer, or N of every M inputs. Pure functions.

A mask is a bool tensor of the scores' shape, True where a weight is pruned.

Zeros that the dense model has of its own count, in a layer as in the whole model: a count of
pruned weights is one of all exact zeros, of either sign. So a mask holds the layer's own zeros
whatever their scores, and what is missing to the count is chosen among the other weights. Where
parts share a count (rows, experts, panels), those with more zeros of their own than an even share
keep them, and the others give as much less.
"""

from typing import Literal

import torch
from torch import Tensor

from prunewright.tools.fast import count_zeros, has_nan, kth_lowest, on_processor

Group = Literal["row", "layer"]
"""Which weights compete: those of one output (Wanda), or those of the whole layer."""


def unstructured_mask(
    scores: Tensor, pruned: int, group: Group, own: Tensor | None = None
) -> Tensor:
    """Prune exactly ``pruned`` weights, those with the lowest scores of their group.

    With ``row`` every row gives ``pruned // rows`` (Wanda, arXiv 2306.11695, which takes the
    floor); what is left over is taken one each from evenly spaced rows, so that the layer's
    count is exact. Ties go to the lower index.

    Args:
        scores: saliency [rows, inputs], any float dtype.
        pruned: number of weights to prune, ``own`` ones included.
        group: ``row`` or ``layer``.
        own: True where a weight is zero in the dense model [rows, inputs]; None: nowhere.

    Raises:
        ValueError: ``pruned`` out of range, or a score is not a number.
    """
    broken = has_nan(scores).long().unsqueeze(0)
    least = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    if own is not None:
        least = own.sum(dim=1)
        scores = scores.masked_fill(own, -torch.inf)
    # All that must be known of a device's values comes at once, so that it is waited for once.
    broken, least = torch.cat([broken, least]).cpu().split([1, len(scores)])
    check_numbers(broken)
    check_count(pruned, int(least.sum()), scores.numel())
    if group == "layer":
        return lowest(scores.reshape(1, -1), torch.tensor([pruned])).reshape(scores.shape)
    return lowest(scores, even_shares(pruned, least))


def check_numbers(broken: Tensor) -> None:
    """Refuse scores some of which are not numbers.

    Args:
        broken: whether they are, of one value.

    Raises:
        ValueError: they are.
    """
    if bool(broken):
        raise ValueError("some scores are not numbers: the weights or the statistics are broken")


def check_count(pruned: int, zeros: int, weights: int) -> None:
    """Refuse a number of weights to prune that is out of range.

    Raises:
        ValueError: it is below the number of ``zeros`` that are there, or above all ``weights``.
    """
    if not zeros <= pruned <= weights:
        words = f", {zeros} of which are zero already" if zeros else ""
        raise ValueError(f"cannot prune {pruned} of {weights} weights{words}")


def even_shares(total: int, least: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What each part gives of a total: as its size is, but never less than its least.

    What rounding leaves over goes, one each, to evenly spaced parts.

    Args:
        total: at least the sum of ``least``.
        least: what each part gives in any case [parts], int64, on the processor.
        sizes: of the parts [parts], int64; None: all are of one size.

    Returns:
        int64 [parts], of the sum ``total``.
    """
    sizes = torch.ones_like(least) if sizes is None else sizes
    shares = least.clone()
    open_ = torch.ones_like(least, dtype=torch.bool)
    # A part whose least exceeds its share is set aside, which lowers the others' shares: some
    # part stays, since the total is enough for what all give in any case.
    while True:
        rest = total - int(shares[~open_].sum())
        ends = sizes[open_].cumsum(0)
        # Bresenham's spacing: a part gives one more where it steps over a whole number.
        reached = ends * rest // ends[-1]
        fair = reached.diff(prepend=reached.new_zeros(1))
        short = fair < least[open_]
        if not bool(short.any()):
            shares[open_] = fair
            return shares
        open_[open_.nonzero().squeeze(1)[short]] = False


def lowest(scores: Tensor, counts: Tensor) -> Tensor:
    """The lowest scores of each row; ties go to the lower index.

    Args:
        scores: [rows, inputs], none of them NaN.
        counts: how many of each row, int64 [rows], on the processor.

    Returns:
        bool [rows, inputs], True for these.
    """
    threshold = kth_lowest(scores, counts.clamp(min=1))
    chosen = scores < threshold
    missing = counts.to(scores.device, non_blocking=True).unsqueeze(1) - chosen.sum(1, keepdim=True)
    ties = scores == threshold
    # To look whether any are too many saves time on a processor; elsewhere it would be waited for.
    if not on_processor(scores) or bool((ties.sum(1, keepdim=True) > missing).any()):
        ties &= ties.cumsum(dim=1, dtype=torch.int32) <= missing
    return chosen.logical_or_(ties)


def nm_mask(scores: Tensor, keep_n: int, group_m: int, own: Tensor | None = None) -> Tensor:
    """Keep the ``keep_n`` highest scores of each aligned group of ``group_m`` inputs of a row.

    Fewer where more of a group's weights are zero in the dense model.

    Args:
        scores: saliency [rows, inputs].
        keep_n: weights kept in a group.
        group_m: size of a group; must divide the number of inputs.
        own: True where a weight is zero in the dense model [rows, inputs]; None: nowhere.

    Raises:
        ValueError: the inputs do not divide into groups, or a score is not a number.
    """
    check_numbers(has_nan(scores))
    if scores.shape[1] % group_m:
        raise ValueError(f"{scores.shape[1]} inputs do not divide into groups of {group_m}")
    return nm_lowest(scores, keep_n, group_m, own)


def nm_lowest(scores: Tensor, keep_n: int, group_m: int, own: Tensor | None) -> Tensor:
    """`nm_mask` of scores that need no check, so that no device is waited for."""
    rows, inputs = scores.shape
    if own is not None:
        scores = scores.masked_fill(own, -torch.inf)
    groups = scores.reshape(rows, inputs // group_m, group_m)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., : group_m - keep_n], True)
    mask = mask.reshape(rows, inputs)
    return mask if own is None else mask | own


def nm_count(weight: Tensor, keep_n: int, group_m: int) -> int:
    """Zeros that an N:M mask leaves in a matrix, its own included.

    Args:
        weight: dense weights [..., outputs, inputs], whose inputs divide into groups.
        keep_n: as for `nm_mask`.
        group_m: likewise.
    """
    zeros = (weight == 0).unflatten(-1, (-1, group_m)).sum(-1)
    return int(zeros.clamp(min=group_m - keep_n).sum())


def zero_places(weight: Tensor) -> Tensor | None:
    """True where a weight is zero, of its shape.

    None, at little cost, where none is; but only on a processor, since to look is to wait.
    """
    return None if on_processor(weight) and not count_zeros(weight) else weight == 0
