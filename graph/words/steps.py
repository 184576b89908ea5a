"""A step in words, and how many are still to come."""

import math
from collections.abc import Sequence

from prunewright.graph.words.numbers import count, percent, perplexity
from prunewright.state import Step
from prunewright.state.profile import short_name
from prunewright.state.run import TOLERANCE
from prunewright.state.shown import clean, one_line

NAMED = 3
"""Layers of a step that are named."""
_MOST = 300
"""Characters that are told of a reason."""


def step_line(record: Step) -> str:
    """A step in a line: 80 columns but for what a step that came to nothing has to say."""
    head = f"step {record.step + 1:>3}  "
    reason = one_line(record.reason, _MOST, "...")
    if record.verdict == "empty":
        return f"{head}empty  {reason}"
    parts = [f"{record.sparsity:>7.2%}" if record.verdict == "accepted" else "rolled back"]
    if record.candidate_perplexity is not None:
        parts.append(f"ppl {perplexity(record.candidate_perplexity):>6}")
    change = change_words(record)
    if record.predicted_change is not None:
        change = f"{change} (predicted {percent(record.predicted_change)})".lstrip()
    parts += [change, count(len(record.applied), "layer"), domain_words(record)]
    if record.candidate_knowledge is not None:
        parts.append(f"facts {knowledge_words(record)}")
    if record.ranking is not None:
        parts.append(f"proposal {record.ranking.words}")
    return head + "  ".join(part for part in [*parts, reason] if part)


def step_words(record: Step) -> str:
    """A step in a sentence, for whoever watches the state."""
    verdict = record.verdict.replace("_", " ")
    parts = [layers_words(record.applied) if record.applied else "", change_words(record)]
    parts.append(domain_words(record))
    told = ", ".join(part for part in [*parts, one_line(record.reason, _MOST, "...")] if part)
    return clean(f"step {record.step + 1} {verdict} at sparsity {record.sparsity:.4f}: {told}")


def layers_words(applied: dict[str, float]) -> str:
    """How many layers a step pruned, and the few it pruned most."""
    largest = sorted(applied, key=lambda name: (-applied[name], name))[:NAMED]
    named = ", ".join(f"{short_name(n)} {applied[n]:+.3f}" for n in largest)
    more = ", ..." if len(applied) > NAMED else ""
    return f"{count(len(applied), 'layer')} ({named}{more})"


def change_words(record: Step) -> str:
    """The measured change of perplexity with its noise; "" if there is none."""
    if record.change is None:
        return ""
    noise = f" ± {record.change_stderr:.2%}" if record.change_stderr is not None else ""
    return f"{percent(record.change)}{noise}"


def domain_words(record: Step) -> str:
    """The measured change of each domain; "" where there are none, or nothing was measured."""
    changes = {name: one.change for name, one in record.domains.items()}
    return ", ".join(f"{n} {change:+.1%}" for n, change in changes.items() if change is not None)


def knowledge_words(record: Step) -> str:
    """Factual recall, and how far it is from the dense model's."""
    value, dense = record.candidate_knowledge, record.knowledge_dense
    if value is None or dense is None:
        return ""
    return f"{value:+.3f} nats a token ({value - dense:+.3f} from dense)"


def steps_to_go(records: Sequence[Step], target: float, max_steps: int) -> int | None:
    """About how many steps a run still takes, if it goes on as it did; None without a ground.

    Args:
        records: its steps so far; rolled-back and empty ones count as the time that they took.
        target: sparsity to reach.
        max_steps: that it may take.
    """
    if not records:
        return None
    missing = target - records[-1].sparsity - TOLERANCE
    left = max_steps - len(records)
    if missing <= 0 or left <= 0:
        return 0
    gained = records[-1].sparsity - records[0].sparsity_before
    if gained <= 0:
        return None
    return min(left, math.ceil(missing * len(records) / gained))
