"""Whether `z_k` tells which layers' pruning costs right answers: rank correlations with trials.

Each layer is pruned by itself, and questions that calibration has not seen are scored on their
answers, beside general text. A cost is that of a weight, as in the signals.

    python benchmarks/knowledge.py --general C4.jsonl.gz --questions HALF.jsonl --unseen OTHER.jsonl
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prunewright.state import load_config
from prunewright.state.profile import KNOWLEDGE_SIGNAL
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import workbench
from prunewright.tools.losses import by_domain

DOMAINS = ("general", "facts")


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, without ties: Pearson's of the ranks."""
    ranks = [[sorted(values).index(value) for value in values] for values in (left, right)]
    return statistics.correlation(*ranks)


def main() -> None:
    """Print the correlation of each signal with each kind of loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--general", required=True, help="text of calibration and guard")
    parser.add_argument("--questions", required=True, help="those whose answers give gradients")
    parser.add_argument("--unseen", required=True, help="other questions, which are scored")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the layer in trial")
    parser.add_argument("--every", type=int, default=3, help="every how many layers are tried")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    general = f"general: {options.general}"
    overrides = [
        f"texts.calibration={{{general}, facts: {options.questions}}}",
        f"texts.guard={{{general}, facts: {options.unseen}}}",
        "texts.windows={calibration: 16, gradient: 16, guard: 8}",
        *options.overrides,
    ]
    config = load_config(None, overrides, criterion="fisher", reconstruct="none")
    with (
        tempfile.TemporaryDirectory() as scratch,
        workbench(config.request, Path(scratch)) as bench,
    ):
        profile = bench.profile(DENSE, DENSE, signals=[KNOWLEDGE_SIGNAL])
        dense = bench.guard_losses(DENSE)
        predicted: dict[str, list[float]] = {"z_c of general text": [], KNOWLEDGE_SIGNAL: []}
        measured: dict[str, list[float]] = {name: [] for name in DOMAINS}
        for layer in profile.layers[:: options.every]:
            count = round(options.sparsity * layer.parameters)
            losses = bench.guard_losses(bench.prune(DENSE, DENSE, {layer.name: count}))
            changes = [after - before for before, after in zip(dense, losses, strict=True)]
            for name, found in by_domain(DOMAINS, changes).items():
                measured[name].append(sum(found) / len(found) / count)
            cost = layer.in_domain("general").cost_of(0.1) / layer.parameters
            predicted["z_c of general text"].append(cost)
            predicted[KNOWLEDGE_SIGNAL].append(layer.signals[KNOWLEDGE_SIGNAL])
    print(f"{len(measured['facts'])} layers, each at {options.sparsity:.0%}")
    for signal, costs in predicted.items():
        for name, losses in measured.items():
            print(f"{signal} and loss of {name}: {rank_correlation(costs, losses):.3f}")
    between = rank_correlation(measured["general"], measured["facts"])
    print(f"loss of general text and of facts: {between:.3f}")


if __name__ == "__main__":
    main()
