"""Asking a person about a decision, through LangGraph's interrupt."""

from typing import Any

from langgraph.types import interrupt
from pydantic import ValidationError

from prunewright.graph.agents import Observation
from prunewright.graph.agents.asking import check
from prunewright.state import Decision, Review, ReviewAnswer, ReviewRequest, Step
from prunewright.state.loading import describe_validation_error
from prunewright.state.review import HOW, ReviewedLayer


def review(step: Step, observation: Observation) -> Step:
    """Have a person approve, edit or reject a decision; a refused answer is asked for again.

    The node that calls it starts again at each answer, so it must not have done anything yet.

    Args:
        step: the agent's decision, with full layer names.
        observation: what an edit is checked against, as the agent's answer is.

    Returns:
        The step with the decision to apply, empty after a rejection, and the `Review`.
    """
    problems: list[str] = []
    refused: list[str] = []
    answer: Any = None
    while True:
        asked = _request(step, observation, problems, answer)
        answer = interrupt(asked.model_dump(mode="json"))
        settled, problems = _settle(answer, step, observation)
        if settled is not None:
            assert settled.review is not None
            found = settled.review.model_copy(update={"refused": refused})
            return settled.model_copy(update={"review": found})
        # A run that is resumed while it waits is given the last answer once more by LangGraph.
        if answer != asked.refused:
            refused.append("; ".join(problems))


def _request(
    step: Step, observation: Observation, problems: list[str], answer: Any
) -> ReviewRequest:
    layers = {layer.name: layer for layer in observation.profile.layers}
    short = [layer.short_name for layer in layers.values()]
    unique = len(set(short)) == len(short)
    decision = step.decision
    gain = sum(item.delta * layers[item.name].parameters for item in decision.layers)
    return ReviewRequest(
        step=observation.step + 1,
        agent=step.agent,
        reasoning=decision.reasoning,
        layers=[
            ReviewedLayer(
                name=layers[item.name].short_name if unique else item.name,
                sparsity=round(layers[item.name].sparsity, 4),
                delta=item.delta,
                after=round(layers[item.name].sparsity + item.delta, 4),
            )
            for item in decision.layers
        ],
        rebalance=decision.rebalance,
        lessons=decision.lessons,
        expected_ppl_change=decision.expected_ppl_change,
        predicted_change=step.predicted_change,
        perplexity=observation.perplexity,
        sparsity=observation.sparsity,
        sparsity_after=observation.sparsity + gain / observation.prunable,
        notes=[*step.notes, *(f"refused: {words}" for words in step.invalid_answers)],
        problems=problems,
        refused=answer,
    )


def _settle(answer: Any, step: Step, observation: Observation) -> tuple[Step | None, list[str]]:
    """The step as a person's answer makes it, or None and what is wrong with the answer."""
    if not isinstance(answer, dict):
        return None, [HOW]
    try:
        given = ReviewAnswer.model_validate(answer)
    except ValidationError as error:
        return None, [f"{describe_validation_error(error, ReviewAnswer)}: {HOW}"]
    if sum(value is not None for value in (given.approve, given.edit, given.reject)) != 1:
        return None, [HOW]
    proposed = step.decision
    if given.edit is not None:
        decision, problems = _edited(given.edit, proposed, observation)
        if decision is None:
            return None, problems
        deltas = decision.deltas
        changes = {
            "decision": decision,
            "predicted_change": observation.profile.predicted_change(deltas),
            "review": Review(verdict="edited", proposed=proposed),
        }
        return step.model_copy(update=changes), []
    if given.reject is not None:
        words = given.reject.strip()
        if not words:
            return None, ["say why it is rejected: the words reach the agent"]
        changes = {
            "decision": Decision(
                reasoning=f"Rejected in review: {words}",
                layers=[],
                done=False,
                lessons=proposed.lessons,
            ),
            "predicted_change": None,
            "review": Review(verdict="rejected", words=words, proposed=proposed),
        }
        return step.model_copy(update=changes), []
    return step.model_copy(update={"review": Review(verdict="approved")}), []


def _edited(
    edit: dict[str, Any], proposed: Decision, observation: Observation
) -> tuple[Decision | None, list[str]]:
    base = proposed.model_dump()
    if edit.keys() & {"layers", "groups"}:
        # What the agent expected was of its own layers.
        base |= {"layers": [], "groups": [], "expected_ppl_change": None}
    try:
        decision = Decision.model_validate(base | edit)
    except ValidationError as error:
        return None, describe_validation_error(error, Decision).splitlines()
    decision, problems = check(decision, observation)
    if not decision.layers and not problems:
        problems = ["the edit leaves no layer: reject the decision instead, and say why"]
    return (None, problems) if problems else (decision, [])
