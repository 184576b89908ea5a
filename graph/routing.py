"""The two decisions of the graph: the rollback guard and the termination."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunewright.state import PruneState, StepRecord
from prunewright.state.config import GuardOptions
from prunewright.state.schema import Status

TOLERANCE = 0.001
"""Distance from the target sparsity that counts as reached."""


@dataclass(frozen=True)
class Price:
    """What a step cost and what it was predicted to cost, as rises of the mean loss in nats.

    Attributes:
        measured: log of the candidate's guard perplexity over the accepted one's.
        error: its standard error, paired over the guard windows.
        predicted: the profile's prediction for what was really applied, after correction.
    """

    measured: float
    error: float
    predicted: float


def step_price(
    change: tuple[float, float], predicted: float, history: Iterable[StepRecord]
) -> Price:
    """The price of a step, its prediction corrected by the accepted steps before it.

    The correction is the sum of their measured rises over the sum of the predicted ones, over the
    steps that were predicted to cost something. It is 1 without such steps, and while their
    measured rise is within twice its standard error: noise over a small number says nothing.

    Args:
        change: relative perplexity change of the candidate and its standard error, finite.
        predicted: rise of the mean loss that the profile predicts for what was applied, nats.
        history: the steps before.
    """
    rises = expected = variance = 0.0
    for record in history:
        cost = sum(record.predicted_costs.values())
        if record.verdict == "accepted" and record.change is not None and cost > 0:
            rise, error = _in_nats(record.change, record.change_stderr or 0.0)
            rises, expected, variance = rises + rise, expected + cost, variance + error**2
    correction = rises / expected if rises > 2 * math.sqrt(variance) else 1.0
    return Price(*_in_nats(*change), correction * predicted)


def _in_nats(change: float, error: float) -> tuple[float, float]:
    """A relative perplexity change and its error, carried back to the mean loss."""
    ratio = max(1 + change, 1e-9)  # a fall from near overflow is rounded to all there was
    return math.log(ratio), error / ratio


def guard_reason(
    accepted: float,
    candidate: float,
    dense: float,
    guard: GuardOptions,
    price: Price | None = None,
    knowledge: tuple[float, float] | None = None,
) -> str:
    """Why a candidate is rolled back; "" if it is accepted.

    Args:
        accepted: guard perplexity of the last accepted revision.
        candidate: of the candidate.
        dense: of the dense model.
        guard: the bounds.
        price: what ``guard.max_price`` bounds: a step goes whose measured rise, less twice its
            standard error, is more than ``max_price`` times the predicted one. A step that is
            predicted to cost nothing, such as one that gives weights back, has no price.
        knowledge: mean log-probability of the right answers by the dense model and by the
            candidate, nats a token, where ``guard.max_knowledge_drop`` bounds its fall.
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
    if guard.max_knowledge_drop is not None and knowledge is not None:
        if not math.isfinite(knowledge[1]):
            return "the log-probability of the right answers to the facts is not finite"
        drop = knowledge[0] - knowledge[1]
        if drop > guard.max_knowledge_drop:
            return (
                f"the right answers to the facts became less likely by {drop:.3f} nats a token "
                f"than the dense model finds them, more than guard.max_knowledge_drop "
                f"{guard.max_knowledge_drop:g}"
            )
    if guard.max_price is None or price is None or price.predicted <= 0:
        return ""
    if price.measured - 2 * price.error > guard.max_price * price.predicted:
        return (
            f"the loss rose by {price.measured:.2g} (noise {price.error:.2g}), "
            f"{price.measured / price.predicted:.3g} times the {price.predicted:.2g} predicted "
            f"for it after correction: more than guard.max_price {guard.max_price:g}"
        )
    return ""


def termination(
    *,
    sparsity: float,
    target: float,
    steps: int,
    max_steps: int,
    stalls: int,
    max_stalls: int,
    nothing_fits: bool = False,
) -> Status:
    """Whether the run goes on after a step, and if not, why.

    ``nothing_fits`` says of a run with an N:M pattern that no whole layer fits under the target.
    """
    if sparsity >= target - TOLERANCE or nothing_fits:
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
