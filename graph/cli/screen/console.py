"""What the command line prints: lines, tables and a progress bar.

Names and words from models, files and LLMs are untrusted: they are shown as plain text, without
markup, and with control characters written out.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table
from rich.text import Text

from prunewright.state import PruneConfig, Step
from prunewright.state.config import BASELINE, pattern_sparsity
from prunewright.state.metrics import NEGLIGIBLE, Metrics, Pair
from prunewright.state.profile import short_name
from prunewright.state.shown import clean
from prunewright.tools.ending import ended_words
from prunewright.tools.signatures import STAGNANT_STEPS, find_signatures

if TYPE_CHECKING:
    from prunewright.tools.evaluation import Evaluation

ZEROS_ALONE = (
    "Zeros alone make a model neither smaller on disk nor faster: that takes a storage format or "
    "a runtime that uses them."
)
NAMED = 3
"""Layers of a step that its line names."""

_VERDICT_STYLES = {"accepted": "green", "rolled_back": "yellow", "empty": "yellow"}
LABELS = {
    "activations": "calibration",
    "gradients": "gradients",
    "masks": "masks",
    "perplexity": "perplexity",
    "allocation": "allocation",
}
# What follows each node, in words.
_NEXT = {
    "profile": "the agent decides",
    "agent_decide": "pruning",
    "apply_prune": "perplexity",
    "evaluate_ppl": "recording",
    "rollback": "recording",
    "reflect": "profiling",
}


class Screen:
    """Where people read: standard output, or standard error while that is kept for JSON."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        make = partial(
            Console, stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False
        )
        self.console = make()
        if not self.console.is_terminal:
            self.console = make(width=200)

    def line(self, *parts: str | tuple[str, str]) -> None:
        """Print one line of plain strings and ``(string, style)`` pairs."""
        text = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            text.append(clean(words), style)
        self.console.print(text, soft_wrap=True)

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, aligned."""
        for name, value in rows:
            self.line((f"{name:<11}", "bold"), value)

    def table(self, columns: list[str], rows: Iterable[list[str]], left: int = 1) -> None:
        """Print a table; the first ``left`` columns are aligned to the left, others right."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(
                Text(clean(column)),
                justify="left" if index < left else "right",
                no_wrap=index >= left,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        self.console.print(table)


class Live:
    """Shows a run while it goes on; pass `on_event` to the runner."""

    def __init__(self, screen: Screen, loaded: Any = None, records: Iterable[Step] = ()) -> None:
        """Make it.

        Args:
            screen: where.
            loaded: called once the model is loaded, with the dense perplexity, if that was
                measured now.
            records: the run's steps so far.
        """
        self._records = list(records)
        self._warned: set[str] = set()
        self.screen = screen
        self._loaded = loaded
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            console=screen.console,
            transient=True,
            # It also takes over standard error, and a quiet one would swallow that.
            disable=screen.console.quiet or not screen.console.is_terminal,
        )
        self._task = self._progress.add_task("loading the model and the texts", total=None)
        self._label = ""

    def __enter__(self) -> "Live":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the screen is someone else's."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def say(self, words: str) -> None:
        """Put some words beside the spinner."""
        self._label = ""
        self._progress.reset(self._task, total=None, description=words)

    def progress(self, label: str, done: int, total: int) -> None:
        """Move the bar."""
        words = LABELS.get(label, label)
        if words != self._label:
            self._label = words
            self._progress.reset(self._task, total=total, description=words)
        self._progress.update(self._task, completed=done, total=total)

    def on_event(self, mode: str, event: dict[str, Any]) -> None:
        """Take an event of the runner."""
        if mode == "updates":
            for node, update in event.items():
                self._node(node, update or {})
        elif "begun" in event:
            self._tell_loaded(None)
        elif "progress" in event:
            part = event["progress"]
            self.progress(part["label"], part["done"], part["total"])
        elif "step" in event:
            record = Step.model_validate(event["step"])
            self.screen.line(*step_line(record))
            self._warn(record)

    def _warn(self, record: Step) -> None:
        """Print the failure signatures that this step was the first to show."""
        # A step taken again after a resume replaces what it recorded before.
        self._records = [*self._records[: record.step], record]
        if len(self._records) < STAGNANT_STEPS:  # too few to judge by
            return
        for kind, words in find_signatures(self._records).items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.screen.line(("warning    ", "yellow"), words)

    def _tell_loaded(self, dense: float | None) -> None:
        if self._loaded is not None:
            self._loaded(dense)
            self._loaded = None

    def _node(self, node: str, update: dict[str, Any]) -> None:
        if node == "profile":
            self._tell_loaded(update.get("dense_perplexity"))
        if node in _NEXT:
            self.say(_NEXT[node])


