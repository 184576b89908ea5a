"""What experiments come to together: keys, sums, ratios, marks, tables with hostile names."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair
import numpy as np
import pytest
from comparisons import BROKE, CONTROL, NAME, SEEDS, make_comparison, make_config
from page import Page

from prunewright.state import InputError, PruneConfig, validate_config
from prunewright.state.study import (
    Comparison,
    EvaluationOptions,
    EvaluationTask,
    Experiment,
    Spread,
    TextResult,
)
from prunewright.tools import study as module
from prunewright.tools.evaluation.harness import prepare_tasks
from prunewright.tools.report.comparison import (
    build_page,
    comparison_charts,
    draw,
    write_pages,
)
from prunewright.tools.report.tables import (
    BEST,
    OFF_TARGET,
    comparison_tables,
    results_table,
    to_markdown,
    write_tables,
)
from prunewright.tools.study import (
    Digests,
    experiment_key,
)


def test_sums_are_those_of_the_numbers_over_seeds() -> None:
    found = make_comparison()
    experiments = {
        (experiment.method, experiment.target, experiment.seed): experiment
        for experiment in found.experiments
    }
    assert len(found.summary) == 5  # two methods at two targets, and the pattern at its one
    for item in found.summary:
        done = [
            experiment.result
            for seed in SEEDS
            if (experiment := experiments[item.method, item.target, seed]).result is not None
        ]
        assert (item.seeds, item.missing) == (len(done), 3 - len(done))
        perplexities = [math.exp(np.mean(r.scores.texts["web <i>"].losses)) for r in done]
        for spread, values in (
            (item.perplexity["web <i>"], perplexities),
            (item.seconds, [r.seconds for r in done]),
            (item.sparsity, [r.sparsity for r in done]),
            (item.peak_memory_bytes, [r.peak_memory_bytes for r in done]),
            (item.tokens_for_choosing, [r.tokens["calibration"] + 50 for r in done]),
        ):
            assert spread is not None
            assert spread.n == len(values)
            assert spread.mean == pytest.approx(np.mean(values))
            assert spread.sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_ratios_are_to_the_control_with_the_same_seed_and_target() -> None:
    found = make_comparison()
    for experiment in found.experiments:
        if experiment.result is None:
            assert experiment.ratio == {}
            continue
        number = [CONTROL, NAME, "2:4"].index(experiment.method)
        # By construction one of two losses differs by the logarithm of the factors.
        expected = math.sqrt((1 + 0.1 * number + experiment.seed) / (1 + experiment.seed))
        assert experiment.ratio == {"web <i>": pytest.approx(expected)}
    (item,) = [s for s in found.summary if s.method == "2:4"]
    ratios = [math.sqrt((1.2 + seed) / (1 + seed)) for seed in SEEDS]
    assert item.ratio["web <i>"].mean == pytest.approx(np.mean(ratios))
    assert item.ratio["web <i>"].sd == pytest.approx(np.std(ratios, ddof=1))

    without = make_comparison(make_config(targets=[0.3]))
    (item,) = [s for s in without.summary if s.method == "2:4"]
    assert item.ratio == {}  # the control was not run at 50 %
    assert "no ratio" in to_markdown(without)
    assert make_comparison(make_config(control=None)).experiments[0].ratio == {}


def test_an_unequal_sparsity_is_marked_everywhere() -> None:
    found = make_comparison()
    off = [(c.method, c.target, c.seed) for c in found.experiments if c.result and not c.on_target]
    assert off == [(NAME, 0.3, 1)]
    assert [(s.method, s.target) for s in found.summary if not s.on_target] == [(NAME, 0.3)]
    results, ratios, experiments = comparison_tables(found)
    for table in (results, ratios, experiments):
        marked = [row for row in table.rows if any(OFF_TARGET in word for word in row)]
        assert len(marked) == 1
        assert marked[0][0] == NAME
        assert any("not comparable" in note for note in table.notes)
    failed = [row for row in results.rows if "2 of 3" in row]
    assert [(row[0], row[1]) for row in failed] == [(NAME, "0.5")]


def test_the_best_is_marked_where_it_is_more_than_the_spreads_away() -> None:
    found = make_comparison()

    def marked(*spreads: tuple[float, float | None]) -> list[int]:
        """The rows that are marked where methods at one target have these perplexities."""
        base = [item for item in found.summary if item.target == 0.5]
        summary = [
            item.model_copy(
                update={"perplexity": {"web <i>": Spread(mean=mean, sd=sd, n=3 if sd else 1)}}
            )
            for item, (mean, sd) in zip(base, spreads, strict=True)
        ]
        table = results_table(found.model_copy(update={"summary": tuple(summary)}))
        rows = [n for n, row in enumerate(table.rows[1:]) if BEST in row[4]]
        assert bool(rows) == any(BEST in note for note in table.notes)
        return rows

    assert marked((40.0, 1.0), (37.9, 1.0), (50.0, 1.0)) == [1]
    assert marked((40.0, 1.0), (38.1, 1.0), (50.0, 1.0)) == []
    assert marked((40.0, 1.0), (37.9, 1.0), (50.0, 12.0)) == []  # one far off, but uncertain
    assert marked((40.0, None), (10.0, 1.0), (50.0, 1.0)) == []
    one = make_comparison(make_config(seeds=[0]))
    assert "One seed is all there is" in to_markdown(one)
    assert "One seed is all there is" in Page(build_page(one, {})).text
    assert "One seed" not in to_markdown(found)


def test_json_reads_back_as_it_was_written(tmp_path: Path) -> None:
    found = make_comparison()
    write_tables(found, tmp_path)
    text = (tmp_path / "comparison.json").read_text()
    assert Comparison.model_validate_json(text) == found
    content = json.loads(text)
    assert content["schema_version"] == 2
    assert len(content["experiments"][0]["result"]["scores"]["texts"]["web <i>"]["losses"]) == 2
    with pytest.raises(ValueError, match="finite"):
        TextResult(perplexity=math.inf, losses=(1.0,))


def test_markdown_holds_hostile_names_as_text() -> None:
    from markdown_it import MarkdownIt

    found = make_comparison()
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(to_markdown(found))
    page = Page(html)
    assert not {"script", "code", "strong", "em", "a", "i", "img"} & set(page.tags)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    columns = {row.count("<td") + row.count("<th") for row in rows}
    tables = comparison_tables(found)
    assert columns == {len(table.columns) for table in tables}
    assert len(rows) == sum(len(table.rows) + 1 for table in tables)
    assert page.text.count(NAME) >= 2 * 2 + 6  # two sums twice, six experiments
    assert BROKE in page.text


def test_the_page_holds_hostile_names_as_text_and_loads_nothing(tmp_path: Path) -> None:
    found = make_comparison()
    page = Page(build_page(found, comparison_charts(found)))
    done = [e.key for e in found.experiments if e.state == "done"]
    assert page.links == [
        f"experiments/{key}/report.html" for key in done
    ]  # links, and nothing loaded
    assert "img" not in page.tags
    assert len(page.scripts) == 3  # the charts' data, Vega and the page's own
    assert "default-src 'none'" in page.policy
    assert page.text.count(NAME) >= 2 * 2 + 6
    assert BROKE in page.text
    assert "window.hacked" not in "".join(page.scripts[1:])
    charts = json.loads(page.scripts[0])
    assert list(charts) == ["1-web-i-sparsity", "1-web-i-tokens", "1-web-i-seconds"]
    for chart in charts.values():
        altair.Chart.from_dict(chart)  # raises where it does not keep to Vega-Lite's schema

    write_pages(found, tmp_path)
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(charts)


@pytest.mark.parametrize("axis", ["sparsity", "tokens", "seconds"])
def test_a_plot_has_each_sum_with_its_spread_at_its_place(axis: str) -> None:
    found = make_comparison()
    spec = comparison_charts(found)[f"1-web-i-{axis}"]
    data = spec["data"] if "data" in spec else spec["layer"][0]["data"]
    rows = [row for row in data["values"] if row["method"] != "dense"]
    assert len(rows) == len(found.summary)
    for row, item in zip(rows, found.summary, strict=True):
        of_axis = {
            "sparsity": (item.sparsity, 100),
            "tokens": (item.tokens_for_choosing, 1),
            "seconds": (item.seconds, 1),
        }
        spread, unit = of_axis[axis]
        perplexity = item.perplexity["web <i>"]
        assert spread is not None
        assert perplexity.sd is not None
        assert row["x"] == pytest.approx(unit * spread.mean)
        assert row["y"] == perplexity.mean
        assert row["high"] - row["y"] == pytest.approx(perplexity.sd)
    svg = ElementTree.fromstring(draw(spec))
    words = "".join(svg.itertext())
    assert "Perplexity, web <i>" in words
    assert NAME[:40] in words


@pytest.fixture
def keys(
    pico_models: Callable[..., Path], pico_config: dict[str, Any], tmp_path: Path
) -> Callable[..., str]:
    """A function that gives an experiment's key, with all that it follows from in ``tmp_path``."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(pico_models(), model)
    for name in ("calibration", "test", "scored"):
        (tmp_path / f"{name}.txt").write_text(f"The text for {name}. " * 9)

    def key(kind: str = "run", evaluation: dict[str, Any] | None = None, **own: Any) -> str:
        texts = pico_config["texts"] | {
            role: str(tmp_path / f"{role}.txt") for role in ("calibration", "test")
        }
        texts |= {name: own.pop(name) for name in ("knowledge", "calibration") if name in own}
        config = validate_config(pico_config | {"model": str(model), "texts": texts} | own)
        text = {"name": "scored", "source": str(tmp_path / "scored.txt"), "windows": 3}
        scored = EvaluationOptions.model_validate({"texts": [text]} | (evaluation or {}))
        return experiment_key(kind, config, scored, Digests())

    return key


