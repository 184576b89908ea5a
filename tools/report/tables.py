"""A comparison as tables of words: one form for the terminal, Markdown and the page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunewright.state.run import TOLERANCE
from prunewright.state.shown import clean, one_line
from prunewright.state.study import DENSE_NAME, Comparison, Spread, Summary
from prunewright.tools.store.storage import write_atomic, write_json

OFF_TARGET = "†"
"""Marks a sparsity that is not the target's."""
BEST = "★"
"""Marks the best of a column, where no other comes near."""
NONE = "\N{EN DASH}"
_MOST = 300


@dataclass(frozen=True)
class Table:
    """Columns, rows of words, and what has to be said below them.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: one word a column.
        left: how many of the first columns hold text rather than numbers.
        notes: sentences.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)


def write_tables(comparison: Comparison, directory: Path) -> None:
    """Write comparison.json and comparison.md.

    Raises:
        StoreError: cannot write.
    """
    write_json(directory / "comparison.json", comparison.model_dump(mode="json"))
    write_atomic(directory / "comparison.md", to_markdown(comparison).encode())


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Results, ratios to the control, and every experiment."""
    tables = [results_table(comparison)]
    if comparison.config.control is not None:
        tables.append(ratio_table(comparison))
    return [*tables, experiment_table(comparison)]


def results_table(comparison: Comparison) -> Table:
    """Mean and spread over seeds of every method at every target."""
    config, dense = comparison.config, comparison.dense.scores
    texts = [text.name for text in config.evaluation.texts]
    tasks = [name for task in config.evaluation.tasks for name in task.columns]
    scores = [f"{dense.texts[n].perplexity:.2f}" if dense else NONE for n in texts]
    scores += [f"{dense.tasks[n]:.3f}" if dense and n in dense.tasks else NONE for n in tasks]
    rows = [[DENSE_NAME, NONE, NONE, NONE, *scores, NONE, NONE, NONE]]
    items = comparison.summary
    best = {n: _best(items, [item.perplexity.get(n) for item in items]) for n in texts}
    best |= {n: _best(items, [item.tasks.get(n) for item in items], -1) for n in tasks}
    for number, item in enumerate(items):
        mark = "" if item.on_target else f" {OFF_TARGET}"
        rows.append(
            [
                item.method,
                f"{item.target:.4g}",
                _spread(item.sparsity, "{:.4f}") + mark,
                f"{item.seeds}" + (f" of {item.seeds + item.missing}" if item.missing else ""),
                *(_spread(item.perplexity.get(n), "{:.2f}", best[n][number]) for n in texts),
                *(_spread(item.tasks.get(n), "{:.3f}", best[n][number]) for n in tasks),
                f"{item.tokens_for_choosing.mean:,.0f}" if item.tokens_for_choosing else NONE,
                _spread(item.seconds, "{:,.1f}"),
                f"{item.peak_memory_bytes.mean / 2**20:,.0f}" if item.peak_memory_bytes else NONE,
            ]
        )
    notes = [
        "Perplexity on each text: mean over seeds ± sample standard deviation. Tokens are those of "
        "text scored to choose masks, seconds those of the run or baseline without this "
        "evaluation, memory the largest resident size of the experiment's own process."
    ]
    notes += _best_words(comparison, rows)
    if any(not item.on_target for item in comparison.summary):
        notes.append(off_target_words())
    if any(item.missing for item in comparison.summary):
        notes.append("Where seeds are missing, the others alone are averaged.")
    names = [f"{name}, perplexity" for name in texts] + tasks
    columns = ["method", "target", "sparsity", "seeds", *names, "tokens", "seconds", "memory, MiB"]
    return Table("Results", columns, rows, notes=notes)


def ratio_table(comparison: Comparison) -> Table:
    """Perplexity over the control's with the same seed and target, over seeds."""
    texts = [text.name for text in comparison.config.evaluation.texts]
    control = comparison.config.control
    at = {item.target for item in comparison.summary if item.method == control}
    off = {item.target for item in comparison.summary if item.method == control}
    off -= {i.target for i in comparison.summary if i.method == control and i.on_target}
    items = comparison.summary
    best = {n: _best(items, [item.ratio.get(n) for item in items]) for n in texts}
    rows = []
    for number, item in enumerate(items):
        mark = f" {OFF_TARGET}" if not item.on_target or item.target in off else ""
        values = [_spread(item.ratio.get(n), "{:.3f}", best[n][number]) for n in texts]
        rows.append(
            [
                item.method,
                f"{item.target:.4g}",
                *(value + mark if value != NONE else value for value in values),
                f"{max((s.n for s in item.ratio.values()), default=0)}",
            ]
        )
    notes = [
        "Perplexity over the control's with the same seed and target, below 1 if the method is "
        "better: mean over seeds ± sample standard deviation."
    ]
    notes += _best_words(comparison, rows)
    if any(item.target not in at for item in comparison.summary):
        notes.append("Where the control was not run at a target, there is no ratio.")
    if any(OFF_TARGET in word for row in rows for word in row[2:]):
        notes.append(off_target_words())
    return Table(f"Ratio to {control}", ["method", "target", *texts, "seeds"], rows, notes=notes)


