"""What earlier steps teach about the predicted costs: factors by projection and by depth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prunewright.state import LayerProfile, ModelProfile, StepRecord

DEPTHS = ("early", "middle", "late")
"""The thirds of a model's blocks."""
SPREAD = 0.5
"""How far a group's factor is believed to lie from the overall one: relative, one sigma."""
MISFIT = 0.1
"""Relative error of a measured step beside its noise: what no factor by group explains."""


@dataclass(frozen=True)
class Correction:
    """Measured over predicted cost, each with its standard error.

    Attributes:
        overall: of all measured steps together; (1, 0) without any.
        projections: factor of each projection relative to ``overall``.
        depths: factor of each third of the blocks relative to ``overall``.
    """

    overall: tuple[float, float] = (1.0, 0.0)
    projections: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    depths: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def factor(self, projection: str, depth: str) -> float:
        """Measured over predicted cost expected of a layer; within 4 times of the overall one."""
        unknown = (1.0, 0.0)
        own = self.projections.get(projection, unknown)[0]
        relative = own + self.depths.get(depth, unknown)[0] - 1
        return self.overall[0] * min(max(relative, 0.25), 4.0)


def depth_of(block: int, blocks: int) -> str:
    """Which third of the model a block lies in."""
    return DEPTHS[min(3 * block // max(blocks, 1), 2)]


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


def correct(records: Sequence[StepRecord]) -> Correction:
    """Factors from the measured steps, rolled-back ones included.

    Each step gives one equation: its measured rise of the loss, y = log(1 + change), is the sum
    over its cells of predicted cost times overall * (1 + u_projection + v_depth). Solved as a
    ridge regression: u and v are Gaussian around 0 with `SPREAD`, an equation's error is its
    noise on the guard and `MISFIT`.
    """
    steps = [r for r in records if r.change is not None and sum(r.predicted_costs.values()) > 0]
    if not steps:
        return Correction()
    measured = np.array([math.log1p(r.change or 0.0) for r in steps])
    totals = np.array([sum(r.predicted_costs.values()) for r in steps])
    overall = max(float(measured.sum() / totals.sum()), 0.05)
    noise = np.array([r.change_stderr or 0.0 for r in steps])
    overall_error = float(np.sqrt((noise**2).sum()) / totals.sum())
    projections = sorted({cell.rpartition("@")[0] for r in steps for cell in r.predicted_costs})
    columns = [*projections, *DEPTHS]
    design = np.zeros((len(steps), len(columns)))
    for row, record in zip(design, steps, strict=True):
        for cell, cost in record.predicted_costs.items():
            projection, _, depth = cell.rpartition("@")
            row[projections.index(projection)] += overall * cost
            row[len(projections) + DEPTHS.index(depth)] += overall * cost
    sigma = np.sqrt(noise**2 + (MISFIT * overall * totals) ** 2) + 1e-12
    scaled = design / sigma[:, None]
    normal = scaled.T @ scaled + np.eye(len(columns)) / SPREAD**2
    covariance = np.linalg.inv(normal)
    found = covariance @ (scaled.T @ ((measured - overall * totals) / sigma))
    errors = np.sqrt(np.diag(covariance))
    pairs = [(1.0 + float(u), float(e)) for u, e in zip(found, errors, strict=True)]
    count = len(projections)
    return Correction(
        (overall, overall_error),
        dict(zip(projections, pairs[:count], strict=True)),
        dict(zip(DEPTHS, pairs[count:], strict=True)),
    )
