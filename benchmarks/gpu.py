"""How much longer a run's steps and its end take than what they cannot do without, and peak memory.

    python benchmarks/gpu.py --size 4b

It makes a random Qwen3, times bare passes, masks, reading and writing with torch and transformers
alone, then a run of greedy's and one-shot SparseGPT, and prints the ratios.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

# Read at the first product, which a run's determinism depends on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from prunewright import baseline, run
from prunewright.state import PruneConfig, load_config
from prunewright.tools.execution.base import TOKENS
from prunewright.tools.model.layers import find_layers, named_blocks
from prunewright.tools.model.loading import resolve_device

sys.path.insert(0, str(Path(__file__).parent))
from memory import PeakMemory
from random_models import make_model

WINDOWS = {"calibration": 16, "gradient": 8, "guard": 8, "test": 2, "length": 2048}
SIZES = {
    "tiny": {"calibration": 4, "gradient": 2, "guard": 2, "test": 2, "length": 64},
    "0.6b": WINDOWS,
    "4b": WINDOWS,
    "8b": WINDOWS,
}
"""Windows by the model's size."""
EVERY = 3
"""Steps between two gradient passes."""
STEPS = EVERY + 1
"""The first, and some more that hold one gradient pass."""
SHARE = 0.1
"""Sparsity that each step adds."""
WARM = 1
"""Windows that go through the model before a pass is timed."""


Result = TypeVar("Result")


@dataclass
class Bare:
    """Seconds that the parts take by themselves.

    Attributes:
        reading: all weight files, from the page cache to the device.
        writing: the same files from the device, into the page cache.
        forward: the calibration windows through the blocks.
        backward: the gradient windows forwards and backwards, activations made again.
        guard: the guard windows' losses.
        masks: one mask of each layer.
    """

    reading: float = 0.0
    writing: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    guard: float = 0.0
    masks: float = 0.0


@dataclass
class Stepwise:
    """Seconds of a run: of its nodes step by step, and of its end."""

    steps: list[dict[str, float]] = field(default_factory=list)
    end: float = 0.0


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, its work on the device included."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What a call gives, and the most bytes that it holds.

    Of a GPU those that torch has allocated, of a processor those beyond the page cache.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device)
    with PeakMemory(psutil.Process()) as peak:
        result = work()
    return result, peak.anonymous


def measure_file(path: Path, copy: Path, device: torch.device, found: Bare) -> int:
    """Add what reading and writing a file takes; gives the bytes of its weights."""
    tensors: dict[str, Tensor] = {}

    def read() -> None:
        # A copy on a processor, too, where the file would be mapped and not read.
        tensors.update((name, t.to(device, copy=True)) for name, t in load_file(path).items())

    found.reading += seconds_of(read, device)
    found.writing += seconds_of(lambda: save_file(tensors, copy), device)
    copy.unlink()
    return sum(tensor.nbytes for tensor in tensors.values())


def measure_passes(directory: Path, config: PruneConfig, device: torch.device, found: Bare) -> None:
    """Time passes over random tokens and the masks of all layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)
    model.requires_grad_(False)
    counts = config.texts.windows
    shape = (counts.calibration, counts.length)
    windows = torch.randint(model.config.vocab_size, shape, device=device)
    batch = 1 if device.type == "cpu" else max(1, TOKENS // counts.length)

    @torch.no_grad()
    def forward(windows: Tensor) -> None:
        for ids in windows.split(batch):
            model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def guard(windows: Tensor) -> None:
        for ids in windows.split(1):
            model(input_ids=ids, labels=ids, use_cache=False)

    def backward(windows: Tensor) -> None:
        for ids in windows.split(1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def timed(work: Callable[[Tensor], None], windows: Tensor) -> float:
        work(windows[:WARM])
        return seconds_of(lambda: work(windows), device)

    found.forward = timed(forward, windows)
    found.guard = timed(guard, windows[torch.arange(counts.guard) % len(windows)])
    weights = [model.get_parameter(layer.parameter) for layer in find_layers(model).values()]

    @torch.no_grad()
    def masks(weights: list[Tensor]) -> None:
        for weight in weights:
            scores = weight.float().abs() * torch.ones(weight.shape[1], device=device)
            threshold = scores.kthvalue(round(SHARE * weight.shape[1]), dim=1, keepdim=True).values
            _ = scores <= threshold

    masks(weights[:1])
    found.masks = seconds_of(lambda: masks(weights), device)
    for weight in weights:
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    for _, block in named_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    found.backward = timed(backward, windows[: counts.gradient])


def measure_run(config: PruneConfig, out: Path) -> Stepwise:
    """A run of greedy's, timed by the graph; a `reflect` takes next to nothing."""
    found = Stepwise()

    def on_event(mode: str, event: dict[str, Any]) -> None:
        for node, update in event.items() if mode == "updates" else ():
            if node == "profile":
                found.steps.append({})
            if node not in ("reflect", "finish"):
                found.steps[-1][node] = update["seconds"][node]

    metrics = run(config, out, on_event).metrics
    if metrics.steps != STEPS or metrics.rollbacks:
        sys.exit(f"the run took {metrics.steps} steps, not {STEPS}: {metrics.reason}")
    found.end = metrics.seconds["finish"]
    return found


