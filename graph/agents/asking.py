"""One checked decision: what the agent sees, what it answers, what is wrong with that."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prunewright.graph.agents import InvalidAnswerError, Observation, Refusal
from prunewright.graph.agents.base import Agent, quote_name
from prunewright.graph.agents.proposal import take
from prunewright.graph.running.stopping import call_stoppable
from prunewright.state import (
    AgentError,
    Decision,
    FromRanking,
    LayerDelta,
    ModelProfile,
    Move,
    ProbeReport,
    PruneContext,
    PruneRequest,
    PruneState,
    Spent,
    Step,
    Trials,
    check_decision,
)
from prunewright.state.decision import SHOWN, first_problems
from prunewright.state.secrets import redact, redact_all
from prunewright.state.step import MAX_REFUSED
from prunewright.tools.losses import perplexities

if TYPE_CHECKING:
    from prunewright.tools.store.rundir import RunDirectory

_log = logging.getLogger("prunewright")
_TOO_MANY = ProbeReport(refused="no probe was left for it")


def observe(
    state: PruneState,
    request: PruneRequest,
    context: PruneContext,
    run: "RunDirectory",
    earlier: Sequence[Step],
) -> Observation:
    """What the agent sees at this point of a run; of the earlier steps with feedback."""
    assert state["profile"] is not None
    names = request.texts.domains("guard")
    bounds = context.guard.bounds(names)
    limit = context.guard.max_increase
    accepted = perplexities(names, state["guard_losses"]) if names else {}
    return Observation(
        step=state["step"],
        steps_left=max(1, context.max_steps - state["step"]),
        target=request.target,
        sparsity=state["sparsity"],
        max_step=request.step,
        max_delta=request.max_delta,
        max_layer_sparsity=request.max_layer_sparsity,
        max_increase=min(bounds.values()) if isinstance(limit, dict) else limit,
        bounds=bounds,
        max_total_increase=context.guard.max_total_increase,
        max_knowledge_drop=context.guard.max_knowledge_drop,
        criterion=request.criterion,
        crowded=request.crowded,
        goal=context.goal,
        pattern=request.pattern,
        dense_perplexity=state["dense_perplexity"],
        perplexity=state["perplexity"],
        profile=run.read_profile(state["profile"]["path"]),
        weights=request.domain_weights,
        domains={name: (state["dense_domains"][name], accepted[name]) for name in names},
        signals=context.signals,
        history=tuple(earlier) if context.feedback else (),
        feedback=context.feedback,
        prompts=context.prompts,
        seed=request.seed,
        thread=run.thread() or "",
        stalls=state["stalls"],
        best=state.get("best"),
        max_probes=context.probes,
    )


def ask(
    name: str,
    agent: Agent,
    observation: Observation,
    *,
    repairs: int,
    measure: Callable[[Move], ProbeReport] | None = None,
) -> Step:
    """A step as an agent proposes it: one checked decision, with full layer names.

    The decision is empty after the last refusal.

    Args:
        name: the agent's.
        agent: is called in a thread that is left behind if the run is stopped meanwhile.
        observation: what it sees; ``max_probes`` bounds the moves that are measured.
        repairs: times a refused answer is sent back.
        measure: says what one move comes to, or why it is refused; None measures none.

    Raises:
        AgentError: the agent could not be asked, or returned something else.
        StoppedError: the run was asked to stop.
    """
    seen = observation if measure is not None else replace(observation, max_probes=0)
    refusals: list[Refusal] = []
    notes: list[str] = []
    ranking: FromRanking | None = None
    before = spent_on(agent)
    while len(refusals) <= repairs:
        try:
            answer = call_stoppable(partial(agent.decide, seen))
            if not isinstance(answer, Decision | Trials):  # of a class of the user's
                raise AgentError(f"{name} returned a {type(answer).__name__}, not a Decision")
            told: list[str] = []
            if isinstance(answer, Decision):
                decision, ranking, told, problems = settle(answer, observation)
            else:
                problems = [] if seen.probes_left else ["no probes are left in this step: decide"]
            text = answer.model_dump_json()
        except InvalidAnswerError as error:
            answer, problems, text = None, [str(error)], error.answer
        notes += getattr(agent, "notes", [])
        seen = replace(seen, tries=seen.tries + 1)
        if problems:
            refusals.append(Refusal(text, tuple(problems)))
            seen = replace(seen, refusals=tuple(refusals))
            _log.info("%s: an answer was refused: %s", name, redact("; ".join(problems)))
        elif isinstance(answer, Trials) and measure is not None:
            reports = [measure(move) for move in answer.moves[: seen.probes_left]]
            reports += (len(answer.moves) - len(reports)) * [_TOO_MANY]
            seen = replace(seen, probes=(*seen.probes, *reports))
        else:
            notes += told
            break
    else:
        decision = Decision(reasoning="No valid answer: nothing is pruned.", layers=[], done=False)
        ranking = None
    after = spent_on(agent)
    step = Step(
        step=observation.step,
        agent=name,
        decision=decision,
        ranking=ranking,
        predicted_change=observation.profile.predicted_change(decision.deltas)
        if decision.layers
        else None,
        invalid_answers=["; ".join(refusal.problems) for refusal in refusals],
        refused_answers=[_kept(refusal.answer) for refusal in refusals],
        repairs=min(len(refusals), repairs),
        notes=notes,
        llm_calls=after.calls - before.calls,
        llm_tokens=after.tokens - before.tokens,
        probes=list(seen.probes),
        sparsity_before=observation.sparsity,
        sparsity=observation.sparsity,
        perplexity_before=observation.perplexity,
        revision=observation.profile.revision,
    )
    # A server knows the key, and what it says is stored.
    return Step.model_validate(redact_all(step.model_dump()))


def _kept(answer: str) -> str:
    """A refused answer as it may be stored: bounded, without keys and lone surrogates."""
    return redact(answer)[:MAX_REFUSED].encode("utf-8", "replace").decode()


def check_move(move: Move, observation: Observation) -> tuple[dict[str, float], list[str]]:
    """A move's deltas by full layer name, and what is wrong with it.

    What bounds a layer bounds it, too; a step's bound and the target do not.
    """
    trial = Decision(reasoning="", layers=move.layers, groups=move.groups)
    decision, problems = check(trial, observation, math.inf)
    if not decision.layers and not problems:
        problems = ["name at least one layer"]
    return decision.deltas, problems


def check(
    answer: Decision, observation: Observation, most: float | None = None
) -> tuple[Decision, list[str]]:
    """The answer as it would be applied, and what is wrong with it: see `settle`."""
    settled = settle(answer, observation, most)
    return settled.decision, settled.problems


class Settled(NamedTuple):
    """An answer as it would be applied, and what is wrong with it."""

    decision: Decision
    ranking: FromRanking | None
    notes: list[str]
    problems: list[str]


def settle(answer: Decision, observation: Observation, most: float | None = None) -> Settled:
    """The answer layer by layer with full names, on the proposal if it takes that, checked.

    Args:
        answer: a decision.
        observation: whose bounds it must keep.
        most: sparsity that it may add to the model; None: the step's budget.
    """
    decision, problems = expand(answer, observation.profile)
    ranking: FromRanking | None = None
    notes: list[str] = []
    if answer.takes_proposal:
        decision, ranking, notes, found = take(decision, observation, len(answer.layers))
        problems += found
    else:
        decision = whole_deltas(decision, observation)
    broken = check_decision(
        decision,
        observation.room(),
        {p.name: p.pruned for p in observation.profile.layers},
        {p.name: p.parameters for p in observation.profile.layers},
        max_delta=observation.max_delta,
        max_step=observation.budget if most is None else most,
        fixed=observation.fixed_deltas(),
    )
    if broken and ranking is not None and ranking.edits:
        broken.append("these deltas are those of the proposal with your edits added")
    return Settled(decision, ranking, notes, [*problems, *broken])


def whole_deltas(decision: Decision, observation: Observation) -> Decision:
    """With a pattern, its sparsity as a delta means the whole layer, whatever that adds to it.

    A layer that has zeros of its own adds less.
    """
    fixed, whole = observation.fixed_deltas() or {}, observation.pattern_sparsity or 0.0

    def settled(item: LayerDelta) -> LayerDelta:
        delta = fixed.get(item.name, 0.0)
        if not delta or abs(item.delta - math.copysign(whole, delta)) > SHOWN:
            return item
        return LayerDelta(name=item.name, delta=delta)

    return decision.model_copy(update={"layers": [settled(item) for item in decision.layers]})


def spent_on(agent: Agent) -> Spent:
    """What an agent has spent so far; one that asks no LLM counts nothing."""
    return Spent(calls=getattr(agent, "calls", 0), tokens=getattr(agent, "tokens", 0))


def expand(decision: Decision, profile: ModelProfile) -> tuple[Decision, list[str]]:
    """The decision layer by layer with full names, and what is wrong with its groups.

    A group is taken by its block numbers, both included: the first and the last must hold the
    projection; blocks between them that do not (hybrid models) have nothing to give.
    """
    full = {p.short_name: p.name for p in profile.layers}
    blocks: dict[str, dict[int, str]] = {}
    for layer in profile.layers:
        blocks.setdefault(layer.projection, {})[layer.block] = layer.name
    layers = [
        LayerDelta(name=full.get(item.name, item.name), delta=item.delta)
        for item in decision.layers
    ]
    problems = []
    for group in decision.groups:
        words = f"group {group.projection[:80]!r} from {group.first} to {group.last}"
        held = blocks.get(group.projection)
        if held is None:
            known = [quote_name(name) for name in blocks]
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            problems.append(f"{words}: no such projection; known: {', '.join(known[:20])}{more}")
        elif group.first > group.last:
            problems.append(f"{words}: from must not be above to")
        elif missing := {group.first, group.last} - set(held):
            problems.append(f"{words}: block {min(missing)} does not hold it")
        else:
            layers += [
                LayerDelta(name=name, delta=group.delta)
                for block, name in sorted(held.items())
                if group.first <= block <= group.last
            ]
    return decision.model_copy(update={"layers": layers, "groups": []}), first_problems(problems)
