"""How kept weights are best solved for: chosen on held-out text.

One-shot `global` allocation of `fisher`; perplexity on the guard windows and, as a domain that
calibration has not seen, on the first windows of another text: masks alone, least squares with
several pulls to the dense weights, and block fits of several epochs and rates after it.

    python benchmarks/reconstruction.py --calibration web.jsonl.gz --other encyclopedia.jsonl.gz
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from prunewright.state import load_config
from prunewright.state.config import FitOptions
from prunewright.state.run import DENSE
from prunewright.tools.allocation import resolve_allocation
from prunewright.tools.bench.workbench import workbench
from prunewright.tools.losses import perplexity
from prunewright.tools.model.tokens import embedding_rows
from prunewright.tools.solve import reconstruction
from prunewright.tools.texts.windows import load_test_windows

solve = reconstruction.solve


def main() -> None:
    """Print both perplexities for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", required=True, help="text of calibration and guard")
    parser.add_argument("--other", required=True, help="a text that calibration has not seen")
    parser.add_argument("--windows", type=int, default=8, help="of calibration")
    parser.add_argument("--held-out", type=int, default=4, help="windows of either text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ridges", nargs="*", type=float, default=[0.02, 0.1, 0.2, 1.0])
    parser.add_argument("--fits", nargs="*", default=["3:3e-4"], help="epochs:learning_rate")
    options = parser.parse_args()
    overrides = [
        f"texts.calibration={options.calibration}",
        f"texts.windows.calibration={options.windows}",
        f"texts.windows.gradient={options.windows // 2}",
        f"texts.windows.guard={options.held_out}",
        "texts.windows.test=1",
        f"texts.windows.length={options.length}",
        "reconstruct=layer",
    ]
    config = load_config(None, overrides, model=options.model, criterion="fisher")
    allocate = resolve_allocation("global", {}, "unstructured")
    with (
        tempfile.TemporaryDirectory() as scratch,
        workbench(config.request, Path(scratch)) as bench,
    ):
        tokenizer, model = bench.loaded.tokenizer, bench.loaded.model
        other = load_test_windows(
            options.other,
            tokenizer,
            options.held_out,
            options.length,
            rows=embedding_rows(model),
        )
        counts = allocate(bench, None).counts

        def show(label: str, revision: str) -> None:
            guard = perplexity(bench.guard_losses(revision))
            unseen = perplexity(bench.loaded.execution.window_losses(bench.head, other))
            print(f"{label}: guard {guard:.3f}, other text {unseen:.3f}", flush=True)

        masks = bench.prune(DENSE, DENSE, counts)
        show("masks alone", masks)
        for ridge in options.ridges:
            reconstruction.solve = partial(solve, ridge=ridge)  # type: ignore[assignment]
            show(f"layer, ridge {ridge:g}", bench.solve(masks))
        reconstruction.solve = solve
        for fit in options.fits:
            epochs, rate = fit.split(":")
            settings = FitOptions(epochs=int(epochs), learning_rate=float(rate))
            request = bench.request
            bench.request = request.model_copy(update={"reconstruct": "block", "fit": settings})
            show(f"block, {fit}", bench.solve(masks))
            bench.request = request


if __name__ == "__main__":
    main()
