"""The six nodes. Each is thin: it calls tools and returns the part of the state that it changes.

A node may run again after a crash, so all it writes outside the state is content-addressed or
replaced as a whole.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar, cast

from langgraph.runtime import Runtime
from pydantic import ValidationError

from prunewright.graph.agents import Observation, make_agent
from prunewright.graph.agents.asking import ask, check, observe, spent_by
from prunewright.graph.agents.base import Probes
from prunewright.graph.correction import predicted_costs
from prunewright.graph.review import review
from prunewright.graph.routing import guard_reason, termination
from prunewright.graph.running.logs import log_fields
from prunewright.graph.running.stopping import call_alone, call_stoppable, check_stop
from prunewright.graph.whole_layers import (
    MISSING,
    check_model,
    check_request,
    land_whole,
    model_notes,
    nothing_fits,
)
from prunewright.graph.words.summary import (
    applied_words,
    decision_words,
    evaluated_words,
    profile_words,
    step_words,
)
from prunewright.state import (
    AppliedDecision,
    Decision,
    DecisionReport,
    InputError,
    ProbeReport,
    PruneContext,
    PruneRequest,
    PruneState,
    PruneUpdate,
    PrunewrightError,
    Review,
    Spent,
    StepRecord,
    StepSummary,
    StoreError,
)
from prunewright.state.config import describe_validation_error
from prunewright.state.metrics import Pair
from prunewright.state.run import TOLERANCE, Knowledge, add_up
from prunewright.tools.bench.own_zeros import check_pattern, check_target, own_zeros_words
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.ending import describe_ending
from prunewright.tools.masks import most_zeros
from prunewright.tools.model.head import Progress, change_with_error, perplexity
from prunewright.tools.results import Outcome, finish
from prunewright.tools.saving.model import try_saving
from prunewright.tools.store.revisions import DENSE
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import accepted_perplexity

_log = logging.getLogger("prunewright")

PROBE_WINDOWS = 2
"""Guard windows that a probe is measured on: the first ones."""
KEPT = 8
"""Steps of the history that the state holds: the latest."""
INTERVAL = 0.1
"""Seconds between two reports of progress, unless a part of the work is done."""
NO_THREAD = "default"
"""Stands for the thread where the graph runs without a checkpointer."""

Node = Callable[[PruneState, Runtime[PruneContext]], PruneUpdate]
_Node = TypeVar("_Node", bound=Callable[..., PruneUpdate])


def timed(node: _Node) -> _Node:
    """Add the node's wall time to the state's ``seconds``, and log it."""

    @functools.wraps(node)
    def wrapper(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
        check_stop()
        began, name = time.perf_counter(), node.__name__
        with log_fields(
            run=str(run_directory(runtime).path), step=state.get("step", 0) + 1, node=name
        ):
            _log.info("%s begins", name)
            try:
                update = call_alone(functools.partial(node, state, runtime))
            except Exception as error:
                _log.info("%s did not end: %s", name, type(error).__name__)
                raise
            seconds = time.perf_counter() - began
            told: dict[str, Any] = {"seconds": seconds}
            if update.get("history"):
                told["verdict"] = update["history"][-1]["verdict"]
            words = update.get("summary") or "nothing to do"
            _log.info("%s took %.2f s: %s", name, seconds, words, extra=told)
        return {**update, "seconds": {name: seconds}}

    return cast(_Node, wrapper)


@timed
def profile(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Profile every layer at the accepted revision; on a new thread, measure the dense model."""
    request, run = _request(state, runtime), run_directory(runtime)
    fresh = "revision" not in state
    step = 0 if fresh else state["step"]
    revision = DENSE if fresh else state["revision"]
    gradient_revision, gradient_step = revision, step
    if step % request.profile.gradient_every and not _gave_back(state, run):
        gradient_revision = state["gradient_revision"]
        gradient_step = state.get("gradient_step", 0)
    if fresh and _thread(runtime) == NO_THREAD and run.trace_file.exists():
        raise InputError(f"{run.path} holds another run: give another `out`, or a thread_id")
    with workbench(request, run.path) as bench:
        if fresh:
            check_pattern(bench)
            check_target(bench)
        if fresh and request.pattern_sparsity is not None:
            zeros = sum(bench.dense_zeros.values())
            check_model(request, bench.loaded, bench.pattern_gains(), zeros)
        if _context(runtime).guard.max_knowledge_drop is not None:
            bench.facts_hash()  # facts that cannot be used are refused before anything is scored
        values = ""
        if fresh or run.forked_after() == step:
            steps = math.ceil(request.target / request.step)
            bench.check_blocks()
            values = try_saving(run, bench, min(steps, _context(runtime).max_steps))
        run.begin(_thread(runtime), request, _context(runtime), bench, values)
        before = dict(bench.tokens)
        update: PruneUpdate = {}
        if fresh:
            losses = bench.guard_losses(DENSE, _progress(runtime))
            dense = perplexity(losses)
            if not math.isfinite(dense):
                raise InputError(
                    f"the model {request.model} is broken before any pruning: its perplexity on "
                    f"the guard text is not finite in {bench.loaded.dtype}. Try another dtype"
                )
            update = _fresh_state(dense, losses, bench.sparsity())
        signals = bench.profile(revision, gradient_revision, _progress(runtime))
        signals = signals.model_copy(update={"gradient_step": gradient_step})
        tokens = _spent(bench, before)
    broken = [
        p.short_name
        for p in signals.layers
        if not math.isfinite(p.s + p.g + sum(p.loss_cost) + (p.pattern_cost or 0.0))
    ]
    if broken:
        raise PrunewrightError(
            f"the signals of {len(broken)} layers are not finite ({', '.join(broken[:5])}): "
            f"activations or gradients overflow in dtype {request.dtype}. The run cannot go on; "
            "start a new one with dtype bfloat16 or float32"
        )
    path = run.write_step_file(step, "profile", signals.model_dump(mode="json"))
    return {
        **update,
        "summary": profile_words(step, signals),
        # Whole and as plain values, however the request came in.
        "request": request.model_dump(mode="json"),
        "gradient_revision": gradient_revision,
        "gradient_step": gradient_step,
        "profile": {"path": path, "table": signals.table()},
        "tokens": tokens,
    }


