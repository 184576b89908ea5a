"""Time and memory of a run against the model's size, and what `prunewright plan` says of them.

    python benchmarks/scaling.py --offload none cpu disk --plot docs/pictures/scaling.svg
    python benchmarks/scaling.py --shape qwen3-4b --offload disk --steps 1

Each model is random and made on the spot; each run and each plan is a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from memory import PeakMemory
from random_models import SHAPES, make_model

LLAMAS = [name for name in SHAPES if name.startswith("llama-") and name != "llama-tiny"]
WINDOWS = {"calibration": 4, "gradient": 2, "guard": 2, "test": 2, "length": 128}
SHARE = 0.1
"""Sparsity that each step adds."""
OFFLOADS = ("none", "cpu", "disk")
COMMAND = [sys.executable, "-m", "prunewright.graph.cli"]


@dataclass(frozen=True)
class Row:
    """One run; bytes and seconds.

    Attributes:
        shape: name of the model's shape.
        offload: where its blocks were.
        parameters: of the model.
        weights: bytes of the model as it is computed in.
        seconds: by node, and ``total``.
        resident: most that the process had in memory, mapped files included.
        anonymous: most of it beyond the page cache.
        planned: the plan's memory of the machine, mapped files left out.
        planned_seconds: the plan's time of steps and end.
    """

    shape: str
    offload: str
    parameters: int
    weights: int
    seconds: dict[str, float]
    resident: int
    anonymous: int
    planned: int
    planned_seconds: float


def prunewright(words: list[str]) -> tuple[str, PeakMemory]:
    """Run a command of prunewright's in a process of its own.

    Returns:
        What it wrote to standard output, and its peaks.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=errors, text=True)
        with PeakMemory(process) as peak:
            output = process.communicate()[0]
        if process.returncode:
            errors.seek(0)
            sys.exit(f"prunewright {' '.join(words)} failed:\n{errors.read()}")
    return output, peak


def measure(model: Path, shape: str, offload: str, settings: list[str], steps: int) -> Row:
    """Plan a run, run it and delete it."""
    given: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "agent": "greedy",
        "target": steps * SHARE,
        "step": SHARE,
        "offload": offload,
        "texts.windows": WINDOWS,
        "guard.max_increase": 100,  # no step may be rolled back
    }
    words = [*(f"{key}={value}" for key, value in given.items()), *settings]
    options = [part for word in words for part in ("--set", word)]
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        out = Path(name) / "run"
        plan = json.loads(prunewright(["plan", "--json", "--time", *options, "--out", str(out)])[0])
        _, peak = prunewright(["run", *options, "--out", str(out)])
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    if metrics["steps"] != steps or metrics["rollbacks"]:
        sys.exit(f"the run took {metrics['steps']} steps, not {steps}: {metrics['reason']}")
    return Row(
        shape=shape,
        offload=offload,
        parameters=plan["parameters"],
        weights=plan["weights"],
        seconds=metrics["seconds"],
        resident=peak.resident,
        anonymous=peak.anonymous,
        planned=plan["memory"]["host"],
        planned_seconds=plan["seconds"]["run"],
    )


HEAD = [
    "model", "parameters", "offload", "weights", "resident", "anonymous", "plan",
    "anonymous / plan", "seconds", "plan, seconds", "seconds / plan", "by node",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row of the table; memory in GiB."""
    gib = [n / 2**30 for n in (row.weights, row.resident, row.anonymous, row.planned)]
    total = row.seconds["total"]
    by_node = ", ".join(f"{n} {s:.3g}" for n, s in row.seconds.items() if n != "total")
    return [
        row.shape,
        f"{row.parameters:,}",
        row.offload,
        *(f"{n:.3f}" for n in gib),
        f"{row.anonymous / row.planned:.2f}",
        f"{total:.1f}",
        f"{row.planned_seconds:.1f}",
        f"{total / row.planned_seconds:.2f}",
        by_node,
    ]


def line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def summary(rows: list[Row], what: str, value: Callable[[Row], float]) -> str:
    """One number of each run: a line a model, a column an offload."""
    offloads = list(dict.fromkeys(row.offload for row in rows))
    lines = [["parameters", "weights, GiB", *(f"{name}, {what}" for name in offloads)]]
    lines.append(["---"] * len(lines[0]))
    for shape in dict.fromkeys(row.shape for row in rows):
        found = {row.offload: row for row in rows if row.shape == shape}
        first = next(iter(found.values()))
        sizes = [f"{first.parameters / 1e6:,.0f}M", f"{first.weights / 2**30:.2f}"]
        lines.append([*sizes, *(f"{value(found[name]):.3g}" for name in offloads)])
    return "\n".join(map(line, lines))


def plot(rows: list[Row], file: Path) -> None:
    """Draw time and memory against parameters, both from 0 on, so that lines are lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "prunewright", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for offload in dict.fromkeys(row.offload for row in rows):
        found = sorted((r for r in rows if r.offload == offload), key=lambda row: row.parameters)
        sizes = [row.parameters / 1e9 for row in found]
        label = f"offload: {offload}"
        memory.plot(sizes, [row.anonymous / 2**30 for row in found], marker="o", label=label)
        time.plot(sizes, [row.seconds["total"] for row in found], marker="o", label=label)
    sizes = sorted({(row.parameters / 1e9, row.weights / 2**30) for row in rows})
    memory.plot(*zip(*sizes, strict=True), color="0.6", linestyle="--", label="the weights")
    memory.set(title="Memory beyond the page cache at its peak", ylabel="GiB")
    time.set(title="Time of the run", ylabel="seconds")
    for axes in (memory, time):
        axes.set(xlabel="parameters, billions", xlim=0, ylim=0)
        axes.grid(alpha=0.3)
        axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure, print each row as soon as it is known, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=LLAMAS, metavar="SHAPE")
    parser.add_argument("--offload", nargs="+", choices=OFFLOADS, default=["none"])
    parser.add_argument("--steps", type=int, default=2, help=f"each adds a sparsity of {SHARE}")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="where models are written; default: temporary")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="extra notebooks")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the rows as JSON")
    options = parser.parse_args()
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    rows = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="scaling-") as name:
            model = make_model(shape, Path(name) / shape)
            for offload in options.offload:
                rows.append(measure(model, shape, offload, options.config, options.steps))
                print(line(cells(rows[-1])), flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print("\n" + summary(rows, "GiB beyond the page cache", lambda row: row.anonymous / 2**30))
    print("\n" + summary(rows, "seconds", lambda row: row.seconds["total"]))
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
