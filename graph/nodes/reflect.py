"""The last node of a step: accept it or not, record it, go on or end."""

import math

from prunewright.graph.nodes.common import Work, node
from prunewright.graph.routing import at_target, returned, termination
from prunewright.graph.whole_layers import MISSING, model_notes, nothing_fits
from prunewright.graph.words.steps import step_words
from prunewright.state import (
    PruneRequest,
    PruneState,
    PruneUpdate,
    Review,
    Step,
    StepSummary,
)
from prunewright.state.run import TOLERANCE, Best
from prunewright.state.step import Kept
from prunewright.tools.bench.own_zeros import own_zeros_words
from prunewright.tools.counting import most_zeros
from prunewright.tools.losses import change_with_error, measures
from prunewright.tools.store.rundir import RunDirectory

KEPT = 8
"""Steps of the history that the state holds: the latest."""


@node
def reflect(state: PruneState, work: Work) -> PruneUpdate:
    """Accept the step or not, record it, decide whether the run goes on."""
    request, context, run = work.request, work.context, work.run
    step, at_end = _whole_layers(_with_model_notes(_judged(state, request, run), run), run, request)
    accepted = step.verdict == "accepted"
    # A person who rejects can stop the run, too: that is not the run's to do.
    stalls = 0 if accepted else state["stalls"] + (not _rejected(step.review))
    cut = accepted and _is_cut(step, run, request)
    best = _best(state, step, at_end or (at_target(step.sparsity, request.target) and not cut))
    status = termination(
        sparsity=step.sparsity,
        target=request.target,
        steps=state["step"] + 1,
        max_steps=context.max_steps,
        stalls=stalls,
        max_stalls=context.max_stalls,
        nothing_fits=at_end,
        done=step.decision.done,
        cut=cut,
        fruitless=None if best is None else best["fruitless"],
    )
    losses = state["candidate_losses"] if accepted else state["guard_losses"]
    known, recalled = state.get("knowledge"), step.candidate_knowledge
    if accepted and known is not None and recalled is not None:
        known = {**known, "accepted": recalled, "revision": step.revision}
    if status != "running" and best is not None and best["revision"] != step.revision:
        step, losses = _gone_back(step, best), best["losses"]
        if known is not None and best["knowledge"] is not None:
            known = {**known, "accepted": best["knowledge"], "revision": step.revision}
    line = run.steps.append(step, state["history"])
    step = line.step
    summary: StepSummary = {
        "step": step.step,
        "seal": line.seal,
        "verdict": step.verdict,
        "sparsity": step.sparsity,
        "perplexity": step.accepted_perplexity,
        "change": step.change,
        "layers": len(step.applied),
    }
    update: PruneUpdate = {
        "summary": step_words(step),
        "step": state["step"] + 1,
        "revision": step.revision,
        "sparsity": step.sparsity,
        "perplexity": summary["perplexity"],
        "guard_losses": losses,
        "stalls": stalls,
        "best": best,
        "history": [*state["history"], summary][-KEPT:],
        "status": status,
        # What only this step needed is not carried on into the next one's checkpoints.
        "profile": None,
        "proposal": None,
        "candidate": None,
        "candidate_sparsity": None,
        "candidate_perplexity": None,
        "candidate_losses": [],
        "candidate_knowledge": None,
        "step_file": "",
        "rollback_reason": "",
    }
    if known is not None:
        update["knowledge"] = known
    work.tell({"step": step.model_dump(mode="json")})
    return update


def _best(state: PruneState, step: Step, reached: bool) -> Best | None:
    """The best revision at the target, once a step is judged.

    A step that is accepted below the target, to come back to it, changes nothing; one that came to
    nothing gained nothing, but for what a person rejected.
    """
    best = state.get("best")
    if step.verdict == "accepted":
        if not reached:
            return best
        now: Best = {
            "step": step.step,
            "revision": step.revision,
            "sparsity": step.sparsity,
            "perplexity": step.accepted_perplexity,
            "losses": state["candidate_losses"],
            "knowledge": step.candidate_knowledge,
            "returns": 0,
            "fruitless": 0,
        }
        return returned(best, now)
    if best is None or _rejected(step.review):
        return best
    return {**best, "fruitless": best["fruitless"] + 1}


