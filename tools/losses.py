"""What follows from the mean losses of windows, without a model."""

import math
from collections.abc import Mapping, Sequence

from prunewright.state.step import DomainMeasure


def perplexity(losses: list[float]) -> float:
    """exp of the mean loss; inf where that overflows or a loss is not finite."""
    mean = sum(losses) / len(losses)
    try:
        return math.exp(mean) if math.isfinite(mean) else math.inf
    except OverflowError:
        return math.inf


def change_with_error(before: list[float], after: list[float]) -> tuple[float, float | None]:
    """Relative perplexity change and its standard error, paired over the windows.

    The error is that of the mean of the windows' loss differences, carried to the relative
    change by its derivative. It is None for one window, which has none, and where it is not finite.
    The change is inf where it overflows.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    try:
        change, slope = math.expm1(mean), math.exp(mean)
    except OverflowError:
        return math.inf, None
    if n == 1:
        return change, None
    error = slope * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return change, error if math.isfinite(error) else None


def by_domain(domains: Sequence[str], losses: list[float]) -> dict[str, list[float]]:
    """The losses of each domain's windows, which take turns; none where there are no domains.

    Args:
        domains: their names, in order.
        losses: of windows, from the first on.
    """
    return {name: losses[turn :: len(domains)] for turn, name in enumerate(domains)}


def perplexities(domains: Sequence[str], losses: list[float]) -> dict[str, float]:
    """The `perplexity` of each domain, as `by_domain` tells them apart."""
    return {name: perplexity(found) for name, found in by_domain(domains, losses).items()}


def measures(
    domains: Sequence[str],
    dense: Mapping[str, float],
    before: list[float],
    after: list[float],
) -> dict[str, DomainMeasure]:
    """How each domain fared in a step.

    Args:
        domains: their names, in order.
        dense: the dense model's perplexity, by domain.
        before: the accepted revision's loss on each guard window, nats a token.
        after: the candidate's; empty if it was not evaluated, or is not finite.
    """
    found, candidate = {}, by_domain(domains, after)
    for name, losses in by_domain(domains, before).items():
        measure = DomainMeasure(dense=dense[name], before=perplexity(losses))
        if after:
            change, stderr = change_with_error(losses, candidate[name])
            value = perplexity(candidate[name])
            told = {"candidate": value, "change": change, "change_stderr": stderr}
            finite = {k: v for k, v in told.items() if v is not None and math.isfinite(v)}
            measure = measure.model_copy(update=finite)
        found[name] = measure
    return found
