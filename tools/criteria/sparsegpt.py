"""SparseGPT (arXiv 2301.00774): masks and an update of the kept weights, panel by panel.

Minimises, row by row, the squared error of the layer's outputs over the calibration tokens. The
error that a pruned weight leaves is made up for by the kept weights to its right (Optimal Brain
Surgeon with the inverse of X^T X, walked through by its Cholesky factor).

X^T X is known from a sample of tokens only, and what the update owes to chance correlations between
inputs it loses on other text. So it may be shrunk towards its diagonal first, as covariances of few
samples are (Schaefer and Strimmer 2005): X^T X + shrinkage * diag(X^T X), up to a factor that
changes nothing. With 0 it is SparseGPT as published.
"""

import torch
from torch import Tensor

from prunewright.tools.fast import has_nan, is_finite, read_at_once
from prunewright.tools.masks import (
    Group,
    check_count,
    check_numbers,
    even_shares,
    lowest,
    nm_lowest,
    zero_places,
)

GROUP: Group = "layer"
PANEL = 128
"""Inputs whose masks are chosen together."""
STRIP = 32
"""Inputs of a panel that are updated one by one; what is right of them is updated once a strip."""
DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are added to it, one after another until it can be factored."""


def score(weight: Tensor, input_square: Tensor) -> Tensor:
    """w_ij^2 * E[x_j^2]: the error of a weight's removal before any update, float32.

    What SparseGPT would take comes out only while it works; this stands in where the effect of a
    mask is predicted.
    """
    return weight.float().square() * input_square.float()


def prune(
    weight: Tensor,
    gram: Tensor,
    *,
    pruned: int | None = None,
    pattern: tuple[int, int] | None = None,
    factors: Tensor | None = None,
    dampings: tuple[float, ...] = DAMPINGS,
    shrinkage: float = 0.0,
    panel: int = PANEL,
) -> tuple[Tensor, Tensor, float] | None:
    """The mask of one matrix and its updated weights.

    Args:
        weight: dense [outputs, inputs].
        gram: X^T X over the calibration tokens [inputs, inputs], up to a factor, float32.
        pruned: number of weights to prune, those that are zero already included; each panel gives
            its share.
        pattern: ``(keep_n, group_m)`` instead.
        factors: what each output's error weighs when rows compete [outputs]; None: all the same.
        dampings: shares of the mean diagonal of the matrix, tried one after another.
        shrinkage: share of its own diagonal that is added to the matrix.
        panel: inputs whose masks are chosen together, rounded down to whole groups.

    Returns:
        The mask, True where pruned; the weights in float32, 0 there; and the damping that was
        needed. None if no damping made the matrix positive definite.

    Raises:
        ValueError: neither or both of ``pruned`` and ``pattern``, a count out of range, inputs that
            do not divide, or weights that are not numbers.
    """
    if (pruned is None) == (pattern is None):
        raise ValueError("give the number of weights to prune, or a pattern")
    inputs = weight.shape[1]
    group = pattern[1] if pattern else 1
    if inputs % group:
        raise ValueError(f"{inputs} inputs do not divide into groups of {group}")
    panels = _runs(inputs, max(panel // group, 1) * group)
    own = zero_places(weight)
    shares: list[int] = []
    if pruned is not None:
        zeros = [0] * len(panels)
        if own is not None:
            zeros = read_at_once(own[:, start:end].sum() for start, end in panels)
        check_count(pruned, sum(zeros), weight.numel())
        sizes = torch.tensor([end - start for start, end in panels])
        shares = even_shares(pruned, torch.tensor(zeros), sizes).tolist()
    found = inverse_factor(gram.float(), dampings, shrinkage)
    if found is None:
        return None
    factor, damping = found
    mask, work = sweep(weight, factor, panels, shares, pattern, factors, own)
    check_numbers(has_nan(work))
    return mask, work, damping


def sweep(
    weight: Tensor,
    factor: Tensor,
    panels: list[tuple[int, int]],
    shares: list[int],
    pattern: tuple[int, int] | None,
    factors: Tensor | None,
    own: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masks and updates from the first input to the last; no step waits for a device.

    Args:
        weight: dense [outputs, inputs].
        factor: of `inverse_factor` [inputs, inputs].
        panels: first input and the one after the last of each, in order.
        shares: weights that each panel prunes; empty with a pattern.
        pattern: as for `prune`.
        factors: likewise.
        own: True where a weight is zero in the dense model [outputs, inputs]; None: nowhere.

    Returns:
        The mask, True where pruned, and the weights in float32, 0 there.
    """
    outputs, inputs = weight.shape
    group = pattern[1] if pattern else 1
    # [inputs, outputs]: what a step reads and writes lies together, which makes it four times as
    # fast.
    work = torch.empty(inputs, outputs, device=weight.device).copy_(weight.T)
    mask = torch.zeros_like(work, dtype=torch.bool)
    for index, (start, end) in enumerate(panels):
        part, gone, corner = work[start:end], mask[start:end], factor[start:end, start:end]
        scale = corner.diagonal().unsqueeze(1)
        if pattern is None:
            price = (part / scale).square_()
            if factors is not None:
                price *= factors
            if own is not None:
                price.masked_fill_(own.T[start:end], -torch.inf)
            cheapest = lowest(price.T.reshape(1, -1), torch.tensor([shares[index]]))
            gone.copy_(cheapest.view(outputs, -1).T)
        taken, errors = gone / scale, torch.empty_like(part)
        for first, last in _runs(end - start, max(STRIP // group, 1) * group):
            for j in range(first, last):
                if pattern is not None and j % group == 0:
                    at = slice(j, j + group)
                    price = (part[at] / scale[at]).square_()
                    zero = None if own is None else own[:, start + j : start + j + group]
                    gone[at] = nm_lowest(price.T, *pattern, zero).T
                    torch.div(gone[at], scale[at], out=taken[at])
                torch.mul(part[j], taken[j], out=errors[j])
                part[j + 1 : last].addr_(corner[j, j + 1 : last], errors[j], alpha=-1)
            part[last:].addmm_(corner[first:last, last:].T, errors[first:last], alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return mask.T.contiguous(), work.masked_fill_(mask, 0.0).T.contiguous()


def _runs(length: int, size: int) -> list[tuple[int, int]]:
    """Start and end of runs of a size, and of what is left."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def inverse_factor(
    gram: Tensor, dampings: tuple[float, ...] = DAMPINGS, shrinkage: float = 0.0
) -> tuple[Tensor, float] | None:
    """Upper Cholesky factor of the inverse of a damped matrix, and the damping that was needed.

    Args:
        gram: symmetric [n, n], float32.
        dampings: shares of the mean diagonal, tried one after another.
        shrinkage: share of its own diagonal that is added, too.

    Returns:
        U with U^T U = (gram + shrinkage * diag(gram) + damping * mean diagonal * I)^-1, and the
        damping; None if the matrix is not positive definite with any of them.
    """
    if not is_finite(gram):
        return None
    mean = gram.diagonal().mean()
    for damping in dampings:
        damped = gram.clone()
        damped.diagonal().mul_(1 + shrinkage).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and is_finite(upper):
                return upper, damping
    return None
