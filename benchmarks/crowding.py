"""Which exponent makes the predicted cost of a crowded layer right: chosen on the guard text.

One-shot pruning at the allocation that equalises the marginal `crowded_costs` over the layers, and
its guard perplexity; beside it the uniform allocation.

    python benchmarks/crowding.py --calibration web.jsonl.gz --criterion wanda
    python benchmarks/crowding.py --calibration web.jsonl.gz --criterion obs --set reconstruct=true
"""

import argparse
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from prunewright.state import load_config
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.calibration.costs import crowded_costs, predict_losses
from prunewright.tools.calibration.profile import statistics_of
from prunewright.tools.losses import perplexity

WIDTH = 0.05
LEVELS = [WIDTH * n for n in range(18)]


def allocate(
    bench: Workbench, losses: dict[str, list[float]], target: float, exponent: float
) -> dict[str, int]:
    """Zeros of each layer when the cheapest slices are taken until the target is reached."""
    layers = bench.loaded.layers
    slices = []
    for name, layer in layers.items():
        price = 0.0
        costs = [0.0, *crowded_costs(LEVELS, losses[name], 0.0, exponent)]
        for n, (before, after) in enumerate(pairwise(costs)):
            price = max(price, (after - before) / (WIDTH * layer.numel))
            slices.append((price, n, name))
    left = target * bench.loaded.prunable
    zeros: dict[str, float] = defaultdict(float)
    for _, _, name in sorted(slices):
        taken = min(WIDTH * layers[name].numel, left)
        zeros[name] += taken
        left -= taken
    return {name: int(zeros[name]) for name in layers}


def main() -> None:
    """Print the guard perplexity of each exponent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True, help="text of calibration and guard")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--target", type=float, default=0.45)
    parser.add_argument("--exponents", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    overrides = [f"texts.calibration={options.calibration}", "texts.windows.guard=4"]
    overrides += options.overrides
    config = load_config(None, overrides, criterion=options.criterion)
    with (
        tempfile.TemporaryDirectory() as scratch,
        workbench(config.request, Path(scratch)) as bench,
    ):
        activations, gradients = bench.activations(DENSE), bench.gradients(DENSE)
        losses = {}
        for name, layer in bench.loaded.layers.items():
            statistics = statistics_of(name, activations, gradients)
            dense = layer.matrix(bench.loaded.dense(layer))
            losses[name] = predict_losses(dense, statistics, config.criterion, LEVELS)
        uniform = {n: int(options.target * ly.numel) for n, ly in bench.loaded.layers.items()}
        plans = {"uniform": uniform} | {
            f"exponent {e:g}": allocate(bench, losses, options.target, e) for e in options.exponents
        }
        for label, counts in plans.items():
            revision = bench.prune(DENSE, DENSE, counts)
            value = perplexity(bench.guard_losses(revision))
            print(f"{label}: {value:.3f} at sparsity {bench.sparsity():.4f}", flush=True)


if __name__ == "__main__":
    main()
