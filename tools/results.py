"""What a finished run leaves: the verified model directory, its card, metrics.json."""

import logging
import math
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prunewright.state import PrunewrightError
from prunewright.state.metrics import Metrics, Pair, Perplexities
from prunewright.tools.card import model_card
from prunewright.tools.perplexity import Progress, perplexity
from prunewright.tools.revisions import DENSE
from prunewright.tools.rundir import RunDirectory
from prunewright.tools.saving import save_model
from prunewright.tools.storage import write_json
from prunewright.tools.workbench import Workbench

_log = logging.getLogger("prunewright")


@dataclass(frozen=True)
class Outcome:
    """What is known when the last step has ended."""

    status: str
    method: dict[str, str]
    revision: str
    reason: str = ""
    steps: int = 0
    rollbacks: int = 0
    decisions: int = 0
    repairs: int = 0
    invalid_answers: int = 0
    probes: int = 0
    llm_calls: int = 0
    guard_dense: float = math.nan
    guard_losses: list[float] = field(default_factory=list)
    knowledge: Pair | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)


def finish(
    run: RunDirectory,
    bench: Workbench,
    outcome: Outcome,
    progress: Progress | None = None,
) -> Metrics:
    """Measure the test text, save and verify the model, write card, metrics and report.

    No model is saved that would be the dense one. May run again after a crash: the model
    directory appears whole or not at all.

    Raises:
        PrunewrightError: the saved model does not reload to the same sparsity and losses.
        StoreError: cannot write.
    """
    began = time.perf_counter()
    tokens_before = dict(bench.tokens)
    dense = perplexity(bench.test_losses(DENSE, progress, undoable=True))
    final = perplexity(bench.test_losses(outcome.revision, progress))
    if not math.isfinite(final):
        raise PrunewrightError(
            "the pruned model's perplexity is not finite: it is broken and was not saved"
        )
    tokens = {k: v - tokens_before.get(k, 0) for k, v in bench.tokens.items()}
    for key, value in outcome.tokens.items():
        tokens[key] = tokens.get(key, 0) + int(value)
    seconds = dict(outcome.seconds)
    metrics = Metrics(
        status=outcome.status,
        reason=outcome.reason,
        saved=outcome.revision != DENSE,
        method=outcome.method,
        revision=outcome.revision,
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
            guard=Pair(dense=outcome.guard_dense, final=perplexity(outcome.guard_losses)),
            test=Pair(dense=dense, final=final),
        ),
        knowledge=outcome.knowledge,
        seconds=seconds,
        tokens=tokens,
        peak_memory_bytes=peak_memory(),
    )
    if metrics.saved:
        directory = bench.loaded.directory

        def card(values: str) -> str:
            return model_card(run.config(), metrics, directory, values)

        save_model(run, bench, outcome.guard_losses, card)
        _log.info("the model is saved, reloaded and checked: %s", run.model)
    seconds["finish"] = time.perf_counter() - began
    seconds["total"] = sum(v for k, v in seconds.items() if k != "total")
    metrics = metrics.model_copy(update={"seconds": seconds, "peak_memory_bytes": peak_memory()})
    run.write_step_file(metrics.steps, "metrics", metrics.model_dump())
    write_json(run.metrics_file, metrics.model_dump())
    _write_report(run)
    return metrics


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


