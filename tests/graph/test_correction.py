"""Measured over predicted costs, against ratios worked out by hand."""

import math

import pytest
from records import record

from prunewright.graph.correction import depth_of, predicted_costs, ratios
from prunewright.state import LayerProfile, ModelProfile, Step


def step(costs: dict[str, float], rise: float | None, stderr: float = 1e-4) -> Step:
    """A measured step; ``rise`` is that of the mean loss, nats."""
    change = None if rise is None else math.expm1(rise)
    return record(change=change, change_stderr=stderr, predicted_costs=costs)


def test_without_measured_steps_there_is_no_ratio() -> None:
    for records in ([], [step({"up@early": 0.1}, None)], [step({}, 0.1)]):
        assert ratios(records) == {}


def test_steps_of_one_kind_at_a_time_tell_what_each_kind_costs() -> None:
    records = [
        step({"q@early": 0.02}, 0.01),
        step({"q@late": 0.02}, 0.014),
        step({"up@early": 0.02}, 0.03),
    ]
    found = ratios(records)
    assert {kind: value for kind, (value, _) in found.items()} == pytest.approx(
        {"all": 0.9, "q": 0.6, "up": 1.5, "early": 1.0, "late": 0.7}
    )


def test_a_step_counts_for_a_kind_by_what_it_predicted_of_it() -> None:
    mixed = step({"q@early": 0.03, "up@early": 0.01}, 0.08)  # twice as dear as predicted
    alone = step({"up@early": 0.03}, 0.03)
    found = ratios([mixed, alone])
    assert found["q"][0] == pytest.approx(2.0)
    assert found["up"][0] == pytest.approx((0.01 * 2 + 0.03 * 1) / 0.04)


def test_what_only_gave_weights_back_says_nothing_of_its_kind() -> None:
    found = ratios([step({"q@early": 0.03, "up@late": -0.01}, 0.02)])
    assert set(found) == {"all", "q", "early"}


def test_the_error_is_the_guards_noise_or_the_spread_whichever_is_larger() -> None:
    (value, error) = ratios([step({"q@early": 0.02}, 0.02, stderr=0.004)])["q"]
    assert (value, error) == pytest.approx((1.0, 0.2))
    even = ratios([step({"q@early": 0.02}, 0.02 * r) for r in (0.5, 1.0, 1.5)])["q"]
    # Equal weights: the standard error of the mean of 0.5, 1 and 1.5.
    assert even == pytest.approx((1.0, 0.5 / math.sqrt(3)), rel=1e-3)


def test_a_kind_that_one_step_touched_has_the_spread_of_all_steps() -> None:
    records = [step({"q@early": 0.02}, 0.02 * r) for r in (0.5, 1.0, 1.5)]
    found = ratios([*records, step({"up@late": 0.01}, 0.01)])
    # Two steps were 0.01 nats off what they would cost at the mean, which is 1.
    squares = 3 * 0.02**2 + 0.01**2
    spread = math.sqrt(2 * 0.01**2 / squares * 4 / 3)
    assert found["up"] == pytest.approx((1.0, spread), rel=1e-3)
    assert found["all"][1] == pytest.approx(spread * math.sqrt(squares) / 0.07, rel=1e-3)


@pytest.mark.parametrize(
    "odd",
    [
        step({"up@late": 4e-5}, 0.002),  # the last, tiny part of the way
        step({"up@late": 0.02, "down@late": -0.0199}, 0.004),  # an exchange
        step({"up@late": 0.02, "down@late": -0.02 + 1e-9}, 0.004),
    ],
)
def test_a_step_that_tells_next_to_nothing_spoils_no_ratio(odd: Step) -> None:
    usual = [step({"up@late": 0.01, "down@late": 0.01}, 0.02 * r) for r in (1.0, 1.04, 1.08)]
    before, after = ratios(usual), ratios([*usual, odd])
    assert after.keys() == before.keys()
    for kind, (value, error) in after.items():
        assert value == pytest.approx(before[kind][0], rel=0.1)
        assert error < 0.1


def test_costs_by_projection_and_depth_add_up_to_the_predicted_change() -> None:
    layers = [
        LayerProfile(
            name=f"m.{block}.{kind}",
            block=block,
            projection=kind,
            parameters=100,
            sparsity=0.3,
            loss_cost=(0.01 * (block + 1), 0.03, 0.06 + block),
            regrow_gain=(0.002, 0.004, 0.005),
            signals={"z_s": 0, "z_g": 0, "z_c": 0},
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
