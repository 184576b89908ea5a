"""What `prunewright compare` prints."""

from collections.abc import Iterable
from typing import Any

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import LABELS, Live
from prunewright.graph.words.numbers import duration
from prunewright.state.shown import one_line
from prunewright.state.study import ExperimentResult, Scores
from prunewright.tools.report.tables import Table

_STYLES = {"done": "green", "cached": "green", "failed": "red"}


class Experiments(Live):
    """The live part of a comparison: a line an experiment, and what the one at work is doing."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(screen)
        self._name = ""
        self.say("reading the model and the texts")

    def on_event(self, mode: str, event: dict[str, Any]) -> None:
        """Take an event of `compare`."""
        if mode != "experiment":
            if "progress" in event:
                part = event["progress"]
                label = LABELS.get(part["label"], part["label"])
                self.progress(f"{self._name}: {label}", part["done"], part["total"])
        elif event["state"] == "running":
            self._name = f"experiment {event['number']} of {event['of']}, {event['experiment']}"
            self.say(self._name)
        else:
            number = f"experiment {event['number']:>3} of {event['of']}  "
            style = _STYLES[event["state"]]
            if event["number"] == event["of"]:
                self.say("drawing the plots")
            words = _words(event["result"]) if event["result"] else event["error"]
            self.screen.line(
                number,
                (f"{event['state']:<8}", style),
                f"{event['experiment']}  {one_line(words, 300, '...')}",
                indent=len(number),
            )


def _words(result: ExperimentResult | Scores) -> str:
    """What an experiment came to, in a line."""
    if isinstance(result, Scores):
        scores, ended = result, ""
    else:
        scores = result.scores
        ended = f"sparsity {result.sparsity:.4f}, {duration(result.seconds)}, "
    texts = (f"{name} {score.perplexity:.3f}" for name, score in scores.texts.items())
    return f"{ended}perplexity {', '.join(texts)}"


def print_tables(screen: Screen, tables: Iterable[Table]) -> None:
    """The tables of a comparison, with their notes."""
    for table in tables:
        screen.line()
        screen.line((table.title, "bold"))
        keys = table.columns.index("target") + 1
        screen.table(table.columns, table.rows, table.left, keys)
        for note in table.notes:
            screen.line(note)
