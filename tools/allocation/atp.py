"""ATP (arXiv 2502.14770): sparsity rises with depth in an arithmetic progression."""

from pydantic import Field

from prunewright.state.config import Options
from prunewright.state.run import DENSE
from prunewright.tools.allocation.blocks import block_counts
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.losses import perplexity
from prunewright.tools.model.head import Progress


class AtpOptions(Options):
    """The common difference, or how it is looked for."""

    beta: float | None = Field(
        None, ge=0, description="what each block is sparser than the one before; null: by trials"
    )
    trials: int = Field(
        6, ge=2, le=100, description="values from 0 to half of the largest legal one that are tried"
    )


def allocate(bench: Workbench, options: AtpOptions, progress: Progress | None = None) -> Allotment:
    """The progression whose difference has the lowest perplexity on the guard windows.

    The grid stops at half of the largest legal difference: beyond it the first blocks would be
    nearly dense and the last nearly empty. 0, the uniform allocation, is among the trials.
    """
    request = bench.request
    depth = max(layer.block for layer in bench.loaded.layers.values()) + 1

    def progression(beta: float) -> Allotment:
        return block_counts(bench, dict(enumerate(atp_sparsities(depth, request.target, beta))))

    if options.beta is not None:
        found = progression(options.beta)
        return Allotment(found.counts, [f"ATP, beta {options.beta:g} as given", *found.notes])
    most = largest_beta(depth, request.target) / 2
    tried: dict[float, float] = {}
    for index in range(options.trials):
        beta = most * index / (options.trials - 1)
        if beta in tried:  # a single block has no progression
            continue
        losses = bench.trial_losses(
            DENSE,
            DENSE,
            progression(beta).counts,
            progress=progress,
            use="allocation",
        )
        tried[beta] = perplexity(losses)
        if progress is not None:
            progress("allocation", index + 1, options.trials)
    best = min(tried, key=lambda beta: (tried[beta], beta))
    found = progression(best)
    values = ", ".join(f"{beta:.5f}: {value:.3f}" for beta, value in tried.items())
    words = f"ATP, beta {best:.5f}, by guard perplexity of {len(tried)} trials ({values})"
    return Allotment(found.counts, [words, *found.notes])


def atp_sparsities(depth: int, target: float, beta: float) -> list[float]:
    """s_i = target - beta (depth - 1) / 2 + beta i, for each block i."""
    return [target - beta * (depth - 1) / 2 + beta * index for index in range(depth)]


def largest_beta(depth: int, target: float) -> float:
    """The difference at which the first block is dense or the last one empty."""
    return min(2 * target, 2 * (1 - target)) / (depth - 1) if depth > 1 else 0.0
