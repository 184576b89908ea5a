"""What a finished run leaves: the verified model directory, its card, metrics.json."""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prunewright.state import PrunewrightError
from prunewright.state.config import BASELINE
from prunewright.state.metrics import Control, Metrics, Pair, Perplexities, Sample, Stage
from prunewright.state.run import DENSE
from prunewright.tools.allocation.uniform import uniform_counts
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.finishing import complete
from prunewright.tools.losses import change_with_error, perplexities, perplexity
from prunewright.tools.model.head import Progress, told
from prunewright.tools.saving.card import model_card
from prunewright.tools.saving.model import save_model
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import write_json

_log = logging.getLogger("prunewright")

PROMPT = "Water boils at a lower temperature on a high mountain because"
"""What the dense and the pruned model continue, for people to read."""


@dataclass(frozen=True)
class Outcome:
    """What is known when the last step has ended, its revision being that of the masks alone."""

    status: str
    method: dict[str, str]
    revision: str
    guard: Pair
    domains: dict[str, Pair] = field(default_factory=dict)
    reason: str = ""
    steps: int = 0
    rollbacks: int = 0
    decisions: int = 0
    repairs: int = 0
    invalid_answers: int = 0
    probes: int = 0
    llm_calls: int = 0
    knowledge: Pair | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)


def finish(
    run: RunDirectory,
    bench: Workbench,
    outcome: Outcome,
    progress: Progress | None = None,
    tell: Callable[[Stage], None] | None = None,
) -> Metrics:
    """Do the stages, measure the test text, save and verify the model, write what it came to.

    Where the configuration says ``with_control``, uniform pruning is measured before it is saved.
    No model is saved that would be the dense one. May run again after a crash: stages that have
    ended are not done again, and the model directory appears whole or not at all.

    Args:
        run: where to.
        bench: the live model.
        outcome: of the steps, or of one shot.
        progress: told of the parts done.
        tell: told of each stage.

    Raises:
        PrunewrightError: the saved model does not reload to the same sparsity and losses.
        StoreError: cannot write.
    """
    revision, guard, training = outcome.revision, outcome.guard.final, run.config().adapt
    ended = complete(run.finishing_file, bench, revision, guard, training, progress, tell)
    began = time.perf_counter()
    tokens_before = dict(bench.tokens)
    saved = outcome.revision != DENSE
    control = sample = None
    # Each revision is asked for all at once: going from one to the other writes every layer.
    dense = perplexity(bench.test_losses(DENSE, progress))
    # Block by block each of its tokens would take as long as all windows together.
    sampled = saved and bench.request.offload == "none"
    dense_text = bench.sample(DENSE, PROMPT, progress) if sampled else ""
    losses = bench.test_losses(ended.revision, progress)
    final = perplexity(losses)
    if not math.isfinite(final) or not math.isfinite(ended.perplexity):
        raise PrunewrightError(
            "the pruned model's perplexity is not finite: it is broken and was not saved"
        )
    if sampled:
        pruned_text = bench.sample(ended.revision, PROMPT, progress)
        sample = Sample(prompt=PROMPT, dense=dense_text, pruned=pruned_text)
    knowledge = outcome.knowledge
    if knowledge is not None and ended.revision != outcome.revision:
        recalled = bench.knowledge(ended.revision, progress)
        knowledge = Pair(dense=knowledge.dense, final=recalled) if math.isfinite(recalled) else None
    tokens = {k: v - tokens_before.get(k, 0) for k, v in bench.tokens.items()}
    spent: list[Mapping[str, float]] = [outcome.tokens, *(one.tokens for one in ended.stages)]
    for key, value in (pair for uses in spent for pair in uses.items()):
        tokens[key] = tokens.get(key, 0) + int(value)
    seconds = outcome.seconds | {stage.name: stage.seconds for stage in ended.stages}
    if saved and run.config().with_control and not _is_uniform(outcome.method):
        control, tokens["control"], seconds["control"] = _measure_control(
            run, bench, outcome, ended.revision, losses, progress
        )
    metrics = Metrics(
        status=outcome.status,
        reason=outcome.reason,
        saved=saved,
        method=outcome.method,
        revision=ended.revision,
        sparsity=bench.sparsity(),
        dense_sparsity=sum(bench.dense_zeros.values()) / bench.loaded.prunable,
        steps=outcome.steps,
        rollbacks=outcome.rollbacks,
        decisions=outcome.decisions,
        repairs=outcome.repairs,
        invalid_answers=outcome.invalid_answers,
        probes=outcome.probes,
        llm_calls=outcome.llm_calls,
        perplexity=Perplexities(
            guard=Pair(dense=outcome.guard.dense, final=ended.perplexity),
            test=Pair(dense=dense, final=final),
        ),
        domains={
            name: Pair(dense=pair.dense, final=ended.domains.get(name, pair.final))
            for name, pair in outcome.domains.items()
        },
        knowledge=knowledge,
        stages=ended.stages,
        control=control,
        sample=sample,
        seconds=seconds,
        tokens=tokens,
        peak_memory_bytes=peak_memory(),
    )
    if metrics.saved:
        for _ in told("saving the model", (run,), 1, progress):
            save_pruned(run, bench, metrics)
    spent_here = time.perf_counter() - began - seconds.get("control", 0.0)
    seconds["finish"] = outcome.seconds.get("finish", 0.0) + spent_here  # of an earlier end, too
    seconds["total"] = sum(v for k, v in seconds.items() if k != "total")
    metrics = metrics.model_copy(update={"seconds": seconds, "peak_memory_bytes": peak_memory()})
    run.write_step_file(metrics.steps, "metrics", metrics.model_dump())
    write_json(run.metrics_file, metrics.model_dump())
    run.control_file.unlink(missing_ok=True)  # nothing asks for its weights any more
    _write_report(run)
    return metrics


