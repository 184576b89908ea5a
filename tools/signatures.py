"""Signatures of a run that goes wrong, found in its steps."""

from prunewright.state import Step

ROLLBACK_RATE = 0.25
"""Share of rolled-back steps above which the agent is not adapting."""
STAGNANT_STEPS = 4
"""Steps in a row that together must gain `STAGNANT_GAIN`, or that share of what they might."""
STAGNANT_GAIN = 0.005
STAGNANT_SHARE = 1 / 40


def failure_signatures(records: list[Step]) -> list[str]:
    """What went wrong in a run, one sentence each; empty if nothing did."""
    return list(find_signatures(records).values())


def find_signatures(records: list[Step]) -> dict[str, str]:
    """What went wrong in a run, a sentence by kind.

    Looked for: more than a quarter of the steps rolled back, no progress over
    `STAGNANT_STEPS` steps before the last, and answers that had to be refused.
    """
    found = {}
    rolled_back = sum(record.verdict == "rolled_back" for record in records)
    if records and rolled_back / len(records) > ROLLBACK_RATE:
        found["rollbacks"] = (
            f"{rolled_back} of {len(records)} steps were rolled back "
            f"({rolled_back / len(records):.0%}): the steps are too large, or the agent does not "
            "learn from what broke"
        )
    stagnant = _stagnant(records)
    if stagnant is not None:
        first, last = stagnant
        found["stagnation"] = (
            f"no progress over steps {first + 1} to {last + 1}: sparsity gained "
            f"{records[last].sparsity - records[first].sparsity_before:.4f}"
        )
    invalid = sum(len(record.invalid_answers) for record in records)
    if invalid:
        decided = sum(record.verdict != "empty" for record in records)
        found["invalid answers"] = (
            f"{invalid} of {invalid + decided} answers were invalid "
            f"({invalid / (invalid + decided):.0%})"
        )
    return found


def _stagnant(records: list[Step]) -> tuple[int, int] | None:
    """Indices of the first and last step of the first stretch without progress."""
    for first in range(len(records) - STAGNANT_STEPS + 1):
        last = first + STAGNANT_STEPS - 1
        steps = records[first : last + 1]
        if any(step.decision.rebalance for step in steps):  # it was not meant to gain
            continue
        # A small step or target asks for little, and at the target nothing is asked for.
        asked = sum(1.0 if step.asked is None else step.asked for step in steps)
        least = min(STAGNANT_GAIN, asked * STAGNANT_SHARE)
        if records[last].sparsity - records[first].sparsity_before < least - 1e-9:
            return first, last
    return None
