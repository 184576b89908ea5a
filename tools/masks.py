"""Masks from scores: exact counts per row, per layer, or N of every M inputs. Pure functions.

A mask is a bool tensor of the scores' shape, True where a weight is pruned.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Group = Literal["row", "layer"]
"""Which weights compete: those of one output (Wanda), or those of the whole layer."""


def unstructured_mask(scores: Tensor, pruned: int, group: Group) -> Tensor:
    """Prune exactly ``pruned`` weights, those with the lowest scores of their group.

    With ``row`` every row gives ``pruned // rows`` (Wanda, arXiv 2306.11695, which takes the
    floor); what is left over is taken one each from evenly spaced rows, so that the layer's
    count is exact. Ties go to the lower index.

    Args:
        scores: saliency [rows, inputs], any float dtype.
        pruned: number of weights to prune, 0 to ``scores.numel()``.
        group: ``row`` or ``layer``.

    Raises:
        ValueError: ``pruned`` out of range, or a score is not a number.
    """
    _refuse_nan(scores)
    if not 0 <= pruned <= scores.numel():
        raise ValueError(f"cannot prune {pruned} of {scores.numel()} weights")
    if group == "layer":
        flat = scores.reshape(1, -1)
        return _lowest(flat, torch.tensor([pruned], device=scores.device)).reshape(scores.shape)
    return _lowest(scores, row_counts(scores.shape[0], pruned, scores.device))


def row_counts(rows: int, pruned: int, device: torch.device) -> Tensor:
    """How many weights each row gives [rows]: equal, the remainder on evenly spaced rows."""
    index = torch.arange(rows, device=device)
    base, extra = divmod(pruned, rows)
    # Bresenham's spacing: exactly `extra` of the rows step over a multiple of `rows`.
    return base + ((index + 1) * extra // rows - index * extra // rows)


def _lowest(scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[i]`` lowest of each row i; ties go to the lower index."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = counts == count
        whole = bool(rows.all())
        part = scores if whole else scores[rows]
        threshold = kth_lowest(part, count).unsqueeze(1)
        chosen = part < threshold
        missing = count - chosen.sum(dim=1, keepdim=True)
        ties = part == threshold
        if bool((ties.sum(dim=1, keepdim=True) > missing).any()):
            ties &= ties.cumsum(dim=1, dtype=torch.int32) <= missing
        chosen |= ties
        if whole:
            return chosen
        mask[rows] = chosen
    return mask


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest along the last dimension, which is dropped; ``k`` counts from 1.

    On a processor by numpy, some six to ten times as fast as torch.
    """
    if values.device.type != "cpu":
        return values.kthvalue(k, dim=-1).values
    # numpy has no bfloat16; float32 holds its numbers exactly.
    numbers = values.float() if values.dtype == torch.bfloat16 else values
    found = np.partition(numbers.numpy(), k - 1, axis=-1)[..., k - 1].copy()
    return torch.from_numpy(found).to(values.dtype)


def nm_mask(scores: Tensor, keep_n: int, group_m: int) -> Tensor:
    """Keep the ``keep_n`` highest scores of each aligned group of ``group_m`` inputs of a row.

    Args:
        scores: saliency [rows, inputs].
        keep_n: weights kept in a group.
        group_m: size of a group; must divide the number of inputs.

    Raises:
        ValueError: the inputs do not divide into groups, or a score is not a number.
    """
    _refuse_nan(scores)
    rows, inputs = scores.shape
    if inputs % group_m:
        raise ValueError(f"{inputs} inputs do not divide into groups of {group_m}")
    groups = scores.reshape(rows, inputs // group_m, group_m)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., : group_m - keep_n], True)
    return mask.reshape(rows, inputs)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What holds the bits of a number, by its bytes."""


def count_zeros(weight: Tensor) -> int:
    """How many weights are zero, of either sign.

    By their bits without the sign: on a processor that is some forty times as fast as by the
    values of bfloat16.
    """
    bits = weight.view(INTEGERS[weight.dtype.itemsize])
    return weight.numel() - int(torch.count_nonzero(bits << 1))


def _refuse_nan(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise ValueError("some scores are not numbers: the weights or the statistics are broken")
