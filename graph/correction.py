"""What earlier steps came to for what was predicted of them, by projection and by depth."""

import math
from collections.abc import Mapping, Sequence

from prunewright.state import LayerProfile, ModelProfile, Step

DEPTHS = ("early", "middle", "late")
"""The thirds of a model's blocks."""
ALL = "all"
EXCHANGED = 1 / 3
"""Least part of all costs that a step moved which their sum must be, so that it tells anything.

What an exchange takes and restores nearly cancels, and what is left is no measure of either.
"""

_Ratio = tuple[float, float, float]
"""Of a step: what it was predicted to cost, its ratio, and the noise of that."""


def depth_of(block: int, blocks: int) -> str:
    """Which third of the model a block lies in."""
    return DEPTHS[min(3 * block // max(blocks, 1), 2)]


def spans(blocks: int) -> dict[str, str]:
    """The first and the last block of each third that has any: ``0-11``."""
    held = {d: [b for b in range(blocks) if depth_of(b, blocks) == d] for d in DEPTHS}
    return {depth: f"{found[0]}-{found[-1]}" for depth, found in held.items() if found}


def depths_of(profile: ModelProfile) -> dict[str, str]:
    """The third of the model that each layer lies in."""
    blocks = 1 + max((p.block for p in profile.layers), default=0)
    return {p.name: depth_of(p.block, blocks) for p in profile.layers}


def predicted_costs(deltas: Mapping[str, float], profile: ModelProfile) -> dict[str, float]:
    """Predicted rise of the mean token loss, nats, of a step: by ``projection@depth``."""
    depths = depths_of(profile)
    layers: dict[str, LayerProfile] = {p.name: p for p in profile.layers}
    costs: dict[str, float] = {}
    for name, delta in deltas.items():
        cell = f"{layers[name].projection}@{depths[name]}"
        costs[cell] = costs.get(cell, 0.0) + layers[name].cost_of(delta)
    return costs


def ratios(records: Sequence[Step]) -> dict[str, tuple[float, float]]:
    """Measured over predicted cost with its standard error: of all steps, and of kinds of layers.

    A step's ratio is its measured rise of the loss, log(1 + change), over what was predicted. A
    kind of layers has the mean of them, weighted by what the step predicted for that kind. The
    error is the larger of the guard's noise and what the spread between all steps makes of the mean
    of so few. A step says what all its layers cost together, so a kind that few steps touched takes
    the spread from the others.

    Returns:
        By `ALL`, projection and depth; empty without a measured step that was predicted to cost
        something. Rolled-back steps count, exchanges do not.
    """
    weights: dict[str, list[_Ratio]] = {}
    for record in filter(_tells, records):
        total = sum(record.predicted_costs.values())
        assert record.change is not None
        ratio, noise = math.log1p(record.change) / total, (record.change_stderr or 0.0) / total
        shares = {ALL: total}
        for cell, cost in record.predicted_costs.items():
            for kind in cell.rsplit("@", 1):
                shares[kind] = shares.get(kind, 0.0) + cost
        for kind, share in shares.items():
            if share > 0:  # a kind that was restored says nothing of what taking costs
                weights.setdefault(kind, []).append((share, ratio, noise))
    spread = _spread(weights.get(ALL, []))
    return {kind: _mean(steps, spread) for kind, steps in weights.items()}


def domain_ratios(records: Sequence[Step]) -> dict[str, tuple[float, float]]:
    """As `ratios`, by domain of the guard's text: of all steps whose cost was predicted there."""
    weights: dict[str, list[_Ratio]] = {}
    for record in filter(_tells, records):
        for name, total in record.predicted_domains.items():
            measure = record.domains.get(name)
            if measure is None or measure.change is None or total <= 0:
                continue
            ratio, noise = math.log1p(measure.change) / total, (measure.change_stderr or 0) / total
            weights.setdefault(name, []).append((total, ratio, noise))
    return {name: _mean(steps, _spread(steps)) for name, steps in weights.items()}


def _tells(record: Step) -> bool:
    """Whether a step was measured and mostly took weights, so that it has a ratio."""
    costs = record.predicted_costs.values()
    moved = sum(map(abs, costs))
    return record.change is not None and moved > 0 and sum(costs) >= EXCHANGED * moved


def _spread(steps: list[_Ratio]) -> float:
    """Standard deviation of a single step's ratio.

    Each counts by the square of its prediction: the ratio of a step that was to cost next to
    nothing is all noise.
    """
    if len(steps) < 2:
        return 0.0
    mean, _ = _mean(steps, 0.0)
    variance = sum((weight * (ratio - mean)) ** 2 for weight, ratio, _ in steps)
    variance /= sum(weight**2 for weight, _, _ in steps)
    return math.sqrt(variance * len(steps) / (len(steps) - 1))


def _mean(steps: list[_Ratio], spread: float) -> tuple[float, float]:
    """Mean of ratios, weighted by the predictions, and its error.

    Args:
        steps: those of a kind.
        spread: standard deviation of a single step's ratio.
    """
    whole = sum(weight for weight, _, _ in steps)
    mean = sum(weight * ratio for weight, ratio, _ in steps) / whole
    noise = math.sqrt(sum((weight * error) ** 2 for weight, _, error in steps)) / whole
    return mean, max(noise, spread * math.sqrt(sum(w**2 for w, _, _ in steps)) / whole)
