"""How a run ended, what to do about it, and how to go on, from what its steps came to."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from prunewright.state import STATUS_WORDS, PruneContext, Step
from prunewright.state.metrics import Control, Metrics
from prunewright.state.run import TOLERANCE, Status
from prunewright.state.shown import one_line

Kind = Literal["accepted", "rolled_back", "refused", "rejected", "weightless", "idle"]
"""What a step came to; the last four are empty ones."""

_MOST = 300
_WORDS: dict[Kind, Callable[[int], str]] = {
    "rolled_back": lambda n: f"{n} {_were(n)} rolled back by the guard",
    "refused": lambda n: f"{n} had no valid answer",
    "rejected": lambda n: f"{n} {_were(n)} rejected in review",
    "weightless": lambda n: f"{n} had deltas that came to no weight",
    "idle": lambda n: f"{n} chose no layer",
}
_ADVICE: dict[Kind, str] = {
    "refused": "ask another model, or set other agent_options",
    "rejected": "ask another agent",
    "weightless": "ask another agent",
    "idle": "ask another agent, or accept this sparsity",
}


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        reason: why, and what to do about it, in words.
        settings: changes of the context with which ``prunewright resume`` may go on with it.
    """

    reason: str
    settings: tuple[str, ...] = ()


def describe_ending(
    status: Status,
    records: Sequence[Step],
    context: PruneContext,
    target: float,
    *,
    saved: bool,
) -> Ending:
    """How a run ended.

    Args:
        status: of the run, no longer running.
        records: its steps.
        context: who decided, and how.
        target: sparsity that was to be reached.
        saved: whether there is a pruned model.
    """
    words = STATUS_WORDS[status]
    if status == "target_reached":
        missing = target - records[-1].sparsity if records else 0.0
        if missing > TOLERANCE:
            words = (
                f"no dense layer fits under the target any more: {missing:.4f} is missing to it, "
                "as layers are taken whole"
            )
        if records and (kept := records[-1].kept) is not None:
            words += f"; of the revisions there the best is kept, that of step {kept.step + 1}"
        return Ending(words)
    lost = [r for r in records if kind_of(r) != "accepted"]
    settings: dict[str, str] = {}
    if status == "stalled":
        lost = list(takewhile(lambda r: kind_of(r) != "accepted", reversed(records)))[::-1]
    else:
        settings["max_steps"] = f"{2 * context.max_steps}"
    counts = Counter(kind_of(r) for r in lost)
    parts, advice = [], ["raise max_steps"] if status == "max_steps" else []
    for kind, count in counts.most_common():
        last = next(r for r in reversed(lost) if kind_of(r) == kind)
        why = (
            f" (the last: {one_line(last.reason, _MOST, '...')})"
            if kind in ("rolled_back", "refused")
            else ""
        )
        parts.append(f"{_WORDS[kind](count)}{why}")
        if kind == "rolled_back":
            words_, setting = _loosened(last.reason, context)
            settings |= setting
        else:
            words_ = _ADVICE[kind]
            settings.setdefault("agent", "greedy")
        if words_ not in advice:
            advice.append(words_)
    if parts:
        words += f"; of {'its' if status == 'max_steps' else 'the last'} "
        words += f"{len(records) if status == 'max_steps' else len(lost)} steps, {', '.join(parts)}"
    words += f": {'; '.join(advice)}"
    if not saved:
        accepted = any(r.verdict == "accepted" for r in records)
        why = "As everything was restored" if accepted else "As no step was accepted"
        words += f". {why}, no model is saved: it would be the dense one"
    return Ending(words, tuple(f"{key}={value}" for key, value in settings.items()))


def ended_words(metrics: Metrics) -> str:
    """How a run or a baseline ended, in words."""
    short = next((w for s, w in STATUS_WORDS.items() if s == metrics.status), "pruned in one shot")
    return metrics.reason or short


def control_words(control: Control) -> str:
    """What a run comes to against uniform pruning, measured with it."""
    words = f"uniform pruning to {control.sparsity:.2%} by the same criterion"
    if control.change is None:
        return f"{words}: its test perplexity is not finite"
    noise = f" ± {control.change_stderr:.1%}" if control.change_stderr is not None else ""
    than = "lower" if control.change < 0 else "higher"
    return f"test perplexity {abs(control.change):.1%}{noise} {than} than that of {words}"


def kind_of(record: Step) -> Kind:
    """What a step came to."""
    if record.verdict in ("accepted", "rolled_back"):
        return record.verdict
    if record.review is not None and record.review.verdict == "rejected":
        return "rejected"
    if record.refused:
        return "refused"
    return "weightless" if record.decision.layers else "idle"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _loosened(reason: str, context: PruneContext) -> tuple[str, dict[str, str]]:
    """What to do about a rollback, by the bound that its reason names."""
    guard = context.guard
    smaller = "or take smaller steps (another agent, or a new run with less step or max_delta)"
    if "not finite" in reason:
        return "take smaller steps, or begin again in another dtype", {}
    if "max_knowledge_drop" in reason:
        key, value = "guard.max_knowledge_drop", guard.max_knowledge_drop
    elif "over the dense model" in reason:
        key, value = "guard.max_total_increase", guard.max_total_increase
    elif isinstance(guard.max_increase, dict):
        key, value = _of_domain(reason, guard.max_increase)
    else:
        key, value = "guard.max_increase", guard.max_increase
    setting = {key: f"{2 * value:g}"} if value is not None else {}
    return f"loosen the guard ({key}), {smaller}", setting


def _of_domain(reason: str, bounds: dict[str, float]) -> tuple[str, float | None]:
    """The bound of the domain that a rollback's reason names, as a key and its value."""
    domain = reason.removeprefix("perplexity of ").partition(" ")[0]
    return f"guard.max_increase.{domain}", bounds.get(domain)
