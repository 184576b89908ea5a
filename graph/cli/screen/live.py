"""The one bar of a run: what is being done, which step it is, and how long it may still take."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.words.numbers import about, clock, duration
from prunewright.graph.words.steps import step_line, steps_to_go
from prunewright.state import PruneConfig, Step
from prunewright.state.metrics import SOLVING, TRAINING, Stage
from prunewright.state.shown import clean
from prunewright.tools.signatures import STAGNANT_STEPS, find_signatures

LABELS = {
    "activations": "calibration",
    "agent": "asking the agent whether it answers",
}
"""Phases whose names are not for people."""
# What follows each node, in words.
_NEXT = {
    "profile": "the agent decides",
    "agent_decide": "pruning",
    "apply_prune": "perplexity",
    "evaluate_ppl": "recording",
    "rollback": "recording",
    "reflect": "profiling",
}
_LOADING = "loading the model and the texts"
_VERDICT_STYLES = {"accepted": "", "rolled_back": "yellow", "empty": "yellow"}


class Live:
    """Shows a run while it goes on; pass `on_event` to the runner."""

    def __init__(
        self,
        screen: Screen,
        loaded: Any = None,
        records: Iterable[Step] = (),
        config: PruneConfig | None = None,
    ) -> None:
        """Make it.

        Args:
            screen: where.
            loaded: called once the model is loaded, with the dense perplexity, if that was
                measured now.
            records: the run's steps so far.
            config: of a run of steps; None where there are none.
        """
        self.screen = screen
        self._records = list(records)
        self._warned: set[str] = set()
        self._loaded = loaded
        self._config = config
        self._at_work = False
        self._ending = False
        self._began = time.monotonic()
        self._step_began: float | None = None
        self._seconds: list[float] = []
        self._stage: tuple[float, int] | None = None
        self._stage_ends: float | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=12),
            _Times(self),
            console=screen.console,
            expand=True,
            transient=True,
            # It also takes over standard error, and a quiet one would swallow that.
            disable=screen.console.quiet or not screen.console.is_terminal,
        )
        self._task = self._progress.add_task(_LOADING, total=None)

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
        """Name what begins."""
        self._show(words, None)
        self._progress.refresh()

    def progress(self, label: str, done: int, total: int) -> None:
        """Say how far what is being done is."""
        words = LABELS.get(label, label)
        self._show(f"{words} {done}/{total}" if total > 1 else words, done / max(total, 1))
        if done == 0:  # it is named before it is done, however short it is
            self._progress.refresh()

    def on_event(self, mode: str, event: dict[str, Any]) -> None:
        """Take an event of the runner."""
        if mode == "updates":
            for node, update in event.items():
                self._node(node, update or {})
        elif "begun" in event:
            self._tell_loaded(None)
        elif "progress" in event:
            self._take_progress(**event["progress"])
        elif "step" in event:
            self._take_step(Step.model_validate(event["step"]))
        elif "finishing" in event:
            self._end()
        elif "stage" in event:
            self._stage = self._stage_ends = None
            print_stage(self.screen, Stage.model_validate(event["stage"]))

    def times(self) -> str:
        """The time since the beginning, and about how much is left, where there is a ground."""
        now = time.monotonic()
        words = clock(now - self._began)
        if self._stage_ends is not None:
            return f"{words}, {about(max(self._stage_ends - now, 0.0))} left"
        left = self._steps_to_go()
        if not left or not self._seconds or self._step_began is None:
            return words
        seconds = left * fmean(self._seconds) - (now - self._step_began)
        return f"{words}, {about(max(seconds, 0.0))} left"

    def _take_progress(self, label: str, done: int, total: int) -> None:
        if label == "agent":
            self.say(LABELS[label] if done < total else _LOADING)
            return
        self._at_work = True
        if label == "activations" and self._step_began is None:
            self._step_began = time.monotonic()
        if label.startswith((SOLVING, TRAINING)):
            self._estimate(done, total)
        self.progress(label, done, total)

    def _estimate(self, done: int, total: int) -> None:
        """When a stage ends; it may have begun long before, in another process."""
        now = time.monotonic()
        began, before = self._stage = self._stage or (now, done)
        if done == total:
            self._stage = self._stage_ends = None
        elif done > before:
            self._stage_ends = now + (now - began) / (done - before) * (total - done)

    def _take_step(self, record: Step) -> None:
        now = time.monotonic()
        if self._step_began is not None:
            self._seconds.append(now - self._step_began)
        self._step_began = now
        self._ending = False
        # A step taken again after a resume replaces what it recorded before.
        self._records = [*self._records[: record.step], record]
        print_step_line(self.screen, record)
        self._warn()

    def _warn(self) -> None:
        """Print the failure signatures that the last step was the first to show."""
        if len(self._records) < STAGNANT_STEPS:  # too few to judge by
            return
        for kind, words in find_signatures(self._records).items():
            if kind not in self._warned:
                self._warned.add(kind)
                self.screen.warn(words)

    def _tell_loaded(self, dense: float | None) -> None:
        if self._loaded is not None:
            self._loaded(dense)
            self._loaded = None

    def _node(self, node: str, update: dict[str, Any]) -> None:
        self._at_work = True
        if node == "profile":
            self._tell_loaded(update.get("dense_perplexity"))
        if node in _NEXT and update.get("status", "running") == "running":
            self.say(_NEXT[node])

    def _end(self) -> None:
        """The last step was taken."""
        self._at_work = self._ending = True
        self.say("what comes after the last step")

    def _steps_to_go(self) -> int | None:
        if self._config is None:
            return None
        if self._ending:
            return 0
        return steps_to_go(self._records, self._config.target, self._config.max_steps)

    def _show(self, words: str, share: float | None) -> None:
        """Describe what is done; of a run of steps the bar shows how near the target is.

        Args:
            words: what is done.
            share: of it that is done.
        """
        if self._config is not None and self._at_work:
            left, taken = self._steps_to_go(), len(self._records)
            about_all = "" if left is None else f" of about {taken + left}"
            step = "the end" if left == 0 else f"step {taken + 1}{about_all}"
            words = f"{step}: {words}"
            share = self._way() if self._records else None
        words = clean(words)
        if share is not None:
            self._progress.update(self._task, description=words, total=1.0, completed=share)
        elif self._progress.tasks[0].total is None:
            self._progress.update(self._task, description=words)
        else:  # a total cannot be taken back: a task that has none is another one
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(words, total=None)

    def _way(self) -> float:
        """The share of the way to the target that is behind the run."""
        assert self._config is not None
        first = self._records[0].sparsity_before
        whole = self._config.target - first
        gone = self._records[-1].sparsity - first
        return min(max(gone / whole, 0.0), 1.0) if whole > 0 else 1.0


class _Times(ProgressColumn):
    """The clock of a `Live`."""

    def __init__(self, live: Live) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._live = live

    def render(self, task: Task) -> Text:
        return Text(self._live.times())


def print_stage(screen: Screen, stage: Stage) -> None:
    """Print what a stage after the last step came to, as `Screen.pairs` prints a value."""
    tokens = sum(stage.tokens.values())
    words = f"{stage.words}; {duration(stage.seconds)}, {tokens:,} tokens"
    if stage.kept:
        screen.pairs([("at the end", words)])
    else:
        screen.warn(words, "at the end")
    screen.pairs(("note", note) for note in stage.notes)


def print_step_line(screen: Screen, record: Step) -> None:
    """Print a step in a line."""
    screen.line((step_line(record), _VERDICT_STYLES[record.verdict]), indent=10)
