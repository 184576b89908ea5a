"""The third node: deltas become masks, and those a candidate revision."""

import math

from pydantic import ValidationError

from prunewright.graph.agents import Observation
from prunewright.graph.agents.asking import check, observe
from prunewright.graph.correction import predicted_costs
from prunewright.graph.nodes.common import Work, node, spent_by
from prunewright.graph.nodes.landing import changed_counts
from prunewright.graph.review import review
from prunewright.graph.words.summary import applied_words
from prunewright.state import InputError, PruneState, PruneUpdate, Step
from prunewright.state.loading import describe_validation_error
from prunewright.state.run import TOLERANCE


@node
def apply_prune(state: PruneState, work: Work) -> PruneUpdate:
    """Turn the deltas into masks and store the candidate revision; never over the target.

    Before that a person is asked, if the context says so.
    """
    request, context, run = work.request, work.context, work.run
    # Neither the rules nor a person needs the earlier steps.
    observation = observe(state, request, context, run, earlier=())
    step = _checked(state, observation)
    if context.review:
        step = review(step, observation)
    update: PruneUpdate = {"proposal": None, "candidate": None, "candidate_sparsity": None}
    if deltas := step.decision.deltas:
        with work.live_model() as bench:
            before = dict(bench.tokens)
            bench.sync(state["revision"])
            # Whatever ends at the target may be what the run ends with.
            counts, notes = changed_counts(bench, state["revision"], deltas, TOLERANCE)
            applied = {}
            if counts:
                earlier = bench.sparsities()
                candidate = bench.prune(
                    state["revision"], state["gradient_revision"], counts, work.progress
                )
                notes = [*notes, *bench.store.about(candidate).get("notes", [])]
                bench.sync(candidate)
                now = bench.sparsities()
                applied = {name: now[name] - earlier[name] for name in counts}
                update["candidate"] = candidate
                update["candidate_sparsity"] = bench.sparsity()
            update["tokens"] = spent_by(bench, before)
        changes = {
            "applied": applied,
            "predicted_costs": predicted_costs(applied, observation.profile),
            "predicted_domains": {
                name: math.log1p(change)
                for name, change in observation.profile.predicted_changes(applied).items()
            },
            "candidate": update["candidate"],
            "notes": [*step.notes, *notes],
        }
        step = step.model_copy(update=changes)
    update["summary"] = applied_words(step.applied, state["sparsity"], update["candidate_sparsity"])
    # In a file, as it is too large for every checkpoint.
    update["step_file"] = run.write_step_file(step.step, "applied", step.model_dump(mode="json"))
    return update


def _checked(state: PruneState, observation: Observation) -> Step:
    """The step as proposed, checked once more: people edit states.

    Raises:
        InputError: its decision breaks a bound; the state can be edited again.
    """
    again = "edit it again (update_state, as_node agent_decide) or fork from an earlier step"
    try:
        step = Step.model_validate(state["proposal"])
    except ValidationError as error:
        words = describe_validation_error(error, Step)
        raise InputError(f"the state holds no proposal: {words}; {again}") from None
    decision, problems = check(step.decision, observation)
    if problems:
        raise InputError(f"the state's decision cannot be applied: {'; '.join(problems)}; {again}")
    predicted = observation.profile.predicted_change(decision.deltas) if decision.layers else None
    return step.model_copy(update={"decision": decision, "predicted_change": predicted})