def _best(items: Sequence[Summary], spreads: list[Spread | None], sign: int = 1) -> list[bool]:
    """Whether each is better than every other at its target by more than both deviations.

    None is where a method has one seed only, nor where there is no other.

    Args:
        items: methods at their targets; those off the target are left out.
        spreads: what is compared, one of each.
        sign: 1 where lower is better, -1 where higher is.
    """
    found = [False] * len(items)
    for target in {item.target for item in items}:
        alike = {
            n: spread
            for n, (item, spread) in enumerate(zip(items, spreads, strict=True))
            if item.target == target and item.on_target and spread is not None
        }
        best = min(alike, key=lambda n: sign * alike[n].mean, default=-1)
        own = alike.pop(best, None)
        if own is not None and alike:
            found[best] = all(
                own.sd is not None
                and other.sd is not None
                and sign * (other.mean - own.mean) > own.sd + other.sd
                for other in alike.values()
            )
    return found


def _best_words(comparison: Comparison, rows: list[list[str]]) -> list[str]:
    """What the mark of the best means; or that one seed tells no best."""
    if len(comparison.config.seeds) == 1:
        return [
            "One seed is all there is: how far numbers would spread over others is not known, so "
            "no best is marked."
        ]
    if any(BEST in word for row in rows for word in row[2:]):
        return [
            f"{BEST} The best at its target: better than each other method by more than the "
            "standard deviations of both together."
        ]
    return []


def off_target_words() -> str:
    """What the mark means."""
    return (
        f"{OFF_TARGET} A sparsity is more than {TOLERANCE} off the target: its perplexity is "
        "not comparable with that of the others at this target."
    )


def experiment_table(comparison: Comparison) -> Table:
    """Every experiment by itself."""
    texts = [text.name for text in comparison.config.evaluation.texts]
    rows = []
    for experiment in comparison.experiments:
        at = [f"{experiment.target:.4g}", f"{experiment.seed}"]
        result = experiment.result
        if result is None:
            words = one_line(experiment.error, _MOST)
            ended = f"{experiment.state}: {words}" if words else experiment.state
            rows.append([experiment.method, ended, *at, *[NONE] * (5 + len(texts)), experiment.key])
            continue
        rows.append(
            [
                experiment.method,
                result.status.replace("_", " "),
                *at,
                f"{result.sparsity:.4f}" + ("" if experiment.on_target else f" {OFF_TARGET}"),
                f"{result.steps} ({result.rollbacks} rolled back)",
                *(f"{result.scores.texts[name].perplexity:.3f}" for name in texts),
                f"{result.tokens_for_choosing:,}",
                f"{result.seconds:,.1f}",
                f"{result.peak_memory_bytes / 2**20:,.0f}",
                experiment.key,
            ]
        )
    columns = ["method", "ended", "target", "seed", "sparsity", "steps", *texts]
    columns += ["tokens", "seconds", "memory, MiB", "directory in experiments/"]
    notes = [off_target_words()] if any(OFF_TARGET in row[4] for row in rows) else []
    return Table("Experiments", columns, rows, left=2, notes=notes)


def to_markdown(comparison: Comparison) -> str:
    """comparison.md; names and errors are text in it, whatever they hold."""
    config = comparison.config
    texts = ", ".join(
        f"{text.name} ({text.windows} windows of {config.evaluation.length} tokens)"
        for text in config.evaluation.texts
    )
    parts = [
        f"# Comparison of {len(config.methods)} methods",
        escape(
            f"Model {config.settle().model}; seeds {', '.join(map(str, config.seeds))}; scored on "
            f"{texts}. Nothing was chosen on these texts."
        ),
    ]
    if comparison.dense.error:
        parts.append(escape(f"The unpruned model failed: {_line(comparison.dense.error)}"))
    for table in comparison_tables(comparison):
        rule = ["---"] * table.left + ["---:"] * (len(table.columns) - table.left)
        lines = [table.columns, *table.rows]
        words = [[escape(word) for word in line] for line in lines]
        words.insert(1, rule)
        parts.append(f"## {escape(table.title)}")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in words))
        parts += [escape(note) for note in table.notes]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown renders as it is, in a table's cell or elsewhere."""
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", _line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    return re.sub(r"\s", " ", clean(text))


def _spread(found: Spread | None, form: str, best: bool = False) -> str:
    if found is None:
        return NONE
    mean = form.format(found.mean)
    words = mean if found.sd is None else f"{mean} ± {form.format(found.sd)}"
    return f"{words} {BEST}" if best else words