@timed
def agent_decide(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Ask the agent; a refused answer is sent back with what was wrong, a bounded number of times.

    After the last refusal the decision is empty, which counts as a stall.
    """
    request, context, run = _request(state, runtime), _context(runtime), run_directory(runtime)
    step, records = state["step"], run.read_records(state["history"])
    observation = observe(state, request, context, run, records)
    scored: dict[str, float] = {}
    if context.probes:
        probes = _probes(state, observation, context.probes, runtime, scored)
        observation = replace(observation, probes=probes)
    # Of tries of this very step that ended in an error.
    lost = run.read_spent(step)
    spent = sum((Spent(calls=r.llm_calls, tokens=r.llm_tokens) for r in records), lost)
    name, agent = make_agent(context.model_copy(update={"out": str(run.path)}), spent)
    try:
        report = call_stoppable(
            lambda: ask(name, agent, observation, repairs=context.asking.repairs)
        )
    except PrunewrightError:
        lost += spent_by(agent)
        if lost.calls:
            run.write_spent(step, lost)
        raise
    report = report.model_copy(
        update={"calls": lost.calls + report.calls, "tokens": lost.tokens + report.tokens}
    )
    assert state["profile"] is not None
    return {
        "summary": decision_words(report),
        "decision": report.model_dump(mode="json"),
        # Its table was for whoever watches the decision.
        "profile": {"path": state["profile"]["path"]},
        "tokens": scored | ({"llm": report.tokens} if report.tokens else {}),
    }


@timed
def apply_prune(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Turn the deltas into masks and store the candidate revision; never over the target.

    Before that a person is asked, if the context says so.
    """
    request, context, run = _request(state, runtime), _context(runtime), run_directory(runtime)
    # Neither the rules nor a person needs the earlier steps.
    observation = observe(state, request, context, run, records=())
    report = _checked(state, observation)
    outcome = AppliedDecision(report=review(report, observation) if context.review else report)
    update: PruneUpdate = {"decision": None, "candidate": None, "candidate_sparsity": None}
    deltas = {item.name: item.delta for item in outcome.report.decision.layers}
    if deltas:
        with workbench(request, run.path) as bench:
            run.check(request, bench)
            before = dict(bench.tokens)
            bench.sync(state["revision"])
            # Where the run may end with this step, it ends on the target.
            last = outcome.report.decision.done or observation.steps_left == 1
            fill = TOLERANCE if last else 0.0
            counts, notes = _changed_counts(bench, state["revision"], deltas, fill)
            applied = {}
            if counts:
                earlier = bench.sparsities()
                candidate = bench.prune(
                    state["revision"], state["gradient_revision"], counts, _progress(runtime)
                )
                notes = [*notes, *bench.store.about(candidate).get("notes", [])]
                bench.sync(candidate)
                now = bench.sparsities()
                applied = {name: now[name] - earlier[name] for name in counts}
                update["candidate"] = candidate
                update["candidate_sparsity"] = bench.sparsity()
            update["tokens"] = _spent(bench, before)
        costs = predicted_costs(applied, observation.profile)
        changes = {"applied": applied, "predicted_costs": costs, "notes": notes}
        outcome = outcome.model_copy(update=changes)
    update["summary"] = applied_words(
        outcome.applied, state["sparsity"], update["candidate_sparsity"]
    )
    update["applied"] = run.write_step_file(
        state["step"], "applied", outcome.model_dump(mode="json")
    )
    return update


@timed
def evaluate_ppl(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Guard perplexity of the candidate, and whether it is rolled back."""
    candidate = state["candidate"]
    if candidate is None:
        return {"candidate_perplexity": None, "candidate_losses": [], "rollback_reason": ""}
    request, context, run = _request(state, runtime), _context(runtime), run_directory(runtime)
    with workbench(request, run.path) as bench:
        run.check(request, bench)
        before = dict(bench.tokens)
        losses = bench.guard_losses(candidate, _progress(runtime))
        value = perplexity(losses)
        finite = math.isfinite(value)
        knowledge, recalled = None, None
        if context.guard.max_knowledge_drop is not None and finite:
            knowledge = _knowledge(state, bench, _progress(runtime))
            recalled = bench.knowledge(candidate, _progress(runtime))
        tokens = _spent(bench, before)
    reason = guard_reason(
        state["perplexity"],
        value,
        state["dense_perplexity"],
        context.guard,
        None if knowledge is None or recalled is None else (knowledge["dense"], recalled),
    )
    measured: PruneUpdate = {}
    if knowledge is not None and recalled is not None:
        known = recalled if math.isfinite(recalled) else None
        measured = {"knowledge": knowledge, "candidate_knowledge": known}
    return {
        **measured,
        "summary": evaluated_words(state["perplexity"], value, reason),
        "candidate_perplexity": value if finite else None,
        "candidate_losses": losses if finite else [],
        "rollback_reason": reason,
        "tokens": tokens,
    }


@timed
def rollback(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Drop the candidate and bring the live model back to the accepted revision."""
    request, run = _request(state, runtime), run_directory(runtime)
    with workbench(request, run.path) as bench:
        run.check(request, bench)
        bench.sync(state["revision"])
    words = f"back at revision {state['revision'][:12]}: {state['rollback_reason']}"
    return {"summary": words, "rollbacks": state["rollbacks"] + 1}


@timed
def reflect(state: PruneState, runtime: Runtime[PruneContext]) -> PruneUpdate:
    """Accept or not, record the step, decide whether the run goes on.

    When it ends, the results are written before the end is recorded.
    """
    request, context, run = _request(state, runtime), _context(runtime), run_directory(runtime)
    asked = min(request.step, max(0.0, request.target - state["sparsity"]))
    record = _record(state, run.read_applied(state["applied"]), asked)
    record, at_end = _whole_layers(_with_model_notes(record, run), run, request)
    if state["history"]:
        record = record.model_copy(update={"previous": state["history"][-1]["record"]})
    summary: StepSummary = {
        "step": record.step,
        "record": run.write_step_file(record.step, "record", record.model_dump(mode="json")),
        "verdict": record.verdict,
        "sparsity": record.sparsity,
        "perplexity": accepted_perplexity(record),
        "change": record.change,
        "layers": len(record.applied),
    }
    history = _latest([*state["history"], summary], run)
    records = run.read_records(history)
    run.write_trace(records)
    accepted = record.verdict == "accepted"
    # A person who rejects can stop the run, too: that is not the run's to do.
    stalls = 0 if accepted else state["stalls"] + (not _rejected(record.review))
    update: PruneUpdate = {
        "summary": step_words(record),
        "step": state["step"] + 1,
        "revision": record.revision,
        "sparsity": record.sparsity,
        "perplexity": summary["perplexity"],
        "guard_losses": state["candidate_losses"] if accepted else state["guard_losses"],
        "stalls": stalls,
        "history": history,
        "status": termination(
            sparsity=record.sparsity,
            target=request.target,
            steps=state["step"] + 1,
            max_steps=context.max_steps,
            stalls=stalls,
            max_stalls=context.max_stalls,
            nothing_fits=at_end,
            done=record.decision.done,
            cut=accepted and _is_cut(record, run, request),
        ),
        # What only this step needed is not carried on into the next one's checkpoints.
        "profile": None,
        "decision": None,
        "candidate": None,
        "candidate_sparsity": None,
        "candidate_perplexity": None,
        "candidate_losses": [],
        "candidate_knowledge": None,
        "applied": "",
        "rollback_reason": "",
    }
    known, recalled = state.get("knowledge"), record.candidate_knowledge
    if accepted and known is not None and recalled is not None:
        known = {**known, "accepted": recalled, "revision": record.revision}
        update["knowledge"] = known
    runtime.stream_writer({"step": record.model_dump(mode="json")})
    if update["status"] != "running":
        outcome = Outcome(
            status=update["status"],
            reason=describe_ending(
                update["status"],
                records,
                context,
                request.target,
                saved=record.revision != DENSE,
            ).reason,
            method={"agent": record.agent, "criterion": request.criterion},
            revision=record.revision,
            steps=len(records),
            rollbacks=state["rollbacks"],
            decisions=sum(r.verdict != "empty" for r in records),
            repairs=sum(r.repairs for r in records),
            invalid_answers=sum(len(r.invalid_answers) for r in records),
            probes=sum(not probe.refused for r in records for probe in r.probes),
            llm_calls=sum(r.llm_calls for r in records),
            guard_dense=state["dense_perplexity"],
            guard_losses=update["guard_losses"],
            # Not where the bound was lifted before the last step was accepted.
            knowledge=Pair(dense=known["dense"], final=known["accepted"])
            if known is not None and known["revision"] == record.revision
            else None,
            seconds=state["seconds"],
            tokens=state["tokens"],
        )
        with workbench(request, run.path) as bench:
            run.check(request, bench)
            metrics = finish(run, bench, outcome, _progress(runtime))
        runtime.stream_writer({"metrics": metrics.model_dump(mode="json")})
    return update


def _knowledge(state: PruneState, bench: Workbench, progress: Progress | None) -> Knowledge:
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


def _probes(
    state: PruneState,
    observation: Observation,
    count: int,
    runtime: Runtime[PruneContext],
    scored: dict[str, float],
) -> Probes:
    """The trials that an agent may have measured from the accepted revision in this step.

    Args:
        state: the step's.
        observation: what a trial is checked against, as a decision is.
        count: trials allowed.
        runtime: the node's.
        scored: is told the tokens that they take, by use.
    """
    request, run, progress = _request(state, runtime), run_directory(runtime), _progress(runtime)

    def measure(trial: Decision) -> ProbeReport:
        decision, problems = check(trial, observation)
        deltas = {item.name: item.delta for item in decision.layers}
        if not deltas and not problems:
            problems = ["name at least one layer"]
        if problems:
            return ProbeReport(refused="; ".join(problems))
        with workbench(request, run.path) as bench:
            run.check(request, bench)
            before = dict(bench.tokens)
            bench.sync(state["revision"])
            counts, _ = _changed_counts(bench, state["revision"], deltas)
            zeros = bench.zeros()
            sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
            if not counts:
                return ProbeReport(refused="the deltas come to no weight")
            losses = bench.trial_losses(
                state["revision"], state["gradient_revision"], counts, PROBE_WINDOWS, progress
            )
            spent = _spent(bench, before)
        scored.update(add_up(scored, spent))
        change, stderr = change_with_error(state["guard_losses"][: len(losses)], losses)
        return ProbeReport(
            layers={name: (count - zeros[name]) / sizes[name] for name, count in counts.items()},
            change=change if math.isfinite(change) else None,
            change_stderr=stderr if math.isfinite(stderr) else None,
            tokens=int(spent["probe"]),
        )

    return Probes(count, measure)


def _changed_counts(
    bench: Workbench, revision: str, deltas: dict[str, float], fill: float = 0.0
) -> tuple[dict[str, int], list[str]]:
    """As `land` at the live revision, of the layers whose number of zeros changes.

    With an N:M pattern as `land_whole`.
    """
    request, zeros = bench.request, bench.zeros()
    sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
    if request.pattern_sparsity is not None:
        changes, notes = land_whole(
            deltas,
            pruned=bench.store.manifest(revision),
            counts={name: gain for name, gain in bench.pattern_gains().items() if gain},
            zeros=sum(zeros.values()),
            total=bench.loaded.prunable,
            target=request.target,
            step=request.step,
        )
        return {name: bench.dense_zeros[name] + gain for name, gain in changes.items()}, notes
    counts, notes = land(
        deltas,
        zeros,
        sizes,
        request.target,
        request.max_layer_sparsity,
        request.step,
        request.max_delta,
        fill,
        own=bench.dense_zeros,
    )
    return {name: count for name, count in counts.items() if count != zeros[name]}, notes


def land(
    deltas: dict[str, float],
    zeros: dict[str, int],
    numel: dict[str, int],
    target: float,
    ceiling: float = 1.0,
    step: float = 1.0,
    max_delta: float = 1.0,
    fill: float = 0.0,
    own: Mapping[str, int] = MappingProxyType({}),
) -> tuple[dict[str, int], list[str]]:
    """Zeros that each layer shall have; what is added is scaled to keep to the target and step.

    Counts are whole weights: each delta is rounded towards 0, and what the pruned layers as a
    whole lose by that goes, one weight each, to those that lost most. Where that ends less than
    ``fill`` below the target, what is added is scaled up to land on it to the weight, as far as
    the layers that are pruned have room.

    Args:
        deltas: sparsity to add by layer; negative gives back.
        zeros: zeros of every layer now.
        numel: weights of every layer.
        target: sparsity that is never exceeded.
        ceiling: sparsity that no layer exceeds, to the next whole weight: agents count in
            fractions, and a fraction that could never be taken would be offered for ever.
        step: sparsity that is added to the model at most.
        max_delta: sparsity that scaling up adds to a layer at most.
        fill: sparsity below the target within which the step is scaled up to it.
        own: zeros of the dense model, which are never given back; 0 where it is not said.

    Returns:
        Counts of the layers named in ``deltas``, and a note where they were scaled.
    """
    back = {
        n: min(math.floor(-delta * numel[n] + 1e-6), zeros[n] - own.get(n, 0))
        for n, delta in deltas.items()
        if delta < 0
    }
    total = sum(numel.values())
    bounds = {
        "land on the target": most_zeros(target, total) - sum(zeros.values()),
        "keep to the step": step * total,
    }
    purpose = min(bounds, key=lambda words: bounds[words])
    left = max(0, bounds[purpose] + sum(back.values()))
    shares = {name: delta * numel[name] for name, delta in deltas.items() if delta >= 0}
    wanted = sum(shares.values())
    notes = []
    if wanted > left + 1e-6:
        scale = left / wanted
        shares = {name: scale * share for name, share in shares.items()}
        notes.append(f"deltas scaled by {scale:.4f} to {purpose}")
    room = {n: max(0, math.ceil(ceiling * numel[n] - 1e-6) - zeros[n]) for n in shares}
    gains = {n: math.floor(share + 1e-6) for n, share in shares.items()}
    lost = max(0, math.floor(sum(shares.values()) + 1e-3) - sum(gains.values()))
    open_ = [n for n in shares if gains[n] < min(room[n], shares[n])]
    for name in sorted(open_, key=lambda n: (gains[n] - shares[n], n))[:lost]:
        gains[name] += 1
    gains = {n: min(gain, room[n]) for n, gain in gains.items()}
    gained = sum(gains.values())
    missing = max(0, int(bounds["land on the target"]) + sum(back.values())) - gained
    if 0 < missing <= fill * total and gained:
        limits = {n: min(room[n], math.floor(max_delta * numel[n] + 1e-6)) for n in shares}
        gains = _raised(gains, shares, limits, min(missing, max(0, math.floor(left) - gained)))
        scale = sum(gains.values()) / gained
        if f"{scale:.4f}" != "1.0000":
            notes.append(f"deltas scaled by {scale:.4f} to land on the target")
    changes = gains | {name: -count for name, count in back.items()}
    return {name: zeros[name] + change for name, change in changes.items()}, notes


def _raised(
    gains: dict[str, int], shares: dict[str, float], limits: dict[str, int], missing: int
) -> dict[str, int]:
    """Gains with so many weights more, in proportion to the shares, none above its limit."""
    gains = dict(gains)
    while missing > 0:
        open_ = sorted((n for n in gains if gains[n] < limits[n]), key=lambda n: (-shares[n], n))
        if not open_:
            break
        scale = missing / max(sum(shares[n] for n in open_), 1e-9)
        more = {n: min(math.floor(scale * shares[n]), limits[n] - gains[n]) for n in open_}
        if not any(more.values()):
            more = dict.fromkeys(open_[:missing], 1)
        gains |= {n: gains[n] + count for n, count in more.items()}
        missing -= sum(more.values())
    return gains


def _latest(history: list[StepSummary], run: RunDirectory) -> list[StepSummary]:
    """What the state keeps of a history: each superstep stores it, and records name those before.

    Those of the first version do not, and are kept.
    """
    first = max(0, len(history) - KEPT)
    while first and not run.read_record(history[first]).previous:
        first -= 1
    return history[first:]


def _gave_back(state: PruneState, run: RunDirectory) -> bool:
    """Whether the step before gave weights back: gradients know nothing of those."""
    last = [run.read_record(summary) for summary in state["history"][-1:]]
    return any(r.verdict == "accepted" and min(r.applied.values(), default=0) < 0 for r in last)


def _is_cut(record: StepRecord, run: RunDirectory, request: PruneRequest) -> bool:
    """Whether the bound of a step alone kept it from the target, so that another one lands there.

    Not for a weight a step, which rounding to whole ones loses where steps divide the target:
    another step costs as much as any.
    """
    missing = request.target - record.sparsity
    over = request.target - record.sparsity_before > request.step
    # With a pattern layers are taken whole.
    if not over or missing > TOLERANCE or request.pattern_sparsity is not None:
        return False
    total = sum(p.parameters for p in run.read_profile(record.profile).layers)
    return most_zeros(request.target, total) - round(record.sparsity * total) > record.step + 1


def _checked(state: PruneState, observation: Observation) -> DecisionReport:
    """The state's decision, checked once more: people edit states.

    Raises:
        InputError: it breaks a bound; the state can be edited again.
    """
    again = "edit it again (update_state, as_node agent_decide) or fork from an earlier step"
    try:
        report = DecisionReport.model_validate(state["decision"])
    except ValidationError as error:
        words = describe_validation_error(error, DecisionReport)
        raise InputError(f"the state holds no decision: {words}; {again}") from None
    decision, problems = check(report.decision, observation)
    if problems:
        raise InputError(f"the state's decision cannot be applied: {'; '.join(problems)}; {again}")
    deltas = {item.name: item.delta for item in decision.layers}
    predicted = observation.profile.predicted_change(deltas) if deltas else None
    return report.model_copy(update={"decision": decision, "predicted_change": predicted})


def _record(state: PruneState, outcome: AppliedDecision, asked: float) -> StepRecord:
    report = outcome.report
    candidate, reason = state["candidate"], state["rollback_reason"]
    accepted = candidate is not None and not reason
    if candidate is None:
        chosen = "the deltas come to no weight" if report.decision.layers else ""
        idle = report.invalid_answers[-1] if report.refused else "the agent chose no layer"
        reason = chosen or idle
        if _rejected(report.review):
            reason = report.decision.reasoning
    change = stderr = None
    if state["candidate_losses"]:
        change, stderr = change_with_error(state["guard_losses"], state["candidate_losses"])
        change = change if math.isfinite(change) else None
        stderr = stderr if math.isfinite(stderr) else None
    assert state["profile"] is not None
    known, recalled = state.get("knowledge"), state.get("candidate_knowledge")
    return StepRecord(
        step=state["step"],
        agent=report.agent,
        verdict="accepted" if accepted else "empty" if candidate is None else "rolled_back",
        reason=reason,
        decision=report.decision,
        applied=outcome.applied,
        predicted_costs=outcome.predicted_costs,
        invalid_answers=report.invalid_answers,
        refused_answers=report.refused_answers,
        notes=[*report.notes, *outcome.notes],
        profile=state["profile"]["path"],
        revision=candidate if accepted and candidate else state["revision"],
        candidate=candidate,
        sparsity_before=state["sparsity"],
        sparsity=(state["candidate_sparsity"] or 0.0) if accepted else state["sparsity"],
        asked=asked,
        perplexity_before=state["perplexity"],
        candidate_perplexity=state["candidate_perplexity"],
        change=change,
        change_stderr=stderr,
        knowledge_dense=known["dense"] if known is not None and recalled is not None else None,
        candidate_knowledge=recalled,
        predicted_change=report.predicted_change,
        repairs=report.repairs,
        llm_calls=report.calls,
        llm_tokens=report.tokens,
        probes=report.probes,
        review=report.review,
    )


def _with_model_notes(record: StepRecord, run: RunDirectory) -> StepRecord:
    """The first step's record with what must be told of the model: what is saved of it, zeros of
    its own, what stays dense, what calibration did not reach."""
    if record.step:
        return record
    profile = run.read_profile(record.profile)
    layers = profile.layers
    zeros = sum(round(p.dense_sparsity * p.parameters) for p in layers)
    words = own_zeros_words(zeros, sum(p.parameters for p in layers))
    told = [run.manifest().get("values", ""), words]
    notes = [*profile.notes, *record.notes, *filter(None, told)]
    return record.model_copy(update={"notes": notes})


def _whole_layers(
    record: StepRecord, run: RunDirectory, request: PruneRequest
) -> tuple[StepRecord, bool]:
    """What a pattern adds to a record's notes, and whether no layer fits under the target now."""
    whole = request.pattern_sparsity
    if whole is None:
        return record, False
    profile = run.read_profile(record.profile)
    applied = record.applied if record.verdict == "accepted" else {}
    at_end = nothing_fits(profile, applied, whole, request.target)
    notes = [*record.notes, *(model_notes(profile) if record.step == 0 else [])]
    missing = request.target - record.sparsity
    if at_end and missing > TOLERANCE:
        notes.append(f"{missing:.4f} {MISSING}")
    return record.model_copy(update={"notes": notes}), at_end


def _rejected(review: Review | None) -> bool:
    return review is not None and review.verdict == "rejected"


def _fresh_state(dense: float, losses: list[float], sparsity: float) -> PruneUpdate:
    return {
        "step": 0,
        "status": "running",
        "revision": DENSE,
        "sparsity": sparsity,
        "perplexity": dense,
        "guard_losses": losses,
        "dense_perplexity": dense,
        "rollbacks": 0,
        "stalls": 0,
        "history": [],
    }


def _request(state: PruneState, runtime: Runtime[PruneContext]) -> PruneRequest:
    """The run's request; as the first node's input it is what a user sent.

    Raises:
        InputError: invalid, its pattern rules out its target or its other bounds, or the directory
            holds another thread's run.
        StoreError: it is not that of the run's configuration.
    """
    value: Any = state["request"]
    if isinstance(value, PruneRequest):
        request = value
    else:
        try:
            request = PruneRequest.model_validate(value)
        except ValidationError as error:
            raise InputError(describe_validation_error(error, PruneRequest)) from None
    check_request(request)
    return run_directory(runtime).settle(_thread(runtime), request)


def _context(runtime: Runtime[PruneContext]) -> PruneContext:
    return runtime.context or PruneContext()


def _thread(runtime: Runtime[PruneContext]) -> str:
    info = runtime.execution_info
    return (info.thread_id if info else None) or NO_THREAD


def run_directory(runtime: Runtime[PruneContext]) -> RunDirectory:
    """The run's directory: what the context says, or one of the thread's name."""
    out = _context(runtime).out
    return RunDirectory(out if out else f"runs/{_thread(runtime)}")


def _progress(runtime: Runtime[PruneContext]) -> Progress:
    """Tells whoever watches the run, but not of every layer: each word wakes other threads."""
    told = -math.inf

    def report(label: str, done: int, total: int) -> None:
        nonlocal told
        check_stop()
        now = time.monotonic()
        if done < total and now - told < INTERVAL:
            return
        told = now
        _log.debug("%s: %d of %d", label, done, total)
        runtime.stream_writer({"progress": {"label": label, "done": done, "total": total}})

    return report


def _spent(bench: Workbench, before: dict[str, int]) -> dict[str, float]:
    return {k: v - before[k] for k, v in bench.tokens.items() if v != before[k]}
