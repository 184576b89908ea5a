"""The first node: every layer's signals at the accepted revision."""

import math

from prunewright.graph.nodes.common import NO_THREAD, Work, node, spent_by
from prunewright.graph.whole_layers import check_model
from prunewright.graph.words.summary import profile_words
from prunewright.state import InputError, PruneState, PruneUpdate, PrunewrightError
from prunewright.state.run import DENSE
from prunewright.tools.bench.own_zeros import check_pattern, check_target
from prunewright.tools.losses import perplexities, perplexity
from prunewright.tools.store.rundir import RunDirectory


@node
def profile(state: PruneState, work: Work) -> PruneUpdate:
    """Profile every layer at the accepted revision; on a new thread, measure the dense model."""
    request, run = work.request, work.run
    fresh = "revision" not in state
    step = 0 if fresh else state["step"]
    revision = DENSE if fresh else state["revision"]
    gradient_revision, gradient_step = revision, step
    if step % request.profile.gradient_every and not _needs_gradients(state, run):
        gradient_revision = state["gradient_revision"]
        gradient_step = state.get("gradient_step", 0)
    if fresh and work.thread == NO_THREAD and run.trace_file.exists():
        raise InputError(f"{run.path} holds another run: give another `out`, or a thread_id")
    with work.live_model() as bench:
        from prunewright.tools.adapt.training import check_training  # torch takes seconds
        from prunewright.tools.saving.model import try_saving

        values = ""
        if fresh:
            check_pattern(bench)
            check_target(bench)
        if fresh and request.pattern_sparsity is not None:
            zeros = sum(bench.dense_zeros.values())
            check_model(request, bench.loaded, bench.pattern_gains(), zeros)
        if work.context.guard.max_knowledge_drop is not None:
            bench.facts_hash()  # facts that cannot be used are refused before anything is scored
        if fresh or run.forked_after() == step:
            steps = math.ceil(request.target / request.step)
            bench.check_blocks()
            if work.context.adapt is not None:
                check_training(bench, work.context.adapt, run.path / "adapt")
            values = try_saving(run, bench, min(steps, work.context.max_steps))
        notes = {"values": values, "notes": bench.loaded.notes}
        run.begin(work.thread, request, work.context, bench.facts(), **notes)
        before = dict(bench.tokens)
        update: PruneUpdate = {}
        if fresh:
            losses = bench.guard_losses(DENSE, work.progress)
            dense = perplexity(losses)
            if not math.isfinite(dense):
                raise InputError(
                    f"the model {request.model} is broken before any pruning: its perplexity on "
                    f"the guard text is not finite in {bench.loaded.dtype}. Try another dtype"
                )
            update = _fresh_state(dense, losses, bench.sparsity())
            if names := request.texts.domains("guard"):
                update["dense_domains"] = perplexities(names, losses)
        signals = bench.profile(revision, gradient_revision, work.progress, work.context.signals)
        signals = signals.model_copy(update={"gradient_step": gradient_step})
        tokens = spent_by(bench, before)
    broken = [
        p.short_name
        for p in signals.layers
        if not math.isfinite(sum(p.measured.values()) + sum(p.loss_cost) + (p.pattern_cost or 0.0))
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


def _needs_gradients(state: PruneState, run: RunDirectory) -> bool:
    """Whether a step may not go by older gradients.

    Those know nothing of weights that the step before restored. So does going back to the best
    revision, as a run did that is to reach a higher target now. Past the target steps exchange
    weights that cost almost alike, which older gradients cannot tell apart.
    """
    return state.get("best") is not None or any(
        step.kept is not None
        or (step.verdict == "accepted" and min(step.applied.values(), default=0) < 0)
        for step in run.read_steps(state["history"])[-1:]
    )


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
        "best": None,
        "history": [],
    }
