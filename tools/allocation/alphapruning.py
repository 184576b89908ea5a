"""AlphaPruning (arXiv 2410.10912): blocks whose spectra have lighter tails are pruned more."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from prunewright.state import InputError
from prunewright.state.config import Options
from prunewright.tools.allocation.blocks import block_counts, by_block
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress, told

_SPREAD = {"magnitude": 0.5, "sparsegpt": 0.2}
"""eps by criterion in the authors' scripts for Llama-2-7B; Wanda's, 0.3, for all others."""


class AlphaPruningOptions(Options):
    """AlphaPruning's one number."""

    eps: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="spread: factors run from 1 - eps to 1 + eps; null: 0.5 for magnitude, "
        "0.2 for sparsegpt, else 0.3",
    )


def allocate(
    bench: Workbench, options: AlphaPruningOptions, progress: Progress | None = None
) -> Allotment:
    """One sparsity a block, higher where its layers' mean power-law exponent is larger.

    Needs no data.

    Raises:
        InputError: a layer's spectrum has no exponent.
    """
    eps = options.eps if options.eps is not None else _SPREAD.get(bench.request.criterion, 0.3)
    blocks = by_block(bench.loaded)
    alphas = {}
    for block, layers in told("allocation", blocks.items(), len(blocks), progress):
        found = []
        for layer, dense in zip(layers, bench.loaded.dense_layers(layers), strict=True):
            for matrix in dense.reshape(-1, *dense.shape[-2:]):
                if not bool(matrix.any()):
                    continue  # nothing is left to prune in it
                alpha = hill_exponent(matrix)
                if alpha is None:
                    raise InputError(
                        f"alphapruning cannot rate {layer.name}: the upper half of its spectrum is "
                        "flat or zero, so it has no power-law exponent; use another allocation"
                    )
                found.append(alpha)
        if found:
            alphas[block] = sum(found) / len(found)
    # A block of zeros alone is rated as the others on average: it stays as it is.
    mean = sum(alphas.values()) / len(alphas)
    alphas = {block: alphas.get(block, mean) for block in blocks}
    sizes = {block: sum(ly.numel for ly in layers) for block, layers in blocks.items()}
    wanted = alpha_sparsities(alphas, sizes, bench.request.target, eps)
    allotted = block_counts(bench, wanted)
    least, most = min(alphas, key=alphas.__getitem__), max(alphas, key=alphas.__getitem__)
    words = (
        f"AlphaPruning, eps {eps:g}: mean exponents from {alphas[least]:.3f} (block {least}) to "
        f"{alphas[most]:.3f} (block {most}); sparsities wanted from {min(wanted.values()):.3f} to "
        f"{max(wanted.values()):.3f}"
    )
    return Allotment(allotted.counts, [words, *allotted.notes])


def hill_exponent(matrix: Tensor) -> float | None:
    """alpha of a matrix: the Hill estimate on the upper half of its eigenvalues.

    With e_1 <= ... <= e_N the squared singular values, k = N/2 and n = N - k:
    alpha = 1 + n / sum_{i >= k} ln(e_i / e_k), counted from 0. The median eigenvalue as the
    threshold is the paper's choice. Rows and columns of zeros alone are left out: they would make
    the median zero.

    Args:
        matrix: weights [outputs, inputs] or transposed.

    Returns:
        The exponent; None where e_k is 0, no eigenvalue is above it, or all weights are zero.
    """
    matrix = matrix.float().cpu()
    matrix = matrix[matrix.any(dim=1)][:, matrix.any(dim=0)]
    if not matrix.numel():
        return None
    values = torch.linalg.svdvals(matrix).double().square().sort().values
    upper = values[len(values) // 2 :]
    logs = (upper / upper[0]).log().sum()
    return 1 + len(upper) / float(logs) if bool(logs.isfinite()) and float(logs) > 0 else None


def alpha_sparsities(
    alphas: Mapping[int, float], sizes: Mapping[int, int], target: float, eps: float
) -> dict[int, float]:
    """s = r * target * sum P / sum (P r), r linear in alpha from 1 - eps to 1 + eps, by block.

    P are the sizes. Blocks with equal exponents are pruned alike.
    """
    low, high = min(alphas.values()), max(alphas.values())
    if low == high:
        return dict.fromkeys(alphas, target)
    factors = {b: (a - low) / (high - low) * 2 * eps + (1 - eps) for b, a in alphas.items()}
    scale = sum(sizes.values()) / sum(sizes[b] * factor for b, factor in factors.items())
    return {block: factor * target * scale for block, factor in factors.items()}
