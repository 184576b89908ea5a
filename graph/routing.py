"""The two decisions of the graph: the rollback guard and the termination."""

import math
from typing import Literal

from prunewright.state import PruneState
from prunewright.state.config import GuardOptions
from prunewright.state.schema import Status

TOLERANCE = 0.001
"""Distance from the target sparsity that counts as reached."""


def guard_reason(accepted: float, candidate: float, dense: float, guard: GuardOptions) -> str:
    """Why a candidate is rolled back; "" if it is accepted.

    Args:
        accepted: guard perplexity of the last accepted revision.
        candidate: of the candidate.
        dense: of the dense model.
        guard: the bounds.
    """
    if not math.isfinite(candidate):
        return "the perplexity is not finite"
    change = (candidate - accepted) / accepted
    if change > guard.max_increase:
        return (
            f"perplexity rose by {change:.1%} over the last accepted revision, "
            f"more than {guard.max_increase:.1%}"
        )
    total = (candidate - dense) / dense
    if guard.max_total_increase is not None and total > guard.max_total_increase:
        return (
            f"perplexity rose by {total:.1%} over the dense model, "
            f"more than {guard.max_total_increase:.1%}"
        )
    return ""


def termination(
    *, sparsity: float, target: float, steps: int, max_steps: int, stalls: int, max_stalls: int
) -> Status:
    """Whether the run goes on after a step, and if not, why."""
    if sparsity >= target - TOLERANCE:
        return "target_reached"
    if stalls >= max_stalls:
        return "stalled"
    return "max_steps" if steps >= max_steps else "running"


def route_guard(state: PruneState) -> Literal["rollback", "reflect"]:
    """After evaluate_ppl: drop the candidate or go on with it."""
    return "rollback" if state["rollback_reason"] else "reflect"


def route_termination(state: PruneState) -> Literal["profile", "__end__"]:
    """After reflect: another step, or the end."""
    return "profile" if state["status"] == "running" else "__end__"
