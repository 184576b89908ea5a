"""What a run costs besides the model's own work: overhead, rollback, disk, memory.

python benchmarks/costs.py --config configs/demo.yaml --out runs/costs

Afterwards, in the same warm process, it times rollbacks (`Workbench.sync` back from a revision) and
reloads of the model (`load_model`, tokenizer included), in turn, and prints the medians. On a
machine that does something else as well, both are of little worth.
"""

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunewright.graph import run
from prunewright.state import Step, load_config
from prunewright.state.run import DENSE
from prunewright.tools.bench import workbench
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.calibration import profile
from prunewright.tools.execution.base import Execution
from prunewright.tools.fast import unpack_bits
from prunewright.tools.model import head as perplexity
from prunewright.tools.model.loading import load_model
from prunewright.tools.store.rundir import RunDirectory

FEW_LAYERS = 40
"""As many as an LLM names in a typical step."""
ROUNDS = 7

SECONDS: dict[str, float] = defaultdict(float)
_depth = 0


def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its wall time added to ``SECONDS`` unless a timed one called it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global _depth
        _depth += 1
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _depth -= 1
            if _depth == 0:
                SECONDS[label] += time.perf_counter() - began

    return wrapper


def instrument() -> None:
    """Time passes, masks and predicted costs (scored as masks are) wherever they are called.

    `Head` runs the model when it is made, to see that it is the model's own.
    """
    perplexity.Head.__init__ = timed("forward", perplexity.Head.__init__)  # type: ignore[method-assign]
    Execution.window_losses = timed("forward", Execution.window_losses)  # type: ignore[method-assign]
    workbench.measure_activations = timed("forward", workbench.measure_activations)  # type: ignore[attr-defined]
    workbench.measure_gradients = timed("backward", workbench.measure_gradients)  # type: ignore[attr-defined]
    Workbench._masks = timed("masks", Workbench._masks)  # type: ignore[method-assign]
    profile.predict_losses = timed("predicted costs", profile.predict_losses)  # type: ignore[attr-defined]


def revision_bytes(store: Path, old: dict[str, str], new: dict[str, str], name: str) -> int:
    """Size of the files that a step adds to the store."""
    masks = set(new.values()) - set(old.values())
    files = [*(store / "masks" / digest for digest in masks), store / "manifests" / f"{name}.json"]
    return sum(file.stat().st_size for file in files)


def step_bytes(bench: Workbench, records: list[Step]) -> list[int]:
    """What each step that made a candidate stored beyond one bit a weight of its layers."""
    over, accepted = [], DENSE
    for record in records:
        if record.candidate:
            old, new = bench.store.manifest(accepted), bench.store.manifest(record.candidate)
            written = revision_bytes(bench.store.directory, old, new, record.candidate)
            names = [name for name in new if new[name] != old.get(name)]
            over.append(written - sum(bench.loaded.layers[name].numel for name in names) // 8)
        accepted = record.revision
    return over


def fewer_layers(bench: Workbench, old: str, new: str) -> str:
    """The revision that differs from ``old`` as ``new`` does, in some evenly spread layers only."""
    before, after = bench.store.manifest(old), bench.store.manifest(new)
    names = [name for name in after if after[name] != before.get(name)]
    with bench.store.writer(before) as writer:
        for name in names[:: max(1, len(names) // FEW_LAYERS)][:FEW_LAYERS]:
            layer = bench.loaded.layers[name]
            bits = bench.store.read(after[name], layer.shape).bits
            writer.add(name, unpack_bits(bits, layer.numel).bool())
    return writer.revision


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_rollbacks(bench: Workbench, records: list[Step]) -> dict[str, Any]:
    """Medians of rollbacks of the last candidate, of a part of it, and of reloads."""
    at = max(i for i, record in enumerate(records) if record.candidate)
    old = records[at - 1].revision if at else DENSE
    whole = records[at].candidate or ""
    part = fewer_layers(bench, old, whole)
    dtype = str(bench.loaded.dtype).removeprefix("torch.")
    times: dict[str, list[float]] = {"whole": [], "part": [], "reload": []}
    for _ in range(ROUNDS):
        for label, candidate in (("whole", whole), ("part", part)):
            bench.sync(candidate)
            times[label].append(seconds_of(lambda: bench.sync(old)))
        times["reload"].append(
            seconds_of(lambda: load_model(str(bench.loaded.directory), dtype=dtype))
        )
    median = {label: statistics.median(values) for label, values in times.items()}
    before = bench.store.manifest(old)
    found: dict[str, Any] = {"reload_seconds": median["reload"]}
    for label, candidate in (("whole", whole), ("part", part)):
        after = bench.store.manifest(candidate)
        layers = sum(after[name] != before.get(name) for name in after)
        share = median[label] / median["reload"]
        found[f"rollback_of_{layers}_layers"] = {"seconds": median[label], "of_reload": share}
    return found


def main() -> None:
    """Run the configuration once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    instrument()
    began = time.perf_counter()
    metrics = run(config, out=options.out).metrics
    total = time.perf_counter() - began
    directory = RunDirectory(options.out)
    records = directory.read_trace()
    steps = sum(file.stat().st_size for file in (options.out / "steps").iterdir())
    with workbench.workbench(config.request, options.out) as bench:
        model_bytes = sum(p.numel() * p.element_size() for p in bench.loaded.model.parameters())
        over = step_bytes(bench, records)
        rollbacks = time_rollbacks(bench, records)
    elsewhere = metrics.seconds["total"] - sum(SECONDS.values())
    print(
        json.dumps(
            {
                "status": metrics.status,
                "threads": torch.get_num_threads(),
                "seconds_total": total,
                "seconds_of_nodes": metrics.seconds,
                "seconds_in": dict(SECONDS),
                "share_of_nodes_elsewhere": elsewhere / total,
                "share_of_nodes_elsewhere_and_predicted_costs": (
                    elsewhere + SECONDS["predicted costs"]
                )
                / total,
                **rollbacks,
                "step_bytes_over_one_bit_a_weight": over,
                "step_bytes_allowed_over": 64 * 1024,
                "steps_json_bytes": steps,
                "sqlite_bytes": directory.database.stat().st_size,
                "steps": metrics.steps,
                "model_bytes": model_bytes,
                "peak_memory_bytes": metrics.peak_memory_bytes,
                "peak_memory_allowed": 3 * model_bytes + 2**30,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
