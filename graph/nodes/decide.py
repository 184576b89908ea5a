"""The second node: the agent is asked."""

import math

from prunewright.graph.agents import Observation, make_agent
from prunewright.graph.agents.asking import ask, check_move, observe, spent_on
from prunewright.graph.nodes.common import Work, node, spent_by
from prunewright.graph.nodes.landing import changed_counts
from prunewright.graph.words.summary import decision_words
from prunewright.state import (
    Move,
    ProbeReport,
    PruneState,
    PruneUpdate,
    PrunewrightError,
    Spent,
)
from prunewright.state.run import add_up
from prunewright.tools.losses import by_domain, change_with_error

PROBE_SHARE = 4
"""A probe is measured on one in so many of the guard windows."""


@node
def agent_decide(state: PruneState, work: Work) -> PruneUpdate:
    """Ask the agent; a refused answer is sent back with what was wrong, a bounded number of times.

    After the last refusal the decision is empty, which counts as a stall.
    """
    request, context, run = work.request, work.context, work.run
    number, earlier = state["step"], run.read_steps(state["history"])
    observation = observe(state, request, context, run, earlier)
    scored: dict[str, float] = {}
    # Of tries of this very step that ended in an error.
    lost = run.read_spent(number)
    spent = sum((Spent(calls=s.llm_calls, tokens=s.llm_tokens) for s in earlier), lost)
    name, agent = make_agent(context.model_copy(update={"out": str(run.path)}), spent)
    try:
        step = ask(
            name,
            agent,
            observation,
            repairs=context.asking.repairs,
            measure=lambda move: _measure(move, state, work, observation, scored),
        )
    except PrunewrightError:
        lost += spent_on(agent)
        if lost.calls:
            run.write_spent(number, lost)
        raise
    assert state["profile"] is not None
    path = state["profile"]["path"]
    told = {
        "llm_calls": lost.calls + step.llm_calls,
        "llm_tokens": lost.tokens + step.llm_tokens,
        "profile": path,
        "revision": state["revision"],
    }
    step = step.model_copy(update=told)
    return {
        "summary": decision_words(step),
        "proposal": step.model_dump(mode="json"),
        # Its table was for whoever watches the decision.
        "profile": {"path": path},
        "tokens": scored | ({"llm": step.llm_tokens} if step.llm_tokens else {}),
    }


def _measure(
    move: Move, state: PruneState, work: Work, observation: Observation, scored: dict[str, float]
) -> ProbeReport:
    """What a move would come to from the accepted revision, or why it is refused.

    Args:
        move: is measured, not applied.
        state: the step's.
        work: the node's.
        observation: what the move is checked against, as a decision is.
        scored: is told the tokens that it takes, by use.
    """
    deltas, problems = check_move(move, observation)
    if problems:
        return ProbeReport(refused="; ".join(problems))
    names, accepted = tuple(observation.domains), state["guard_losses"]
    windows = probe_windows(len(accepted), max(1, len(names)))
    with work.live_model() as bench:
        tokens = dict(bench.tokens)
        bench.sync(state["revision"])
        counts, _ = changed_counts(bench, state["revision"], deltas, bounded=False)
        zeros = bench.zeros()
        sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
        if not counts:
            return ProbeReport(refused="the deltas come to no weight")
        losses = bench.trial_losses(
            state["revision"], state["gradient_revision"], counts, windows, work.progress
        )
        spent = spent_by(bench, tokens)
    scored.update(add_up(scored, spent))
    before = [accepted[window] for window in windows]
    change, stderr = change_with_error(before, losses)
    after = by_domain(names, losses)
    changes = {n: change_with_error(b, after[n])[0] for n, b in by_domain(names, before).items()}
    return ProbeReport(
        layers={name: (count - zeros[name]) / sizes[name] for name, count in counts.items()},
        change=change if math.isfinite(change) else None,
        change_stderr=stderr,
        domains={name: value for name, value in changes.items() if math.isfinite(value)},
        tokens=int(spent["probe"]),
    )


def probe_windows(guard: int, domains: int = 1) -> list[int]:
    """Indices of the guard windows that a probe is measured on.

    A quarter of them, spread over the text, and at least two of each domain where there are so
    many.

    Args:
        guard: number of windows.
        domains: how many take turns in them.
    """
    rounds = guard // domains
    taken = min(rounds, max(2, math.ceil(rounds / PROBE_SHARE)))
    return [
        domains * (index * rounds // taken) + domain
        for index in range(taken)
        for domain in range(domains)
    ]
