"""What a run costs besides the model's own work: overhead, rollback, disk, memory.

python benchmarks/costs.py --config configs/demo.yaml --out runs/costs
"""

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunewright.graph import run
from prunewright.state import load_config
from prunewright.tools import criteria, perplexity, profiling, results, workbench
from prunewright.tools.models import load_model
from prunewright.tools.rundir import RunDirectory

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
    """Time forward and backward passes and mask computation wherever they are called."""
    for module in (perplexity, workbench, results):
        if hasattr(module, "window_losses"):
            module.window_losses = timed("forward", perplexity.window_losses)  # type: ignore[attr-defined]
    workbench.measure_activations = timed("forward", profiling.measure_activations)  # type: ignore[attr-defined]
    workbench.measure_gradients = timed("backward", profiling.measure_gradients)  # type: ignore[attr-defined]
    workbench.prune_mask = timed("masks", criteria.prune_mask)  # type: ignore[attr-defined]
    profiling.predict_losses = timed("masks", profiling.predict_losses)


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

    with workbench.workbench(config.request, options.out) as bench:
        model_bytes = sum(p.numel() * p.element_size() for p in bench.loaded.model.parameters())
        layers = bench.loaded.layers
        last = records[-1]
        before = records[-2].revision
        changed = sum(layers[name].numel for name in last.applied)
        bench.sync(last.revision)
        began = time.perf_counter()
        bench.sync(before)
        rollback = time.perf_counter() - began
        old, new = bench.store.manifest(before), bench.store.manifest(last.revision)
        masks = {new[n] for n in new if new[n] != old.get(n)} - set(old.values())
        store = options.out / "revisions"
        written = sum((store / "masks" / digest).stat().st_size for digest in masks)
        written += (store / "manifests" / f"{last.revision}.json").stat().st_size
        source = bench.loaded.directory
    began = time.perf_counter()
    load_model(str(source), dtype=str(bench.loaded.dtype).removeprefix("torch."))
    reload = time.perf_counter() - began

    share = 1 - sum(SECONDS.values()) / total
    print(
        json.dumps(
            {
                "status": metrics.status,
                "threads": torch.get_num_threads(),
                "seconds_total": total,
                "seconds_in": dict(SECONDS),
                "share_of_everything_else": share,
                "rollback_seconds": rollback,
                "rollback_layers": len(last.applied),
                "reload_seconds": reload,
                "step_bytes": written,
                "step_bytes_over_one_bit_a_weight": written - changed // 8,
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
