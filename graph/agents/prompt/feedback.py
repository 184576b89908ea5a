"""What the earlier steps came to, in words, for the next decision."""

from collections.abc import Mapping, Sequence
from statistics import median

from prunewright.graph.agents.base import Observation, quote_name
from prunewright.graph.agents.prompt.table import by_blocks, by_thirds, thousandths, with_heads
from prunewright.graph.correction import ALL, DEPTHS, domain_ratios, ratios, spans
from prunewright.graph.routing import MAX_FRUITLESS
from prunewright.state import Step
from prunewright.state.shown import one_line

TOLD = 8
"""Steps before those that have a line each."""
LATEST = 3
"""Steps that are told in full: the latest."""
ROLLBACKS = 2
"""Rolled-back steps whose layers and deltas are told: the latest."""
ITEMS = 12
"""Groups of layers named of one step."""


def compile_feedback(observation: Observation) -> str:
    """All that an LLM is told of its earlier steps; "" without feedback or before the first.

    A line a step, of the latest with what they changed; of the latest rollbacks also the layers
    with their deltas, of the last step the agent's own reasoning; what was measured over what was
    predicted, by projection and by depth. Of predicted costs only where they are shown.
    """
    records = observation.history
    if not observation.feedback or not records:
        return ""
    costs = observation.costs_shown
    lines = _table(records[:-LATEST], costs) + _latest(observation, records[-LATEST:])
    for record in [r for r in records if r.verdict == "rolled_back"][-ROLLBACKS:]:
        why = f"Step {record.step + 1} was rolled back: {one_line(record.reason, 300)}."
        lines.append(f"{why} It was {_layers(observation, record.applied)}")
    lines += _last(observation, records[-1])
    if costs:
        lines += _ratios(observation, records)
        lines += _domain_ratios(domain_ratios(records))
    return "\n".join(lines)


def told_probes(observation: Observation) -> str:
    """What the moves came to that were measured in this very step; "" if none was asked for."""
    if not observation.probes:
        return ""
    costs = observation.costs_shown
    tokens = max(probe.tokens for probe in observation.probes)
    lines = [
        "Moves that you had measured, each from where the model is now and none applied: change of "
        f"the perplexity on {tokens:,} tokens of the held-out text, in per cent"
        f"{', predicted by the costs' if costs else ''}:"
    ]
    for number, probe in enumerate(observation.probes, 1):
        if probe.refused:
            lines.append(f"{number}. refused: {one_line(probe.refused, 600)}")
            continue
        error = within(probe.change_stderr)
        change = "not finite" if probe.change is None else f"{percent(probe.change)}{error}"
        if costs:
            predicted = observation.profile.predicted_change(probe.layers)
            change += f", predicted {percent(predicted)}"
        change += "".join(
            f", {quote_name(name)} {percent(value)}" for name, value in probe.domains.items()
        )
        lines.append(f"{number}. {_layers(observation, probe.layers)}: {change}")
    left = observation.probes_left
    lines.append(f"Probes left: {left}." if left else "No probes are left in this step: decide.")
    return "\n".join(lines)


def told_best(observation: Observation) -> str:
    """What is kept at the target; "" before it was reached, and without feedback."""
    best = observation.best if observation.feedback else None
    if best is None:
        return ""
    words = f"Best at the target so far: perplexity {best['perplexity']:.3f}, of step "
    words += f"{best['step'] + 1}. It is kept."
    if best["fruitless"]:
        words += f" {best['fruitless']} of {MAX_FRUITLESS} tries in a row gained nothing."
    return words


def last_changes(observation: Observation) -> dict[str, str]:
    """Step, from 1, that last changed each layer, with an x if it was rolled back."""
    found: dict[str, str] = {}
    for record in observation.history if observation.feedback else ():
        mark = "x" if record.verdict == "rolled_back" else ""
        found |= dict.fromkeys(record.applied, f"{record.step + 1}{mark}")
    return found


def last_measured(observation: Observation) -> Step | None:
    """The last step whose perplexity was measured; None without feedback."""
    records = observation.history if observation.feedback else ()
    return next((r for r in reversed(records) if r.change is not None), None)


def percent(value: float | None, plus: str = "+") -> str:
    """A fraction in per cent, signed, with two or three digits; "-" for None."""
    if value is None:
        return "-"
    value *= 100
    digits = 2 if abs(value) < 0.995 else 1 if abs(value) < 9.95 else 0
    words = f"{value:+z.{digits}f}".replace("+0.", "+.").replace("-0.", "-.")
    return words.replace("+", plus)


def within(error: float | None) -> str:
    """A standard error in per cent, as it follows a change; "" for None."""
    return "" if error is None else f" ± {percent(error, '')}"