def step_line(record: Step) -> list[str | tuple[str, str]]:
    """One step in one line."""
    verdict = record.verdict.replace("_", " ")
    parts: list[str | tuple[str, str]] = [
        f"step {record.step + 1:>3}  ",
        (f"{verdict:<11}", _VERDICT_STYLES[record.verdict]),
    ]
    if record.verdict == "empty":
        return [*parts, f"  {one_line(record.reason, 300)}"]
    parts.append(f"  {layers_words(record.applied)}")
    parts.append(f"  sparsity {record.sparsity:.4f}")
    if record.candidate_perplexity is not None:
        parts.append(f"  perplexity {record.candidate_perplexity:.3f}")
    change = change_words(record)
    if change:
        parts.append(f"  {change}")
    if record.predicted_change is not None:
        parts.append(f" (predicted {record.predicted_change:+.2%})")
    if record.candidate_knowledge is not None:
        parts.append(f"  facts {knowledge_words(record)}")
    if record.reason:
        parts.append(f"  {one_line(record.reason, 300)}")
    return parts


def layers_words(applied: dict[str, float]) -> str:
    """How many layers a step pruned, and the few it pruned most."""
    largest = sorted(applied, key=lambda name: (-applied[name], name))[:NAMED]
    named = ", ".join(f"{short_name(n)} {applied[n]:+.3f}" for n in largest)
    more = ", ..." if len(applied) > NAMED else ""
    noun = "layer" if len(applied) == 1 else "layers"
    return f"{len(applied)} {noun} ({named}{more})"


def change_words(record: Step) -> str:
    """The measured change of perplexity with its noise; "" if there is none."""
    if record.change is None:
        return ""
    noise = f" ± {record.change_stderr:.2%}" if record.change_stderr is not None else ""
    return f"{record.change:+.2%}{noise}"


def knowledge_words(record: Step) -> str:
    """Log-probability of the right answers to the facts, and how far it is from the dense one."""
    value, dense = record.candidate_knowledge, record.knowledge_dense
    if value is None or dense is None:
        return ""
    return f"{value:+.3f} nats a token ({value - dense:+.3f} from dense)"


def one_line(text: str, most: int) -> str:
    """Text on one line, cut."""
    joined = " ".join(text.split())
    return joined if len(joined) <= most else joined[: most - 3] + "..."


def request_rows(config: PruneConfig) -> list[tuple[str, str]]:
    """What a run is asked to do: target, criterion, texts."""
    windows, texts = config.texts.windows, config.texts
    guard = texts.guard or f"{texts.calibration} (other windows)"
    return [
        ("target", target_words(config)),
        ("criterion", config.criterion_words),
        (
            "texts",
            f"calibration {texts.calibration}, {windows.calibration} windows; "
            f"guard {guard}, {windows.guard}; test {texts.test}, {windows.test}; "
            f"{windows.length} tokens each",
        ),
    ]


def target_words(config: PruneConfig) -> str:
    """The target in words; a baseline's is fixed by a pattern, a run takes whole layers to it."""
    whole = pattern_sparsity(config.pattern)
    if whole is None:
        return f"{config.target:.1%} of the prunable weights"
    if config.agent == BASELINE:
        return f"{whole:.1%} of the prunable weights, fixed by the pattern"
    return f"{config.target:.1%} of the prunable weights, by whole layers of {config.pattern}"


def print_metrics(screen: Screen, metrics: Metrics, directory: str, model: str | None) -> None:
    """The summary of a finished run; without a model where none was saved."""
    rows = [
        _pair_row("test (reported)", metrics.perplexity.test),
        _pair_row("guard (chosen on)", metrics.perplexity.guard),
    ]
    screen.line()
    screen.table(["perplexity", "dense", "pruned", "change"], rows)
    screen.line()
    screen.pairs(
        [
            ("sparsity", _sparsity_words(metrics)),
            *_knowledge_rows(metrics.knowledge),
            ("ended", ended_words(metrics)),
            ("steps", f"{metrics.steps}, {metrics.rollbacks} rolled back"),
            ("agent", _agent_words(metrics)),
            ("scored", _scored_words(metrics.tokens)),
            ("time", _time_words(metrics.seconds)),
            ("memory", f"{size(metrics.peak_memory_bytes)} at most"),
            ("masks", metrics.revision),
            ("model", model or "none: it would be the dense one"),
            ("run", directory),
        ]
    )
    screen.line(ZEROS_ALONE)


