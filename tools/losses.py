"""What follows from the mean losses of windows, without a model."""

import math


def perplexity(losses: list[float]) -> float:
    """exp of the mean loss; inf where that overflows or a loss is not finite."""
    mean = sum(losses) / len(losses)
    try:
        return math.exp(mean) if math.isfinite(mean) else math.inf
    except OverflowError:
        return math.inf


def change_with_error(before: list[float], after: list[float]) -> tuple[float, float]:
    """Relative perplexity change and its standard error, paired over the windows.

    The error is that of the mean of the windows' loss differences, carried to the relative
    change by its derivative. Both are inf where the change overflows.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n) if n > 1 else 0.0
    try:
        return math.expm1(mean), math.exp(mean) * spread
    except OverflowError:
        return math.inf, math.inf
