"""Perplexity at equal sparsity of several methods, over seeds and text domains.

Every method gets the same calibration windows, is judged on the same test windows, and ends at
the same sparsity. A cell that is finished is not run again, so the script can be stopped and
started at will. Saved models are deleted once they are scored.

    python benchmarks/quality.py --calibration web.jsonl.gz \
        --test wikitext2=wikitext2-test.jsonl.gz:20 --test web=c4-test.jsonl.gz:12 \
        --methods uniform-wanda greedy-wanda greedy-fisher --seeds 0 1 2 --out results/web
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from prunewright.graph import baseline, run
from prunewright.tools.models import load_model
from prunewright.tools.perplexity import Head, perplexity, window_losses
from prunewright.tools.texts import load_test_windows

UNGUARDED = {"guard": {"max_increase": 1e9}}
# What each method changes of the shared configuration; "agent" None is one shot.
METHODS: dict[str, dict[str, Any]] = {
    "uniform-magnitude": {"agent": None, "criterion": "magnitude"},
    "uniform-wanda": {"agent": None, "criterion": "wanda"},
    "uniform-fisher": {"agent": None, "criterion": "fisher"},
    "wanda-4:8": {"agent": None, "criterion": "wanda", "pattern": "4:8"},
    "wanda-2:4": {"agent": None, "criterion": "wanda", "pattern": "2:4"},
    "owl-wanda": {"agent": None, "criterion": "wanda", "allocation": "owl"},
    "alphapruning-wanda": {"agent": None, "criterion": "wanda", "allocation": "alphapruning"},
    "atp-wanda": {"agent": None, "criterion": "wanda", "allocation": "atp"},
    "greedy-oneshot-wanda": {"agent": None, "criterion": "wanda", "allocation": "greedy"},
    "evolutionary-wanda": {"agent": None, "criterion": "wanda", "allocation": "evolutionary"},
    "global-wanda": {"agent": None, "criterion": "wanda", "allocation": "global"},
    "global-fisher": {"agent": None, "criterion": "fisher", "allocation": "global"},
    "greedy-wanda": {"agent": "greedy", "criterion": "wanda"},
    "greedy-fisher": {"agent": "greedy", "criterion": "fisher"},
    "adaptive-wanda": {"agent": "adaptive", "criterion": "wanda"},
    "adaptive-fisher": {"agent": "adaptive", "criterion": "fisher"},
    "zscore-wanda": {"agent": "zscore", "criterion": "wanda", **UNGUARDED},
    "zscore-wanda-cap-0.6": {
        "agent": "zscore",
        "criterion": "wanda",
        "max_layer_sparsity": 0.6,
        **UNGUARDED,
    },
    "random-wanda": {"agent": "random", "criterion": "wanda", **UNGUARDED},
}


def prune(method: str, settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Run one method into a directory; return metrics.json's content."""
    config = {k: v for k, v in (settings | METHODS[method]).items() if v is not None}
    act = baseline if METHODS[method]["agent"] is None else run
    return act(config, out=directory).metrics.model_dump()


def score(directory: str, tests: dict[str, tuple[str, int]], length: int) -> dict[str, float]:
    """Perplexity of a model directory on every domain."""
    loaded = load_model(directory)
    head = Head(loaded.model)
    result = {}
    for name, (source, count) in tests.items():
        windows = load_test_windows(source, loaded.tokenizer, count, length)
        result[name] = perplexity(window_losses(loaded.model, head, windows))
    return result


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", required=True, help="text of calibration and guard")
    parser.add_argument("--test", action="append", required=True, help="NAME=SOURCE:WINDOWS")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--target", type=float, default=0.45)
    parser.add_argument("--step", type=float, default=0.05)
    parser.add_argument("--max-increase", type=float, default=0.15, help="of the guard")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tests = {}
    for item in options.test:
        name, _, rest = item.partition("=")
        source, _, count = rest.rpartition(":")
        tests[name] = (source, int(count))
    options.out.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, Any]] = {}

    def cell(key: str, make: Any) -> None:
        path = options.out / f"{key}.json"
        if not path.exists():
            path.write_text(json.dumps(make(), indent=1))
        cells[key] = json.loads(path.read_text())
        print(key, cells[key]["perplexity"], flush=True)

    cell("dense", lambda: {"perplexity": score(options.model, tests, options.length)})
    for seed in options.seeds:
        for method in options.methods:

            def make(method: str = method, seed: int = seed) -> dict[str, Any]:
                directory = options.out / f"run-{method}-{seed}"
                shutil.rmtree(directory, ignore_errors=True)
                settings = {
                    "model": options.model,
                    "target": options.target,
                    "step": options.step,
                    "seed": seed,
                    "guard": {"max_increase": options.max_increase},
                    "texts": {
                        "calibration": options.calibration,
                        "test": next(iter(tests.values()))[0],
                        "windows": {"length": options.length, "guard": 4, "test": 1},
                    },
                }
                metrics = prune(method, settings, directory)
                result = score(str(directory / "model"), tests, options.length)
                shutil.rmtree(directory / "model")
                keep = ("status", "sparsity", "revision", "steps", "rollbacks", "seconds", "tokens")
                kept = {k: metrics[k] for k in keep}
                return kept | {"perplexity": result}

            cell(f"{method}-{seed}", make)
    print_table(options.methods, options.seeds, cells, list(tests))


def print_table(
    methods: list[str], seeds: list[int], cells: dict[str, dict[str, Any]], domains: list[str]
) -> None:
    """Means over seeds, spread, and the ratio to uniform Wanda with the same seed."""
    print("\n| method | sparsity | " + " | ".join(domains) + " |")
    print("|---" * (len(domains) + 2) + "|")
    dense = cells["dense"]["perplexity"]
    print("| dense | 0 | " + " | ".join(f"{dense[d]:.2f}" for d in domains) + " |")
    for method in methods:
        rows = [cells[f"{method}-{seed}"] for seed in seeds]
        texts = []
        for domain in domains:
            values = [row["perplexity"][domain] for row in rows]
            text = f"{statistics.mean(values):.2f}"
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.2f}"
            if "uniform-wanda" in methods:
                ratios = [
                    value / cells[f"uniform-wanda-{seed}"]["perplexity"][domain]
                    for value, seed in zip(values, seeds, strict=True)
                ]
                text += f" ({math.fsum(ratios) / len(ratios):.3f})"
            texts.append(text)
        sparsity = statistics.mean(row["sparsity"] for row in rows)
        print(f"| {method} | {sparsity:.4f} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