def _gone_back(step: Step, best: Best) -> Step:
    """The last step of a run that ends with an earlier one's revision."""
    own = step.accepted_perplexity
    words = (
        f"the run ends with the revision of step {best['step'] + 1}, the best at the target: guard "
        f"perplexity {best['perplexity']:.3f}, and {own:.3f} after the last step, at a sparsity of "
        f"{step.sparsity:.4f}"
    )
    return step.model_copy(
        update={
            "revision": best["revision"],
            "sparsity": best["sparsity"],
            "kept": Kept(step=best["step"], perplexity=best["perplexity"]),
            "notes": [*step.notes, words],
        }
    )


def _judged(state: PruneState, request: PruneRequest, run: RunDirectory) -> Step:
    """The step as applied, with what was measured and what becomes of it."""
    step = run.read_applied(state["step_file"])
    candidate, reason = step.candidate, state["rollback_reason"]
    accepted = candidate is not None and not reason
    if candidate is None:
        reason = _why_empty(step)
    change = stderr = None
    if state["candidate_losses"]:
        change, stderr = change_with_error(state["guard_losses"], state["candidate_losses"])
    known, recalled = state.get("knowledge"), state.get("candidate_knowledge")
    measured = {
        "candidate_perplexity": state["candidate_perplexity"],
        "change": _finite(change),
        "change_stderr": stderr,
        "domains": measures(
            request.texts.domains("guard"),
            state.get("dense_domains", {}),
            state["guard_losses"],
            state["candidate_losses"],
        ),
        "knowledge_dense": known["dense"] if known is not None and recalled is not None else None,
        "candidate_knowledge": recalled,
    }
    verdict = {
        "asked": min(request.step, max(0.0, request.target - state["sparsity"])),
        "verdict": "accepted" if accepted else "empty" if candidate is None else "rolled_back",
        "reason": reason,
        "revision": candidate if accepted else state["revision"],
        "sparsity": (state["candidate_sparsity"] or 0.0) if accepted else state["sparsity"],
    }
    return step.model_copy(update=measured | verdict)


def _why_empty(step: Step) -> str:
    if _rejected(step.review):
        return step.decision.reasoning
    if step.decision.layers:
        return "the deltas come to no weight"
    return step.invalid_answers[-1] if step.refused else "the agent chose no layer"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_cut(step: Step, run: RunDirectory, request: PruneRequest) -> bool:
    """Whether the bound of a step alone kept it from the target, so that another one lands there.

    Not for a weight a step, which rounding to whole ones loses where steps divide the target:
    another step costs as much as any.
    """
    missing = request.target - step.sparsity
    over = request.target - step.sparsity_before > request.step
    # With a pattern layers are taken whole.
    if not over or missing > TOLERANCE or request.pattern_sparsity is not None:
        return False
    total = sum(p.parameters for p in run.read_profile(step.profile).layers)
    return most_zeros(request.target, total) - round(step.sparsity * total) > step.step + 1


def _with_model_notes(step: Step, run: RunDirectory) -> Step:
    """The first step tells of the model, too: what is saved of it, zeros of its own, what stays
    dense, what calibration did not reach."""
    if step.step:
        return step
    profile = run.read_profile(step.profile)
    layers = profile.layers
    zeros = sum(round(p.dense_sparsity * p.parameters) for p in layers)
    words = own_zeros_words(zeros, sum(p.parameters for p in layers))
    told = [run.manifest().get("values", ""), words]
    notes = [*profile.notes, *step.notes, *filter(None, told)]
    return step.model_copy(update={"notes": notes})


def _whole_layers(step: Step, run: RunDirectory, request: PruneRequest) -> tuple[Step, bool]:
    """What a pattern adds to a step's notes, and whether no layer fits under the target now."""
    whole = request.pattern_sparsity
    if whole is None:
        return step, False
    profile = run.read_profile(step.profile)
    applied = step.applied if step.verdict == "accepted" else {}
    at_end = nothing_fits(profile, applied, whole, request.target)
    notes = [*step.notes, *(model_notes(profile) if step.step == 0 else [])]
    missing = request.target - step.sparsity
    if at_end and missing > TOLERANCE:
        notes.append(f"{missing:.4f} {MISSING}")
    return step.model_copy(update={"notes": notes}), at_end


def _rejected(review: Review | None) -> bool:
    return review is not None and review.verdict == "rejected"
