"""What a node did, in words for whoever watches the state, in Studio or elsewhere."""

from collections.abc import Mapping
from types import MappingProxyType

from prunewright.graph.words.steps import layers_words
from prunewright.state import ModelProfile, Step
from prunewright.state.metrics import Metrics
from prunewright.state.profile import COST_SIGNAL
from prunewright.state.shown import clean

_NAMED = 3


def profile_words(step: int, profile: ModelProfile) -> str:
    """What the profile came to."""
    scores = sorted((p.signals[COST_SIGNAL], p.name, p.short_name) for p in profile.layers)
    named = ", ".join(f"{short} {COST_SIGNAL} {z:+.2f}" for z, _, short in scores[:_NAMED])
    return clean(f"step {step + 1}: {len(profile.layers)} layers profiled, cheapest {named}")


def decision_words(step: Step) -> str:
    """Who chose what."""
    deltas = step.decision.deltas
    if not deltas:
        return clean(f"{step.agent} chose no layer")
    predicted = step.predicted_change
    tail = "" if predicted is None else f", predicted {predicted:+.2%} perplexity"
    begun = "" if step.ranking is None else f"took the proposal {step.ranking.words}: "
    return clean(f"{step.agent} {begun or 'chose '}{layers_words(deltas)}{tail}")


def applied_words(applied: dict[str, float], before: float, after: float | None) -> str:
    """What was pruned."""
    if after is None:
        return "nothing was pruned"
    return clean(f"{layers_words(applied)}: sparsity {before:.4f} to {after:.4f}")


def evaluated_words(
    before: float,
    after: float,
    reason: str,
    domains: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """What the guard measured and decided.

    Args:
        before: perplexity of the accepted revision.
        after: the candidate's.
        reason: why the candidate is rolled back; "" if it is accepted.
        domains: both of each domain.
    """
    each = "".join(f"{n} {old:.3f} to {new:.3f}, " for n, (old, new) in domains.items())
    return f"perplexity {before:.3f} to {after:.3f}, {each}" + (
        f"to be rolled back: {reason}" if reason else "accepted"
    )


def finished_words(metrics: Metrics) -> str:
    """What was done after the last step, and what the run came to."""
    test = metrics.perplexity.test
    saved = "the model is saved" if metrics.saved else "no model is saved"
    parts = [
        *(stage.words for stage in metrics.stages),
        f"test perplexity {test.dense:.3f} to {test.final:.3f}",
        *(f"{n} {pair.dense:.3f} to {pair.final:.3f}" for n, pair in metrics.domains.items()),
    ]
    return clean("; ".join([*parts, saved]))