def _latest(observation: Observation, records: Sequence[Step]) -> list[str]:
    """The latest steps, a line each."""
    costs = observation.costs_shown
    lines = [
        "The latest steps, in per cent: mean delta of each projection, in the early/middle/late "
        "third of the blocks where it differs; sparsity after the step; perplexity, its change:"
    ]
    for r in records:
        if r.verdict == "empty":
            lines.append(_empty(r))
            continue
        what = by_thirds(observation.profile.layers, r.applied, percent)
        value = r.candidate_perplexity
        parts = [
            f"{r.step + 1}: {what}; sparsity {100 * r.sparsity:.2f}",
            f"perplexity {'not finite' if value is None else f'{value:.2f}'}",
            *([f"{percent(r.change)}{within(r.change_stderr)}"] if r.change is not None else []),
            *([f"predicted {percent(r.predicted_change)}"] if costs else []),
        ]
        expected = r.decision.expected_ppl_change
        parts += [f"expected {percent(expected)}"] if expected is not None else []
        parts += [_recall(r)] if r.candidate_knowledge is not None else []
        parts += ["rolled back"] if r.verdict == "rolled_back" else []
        lines.append(", ".join(parts))
    return lines


def _empty(record: Step) -> str:
    return f"{record.step + 1} nothing was pruned: {one_line(record.reason, 200, '...')}"


def _table(records: Sequence[Step], costs: bool) -> list[str]:
    """The steps before those, a line each."""
    if not records:
        return []
    noise = [r.change_stderr for r in records if r.change_stderr is not None]
    error = f", within {percent(median(noise), '')} or so" if noise else ""
    head = f"step gained change{' predicted' if costs else ''}"
    title = (
        "Earlier steps, in per cent: sparsity that the model gained, change of the perplexity"
        f"{error}{', predicted by the costs' if costs else ''}:"
    )
    lines = []
    if before := records[:-TOLD]:
        gained = percent(before[-1].sparsity - before[0].sparsity_before)
        change = percent(before[-1].accepted_perplexity / before[0].perplexity_before - 1)
        title += f"\n1-{len(before)} together {gained} {change}"
    for r in records[-TOLD:]:
        if r.verdict == "empty":
            lines.append(_empty(r))
            continue
        cells = [str(r.step + 1), percent(_gained(r)), percent(r.change)]
        cells += [percent(r.predicted_change)] if costs else []
        cells += [_recall(r)] if r.candidate_knowledge is not None else []
        cells += ["rolled back"] if r.verdict == "rolled_back" else []
        lines.append(" ".join(cells))
    return [title, *with_heads(head, lines, 10)]


def _recall(record: Step) -> str:
    """Factual recall less the dense model's."""
    assert record.candidate_knowledge is not None
    assert record.knowledge_dense is not None
    return f"recall {record.candidate_knowledge - record.knowledge_dense:+.3f} nats"


def _gained(record: Step) -> float | None:
    """Sparsity that the step added to the model; None if it was rolled back."""
    accepted = record.verdict == "accepted"
    return record.sparsity - record.sparsity_before if accepted else None


def _last(observation: Observation, record: Step) -> list[str]:
    if record.review is not None and record.review.verdict == "rejected":
        return [f"A person rejected your last decision: {one_line(record.review.words, 1000)}"]
    lines = []
    if (ranking := record.ranking) is not None and observation.costs_shown:
        edits = f": {_layers(observation, ranking.edits)}" if ranking.edits else ""
        lines.append(f"You took the proposal {ranking.words}{edits}.")
    if record.review is not None and record.review.verdict == "edited":
        lines.append("A person edited your decision before it was applied.")
    if record.decision.reasoning:
        lines.append(f"Your reasoning then: {one_line(record.decision.reasoning, 300, '...')}")
    return lines


def _layers(observation: Observation, deltas: Mapping[str, float]) -> str:
    shown = {name: thousandths(delta) for name, delta in deltas.items()}
    return by_blocks(observation.profile.layers, shown, ITEMS)


def _ratios(observation: Observation, records: Sequence[Step]) -> list[str]:
    """Measured over predicted cost: overall, by projection and by depth, with its error."""
    found = ratios(records)
    if not found:
        return []
    thirds = spans(1 + max(p.block for p in observation.profile.layers))
    kinds = sorted(found.keys() - {ALL, *DEPTHS})
    groups = [(quote_name(kind), kind) for kind in kinds]
    groups += [(f"blocks {span}", depth) for depth, span in thirds.items() if depth in found]
    parts = [f"{name} {found[kind][0]:.2f} ± {found[kind][1]:.2f}" for name, kind in groups]
    overall, error = found[ALL]
    return [
        f"Measured over predicted cost, of all steps: {overall:.2f} ± {error:.2f}; "
        f"{', '.join(parts)}"
    ]


def _domain_ratios(found: dict[str, tuple[float, float]]) -> list[str]:
    """The same by domain."""
    parts = [
        f"{quote_name(name)} {ratio:.2f} ± {error:.2f}" for name, (ratio, error) in found.items()
    ]
    return [f"By domain, measured over predicted: {', '.join(parts)}"] if parts else []
