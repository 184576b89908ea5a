"""The rollback guard and the termination, against their definitions."""

import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunewright.graph.routing import (
    guard_reason,
    returned,
    route_guard,
    route_termination,
    termination,
)
from prunewright.state import STATUS_WORDS, PruneState
from prunewright.state.config import GuardOptions
from prunewright.state.run import Best, Status

PERPLEXITIES = st.floats(1.0, 1e300)


@given(accepted=PERPLEXITIES, candidate=PERPLEXITIES, bound=st.floats(1e-6, 10))
def test_a_candidate_goes_exactly_if_it_rises_by_more_than_the_bound(
    accepted: float, candidate: float, bound: float
) -> None:
    reason = guard_reason(accepted, candidate, accepted, GuardOptions(max_increase=bound))
    assert bool(reason) == ((candidate - accepted) / accepted > bound)


@given(
    dense=st.floats(1, 1e6),
    accepted=st.floats(1, 1e6),
    candidate=st.floats(1, 1e6),
    total=st.floats(0.01, 5),
)
def test_the_total_bound_counts_from_the_dense_model(
    dense: float, accepted: float, candidate: float, total: float
) -> None:
    guard = GuardOptions(max_increase=1e9, max_total_increase=total)
    reason = guard_reason(accepted, candidate, dense, guard)
    assert bool(reason) == ((candidate - dense) / dense > total)
    assert not reason or "over the dense model" in reason


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_a_perplexity_that_is_not_finite_goes_whatever_the_bounds(value: float) -> None:
    guard = GuardOptions(max_increase=1e300)
    assert "not finite" in guard_reason(20.0, value, 20.0, guard)


def test_the_reason_names_the_rise_and_the_bound() -> None:
    reason = guard_reason(20.0, 25.0, 20.0, GuardOptions(max_increase=0.15))
    assert "25.0%" in reason
    assert "15.0%" in reason


@pytest.mark.parametrize(
    ("rise", "bound", "words"),
    [
        (0.0006, 0.0005, "by 0.06% over the last accepted revision, more than 0.05%"),
        (0.003, 0.0005, "by 0.30% over the last accepted revision, more than 0.05%"),
        (0.150004, 0.15, "by 15.0004% over the last accepted revision, more than 15.0000%"),
        (0.2, 1 / 7, "by 20.00000000% over the last accepted revision, more than 14.28571429%"),
    ],
)
def test_the_rise_and_the_bound_can_be_told_apart(rise: float, bound: float, words: str) -> None:
    reason = guard_reason(20.0, 20.0 * (1 + rise), 20.0, GuardOptions(max_increase=bound))
    assert reason == f"perplexity rose {words}"
    total = GuardOptions(max_increase=1e6, max_total_increase=bound)
    over_dense = words.replace("last accepted revision", "dense model")
    assert guard_reason(19.9, 20.0 * (1 + rise), 20.0, total) == f"perplexity rose {over_dense}"


def test_each_domain_is_bounded_though_the_whole_holds() -> None:
    domains = {"code": (10.0, 9.0), "german": (10.0, 12.0)}
    reason = guard_reason(10.0, 10.4, 10.0, GuardOptions(max_increase=0.15), domains=domains)
    words = "rose by 20.0% over the last accepted revision, more than 15.0%"
    assert reason == f"perplexity of german {words}"
    loose = GuardOptions(max_increase={"code": 1e-6, "german": 0.21})
    assert guard_reason(10.0, 10.4, 10.0, loose, domains=domains) == ""
    with pytest.raises(ValueError, match=r"bounds code, and .* has the domains code, german"):
        guard_reason(10.0, 9.0, 10.0, GuardOptions(max_increase={"code": 1}), domains=domains)


