"""The second node: the agent is asked."""

import math
from dataclasses import replace

from prunewright.graph.agents import Observation, make_agent
from prunewright.graph.agents.asking import ask, check, observe, spent_on
from prunewright.graph.agents.base import Probes
from prunewright.graph.nodes.common import Work, node, spent_by
from prunewright.graph.nodes.landing import changed_counts
from prunewright.graph.running.stopping import call_stoppable
from prunewright.graph.words.summary import decision_words
from prunewright.state import (
    Decision,
    ProbeReport,
    PruneState,
    PruneUpdate,
    PrunewrightError,
    Spent,
)
from prunewright.state.run import add_up
from prunewright.tools.losses import change_with_error

PROBE_WINDOWS = 2
"""Guard windows that a probe is measured on: the first ones."""


@node
def agent_decide(state: PruneState, work: Work) -> PruneUpdate:
    """Ask the agent; a refused answer is sent back with what was wrong, a bounded number of times.

    After the last refusal the decision is empty, which counts as a stall.
    """
    request, context, run = work.request, work.context, work.run
    number, earlier = state["step"], run.read_steps(state["history"])
    observation = observe(state, request, context, run, earlier)
    scored: dict[str, float] = {}
    if context.probes:
        probes = _probes(state, work, observation, scored)
        observation = replace(observation, probes=probes)
    # Of tries of this very step that ended in an error.
    lost = run.read_spent(number)
    spent = sum((Spent(calls=s.llm_calls, tokens=s.llm_tokens) for s in earlier), lost)
    name, agent = make_agent(context.model_copy(update={"out": str(run.path)}), spent)
    try:
        step = call_stoppable(lambda: ask(name, agent, observation, repairs=context.asking.repairs))
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


def _probes(
    state: PruneState, work: Work, observation: Observation, scored: dict[str, float]
) -> Probes:
    """The trials that an agent may have measured from the accepted revision in this step.

    Args:
        state: the step's.
        work: the node's.
        observation: what a trial is checked against, as a decision is.
        scored: is told the tokens that they take, by use.
    """

    def measure(trial: Decision) -> ProbeReport:
        decision, problems = check(trial, observation)
        deltas = decision.deltas
        if not deltas and not problems:
            problems = ["name at least one layer"]
        if problems:
            return ProbeReport(refused="; ".join(problems))
        with work.live_model() as bench:
            before = dict(bench.tokens)
            bench.sync(state["revision"])
            counts, _ = changed_counts(bench, state["revision"], deltas)
            zeros = bench.zeros()
            sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
            if not counts:
                return ProbeReport(refused="the deltas come to no weight")
            losses = bench.trial_losses(
                state["revision"], state["gradient_revision"], counts, PROBE_WINDOWS, work.progress
            )
            spent = spent_by(bench, before)
        scored.update(add_up(scored, spent))
        change, stderr = change_with_error(state["guard_losses"][: len(losses)], losses)
        return ProbeReport(
            layers={name: (count - zeros[name]) / sizes[name] for name, count in counts.items()},
            change=change if math.isfinite(change) else None,
            change_stderr=stderr if math.isfinite(stderr) else None,
            tokens=int(spent["probe"]),
        )

    return Probes(work.context.probes, measure)
