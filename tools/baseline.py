"""Uniform one-shot pruning: the control that every run is compared with."""

import math
import time

from prunewright.state import (
    Decision,
    InputError,
    LayerDelta,
    PruneConfig,
    StepRecord,
    parse_pattern,
)
from prunewright.state.metrics import Metrics
from prunewright.tools.layers import Layer
from prunewright.tools.perplexity import Progress, change_with_error, perplexity
from prunewright.tools.results import Outcome, finish
from prunewright.tools.revisions import DENSE
from prunewright.tools.rundir import RunDirectory
from prunewright.tools.workbench import workbench

BASELINE = "baseline"
"""The name that stands for "no agent" in a run directory's config and trace."""


def prune_once(
    run: RunDirectory, config: PruneConfig, thread: str, progress: Progress | None = None
) -> Metrics:
    """Prune every layer to the target (or the pattern) in one shot and write a run's files.

    Statistics are taken once, on the dense model, with the texts, windows and evaluation of a
    step-by-step run.

    Args:
        run: a created run directory.
        config: its configuration; target, criterion and pattern count, the agent does not.
        thread: what to call the run.
        progress: told of the parts done.

    Raises:
        InputError: a layer does not divide into the pattern's groups.
        StoreError: cannot write.
    """
    request = config.request
    began = time.perf_counter()
    with workbench(request, run.path) as bench:
        tokens_before = dict(bench.tokens)
        _check_pattern(request.pattern, bench.loaded.layers)
        run.begin(thread, request, config.context, bench)
        before = bench.guard_losses(DENSE, progress)
        dense_sparsity = bench.sparsity()
        counts = None
        if parse_pattern(request.pattern) is None:
            counts = {
                name: math.floor(request.target * layer.numel)
                for name, layer in bench.loaded.layers.items()
            }
        revision = bench.prune(DENSE, DENSE, counts, progress)
        losses = bench.guard_losses(revision, progress)
        applied = bench.sparsities()
        value = perplexity(losses)
        change, stderr = change_with_error(before, losses)
        run.write_trace(
            [
                StepRecord(
                    step=0,
                    agent=BASELINE,
                    verdict="accepted",
                    reason="",
                    decision=Decision(
                        reasoning=f"Uniform, one shot, pattern {request.pattern}.",
                        layers=[LayerDelta(name=n, delta=s) for n, s in applied.items()],
                    ),
                    applied=applied,
                    invalid_answers=[],
                    notes=[],
                    profile="",
                    revision=revision,
                    candidate=revision,
                    sparsity_before=dense_sparsity,
                    sparsity=bench.sparsity(),
                    perplexity_before=perplexity(before),
                    candidate_perplexity=value if math.isfinite(value) else None,
                    change=change if math.isfinite(value) else None,
                    change_stderr=stderr if math.isfinite(value) else None,
                    predicted_change=None,
                    llm_tokens=0,
                )
            ]
        )
        outcome = Outcome(
            status=BASELINE,
            method={"agent": BASELINE, "criterion": request.criterion, "pattern": request.pattern},
            revision=revision,
            steps=1,
            guard_dense=perplexity(before),
            guard_losses=losses,
            seconds={BASELINE: time.perf_counter() - began},
            tokens={use: n - tokens_before[use] for use, n in bench.tokens.items()},
        )
        return finish(run, bench, outcome, progress)


def _check_pattern(pattern: str, layers: dict[str, Layer]) -> None:
    """Refuse a pattern that a layer does not divide into, while nothing is computed yet."""
    parsed = parse_pattern(pattern)
    for layer in layers.values():
        inputs = layer.shape[-2 if layer.transposed else -1]
        if parsed is not None and inputs % parsed[1]:
            raise InputError(
                f"pattern {pattern} does not fit the model: the {inputs} inputs of {layer.name} "
                f"do not divide into groups of {parsed[1]}"
            )
