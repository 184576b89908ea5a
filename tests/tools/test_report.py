"""report.html as an HTML parser reads it, and `load_trace`."""

import base64
import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair
import pytest
from page import HOSTILE, Page, make_runs
from typer.testing import CliRunner

from prunewright.graph import run
from prunewright.graph.cli import app
from prunewright.state import InputError, StoreError
from prunewright.state.metrics import Stage
from prunewright.state.shown import clean
from prunewright.tools import load_trace
from prunewright.tools.report import build_report, write_report
from prunewright.tools.report.charts import curve_chart
from prunewright.tools.report.maps import Grid


@pytest.fixture(scope="module")
def runs(
    pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return make_runs(pico_models(), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    shutil.copytree(runs[0], tmp_path / "copy")
    return tmp_path / "copy"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def steps_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "trace.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def rows_of(chart: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a plot's main data."""
    data = chart["data"] if "data" in chart else chart["layer"][0]["data"]
    rows: list[dict[str, Any]] = data["values"]
    return rows


def by_layer(chart: dict[str, Any]) -> dict[str, float]:
    """The values of a map by the full names that layers have in a Llama."""
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    found = {}
    for row in rows_of(chart):
        part = "self_attn" if row["projection"] in attention else "mlp"
        found[f"model.layers.{row['block']}.{part}.{row['projection']}"] = row["value"]
    return found


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = read(path)
    edit(content)
    path.write_text(json.dumps(content))


def test_the_page_has_the_numbers_of_metrics_and_trace(runs: tuple[Path, Path]) -> None:
    page = Page(build_report([runs[0]]))
    metrics = read(runs[0] / "metrics.json")
    perplexity = metrics["perplexity"]
    expected = [
        metrics["sparsity"],
        metrics["rollbacks"],
        metrics["seconds"]["total"],
        *(perplexity[text][which] for text in perplexity for which in perplexity[text]),
        *metrics["tokens"].values(),
        *(stage[name] for stage in metrics["stages"] for name in ("before", "after", "seconds")),
    ]
    for record in steps_of(runs[0]):
        expected += [
            record["step"] + 1,
            record["sparsity"],
            record["candidate_perplexity"],
            record["change"],
            record["change_stderr"],
            record["predicted_change"],
            *sorted(record["applied"].values())[-3:],
        ]
    assert {value for value in expected if value is not None} <= set(page.numbers)
    assert " answers were invalid" in page.text
    manifest = read(runs[0] / "manifest.json")
    for fact in (
        manifest["model"]["sha256"],
        *(text["sha256"] for text in manifest["texts"].values()),
        manifest["versions"]["torch"],
        metrics["revision"],
        "texts.windows.length",
    ):
        assert fact in page.text


def test_the_plots_have_the_numbers_of_the_trace(runs: tuple[Path, Path]) -> None:
    charts = json.loads(Page(build_report(list(runs))).scripts[0])
    records = steps_of(runs[0])
    rows = [row for row in rows_of(charts["sparsity"]) if row["run"] == runs[0].name]
    assert [row["sparsity"] for row in rows[1:]] == [100 * r["sparsity"] for r in records]
    assert [row["verdict"] for row in rows[1:]][:2] == ["accepted", "rolled back"]
    # The line stays where it was when a step is rolled back.
    assert rows[2]["accepted"] == records[1]["perplexity_before"]
    assert rows[2]["measured"] == records[1]["candidate_perplexity"]
    assert {row["run"] for row in rows_of(charts["tradeoff"])} == {p.name for p in runs}
    profile = read(runs[0] / records[-1]["profile"])
    for signal in ("z_s", "z_g", "z_c"):
        values = {layer["name"]: layer["signals"][signal] for layer in profile["layers"]}
        assert by_layer(charts[f"heat-{signal}"]) == values
    final = by_layer(charts["heat-sparsity"])
    sizes = {layer["name"]: layer["parameters"] for layer in profile["layers"]}
    total = sum(final[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert total / 100 == pytest.approx(read(runs[0] / "metrics.json")["sparsity"])


def test_the_loss_of_a_stage_that_trains_is_drawn_over_its_tokens() -> None:
    values: dict[str, Any] = {"revision": "r", "before": 30.0, "after": 28.0, "kept": True}
    values |= {"seconds": 9.0, "tokens": {"adapt": 200}}
    solved = Stage(name="reconstruct", **values)
    trained = Stage(name="adapt", curve=[(100, 0.5), (200, 0.25)], **values)
    assert curve_chart([solved]) is None
    chart = curve_chart([solved, trained])
    assert chart is not None
    assert rows_of(chart) == [{"tokens": 100, "loss": 0.5}, {"tokens": 200, "loss": 0.25}]
    altair.Chart.from_dict(chart)
    assert trained.words.startswith("adapt (training): guard perplexity 30.000 to 28.000")


def test_every_plot_keeps_to_the_schema_of_vega_lite(runs: tuple[Path, Path]) -> None:
    for shown in ([runs[0]], list(runs)):
        charts = json.loads(Page(build_report(shown)).scripts[0])
        assert {"sparsity", "perplexity", "prediction", "heat-sparsity", "heat-z_s"} <= set(charts)
        for chart in charts.values():
            altair.Chart.from_dict(chart)  # raises where it does not


def test_the_pages_own_run_comes_first_in_every_legend(runs: tuple[Path, Path]) -> None:
    for first, second in (runs, runs[::-1]):
        charts = json.loads(Page(build_report([first, second])).scripts[0])
        way = charts["tradeoff"]["encoding"]
        line = charts["sparsity"]["layer"][0]["encoding"]
        for scaled in (way["color"], way["shape"], line["color"], line["strokeDash"]):
            assert scaled["scale"]["domain"] == [first.name, second.name]
        # Alike, so that they are drawn as one legend.
        assert way["color"] == way["shape"]


def test_it_opens_with_what_was_pruned_by_whom_and_what_it_cost(runs: tuple[Path, Path]) -> None:
    page = Page(build_report([runs[0]]))
    metrics = read(runs[0] / "metrics.json")
    test = metrics["perplexity"]["test"]
    head = page.text[: page.text.index("Where the zeros are")]
    for words in (
        f"{metrics['sparsity']:.1%} pruned",
        f"import:page:Hostile set {metrics['sparsity']:.2%} of the 18,432 weights in 14 linear",
        f"from {test['dense']:.2f} to {test['final']:.2f}, by "
        f"{abs(test['final'] / test['dense'] - 1):.1%}.",
    ):
        assert words in head
    places = [page.text.index(words) for words in ("Where the", "Decisions", "Over the", "Before")]
    assert places == sorted(places)
    assert places[-1] < page.text.index("Load it") < page.text.index("Versions and hashes")


def test_each_step_has_a_map_of_what_it_pruned(runs: tuple[Path, Path]) -> None:
    html = build_report([runs[0]])
    articles = re.findall(r'<article class="(\w+)".*?</article>', html, re.DOTALL)
    records = steps_of(runs[0])
    assert articles == [record["verdict"] for record in records]
    maps = re.findall(r"<svg class=.*?</svg>", html, re.DOTALL)
    assert len(maps) == sum(bool(record["applied"]) for record in records)
    squares = re.findall(r"M(\d+) (\d+)h", maps[0])
    rows = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    named = [name.split(".") for name in records[0]["applied"]]
    assert set(squares) == {(parts[2], str(rows.index(parts[4]))) for parts in named}


def test_a_map_has_shades_gives_back_its_own_colour_and_averages_experts() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(2) for e in range(2)]
    grid = Grid.of([*names, "model.layers.0.self_attn.o_proj"])
    assert (grid.blocks, grid.projections) == (["0", "1"], ["up_proj", "o_proj"])
    means = grid.means({names[0]: 0.1, names[1]: 0.3, names[2]: -0.2})
    assert means == {("up_proj", "0"): pytest.approx(0.2), ("up_proj", "1"): -0.2}
    drawn = grid.drawing({names[0]: 0.1, names[1]: 0.3, names[2]: -0.1, names[3]: 0.0}, 0.5, "<b>")
    assert 'class="more-2" d="M0 0h.9v.9h-.9z"' in drawn
    assert 'class="less-1" d="M1 0h.9v.9h-.9z"' in drawn
    assert "<b>" not in drawn
    other = Grid.of(["h.0.attn.c_proj", "h.0.mlp.c_proj"])
    assert other.projections == ["attn.c_proj", "mlp.c_proj"]  # else they could not be told apart


def test_hostile_text_stays_text_and_nothing_is_loaded(runs: tuple[Path, Path]) -> None:
    html = build_report(list(runs))
    page = Page(html)
    # Of the reasoning, a refused answer, a note and a review.
    assert page.text.count(clean(HOSTILE)) == 4
    assert clean(html) == html
    assert page.tags.count("script") == 3
    assert not {"img", "b", "iframe", "link", "object", "base", "form"} & set(page.tags)
    assert page.links == []
    assert not set("<\u2028\u2029") & set(page.scripts[0])
    # Only the page's own scripts may run: the policy names their hashes.
    digests = [hashlib.sha256(script.encode()).digest() for script in page.scripts[1:]]
    allowed = re.findall(r"'sha256-([^']+)'", page.policy)
    assert allowed == [base64.b64encode(digest).decode() for digest in digests]
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives.pop("style-src") == "'unsafe-inline'"
    assert directives.pop("script-src").split() == [f"'sha256-{digest}'" for digest in allowed]
    assert set(directives.values()) == {"'none'"}
    assert "default-src" in directives


def test_it_is_compared_with_uniform_pruning_or_says_that_it_is_not(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    alone = Page(build_report([runs[0]])).text
    assert "Uniform pruning was not measured" in alone
    assert "prunewright baseline --config" in alone
    together = Page(build_report(list(runs)))
    own, other = (read(path / "metrics.json")["perplexity"]["test"]["final"] for path in runs)
    assert own / other in together.numbers
    assert f"the ratio {own / other:.3f}" in together.text
    assert ("is not lower" in together.text) == (own >= other)
    # Another test text: the numbers say nothing about each other.
    shutil.copytree(runs[1], tmp_path / "other")
    change(
        tmp_path / "other" / "manifest.json", lambda m: m["texts"]["test"].update(sha256="0" * 64)
    )
    apart = Page(build_report([runs[0], tmp_path / "other"]))
    assert "Not comparable" in apart.text
    assert own / other not in apart.numbers


def test_a_baseline_has_a_page(runs: tuple[Path, Path]) -> None:
    page = Page((runs[1] / "report.html").read_text(encoding="utf-8"))
    assert read(runs[1] / "metrics.json")["perplexity"]["test"]["final"] in page.numbers
    assert "This is the uniform control itself." in page.text
    assert "heat-z_s" not in json.loads(page.scripts[0])


def test_only_a_uniform_baseline_is_taken_for_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    owl = tmp_path / "owl"
    shutil.copytree(runs[1], owl)
    config = (owl / "config.yaml").read_text(encoding="utf-8")
    (owl / "config.yaml").write_text(config.replace("allocation: uniform", "allocation: owl"))
    together = Page(build_report([runs[0], owl])).text
    assert "Uniform pruning was not measured" in together
    assert "owl, one shot" in together
    alone = Page(build_report([owl])).text
    assert "This is the uniform control itself." not in alone
    assert "--allocation uniform --set 'allocation_options={}' --out" in alone
    assert "perplexity on the test text is" in Page(build_report([owl, runs[1]])).text


def test_a_run_that_has_not_ended_has_a_page(copy: Path) -> None:
    (copy / "metrics.json").unlink()
    lines = (copy / "trace.jsonl").read_text(encoding="utf-8").split("\n")
    # As an older version wrote it, without what has a default since.
    record = json.loads(lines[0])
    for name in ("predicted_costs", "repairs", "llm_calls", "probes", "seal"):
        del record[name]
    (copy / "trace.jsonl").write_text(json.dumps(record) + "\n")
    page = Page(build_report([copy]))
    assert "not finished" in page.text
    assert record["sparsity"] in page.numbers
    for name in ("trace.jsonl", "manifest.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "steps")
    page = Page(build_report([copy]))
    assert "No step had ended yet" in page.text
    assert json.loads(page.scripts[0]) == {}


def test_what_cannot_be_read_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        build_report([tmp_path])
    with pytest.raises(InputError, match="named twice"):
        build_report([copy, copy])
    trace = (copy / "trace.jsonl").read_text(encoding="utf-8")
    (copy / "trace.jsonl").write_text(trace.replace('"change":0.3', '"change":1e999'))
    with pytest.raises(StoreError, match=r"trace\.jsonl is damaged"):
        build_report([copy])
    (copy / "trace.jsonl").write_text(trace[:500])
    with pytest.raises(StoreError, match=r"trace\.jsonl is damaged"):
        write_report([copy])
    with pytest.raises(StoreError, match=r"trace\.jsonl is damaged"):
        load_trace(copy)
    change(copy / "manifest.json", lambda m: m["versions"].update(prunewright="999.0"))
    with pytest.raises(InputError, match=r"made by prunewright 999\.0"):
        build_report([copy])
    with pytest.raises(InputError, match=r"made by prunewright 999\.0"):
        load_trace(copy)


def test_the_command_writes_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", *map(str, runs), "--out", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"report": str(out)}
    assert "Side by side" in Page(out.read_text(encoding="utf-8")).text


def test_a_finished_run_is_kept_where_its_report_cannot_be_written(
    pico_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "vl-convert-python":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with caplog.at_level(logging.WARNING, "prunewright"):
        result = run(pico_config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert (result.model_directory / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "report.html").exists()
    assert "pip install 'prunewright[report]'" in caplog.text
    assert f"prunewright report {tmp_path / 'run'}" in caplog.text


def test_frames_hold_what_the_trace_holds(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = load_trace(runs[0])
    records = steps_of(runs[0])
    history = trace.history
    assert repr(trace).startswith(f"<Trace history: {len(records)} rows, decisions: ")
    assert list(history["step"]) == [record["step"] + 1 for record in records]
    for column, key in (
        ("verdict", "verdict"),
        ("sparsity", "sparsity"),
        ("perplexity", "candidate_perplexity"),
        ("change", "change"),
        ("stderr", "change_stderr"),
        ("predicted", "predicted_change"),
        ("tokens", "llm_tokens"),
    ):
        values = [None if value != value else value for value in history[column]]
        assert values == [record[key] for record in records], column
    assert history["reasoning"][0] == clean(HOSTILE)
    assert history["gained"].sum() == pytest.approx(
        sum(record["sparsity"] - record["sparsity_before"] for record in records)
    )
    applied = [
        (record["step"] + 1, name, delta)
        for record in records
        for name, delta in record["applied"].items()
    ]
    rows = trace.decisions[["step", "layer", "delta"]]
    assert list(rows.itertuples(index=False, name=None)) == applied
    for row in trace.decisions.itertuples():
        assert row.layer == f"model.layers.{row.block}.{row.projection}"
    second = trace.profiles[trace.profiles["step"] == 2].set_index("layer")
    layers = read(runs[0] / records[1]["profile"])["layers"]
    assert len(second) == len(layers)
    for layer in layers:
        row = second.loc[layer["name"]]
        for key in ("block", "projection", "parameters", "sparsity", "dense_sparsity"):
            assert row[key] == layer[key], key
        for key in ("z_s", "z_g", "z_c"):
            assert row[key] == layer["signals"][key], key
            assert row[key.removeprefix("z_")] == layer["measured"][key], key
        for key in ("loss_cost", "regrow_gain"):
            assert [row[f"{key}_{delta}"] for delta in ("0.05", "0.10", "0.15")] == layer[key]
    control = load_trace(runs[1])
    assert (len(control.history), len(control.profiles)) == (1, 0)
    assert "z_c" in control.profiles.columns
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install"):
        load_trace(runs[0])
