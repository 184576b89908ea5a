"""The two decisions of the graph: the rollback guard and the termination."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from prunewright.state import PruneState
from prunewright.state.config import GuardOptions
from prunewright.state.run import TOLERANCE, Best, Status
from prunewright.state.shown import told_apart
from prunewright.tools.losses import change_with_error


def guard_reason(
    accepted: float,
    candidate: float,
    dense: float,
    guard: GuardOptions,
    knowledge: tuple[float, float] | None = None,
    domains: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """Why a candidate is rolled back; "" if it is accepted.

    Args:
        accepted: guard perplexity of the last accepted revision.
        candidate: of the candidate.
        dense: of the dense model.
        guard: the bounds.
        knowledge: mean log-probability of the right answers by the dense model and by the
            candidate, nats a token, where ``guard.max_knowledge_drop`` bounds its fall.
        domains: perplexity of each domain at the last accepted revision and at the candidate.

    Raises:
        ValueError: ``guard.max_increase`` is a mapping of other domains.
    """
    if not math.isfinite(candidate):
        return "the perplexity is not finite"
    # Where each domain is bounded their mean is, too.
    rises = {name: (after - before) / before for name, (before, after) in domains.items()}
    bounds = guard.bounds(rises)
    if not isinstance(guard.max_increase, dict) and not rises:
        rises, bounds = {"": (candidate - accepted) / accepted}, {"": guard.max_increase}
    worst = max(rises, key=lambda name: rises[name] / bounds[name])
    if rises[worst] > bounds[worst]:
        whose = f"perplexity of {worst}" if worst else "perplexity"
        rise, bound = told_apart(rises[worst], bounds[worst])
        return f"{whose} rose by {rise} over the last accepted revision, more than {bound}"
    total = (candidate - dense) / dense
    if guard.max_total_increase is not None and total > guard.max_total_increase:
        rise, bound = told_apart(total, guard.max_total_increase)
        return f"perplexity rose by {rise} over the dense model, more than {bound}"
    if guard.max_knowledge_drop is not None and knowledge is not None:
        if not math.isfinite(knowledge[1]):
            return "factual recall is not finite"
        drop = knowledge[0] - knowledge[1]
        if drop > guard.max_knowledge_drop:
            fall, _ = told_apart(drop, guard.max_knowledge_drop, "f", 3)
            return (
                f"factual recall fell by {fall} nats a token below the dense model's, more than "
                f"guard.max_knowledge_drop {guard.max_knowledge_drop:g}"
            )
    return ""


NEARER = TOLERANCE / 10
"""Difference of sparsity that decides between two revisions at the target."""
MAX_FRUITLESS = 2
"""Returns to the target in a row that gain nothing, after which a run ends there."""


def at_target(sparsity: float, target: float) -> bool:
    """Whether a sparsity is that of the target, within `TOLERANCE`."""
    return sparsity >= target - min(TOLERANCE, target / 2)


def returned(best: Best | None, now: Best) -> Best:
    """What is kept at the target once an accepted step has ended there.

    It gained if its perplexity is below the best one's by more than the standard error of that
    change, paired over the guard windows; one window has none. The lower perplexity of the two is
    kept, unless one of them is nearer to the target by more than `NEARER`: sparsity that is missing
    is perplexity, too.

    Args:
        best: what was kept before; None if the target was never reached.
        now: the step's revision, its counts 0.
    """
    if best is None:
        return now
    change, error = change_with_error(best["losses"], now["losses"])
    nearer = now["sparsity"] - best["sparsity"]
    lower = now["perplexity"] < best["perplexity"]
    kept = now if nearer > NEARER or (lower and nearer >= -NEARER) else best
    return {
        **kept,
        "returns": best["returns"] + 1,
        "fruitless": 0 if change < -(error or 0.0) else best["fruitless"] + 1,
    }


def termination(
    *,
    sparsity: float,
    target: float,
    steps: int,
    max_steps: int,
    stalls: int,
    max_stalls: int,
    nothing_fits: bool = False,
    done: bool = True,
    cut: bool = False,
    fruitless: int | None = None,
) -> Status:
    """Whether the run goes on after a step, and if not, why.

    Args:
        sparsity: the accepted revision's.
        target: to be reached, within `TOLERANCE`.
        steps: taken so far.
        max_steps: that may be taken.
        stalls: steps just now, in a row, that were rolled back or empty.
        max_stalls: that may be.
        nothing_fits: of a run with an N:M pattern, that no whole layer fits under the target.
        done: what the step's decision says; false goes on at the target while steps are left.
        cut: that the bound of a step alone kept it from the target, so that another one lands.
        fruitless: returns to the target just now, in a row, that gained nothing; None: it was never
            reached. Once it was, a run that ends below it has a revision there to end with.
    """
    out_of_steps, stuck = steps >= max_steps, stalls >= max_stalls
    reached = at_target(sparsity, target) or nothing_fits
    over = out_of_steps or stuck or (fruitless or 0) >= MAX_FRUITLESS
    if over and (reached or fruitless is not None):
        return "target_reached"
    if reached and done and not cut:
        return "target_reached"
    if stuck:
        return "stalled"
    return "max_steps" if out_of_steps else "running"


def route_guard(state: PruneState) -> Literal["rollback", "reflect"]:
    """After evaluate_ppl: drop the candidate or go on with it."""
    return "rollback" if state["rollback_reason"] else "reflect"


def route_termination(state: PruneState) -> Literal["profile", "finish"]:
    """After reflect: another step, or what comes after the last one."""
    return "profile" if state["status"] == "running" else "finish"