def test_a_fall_is_never_rolled_back() -> None:
    assert guard_reason(20.0, 1.0, 20.0, GuardOptions(max_increase=1e-9)) == ""


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "running"),
        ({"sparsity": 0.4491}, "target_reached"),
        ({"sparsity": 0.4489}, "running"),
        ({"sparsity": 0.45, "steps": 40, "stalls": 3}, "target_reached"),
        ({"steps": 39}, "running"),
        ({"steps": 40}, "max_steps"),
        ({"stalls": 2}, "running"),
        ({"stalls": 3}, "stalled"),
        ({"steps": 40, "stalls": 3}, "stalled"),
        ({"sparsity": 0.45, "done": False}, "running"),
        ({"sparsity": 0.45, "done": False, "steps": 40}, "target_reached"),
        ({"sparsity": 0.4495, "cut": True}, "running"),
        # Once the target was reached: at it, and below it on the way back.
        ({"sparsity": 0.45, "done": False, "fruitless": 0}, "running"),
        ({"sparsity": 0.45, "done": False, "fruitless": 1}, "running"),
        ({"sparsity": 0.45, "done": False, "fruitless": 2}, "target_reached"),
        ({"sparsity": 0.45, "fruitless": 0}, "target_reached"),
        ({"sparsity": 0.4, "fruitless": 0}, "running"),
        ({"sparsity": 0.4, "fruitless": 1, "done": False}, "running"),
        ({"sparsity": 0.4, "fruitless": 2}, "target_reached"),
        ({"sparsity": 0.4, "fruitless": 0, "steps": 40}, "target_reached"),
        ({"sparsity": 0.4, "fruitless": 1, "stalls": 3}, "target_reached"),
    ],
)
def test_termination(changes: dict[str, Any], status: str) -> None:
    values: dict[str, Any] = {
        "sparsity": 0.2,
        "target": 0.45,
        "steps": 7,
        "max_steps": 40,
        "stalls": 0,
        "max_stalls": 3,
    }
    assert termination(**(values | changes)) == status


def best(*losses: float, sparsity: float = 0.45, **counts: int) -> Best:
    """A revision at the target with some losses, named by them."""
    return {
        "step": 7,
        "revision": str(losses),
        "sparsity": sparsity,
        "perplexity": math.exp(sum(losses) / len(losses)),
        "losses": list(losses),
        "knowledge": None,
        "returns": counts.get("returns", 0),
        "fruitless": counts.get("fruitless", 0),
    }


@pytest.mark.parametrize(
    ("now", "kept", "fruitless"),
    [
        # Every window fell by the same, which has no error.
        (best(2.9, 3.9, 4.9), True, 0),
        # It fell by 0.1 on average, with an error of 0.1 and a little, or half of that.
        (best(2.7, 3.9, 5.1), True, 2),
        (best(2.8, 3.9, 5.0), True, 0),
        (best(3.0, 4.0, 5.0), False, 2),
        (best(3.1, 4.1, 5.1), False, 2),
        # What is nearer to the target is kept, and what is further from it is not.
        (best(3.1, 4.1, 5.1, sparsity=0.4502), True, 2),
        (best(2.9, 3.9, 4.9, sparsity=0.4498), False, 0),
        (best(2.9, 3.9, 4.9, sparsity=0.44995), True, 0),
    ],
)
def test_what_is_kept_at_the_target(now: Best, kept: bool, fruitless: int) -> None:
    before = best(3.0, 4.0, 5.0, returns=4, fruitless=1)
    assert returned(None, now) == now
    expected = now if kept else before
    assert returned(before, now) == {**expected, "returns": 5, "fruitless": fruitless}


def test_the_bound_on_what_is_forgotten() -> None:
    bound = GuardOptions(max_knowledge_drop=0.5)
    assert guard_reason(20, 20, 20, bound, knowledge=(-2.0, -2.5)) == ""
    assert guard_reason(20, 20, 20, bound, knowledge=(-2.0, -1.0)) == ""
    assert guard_reason(20, 20, 20, bound, knowledge=(-2.0, -2.6)) == (
        "factual recall fell by 0.600 nats a token below the dense model's, more than "
        "guard.max_knowledge_drop 0.5"
    )
    assert "not finite" in guard_reason(20, 20, 20, bound, knowledge=(-2.0, math.nan))
    assert "perplexity rose" in guard_reason(20, 30, 20, bound, knowledge=(-2.0, -9.0))
    assert guard_reason(20, 20, 20, GuardOptions(), knowledge=(-2.0, -9.0)) == ""


def test_the_router_after_evaluate_ppl() -> None:
    assert route_guard(cast(PruneState, {"rollback_reason": "worse"})) == "rollback"
    assert route_guard(cast(PruneState, {"rollback_reason": ""})) == "reflect"


@pytest.mark.parametrize("status", STATUS_WORDS)
def test_the_router_after_reflect_goes_on_only_while_running(status: Status) -> None:
    goes_on = route_termination(cast(PruneState, {"status": status})) == "profile"
    assert goes_on == (status == "running")
