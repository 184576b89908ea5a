"""What a run or an evaluation came to."""

from typing import TYPE_CHECKING

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.words.numbers import count, nats, size
from prunewright.graph.words.runs import (
    agent_words,
    knowledge_rows,
    pair_row,
    scored_words,
    sparsity_words,
    time_words,
)
from prunewright.state.metrics import Metrics, Pair
from prunewright.tools.ending import control_words, ended_words

if TYPE_CHECKING:
    from prunewright.tools.evaluation import Evaluation

ZEROS_ALONE = (
    "Zeros alone make a model neither smaller on disk nor faster: that takes a storage format or "
    "a runtime that uses them."
)


def print_metrics(screen: Screen, metrics: Metrics, directory: str, model: str | None) -> None:
    """The summary of a finished run; without a model where none was saved."""
    rows = [
        pair_row("test (reported)", metrics.perplexity.test),
        pair_row("guard (chosen on)", metrics.perplexity.guard),
    ]
    rows += [pair_row(f"guard, {name}", pair) for name, pair in metrics.domains.items()]
    columns = ["perplexity", "dense", "pruned", "change"]
    if metrics.control is not None:
        columns.append("uniform")
        control = metrics.control
        values = [control.test, control.guard, *map(control.domains.get, metrics.domains)]
        for row, value in zip(rows, values, strict=True):
            row.append("not finite" if value is None else f"{value:.3f}")
    if metrics.stages and metrics.stages[0].before is not None:
        masks = Pair(dense=metrics.perplexity.guard.dense, final=metrics.stages[0].before)
        rows.append(pair_row("guard, masks alone", masks))
    screen.line()
    screen.table(columns, [row + [""] * (len(columns) - len(row)) for row in rows])
    screen.line()
    screen.pairs(
        [
            ("sparsity", sparsity_words(metrics)),
            *knowledge_rows(metrics.knowledge),
            *([("control", control_words(metrics.control))] if metrics.control else []),
            *(("at the end", stage.words) for stage in metrics.stages),
            ("ended", ended_words(metrics)),
            ("steps", f"{metrics.steps}, {metrics.rollbacks} rolled back"),
            ("agent", agent_words(metrics)),
            ("scored", scored_words(metrics.tokens)),
            ("time", time_words(metrics.seconds)),
            ("memory", f"{size(metrics.peak_memory_bytes)} at most"),
            ("masks", metrics.revision),
            ("model", model or "none: it would be the dense one"),
            ("run", directory),
        ]
    )
    screen.line(ZEROS_ALONE)


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
            words = f"{value} on {text.source} ({text.windows} windows of {text.length} tokens)"
            screen.pairs([("perplexity", words)])
        for task in one.tasks:
            noise = f" ± {task.stderr:.1%}" if task.stderr is not None else ""
            words = (
                f"{task.accuracy:.1%}{noise} right of {count(task.questions, 'question')} from "
                f"{task.data}, {task.shots}-shot; right answers at "
                f"{nats(task.log_probability)} nats a token"
            )
            screen.pairs([(task.task, words)])
    if found.comparisons:
        screen.line()
        screen.table(
            ["task", "accuracy", "against", "retention", "lost", "gained", "p", "nats a token"],
            [
                [
                    c.task,
                    f"{c.accuracy:.1%}",
                    f"{c.reference_accuracy:.1%}",
                    "" if c.retention is None else f"{c.retention:.1f}%",
                    str(c.lost),
                    str(c.gained),
                    f"{c.p_value:.2g}",
                    nats(c.log_probability_change)
                    + ("" if c.low is None else f" [{c.low:+.3f}, {nats(c.high)}]"),
                ]
                for c in found.comparisons
            ],
        )
