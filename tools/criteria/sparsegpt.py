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

from prunewright.tools.masks import Group, even_shares, nm_mask, unstructured_mask, zero_places

GROUP: Group = "layer"
PANEL = 128
"""Inputs whose masks are chosen together."""
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
        ValueError: neither or both of ``pruned`` and ``pattern``, or the inputs do not divide.
    """
    if (pruned is None) == (pattern is None):
        raise ValueError("give the number of weights to prune, or a pattern")
    inputs = weight.shape[1]
    work = weight.float().clone()
    found = inverse_factor(gram.float(), dampings, shrinkage)
    if found is None:
        return None
    factor, damping = found
    mask = torch.zeros(work.shape, dtype=torch.bool, device=work.device)
    group = pattern[1] if pattern else 1
    if inputs % group:
        raise ValueError(f"{inputs} inputs do not divide into groups of {group}")
    panel = max(panel // group, 1) * group
    own = zero_places(weight)
    panels = [(start, min(start + panel, inputs)) for start in range(0, inputs, panel)]
    shares: list[int] = []
    if pruned is not None:
        least = [0 if own is None else int(own[:, start:end].sum()) for start, end in panels]
        sizes = torch.tensor([end - start for start, end in panels])
        shares = even_shares(pruned, torch.tensor(least), sizes).tolist()
    for index, (start, end) in enumerate(panels):
        part, corner = work[:, start:end], factor[start:end, start:end]
        scale = corner.diagonal()
        if pruned is not None:
            price = (part / scale).square()
            if factors is not None:
                price *= factors.unsqueeze(1)
            zero = None if own is None else own[:, start:end]
            mask[:, start:end] = unstructured_mask(price, shares[index], "layer", zero)
        errors = torch.empty_like(part)
        for j in range(end - start):
            if pattern is not None and j % group == 0:
                now = (part[:, j : j + group] / scale[j : j + group]).square()
                at = slice(start + j, start + j + group)
                mask[:, at] = nm_mask(now, *pattern, None if own is None else own[:, at])
            errors[:, j] = part[:, j] * mask[:, start + j] / scale[j]
            part[:, j:].addr_(errors[:, j], corner[j, j:], alpha=-1)
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return mask, work.masked_fill_(mask, 0.0), damping


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
    if not bool(gram.isfinite().all()):
        return None
    mean = gram.diagonal().mean()
    for damping in dampings:
        damped = gram.clone()
        damped.diagonal().mul_(1 + shrinkage).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(upper.isfinite().all()):
                return upper, damping
    return None