def _sparsity_words(metrics: Metrics) -> str:
    words = f"{metrics.sparsity:.2%} of the prunable weights are exactly zero"
    if metrics.dense_sparsity < NEGLIGIBLE:
        return words
    return f"{words}, {metrics.dense_sparsity:.2%} were before"


def print_evaluation(screen: Screen, found: "Evaluation") -> None:
    """What a model scored, alone or against another."""
    for one in (found, found.against):
        if one is None:
            continue
        screen.pairs(
            [
                ("model" if one is found else "against", one.model),
                ("loaded", f"{one.dtype} on {one.device}, {one.parameters:,} parameters"),
                ("sparsity", f"{one.sparsity:.2%} of {one.prunable:,} prunable weights are zero"),
            ]
        )
        for text in one.texts:
            noise = f" ± {text.stderr:.3f}" if text.stderr is not None else ""
            value = "not finite" if text.perplexity is None else f"{text.perplexity:.3f}{noise}"
            screen.line(
                ("perplexity ", "bold"),
                f" {value} on {text.source} ({text.windows} windows of {text.length} tokens)",
            )
        for task in one.tasks:
            noise = f" ± {task.stderr:.1%}" if task.stderr is not None else ""
            screen.line(
                (f"{task.task:<11}", "bold"),
                f"{task.accuracy:.1%}{noise} right of {_count(task.questions, 'question')} from "
                f"{task.data}, {task.shots}-shot; right answers at "
                f"{nats_words(task.log_probability)} nats a token",
            )
    if found.comparisons:
        screen.line()
        screen.table(
            ["task", "accuracy", "against", "retention", "lost", "gained", "p", "nats a token"],
            [
                [
                    c.task,
                    f"{c.accuracy:.1%}",
                    f"{c.reference_accuracy:.1%}",
                    "" if c.retention is None else f"{c.retention:.1f} %",
                    str(c.lost),
                    str(c.gained),
                    f"{c.p_value:.2g}",
                    nats_words(c.log_probability_change)
                    + ("" if c.low is None else f" [{c.low:+.3f}, {nats_words(c.high)}]"),
                ]
                for c in found.comparisons
            ],
        )


def nats_words(value: float | None) -> str:
    """A log-probability or a difference of some, in nats."""
    return "not finite" if value is None else f"{value:+.3f}"


def calls_words(calls: int, tokens: int) -> str:
    """What an LLM was asked; "" if it was not."""
    return f"{_count(calls, 'call')}, {tokens:,} tokens" if calls or tokens else ""


def _knowledge_rows(pair: Pair | None) -> list[tuple[str, str]]:
    if pair is None:
        return []
    words = f"right answers at {nats_words(pair.final)} nats a token, dense {pair.dense:+.3f}"
    return [("facts", words)]


def _agent_words(metrics: Metrics) -> str:
    words = [_count(metrics.decisions, "decision")]
    if metrics.invalid_answers:
        refused = _count(metrics.invalid_answers, "answer")
        words.append(f"{refused} refused, {metrics.repairs} of them sent back")
    if metrics.probes:
        words.append(_count(metrics.probes, "probe"))
    asked = calls_words(metrics.llm_calls, metrics.tokens.get("llm", 0))
    return "; ".join([", ".join(words), *([f"LLM: {asked}"] if asked else [])])


def _scored_words(tokens: dict[str, int]) -> str:
    """Tokens of text by what they were scored for."""
    return ", ".join(f"{use} {n:,}" for use, n in tokens.items() if use != "llm") + " tokens"


def _time_words(seconds: dict[str, float]) -> str:
    parts = sorted((-value, node) for node, value in seconds.items() if node != "total")
    named = ", ".join(f"{node} {duration(-value)}" for value, node in parts)
    return f"{duration(seconds.get('total', math.nan))} ({named})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _pair_row(name: str, pair: Pair) -> list[str]:
    return [
        name,
        f"{pair.dense:.3f}",
        f"{pair.final:.3f}",
        f"{(pair.final - pair.dense) / pair.dense:+.2%}",
    ]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
