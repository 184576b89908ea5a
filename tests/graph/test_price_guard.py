"""The guard by price, against numbers worked out by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import record

from prunewright.graph.routing import Price, guard_reason, step_price
from prunewright.state import StepRecord
from prunewright.state.config import GuardOptions
from prunewright.state.history import Verdict


def step(
    rise: float | None,
    predicted: float,
    error: float = 0.0,
    verdict: Verdict = "accepted",
    reason: str = "",
) -> StepRecord:
    """A step whose mean loss rose by ``rise`` nats with a standard error, as it is recorded."""
    return record(
        verdict=verdict,
        reason=reason,
        predicted_costs={"mlp.up_proj@early": predicted},
        candidate_perplexity=None if rise is None else 20.0 * math.exp(rise),
        change=None if rise is None else math.expm1(rise),
        change_stderr=None if rise is None else math.exp(rise) * error,
        predicted_change=math.expm1(predicted),
    )


def verdict_on(
    rise: float,
    predicted: float,
    history: list[StepRecord],
    error: float = 0.0,
    max_price: float | None = 2.0,
) -> str:
    """The guard's reason for a step, with no other bound."""
    change = (math.expm1(rise), math.exp(rise) * error)
    guard = GuardOptions(max_increase=1e9, max_price=max_price)
    price = step_price(change, predicted, history)
    return guard_reason(20.0, 20.0 * math.exp(rise), 20.0, guard, price)


# Twice the correction times the prediction, and a rise on either side of it.
CASES: dict[str, tuple[list[StepRecord], float, float]] = {
    "no history: 2 * 0.01": ([], 0.01, 0.020),
    "twice as dear so far: 2 * (0.06 / 0.03) * 0.01": (
        [step(0.02, 0.01), step(0.04, 0.02)],
        0.01,
        0.040,
    ),
    "half as dear so far: 2 * (0.03 / 0.06) * 0.01": (
        [step(0.01, 0.02), step(0.02, 0.04)],
        0.01,
        0.010,
    ),
    "sums, not the mean of ratios: 2 * (0.101 / 0.11) * 0.01": (
        [step(0.001, 0.01), step(0.1, 0.1)],
        0.01,
        2 * 0.101 / 0.11 * 0.01,
    ),
    "rolled-back and empty steps teach nothing": (
        [step(0.9, 0.01, verdict="rolled_back"), step(None, 0.5, verdict="empty")],
        0.01,
        0.020,
    ),
    "nor do steps that were predicted to cost nothing": (
        [step(0.01, 0.01), step(0.09, -0.03), step(0.05, 0.0)],
        0.01,
        0.020,
    ),
    "a history within its noise teaches nothing": (
        # 0.003 of rise with an error of 0.005 (3-4-5): within twice that.
        [step(0.002, 0.02, 0.003), step(0.001, 0.02, 0.004)],
        0.01,
        0.020,
    ),
    "a history that fell teaches nothing": ([step(-0.01, 0.01)], 0.01, 0.020),
    "one above its noise does: 2 * (0.012 / 0.04) * 0.01": (
        [step(0.006, 0.02, 0.003), step(0.006, 0.02, 0.004)],
        0.01,
        0.006,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_the_corrected_prediction_times_max_price(name: str) -> None:
    history, predicted, bound = CASES[name]
    assert verdict_on(bound * 1.001, predicted, history) != ""
    assert verdict_on(bound * 0.999, predicted, history) == ""


def test_twice_the_noise_of_the_guard_is_granted() -> None:
    assert verdict_on(0.0301, 0.01, [], error=0.005) != ""
    assert verdict_on(0.0299, 0.01, [], error=0.005) == ""


@pytest.mark.parametrize("predicted", [0.0, -0.02])
def test_a_step_that_is_predicted_to_cost_nothing_has_no_price(predicted: float) -> None:
    assert verdict_on(0.5, predicted, []) == ""


def test_without_max_price_no_price_is_too_high() -> None:
    assert verdict_on(5.0, 1e-6, [], max_price=None) == ""


def test_the_reason_says_what_it_cost_what_was_predicted_and_the_bound() -> None:
    reason = verdict_on(0.031, 0.0045, [step(0.02, 0.01)], error=0.002)
    assert reason == (
        "the loss rose by 0.031 (noise 0.002), 3.44 times the 0.009 predicted for it after "
        "correction: more than guard.max_price 2"
    )


def test_the_other_bounds_come_first() -> None:
    guard = GuardOptions(max_increase=0.15, max_price=2.0)
    price = Price(measured=math.log(1.5), error=0.0, predicted=0.01)
    assert "last accepted revision" in guard_reason(20.0, 30.0, 20.0, guard, price)


@given(
    rise=st.floats(-700, 700),
    error=st.floats(0, 10),
    predicted=st.floats(-1, 10),
    history=st.lists(st.tuples(st.floats(-700, 700), st.floats(-1, 10), st.floats(0, 10))),
)
def test_whatever_was_measured_the_price_is_finite_and_a_fall_is_accepted(
    rise: float, error: float, predicted: float, history: list[Any]
) -> None:
    records = [step(*values) for values in history]
    change = (math.expm1(rise), math.exp(rise) * error)
    price = step_price(change, predicted, records)
    assert math.isfinite(price.measured + price.error + price.predicted)
    assert price.predicted * predicted >= 0
    if rise <= 0:
        assert verdict_on(rise, predicted, records, error) == ""
