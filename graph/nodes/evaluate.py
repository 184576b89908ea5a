"""The fourth node, the guard, and the way back."""

import math
from typing import TYPE_CHECKING

from prunewright.graph.nodes.common import Work, node, spent_by
from prunewright.graph.routing import guard_reason
from prunewright.graph.words.summary import evaluated_words
from prunewright.state import InputError, PruneState, PruneUpdate, StoreError
from prunewright.state.run import DENSE, Knowledge
from prunewright.tools.losses import perplexities, perplexity

if TYPE_CHECKING:
    from prunewright.tools.bench.workbench import Workbench
    from prunewright.tools.model.head import Progress


@node
def evaluate_ppl(state: PruneState, work: Work) -> PruneUpdate:
    """Guard perplexity of the candidate, and whether it is rolled back."""
    candidate = state["candidate"]
    if candidate is None:
        return {"candidate_perplexity": None, "candidate_losses": [], "rollback_reason": ""}
    context = work.context
    with work.live_model() as bench:
        before = dict(bench.tokens)
        losses = bench.guard_losses(candidate, work.progress)
        value = perplexity(losses)
        finite = math.isfinite(value)
        knowledge, recalled = None, None
        if context.guard.max_knowledge_drop is not None and finite:
            knowledge = _knowledge(state, bench, work.progress)
            recalled = bench.knowledge(candidate, work.progress)
        tokens = spent_by(bench, before)
    names = work.request.texts.domains("guard")
    accepted = perplexities(names, state["guard_losses"])
    domains = {n: (accepted[n], after) for n, after in perplexities(names, losses).items()}
    reason = guard_reason(
        state["perplexity"],
        value,
        state["dense_perplexity"],
        context.guard,
        None if knowledge is None or recalled is None else (knowledge["dense"], recalled),
        domains,
    )
    measured: PruneUpdate = {}
    if knowledge is not None and recalled is not None:
        known = recalled if math.isfinite(recalled) else None
        measured = {"knowledge": knowledge, "candidate_knowledge": known}
    return {
        **measured,
        "summary": evaluated_words(state["perplexity"], value, reason, domains),
        "candidate_perplexity": value if finite else None,
        "candidate_losses": losses if finite else [],
        "rollback_reason": reason,
        "tokens": tokens,
    }


@node
def rollback(state: PruneState, work: Work) -> PruneUpdate:
    """Drop the candidate and bring the live model back to the accepted revision."""
    with work.live_model() as bench:
        bench.sync(state["revision"])
    words = f"back at revision {state['revision'][:12]}: {state['rollback_reason']}"
    return {"summary": words, "rollbacks": state["rollbacks"] + 1}


def _knowledge(state: PruneState, bench: "Workbench", progress: "Progress | None") -> Knowledge:
    """What the dense model and the accepted revision know, measured unless it is known.

    Raises:
        InputError: the facts cannot be read, or the dense model's score is not finite.
        StoreError: they are not the facts that were scored before.
    """
    known, facts, revision = state.get("knowledge"), bench.facts_hash(), state["revision"]
    if known is not None and known["facts"] != facts:
        raise StoreError(
            f"the run cannot go on: the facts of {bench.request.texts.knowledge} are no longer "
            "those that its earlier steps were scored on"
        )
    dense = known["dense"] if known is not None else bench.knowledge(DENSE, progress)
    if not math.isfinite(dense):
        raise InputError(
            "guard.max_knowledge_drop cannot be used: the dense model's log-probability of the "
            f"right answers is not finite in {bench.loaded.dtype}. Try another dtype"
        )
    if known is not None and known["revision"] == revision:
        accepted = known["accepted"]
    else:
        accepted = dense if revision == DENSE else bench.knowledge(revision, progress)
    return {"dense": dense, "accepted": accepted, "revision": revision, "facts": facts}