def measure_once(config: PruneConfig, out: Path) -> float:
    """Seconds of pruning in one shot, both guard perplexities included."""
    seconds = baseline(config, out).metrics.seconds
    return seconds["allocation"] + seconds["prune"]


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows, the first of them the head, as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def ratio_row(
    what: str, value: float, base: str, least: float, unit: str = "s", aim: str = ""
) -> tuple[str, ...]:
    return what, f"{value:.4g} {unit}", f"{least:.4g} {unit}, {base}", f"{value / least:.3g}", aim


def times(bare: Bare, stepwise: Stepwise, once: float) -> list[tuple[str, ...]]:
    """Rows of what each part takes beside what it cannot do without."""
    later = stepwise.steps[1:]
    step = sum(sum(nodes.values()) for nodes in later) / len(later)
    needed = bare.forward + bare.backward / EVERY + bare.masks + bare.guard
    begun = bare.reading + bare.forward + bare.backward
    files = bare.writing + bare.reading
    first = stepwise.steps[0]["profile"]
    return [
        ratio_row("a step", step, "its passes and masks", needed, aim="ratio 1.5"),
        ratio_row("first profile, with loading", first, "reading, its passes", begun, aim="12 s"),
        ratio_row("the end", stepwise.end, "writing and reading", files, aim="ratio 2.5"),
        ratio_row("one-shot SparseGPT", once, "a forward pass", bare.forward, aim="60 s"),
    ]


def parts(bare: Bare) -> str:
    rows = [(name, f"{seconds:.4g}") for name, seconds in vars(bare).items()]
    return table([("bare part", "seconds"), *rows])


def nodes(stepwise: Stepwise) -> str:
    names = list(stepwise.steps[0])
    rows = [tuple(f"{step.get(name, 0.0):.4g}" for name in names) for step in stepwise.steps]
    named = [(str(number), *row) for number, row in enumerate(rows, 1)]
    return table([("step, seconds", *names), *named])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where models are written; default: temporary")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    device = resolve_device(options.device)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gpu-") as name:
        folder = Path(name)
        directory = make_model(f"qwen3-{options.size}", folder / "dense", device)
        settings: dict[str, Any] = {
            "dtype": "bfloat16",
            "agent": "greedy",
            "target": STEPS * SHARE,
            "step": SHARE,
            "texts.windows": SIZES[options.size],
            "guard.max_increase": 100,  # no step may be rolled back
        }
        given = [*(f"{key}={value}" for key, value in settings.items()), *options.overrides]
        given.append(f"profile.gradient_every={EVERY}")
        config = load_config(None, given, model=str(directory), criterion="wanda")
        config = config.model_copy(update={"device": str(device)})
        bare, weights = Bare(), 0
        for path in sorted(directory.glob("*.safetensors")):
            weights += measure_file(path, folder / path.name, device, bare)
        peaks = {}
        passes = partial(measure_passes, directory, config, device, bare)
        _, peaks["passes and masks"] = peak_of(passes, device)
        stepwise, peaks["the run"] = peak_of(partial(measure_run, config, folder / "run"), device)
        shutil.rmtree(folder / "run")
        sparsegpt = config.model_copy(update={"criterion": "sparsegpt"})
        shot = partial(measure_once, sparsegpt, folder / "sparsegpt")
        once, peaks["SparseGPT"] = peak_of(shot, device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    windows = SIZES[options.size]
    print(f"Qwen3 {options.size}, {what}, torch {torch.__version__}, windows {windows}\n")
    print(parts(bare), nodes(stepwise), sep="\n\n", end="\n\n")
    size = weights / 2**30
    held = [
        ratio_row(f"peak of {part}", peak / 2**30, "the weights", size, "GiB")
        for part, peak in peaks.items()
    ]
    head = ("what", "measured", "beside", "ratio", "aim for 4b")
    print(table([head, *times(bare, stepwise, once), *held]))
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
