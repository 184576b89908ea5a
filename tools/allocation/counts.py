"""From sparsities to whole weights: the one place where an allocation meets its total."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Allotment:
    """What an allocation came to.

    Attributes:
        counts: zeros that each layer shall have.
        notes: what was chosen on the way, for the trace.
    """

    counts: dict[str, int]
    notes: list[str]


def total_count(target: float, sizes: Mapping[str, int], ceiling: float) -> int:
    """Weights to prune in all: the target's, or all that the layers may give, if that is less."""
    return min(
        math.floor(target * sum(sizes.values())),
        sum(math.floor(ceiling * size) for size in sizes.values()),
    )


def exact_counts(
    sparsities: Mapping[str, float], sizes: Mapping[str, int], target: float, ceiling: float
) -> Allotment:
    """Zeros of each layer for some wanted sparsities, with exactly the target's total.

    All sparsities are moved by one and the same amount, each then clamped to [0, ceiling], so
    that the parameter-weighted mean is the target; what rounding down loses goes, one weight
    each, to the layers that lost most, in the order given where equal.

    Args:
        sparsities: wanted of each layer; any finite number.
        sizes: weights of each layer.
        target: sparsity over all of them, at most the ceiling.
        ceiling: of any one layer.

    Returns:
        Counts that add up to `total_count`, and a note if a layer was clamped.
    """
    total = total_count(target, sizes, ceiling)
    caps = {name: math.floor(ceiling * size) for name, size in sizes.items()}

    def moved(shift: float) -> dict[str, float]:
        return {
            name: min(max((sparsities[name] + shift) * size, 0.0), caps[name])
            for name, size in sizes.items()
        }

    low = -max(sparsities.values())  # nothing is pruned
    high = ceiling - min(sparsities.values())  # as much as may be
    for _ in range(100):
        middle = (low + high) / 2
        if math.fsum(moved(middle).values()) <= total:
            low = middle
        else:
            high = middle
    shares = moved(low)
    counts = {name: math.floor(share) for name, share in shares.items()}
    left = total - sum(counts.values())
    while left > 0:
        open_layers = [name for name in counts if counts[name] < caps[name]]
        open_layers.sort(key=lambda name: counts[name] - shares[name])
        for name in open_layers[:left]:
            counts[name] += 1
            left -= 1
    bounds = [(sparsities[name] + low, ceiling) for name in sizes]
    clamped = sum(wanted < 0 or wanted > most for wanted, most in bounds)
    notes = []
    if clamped:
        notes.append(
            f"{clamped} of {len(sizes)} layers were held at a sparsity of 0 or of {ceiling:g}; "
            f"the others were moved by {low:+.4f} to keep the total"
        )
    return Allotment(counts, notes)
