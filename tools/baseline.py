"""One-shot pruning at a given allocation: the controls that every run is compared with."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

from prunewright.state import (
    Decision,
    InputError,
    LayerDelta,
    PruneConfig,
    Step,
    parse_pattern,
)
from prunewright.state.config import BASELINE
from prunewright.state.metrics import Metrics, Pair
from prunewright.state.run import DENSE
from prunewright.tools.adapt.training import check_training
from prunewright.tools.allocation import resolve_allocation
from prunewright.tools.bench.own_zeros import check_pattern, check_target, own_zeros_words
from prunewright.tools.bench.pruned import PrunedCopy
from prunewright.tools.bench.workbench import workbench
from prunewright.tools.losses import change_with_error, measures, perplexities, perplexity
from prunewright.tools.model.head import Progress
from prunewright.tools.model.layers import Layer
from prunewright.tools.results import Outcome, finish
from prunewright.tools.saving.model import try_saving
from prunewright.tools.store.rundir import RunDirectory


def prune_once(
    run: RunDirectory,
    config: PruneConfig,
    thread: str,
    progress: Progress | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Metrics:
    """Prune to the target (or the pattern) in one shot and write a run's files.

    Statistics are taken once, on the dense model, with the texts, windows and evaluation of a
    step-by-step run.

    Args:
        run: a created run directory.
        config: its configuration; target, criterion, pattern and allocation count, the agent
            does not. Where it names a pruned copy, its zeros and kept weights are taken instead.
        thread: what to call the run.
        progress: told of the parts done.
        tell: is sent ``begun`` once the model is loaded and the manifest written, and each `Stage`.

    Raises:
        InputError: the pruned copy is none, a layer does not divide into the pattern's groups,
            the allocation cannot be made, the model's own zeros leave nothing to prune, or the
            model could not be saved.
        StoreError: cannot write.
    """
    request = config.request
    unstructured = parse_pattern(request.pattern) is None
    allocate = resolve_allocation(config.one_shot, config.allocation_options, request.pattern)
    with workbench(request, run.path, progress) as bench:
        copy = None
        if request.pruned is not None:
            copy = PrunedCopy(bench, request.pruned)
        else:
            _check_pattern(request.pattern, bench.loaded.layers)
            check_pattern(bench)
            if unstructured:
                check_target(bench)
        bench.forget_statistics()  # those of an earlier baseline of this process
        bench.check_blocks()
        if config.adapt is not None:
            check_training(bench, config.adapt, run.path / "adapt")
        values = try_saving(run, bench, revisions=1)
        told = {"values": values, "notes": bench.loaded.notes}
        run.begin(thread, request, config.context, bench.facts(), **told)
        tell({"begun": True})
        tokens = dict(bench.tokens)
        counts, notes = None, []
        began = time.perf_counter()
        if copy is None and unstructured:
            allotment = allocate(bench, progress)
            counts, notes = allotment.counts, allotment.notes
        allocated = time.perf_counter()
        words = own_zeros_words(sum(bench.dense_zeros.values()), bench.loaded.prunable)
        notes = [*filter(None, [values, words]), *notes]
        before = bench.guard_losses(DENSE, progress)
        dense_sparsity = bench.sparsity()
        if copy is None:
            revision = bench.prune(DENSE, DENSE, counts, progress)
        else:
            revision = copy.store(progress)
            del copy  # its weights
        losses = bench.guard_losses(revision, progress)
        applied = bench.sparsities()
        value = perplexity(losses)
        change, stderr = change_with_error(before, losses)
        finite = math.isfinite(value)
        names = request.texts.domains("guard")
        dense = perplexities(names, before)
        final = perplexities(names, losses)
        shared = f"Allocation {config.one_shot}, one shot, pattern {request.pattern}."
        method = {
            "agent": BASELINE,
            "allocation": config.one_shot,
            "allocation_options": json.dumps(config.allocation_options),
            "criterion": request.criterion,
            "pattern": request.pattern,
        }
        if request.pruned is not None:
            shared = "The zeros of a pruned copy."
            method = {"agent": BASELINE, "pruned": request.pruned}
        step = Step(
            step=0,
            agent=BASELINE,
            verdict="accepted",
            decision=Decision(
                reasoning=shared,
                layers=[LayerDelta(name=n, delta=s) for n, s in applied.items()],
            ),
            applied=applied,
            notes=[
                *bench.loaded.notes,
                *bench.statistics_notes(),
                *notes,
                *bench.store.about(revision).get("notes", []),
            ],
            revision=revision,
            candidate=revision,
            sparsity_before=dense_sparsity,
            sparsity=bench.sparsity(),
            perplexity_before=perplexity(before),
            candidate_perplexity=value if finite else None,
            change=change if finite else None,
            change_stderr=stderr,
            domains=measures(names, dense, before, losses if finite else []),
        )
        run.write_trace([step])
        outcome = Outcome(
            status=BASELINE,
            method=method,
            revision=revision,
            steps=1,
            guard=Pair(dense=perplexity(before), final=value),
            domains={name: Pair(dense=dense[name], final=final[name]) for name in names},
            seconds={"allocation": allocated - began, "prune": time.perf_counter() - allocated},
            tokens={use: n - tokens[use] for use, n in bench.tokens.items()},
        )
        return finish(
            run,
            bench,
            outcome,
            progress,
            lambda stage: tell({"stage": stage.model_dump(mode="json")}),
        )


def _check_pattern(pattern: str, layers: dict[str, Layer]) -> None:
    """Refuse a pattern that a layer does not divide into, while nothing is computed yet."""
    parsed = parse_pattern(pattern)
    for layer in layers.values():
        if parsed is not None and layer.inputs % parsed[1]:
            raise InputError(
                f"pattern {pattern} does not fit the model: the {layer.inputs} inputs of "
                f"{layer.name} do not divide into groups of {parsed[1]}"
            )