def _is_uniform(method: dict[str, str]) -> bool:
    """Whether a baseline is the uniform control itself."""
    return method.get("allocation") == "uniform"


def _measure_control(
    run: RunDirectory,
    bench: Workbench,
    outcome: Outcome,
    final: str,
    losses: list[float],
    progress: Progress | None,
) -> tuple[Control, int, float]:
    """Prune every layer alike, in one shot, and measure it; its model is not saved.

    Args:
        run: the run's directory.
        bench: at the run's final revision, where it is left.
        outcome: of the run. At its target, the control is what ``baseline --allocation uniform``
            comes to.
        final: the run's final revision.
        losses: its own on the test windows.
        progress: told of the parts done.

    Returns:
        The control, the tokens that were run through the model for it, and the seconds it took.
    """
    began, before, reached = time.perf_counter(), dict(bench.tokens), bench.sparsity()
    target = bench.request.target
    wanted = target if outcome.status in ("target_reached", BASELINE) else reached
    counts = uniform_counts(bench, wanted).counts
    revision = bench.prune(DENSE, DENSE, counts, progress)
    guard_losses = bench.guard_losses(revision, progress)
    guard = perplexity(guard_losses)
    domains = perplexities(bench.request.texts.domains("guard"), guard_losses)
    ended = complete(run.control_file, bench, revision, guard, run.config().adapt, progress)
    revision, guard = ended.revision, ended.perplexity
    domains |= ended.domains
    test_losses = bench.test_losses(revision, progress)
    test = perplexity(test_losses)
    change, stderr = change_with_error(test_losses, losses)
    sparsity = bench.sparsity()
    bench.sync(final)
    spent = sum(bench.tokens.values()) - sum(before.values())
    spent += sum(n for stage in ended.stages for n in stage.tokens.values())
    bench.tokens.update(before)  # they are told as one use
    control = Control(
        revision=revision,
        sparsity=sparsity,
        guard=guard if math.isfinite(guard) else None,
        test=test if math.isfinite(test) else None,
        change=change if math.isfinite(test) else None,
        change_stderr=stderr,
        domains={name: v if math.isfinite(v) else None for name, v in domains.items()},
    )
    return control, spent, time.perf_counter() - began


def save_pruned(run: RunDirectory, bench: Workbench, metrics: Metrics) -> None:
    """Save and check the live model, with its card.

    Args:
        run: where to.
        bench: the model at its final revision.
        metrics: what the card tells.

    Raises:
        PrunewrightError: the saved model does not reload to the same sparsity and losses.
        StoreError: cannot write.
    """

    def card(values: str) -> str:
        return model_card(run.config(), metrics, bench.loaded.directory, values)

    save_model(run, bench, card)
    _log.info("the model is saved, reloaded and checked: %s", run.model)


def _write_report(run: RunDirectory) -> None:
    """The page for people; the run is whole without it, so no failure of it is the run's."""
    # Not at the top: the report's parts need this module.
    from prunewright.tools.report import write_report

    try:
        write_report([run.path])
    except Exception as error:
        _log.warning(
            "The run is finished and saved, but without its report: %s. What writes it: "
            "prunewright report %s",
            error or type(error).__name__,
            run.path,
        )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Linux counts the process that started this one in ru_maxrss; VmHWM begins again with exec.
    with suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
