"""What measured steps teach about predicted costs, against costs whose truth is known."""

import math
import random

import numpy as np
import pytest
from records import record

from prunewright.graph.correction import (
    DEPTHS,
    Correction,
    correct,
    depth_of,
    predicted_costs,
)
from prunewright.state import LayerProfile, ModelProfile, StepRecord


def step(costs: dict[str, float], rise: float | None, stderr: float = 1e-4) -> StepRecord:
    """A measured step; ``rise`` is that of the mean loss, nats."""
    change = None if rise is None else math.expm1(rise)
    return record(change=change, change_stderr=stderr, predicted_costs=costs)


def test_without_measured_steps_nothing_is_corrected() -> None:
    for records in ([], [step({"up@early": 0.1}, None)], [step({}, 0.1)]):
        found = correct(records)
        assert found == Correction()
        assert found.factor("up", "early") == 1.0


def test_one_step_sets_the_overall_ratio_alone() -> None:
    found = correct([step({"up@early": 0.01, "down@late": 0.01}, 0.03)])
    assert found.overall[0] == pytest.approx(1.5)
    assert found.factor("up", "early") == pytest.approx(1.5)
    assert found.factor("never", "seen") == pytest.approx(1.5)


def test_the_true_factors_are_found_from_varied_steps() -> None:
    """Steps of one kind of layer at a time tell what each kind really costs."""
    kinds, middle = {"q": 0.6, "up": 1.0, "down": 1.5}, 0.8
    records = []
    for kind, truth in kinds.items():
        for depth, slope in zip(DEPTHS, (0.2, 0.0, -0.2), strict=True):
            records.append(step({f"{kind}@{depth}": 0.02}, 0.02 * middle * (truth + slope)))
    found = correct(records)
    for kind, truth in kinds.items():
        for depth, slope in zip(DEPTHS, (0.2, 0.0, -0.2), strict=True):
            assert found.factor(kind, depth) == pytest.approx(middle * (truth + slope), rel=0.05)


def test_it_is_the_ridge_regression_that_it_says() -> None:
    """Against the same posterior found by least squares on stacked equations."""
    draw = random.Random(0)
    cells = [f"{p}@{d}" for p in ("q", "up") for d in DEPTHS]
    records = [
        step({c: draw.uniform(0.001, 0.02) for c in cells}, draw.uniform(0.01, 0.1), 0.003)
        for _ in range(5)
    ]
    y = np.array([math.log1p(r.change or 0) for r in records])
    totals = np.array([sum(r.predicted_costs.values()) for r in records])
    c = y.sum() / totals.sum()
    rows, right = [], []
    for measured, rise, total in zip(records, y, totals, strict=True):
        sigma = math.hypot(0.003, 0.1 * c * total)
        q, up = (sum(v for k, v in measured.predicted_costs.items() if k[:-5].startswith(p))
                 for p in ("q", "up"))  # fmt: skip
        by_depth = [
            sum(v for k, v in measured.predicted_costs.items() if k.endswith(f"@{d}"))
            for d in DEPTHS
        ]
        rows.append([c * value / sigma for value in (q, up, *by_depth)])
        right.append((rise - c * total) / sigma)
    rows += (np.eye(5) / 0.5).tolist()
    u = np.linalg.lstsq(np.array(rows), np.array(right + [0.0] * 5), rcond=None)[0]
    found = correct(records)
    assert [v - 1 for v, _ in found.projections.values()] == pytest.approx(u[:2], abs=1e-9)
    assert [v - 1 for v, _ in found.depths.values()] == pytest.approx(u[2:], abs=1e-9)


def test_a_factor_stays_within_four_times_of_the_overall_one() -> None:
    found = Correction((0.5, 0.1), {"a": (-3.0, 1.0), "b": (9.0, 1.0)}, {})
    assert (found.factor("a", "early"), found.factor("b", "late")) == (0.125, 2.0)


def test_costs_by_projection_and_depth_add_up_to_the_predicted_change() -> None:
    layers = [
        LayerProfile(
            name=f"m.{block}.{kind}",
            block=block,
            projection=kind,
            parameters=100,
            sparsity=0.3,
            s=0,
            g=0,
            loss_cost=(0.01 * (block + 1), 0.03, 0.06 + block),
            regrow_gain=(0.002, 0.004, 0.005),
            z_s=0,
            z_g=0,
            z_c=0,
        )
        for block in range(5)
        for kind in ("q", "up")
    ]
    profile = ModelProfile(revision="r", gradient_revision="r", layers=layers)
    deltas = {"m.0.q": 0.05, "m.1.q": 0.05, "m.4.q": -0.10, "m.4.up": 0.10}
    costs = predicted_costs(deltas, profile)
    assert costs == pytest.approx({"q@early": 0.03, "q@late": -0.004, "up@late": 0.03})
    total = math.log1p(profile.predicted_change(deltas))
    assert sum(costs.values()) == pytest.approx(total)
    assert [depth_of(b, 5) for b in range(5)] == ["early", "early", "middle", "middle", "late"]
