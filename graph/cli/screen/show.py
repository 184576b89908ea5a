"""What happened in a run, read from its directory."""

from typing import Any

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import print_stage, print_step_line
from prunewright.graph.cli.screen.results import print_metrics
from prunewright.graph.words.numbers import calls, percent
from prunewright.graph.words.runs import request_rows
from prunewright.graph.words.steps import change_words, knowledge_words, layers_words
from prunewright.state import ProbeReport, Review, Step
from prunewright.state.profile import short_name
from prunewright.state.shown import clean
from prunewright.state.step import DomainMeasure
from prunewright.tools.signatures import failure_signatures
from prunewright.tools.store.trace import Story, layer_sparsities


def as_json(story: Story, *, step: int | None = None, layers: bool = False) -> dict[str, Any]:
    """The run, or one step of it, as JSON values.

    Args:
        story: the run.
        step: only this step, counted from 1.
        layers: each layer's sparsity too.
    """
    if step is not None:
        return story.records[step - 1].model_dump(mode="json")
    found: dict[str, Any] = {
        "directory": str(story.directory.path),
        "finished": story.metrics is not None,
        "config": story.config.model_dump(mode="json"),
        "steps": [record.model_dump(mode="json") for record in story.records],
        "signatures": failure_signatures(story.records),
        "metrics": story.metrics.model_dump(mode="json") if story.metrics else None,
    }
    return found | {"layers": layer_sparsities(story)} if layers else found


def print_story(screen: Screen, story: Story) -> None:
    """The run, a line a step, and where it is."""
    agents = list(dict.fromkeys(record.agent for record in story.records))
    screen.pairs(
        [
            ("model", story.config.model),
            ("agent", ", then ".join(agents) or story.config.agent),
            *request_rows(story.config),
        ]
    )
    if story.records:
        screen.pairs([("dense", f"perplexity {story.records[0].perplexity_before:.3f} (guard)")])
        screen.line()
        for record in story.records:
            print_step_line(screen, record)
    for words in failure_signatures(story.records):
        screen.warn(words)
    if story.metrics is None:
        for stage in story.stages:
            print_stage(screen, stage)
        screen.line()
        screen.line(
            f"Not finished, {len(story.records)} steps so far. Go on with: "
            f"prunewright resume {story.directory.path}"
        )
    else:
        model = str(story.directory.model) if story.metrics.saved else None
        print_metrics(screen, story.metrics, str(story.directory.path), model)


def print_step(screen: Screen, record: Step) -> None:
    """One step whole: what was chosen, why, and what it came to."""
    expected = record.decision.expected_ppl_change
    predicted = record.predicted_change
    rows = [
        ("step", str(record.step + 1)),
        ("agent", record.agent),
        ("verdict", record.verdict.replace("_", " ")),
        ("reason", record.reason),
        ("sparsity", f"{record.sparsity_before:.4f} -> {record.sparsity:.4f}"),
        ("perplexity", _perplexities(record)),
        *(("domain", _domain(name, one)) for name, one in record.domains.items()),
        ("facts", knowledge_words(record)),
        ("proposal", "" if record.ranking is None else f"taken {record.ranking.words}"),
        ("predicted", "" if predicted is None else f"{percent(predicted)} by the profile"),
        ("expected", "" if expected is None else f"{percent(expected)} by the agent"),
        ("revision", record.revision),
        ("asked", calls(record.llm_calls, record.llm_tokens)),
    ]
    screen.pairs((name, value) for name, value in rows if value)
    probes = [probe.refused or _probe(probe) for probe in record.probes]
    for name, words in (
        ("probe", probes),
        ("refused", record.invalid_answers),
        ("note", record.notes),
        ("review", _review_lines(record.review)),
    ):
        screen.pairs((name, line) for line in words)
    screen.line()
    screen.line(("Reasoning", "bold"))
    screen.line(record.decision.reasoning or "(none given)")
    screen.line()
    # What an edit took out of the proposal is in the trace alone.
    edits = record.ranking.edits if record.ranking is not None else {}
    screen.table(
        ["layer", "chosen", *(["by edit"] if edits else []), "applied"],
        [
            [
                item.name,
                f"{item.delta:+.4f}",
                *([f"{edits[item.name]:+.4f}" if item.name in edits else ""] if edits else []),
                f"{record.applied.get(item.name, 0.0):+.4f}",
            ]
            for item in record.decision.layers
        ],
    )


def _review_lines(review: Review | None) -> list[str]:
    """What a person said, and what the agent had chosen where that is not what was applied."""
    if review is None:
        return []
    lines = [f"{review.verdict}{': ' if review.words else ''}{review.words}"]
    if review.proposed is not None:
        deltas = review.proposed.deltas
        chosen = ", ".join(f"{short_name(n)} {d:+.4f}" for n, d in deltas.items()) or "no layer"
        lines.append(f"the agent had chosen {chosen}")
    return lines + [f"refused: {words}" for words in review.refused]


def _probe(probe: ProbeReport) -> str:
    change = "not finite" if probe.change is None else percent(probe.change)
    noise = "" if probe.change_stderr is None else f" ± {probe.change_stderr:.2%}"
    return f"{layers_words(probe.layers)}: {change}{noise} on {probe.tokens} tokens"


def _perplexities(record: Step) -> str:
    value = record.candidate_perplexity
    after = "not measured" if value is None else f"{value:.3f} ({change_words(record)})"
    return f"{record.perplexity_before:.3f} -> {after}"


def _domain(name: str, one: DomainMeasure) -> str:
    words = f"{name} {one.before:.3f} -> "
    words += "not measured" if one.candidate is None else f"{one.candidate:.3f}"
    if one.change is not None:
        noise = "" if one.change_stderr is None else f" ± {one.change_stderr:.2%}"
        words += f" ({percent(one.change)}{noise})"
    return f"{words}, dense {one.dense:.3f}"


def print_layers(screen: Screen, story: Story) -> None:
    """Each layer's sparsity in per cent: blocks down, projections across."""
    found = layer_sparsities(story)
    if not found:
        screen.line("No step has been taken yet.")
        return
    cells: dict[str, dict[str, float]] = {}
    for name, sparsity in found.items():
        block, _, projection = short_name(name).partition(".")
        cells.setdefault(block, {})[projection] = sparsity
    columns = list(dict.fromkeys(p for row in cells.values() for p in row))
    screen.line("Sparsity of each layer, per cent:")
    screen.table(
        ["block", *(clean(column) for column in columns)],
        [
            [block, *(f"{100 * row[c]:.1f}" if c in row else "" for c in columns)]
            for block, row in cells.items()
        ],
    )