<<<<<<< HEAD
=======
def save_model(run: RunDirectory, bench: Workbench, outcome: Outcome, metrics: Metrics) -> None:
    """Save the live model as a plain Hugging Face directory, reload it and compare.

    Raises:
        PrunewrightError: sparsity or losses differ after reloading.
        StoreError: cannot write.
    """
    scratch = run.path / ".saving"
    # What a process left that was killed while saving.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        try:
            scratch.mkdir(parents=True)
            bench.loaded.model.save_pretrained(scratch)
            bench.loaded.tokenizer.save_pretrained(scratch)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise StoreError(
                f"cannot save the model into {run.path}: {error}. The run is kept: free some "
                f"space, then: prunewright resume {run.path}"
            ) from error
        card = scratch / "README.md"
        write_atomic(card, model_card(bench.request, metrics).encode())
        for file in scratch.glob("*.safetensors"):
            file.chmod(card.stat().st_mode)  # safetensors writes for the owner alone
        _verify(scratch, bench, outcome)
        if run.model.exists():
            shutil.rmtree(run.model)
        scratch.rename(run.model)
        _log.info("the model is saved, reloaded and checked: %s", run.model)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _verify(directory: Path, bench: Workbench, outcome: Outcome) -> None:
    saved = load_model(
        str(directory),
        dtype=str(bench.loaded.dtype).removeprefix("torch."),
        device=str(bench.loaded.device),
        trust_remote_code=bench.request.trust_remote_code,
        keep_dense=False,
    )
    layers = bench.loaded.layers
    zeros = {name: count_zeros(saved.weight(layer)) for name, layer in layers.items()}
    if zeros != bench.zeros():
        raise PrunewrightError(f"the model saved in {directory} reloads with other zeros")
    count = min(VERIFY_WINDOWS, len(bench.windows.guard))
    again = window_losses(saved.model, Head(saved.model), bench.windows.guard[:count])
    expected = outcome.guard_losses[:count]
    if any(not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(again, expected, strict=True)):
        raise PrunewrightError(
            f"the model saved in {directory} reloads with other losses: {again}, not {expected}"
        )


def model_card(request: PruneRequest, metrics: Metrics) -> str:
    """The README.md of a saved model: base model, method, numbers, and what zeros do not give."""
    base = "SmolLM2-135M-Instruct" if request.model == EMBEDDED else request.model
    front = yaml.safe_dump(
        {
            "library_name": "transformers",
            "base_model": base,
            "tags": ["pruning", "sparse", "prunewright", request.criterion],
        },
        sort_keys=False,
    )
    ppl = metrics.perplexity
    recipe = yaml.safe_dump(request.model_dump(mode="json"), sort_keys=False)
    return f"""---
{front}---
# {base.rpartition("/")[2]}, pruned to {metrics.sparsity:.1%}

Pruned with Prunewright after training, without retraining: {metrics.sparsity:.2%} of the weights
in the decoder blocks' linear layers are exactly zero. Embeddings, norms and the head are dense.

| | dense | pruned |
|---|---|---|
| perplexity, guard text | {ppl.guard.dense:.3f} | {ppl.guard.final:.3f} |
| perplexity, test text ({request.texts.test}) | {ppl.test.dense:.3f} | {ppl.test.final:.3f} |

Method: {_method_words(metrics.method)}, criterion {request.criterion_words};
{metrics.steps} steps, {metrics.rollbacks} rolled back; ended because: {metrics.status}.
Masks: `{metrics.revision}`.

Zeros alone make a model neither smaller on disk nor faster: that takes a storage format or a
runtime that uses them.{_pattern_words(request.pattern, whole=metrics.status != BASELINE)}

## Recipe

```yaml
{recipe}```
"""


def _pattern_words(pattern: str, *, whole: bool) -> str:
    """What is known of runtimes for an N:M pattern; the sources stand in the project's README.

    Args:
        pattern: of the request.
        whole: whether a run chose the layers that take it, so that others are dense.
    """
    if pattern == "unstructured":
        return ""
    chosen = f" Each layer is dense or {pattern} as a whole." if whole else ""
    if pattern != "2:4":
        return f"{chosen} NVIDIA's sparse tensor cores take 2:4, not {pattern}: it is for research."
    return f"""{chosen}

2:4 is the pattern of NVIDIA's sparse tensor cores (Ampere and later; cuSPARSELt, CUTLASS). This
directory is stored dense: it runs no faster until each 2:4 layer is converted, in PyTorch by
`torch.sparse.to_sparse_semi_structured`. vLLM and llm-compressor no longer support 2:4."""


def _method_words(method: dict[str, str]) -> str:
    """Who or what shared the target out over the layers."""
    words = method["agent"]
    if "allocation" in method:
        words += f", allocation {method['allocation']}"
    if method.get("allocation_options", "{}") != "{}":
        words += f" {method['allocation_options']}"
    return words


>>>>>>> cb8a8cb (Layers are what a pass uses: batched and stacked products, routers by path, shared ones once)
def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Linux counts the process that started this one in ru_maxrss; VmHWM begins anew with exec.
    with suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