def test_a_key_changes_with_whatever_changes_a_result(
    keys: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [keys()]
    assert keys() == found[0]
    found += [keys("baseline"), keys(seed=1), keys(step=0.2), keys(agent="random")]
    found.append(keys(evaluation={"length": 48}))
    for name in ("calibration.txt", "test.txt", "scored.txt", "model/config.json"):
        path = tmp_path / name
        before = path.read_text()
        path.write_text(before + " ")
        found.append(keys())
        path.write_text(before)
        assert keys() == found[0]
    facts = tmp_path / "facts.jsonl"
    for answer in ("Paris", "Lyon"):
        row = {"question": "What is the capital of France?", "answers": [answer]}
        facts.write_text(json.dumps(row))
        found.append(keys(guard={"max_knowledge_drop": 0.1}, knowledge=str(facts)))
    (tmp_path / "model" / "own.tiktoken").write_text("IQ== 0\n")
    found.append(keys())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found.append(keys())
    monkeypatch.setattr(module, "package_version", lambda: "99.0")
    found.append(keys())
    assert len(set(found)) == len(found)
    assert keys(out="elsewhere") == found[-1]  # where it lies changes nothing


def test_a_text_that_chooses_is_not_scored_on(keys: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "scored.txt").write_text((tmp_path / "calibration.txt").read_text())
    with pytest.raises(InputError, match="scored is the calibration text too"):
        keys()
    mix = ["embedded", str(tmp_path / "scored.txt")]
    with pytest.raises(InputError, match="scored is the calibration text too"):
        keys(calibration=mix)


def test_a_key_changes_with_a_mix_and_its_weights(keys: Callable[..., str], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 9)
    mixes = [
        ["embedded", str(other)],
        ["embedded", {"source": str(other), "weight": 2}],
        ["embedded", "self"],
    ]
    found = [keys(), *(keys(calibration=mix) for mix in mixes)]
    other.write_text("Changed. " * 9)
    found.append(keys(calibration=mixes[0]))
    assert len(set(found)) == len(found)


def test_questions_that_are_asked_are_not_calibrated_on(
    keys: Callable[..., str], tmp_path: Path
) -> None:
    rows = [
        {"question": f"What is the capital of country {n}?", "answers": [f"city {n}"]}
        for n in range(40)
    ]
    whole, rest = tmp_path / "whole.jsonl", tmp_path / "rest.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "capitals", "task": "facts", "data": str(whole), "limit": 10, "shots": 2}
    asking = {"tasks": [task]}
    with pytest.raises(InputError, match="answers questions that capitals asks"):
        keys(evaluation=asking, calibration=["embedded", str(whole)])
    (quiz,) = prepare_tasks([EvaluationTask.model_validate(task)])
    asked = {quiz.questions[index].question for index in quiz.asked}
    rest.write_text("".join(json.dumps(r) + "\n" for r in rows if r["question"] not in asked))
    assert keys(evaluation=asking, calibration=["embedded", str(rest)])


def test_experiments_know_their_names_and_errors() -> None:
    found = make_comparison()
    assert list(found.errors) == [f"{NAME}, 50 %, seed 2"]
    experiment = Experiment(
        method="m", kind="run", seed=3, target=0.45, key="k", state="pending", result=None
    )
    assert experiment.name == "m, 45 %, seed 3"
    assert isinstance(found.config.settle(), PruneConfig)
