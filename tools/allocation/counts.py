"""From sparsities to whole weights: the one place where an allocation meets its total."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prunewright.tools.counting import most_zeros


@dataclass(frozen=True)
class Allotment:
    """What an allocation came to.

    Attributes:
        counts: zeros that each layer shall have.
        notes: what was chosen on the way, for the trace.
    """

    counts: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class Bounds:
    """What each layer may give: its own zeros at the least, which no mask takes away.

    Attributes:
        sizes: weights of each layer.
        least: zeros that each has in the dense model.
        ceiling: sparsity of any layer that has not more by itself.
    """

    sizes: Mapping[str, int]
    least: Mapping[str, int]
    ceiling: float

    @property
    def most(self) -> dict[str, int]:
        """The most zeros of each layer."""
        return {
            name: max(math.floor(self.ceiling * size), self.least[name])
            for name, size in self.sizes.items()
        }

    def total(self, target: float) -> int:
        """Zeros in all: the target's, or all that the layers may have, if that is less."""
        return min(most_zeros(target, sum(self.sizes.values())), sum(self.most.values()))


def exact_counts(sparsities: Mapping[str, float], bounds: Bounds, target: float) -> Allotment:
    """Zeros of each layer for some wanted sparsities, with exactly the target's total.

    All sparsities are moved by one and the same amount, each then clamped to its bounds, so
    that the parameter-weighted mean is the target; what rounding down loses goes, one weight
    each, to the layers that lost most, in the order given where equal.

    Args:
        sparsities: wanted of each layer; any finite number.
        bounds: of the layers.
        target: sparsity over all of them, at most the ceiling and not below their own zeros.

    Returns:
        Counts that add up to the bounds' total, and a note if a layer was clamped.
    """
    sizes, least, ceiling = bounds.sizes, bounds.least, bounds.ceiling
    total, caps = bounds.total(target), bounds.most

    def moved(shift: float) -> dict[str, float]:
        return {
            name: min(max((sparsities[name] + shift) * size, least[name]), caps[name])
            for name, size in sizes.items()
        }

    low = -max(sparsities.values())  # nothing is pruned further
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
    wanted = {name: sparsities[name] + low for name in sizes}
    clamped = sum(
        wanted[n] * size < least[n] or wanted[n] > max(ceiling, least[n] / size)
        for n, size in sizes.items()
    )
    notes = []
    if clamped:
        floor = "the sparsity of their own zeros" if any(least.values()) else "a sparsity of 0"
        notes.append(
            f"{clamped} of {len(sizes)} layers were held at {floor} or of "
            f"{ceiling:g}; the others were moved by {low:+.4f} to keep the total"
        )
    return Allotment(counts, notes)
