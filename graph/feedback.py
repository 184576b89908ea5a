"""Feedback of the earlier steps in words, for the next decision."""

import math

from prunewright.graph.agents.base import quote_name
from prunewright.state import StepRecord

LINES = 40
"""Steps that the feedback goes back."""


def compile_feedback(records: list[StepRecord]) -> str:
    """One line a step; the last one, and each that was rolled back, with its layers.

    A line at the end compares what all measured steps cost with what was predicted.
    """
    lines = []
    for record in records[-LINES:]:
        last = record is records[-1]
        lines.append(_line(record))
        if record.applied and (last or record.verdict == "rolled_back"):
            lines.append(f"  layers: {_layers(record)}")
        if last and record.decision.reasoning:
            lines.append(f"  your reasoning: {_one_line(record.decision.reasoning, 600)}")
    ratio = measured_over_predicted(records)
    if ratio is not None:
        lines.append(f"all steps: measured cost is {ratio:.2f} times the predicted cost")
    return "\n".join(lines)


def measured_over_predicted(records: list[StepRecord]) -> float | None:
    """Loss that the measured steps cost over what was predicted; None without a prediction."""
    measured = predicted = 0.0
    for record in records:
        if record.change is not None and record.predicted_change is not None:
            measured += math.log1p(record.change)
            predicted += math.log1p(record.predicted_change)
    return measured / predicted if predicted > 0 else None


def _line(record: StepRecord) -> str:
    gain = sum(record.applied.values())
    head = f"step {record.step + 1}: {record.verdict.replace('_', ' ')}"
    if record.verdict == "empty":
        return f"{head}: {_one_line(record.reason, 300)}"
    parts = [
        f"{len(record.applied)} layers",
        f"mean delta {gain / max(1, len(record.applied)):.3f}",
        f"sparsity {record.sparsity_before:.4f} -> {record.sparsity:.4f}",
    ]
    if record.change is not None:
        noise = record.change_stderr or 0.0
        parts.append(f"perplexity {record.change:+.2%} (noise {noise:.2%})")
    if record.predicted_change is not None:
        parts.append(f"predicted {record.predicted_change:+.2%}")
    if record.reason:
        parts.append(record.reason)
    return f"{head}: {', '.join(parts)}"


def _layers(record: StepRecord) -> str:
    names = sorted(record.applied, key=lambda name: -record.applied[name])
    shown = ", ".join(f"{_short(n)} {record.applied[n]:+.3f}" for n in names[:40])
    return f"{shown} and {len(names) - 40} more" if len(names) > 40 else shown


def _one_line(text: str, limit: int) -> str:
    return " ".join(text.split())[:limit]


def _short(name: str) -> str:
    """The part of a layer's name from its block's index on."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return quote_name(".".join(parts[first:]))
