"""comparison.json, its tables in Markdown, its page, and its plots as files."""

import json
import re
from pathlib import Path
from typing import Any

from prunewright.state.study import DENSE_NAME, Comparison, Summary
from prunewright.tools.report import plotting_script, render_page
from prunewright.tools.report.charts import Spec
from prunewright.tools.report.tables import comparison_tables, to_markdown
from prunewright.tools.store.storage import write_atomic, write_json

PLOTS = "plots"
_SHAPES = [
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
]
# The colours of page.js on white.
_COLOURS = ["#0068b3", "#b35900", "#00795a", "#b0307a", "#6f6a00", "#6a3fc2"]
_AXES = {
    "sparsity": "Sparsity, per cent",
    "tokens": "Tokens of text scored to choose masks",
    "seconds": "Seconds",
}
_WIDTH = 640


def write_tables(comparison: Comparison, directory: Path) -> None:
    """Write comparison.json and comparison.md.

    Raises:
        StoreError: cannot write.
    """
    write_json(directory / "comparison.json", comparison.model_dump(mode="json"))
    write_atomic(directory / "comparison.md", to_markdown(comparison).encode())


def write_pages(comparison: Comparison, directory: Path) -> None:
    """Write comparison.html, which needs no network, and each of its plots as ``plots/*.svg``.

    Raises:
        InputError: the extra ``report`` is missing.
        StoreError: cannot write.
    """
    charts = comparison_charts(comparison)
    page = build_page(comparison, charts)
    write_atomic(directory / "comparison.html", page.encode("utf-8", "backslashreplace"))
    for name, spec in charts.items():
        write_atomic(directory / PLOTS / f"{name}.svg", draw(spec).encode())


def build_page(comparison: Comparison, charts: dict[str, Spec]) -> str:
    """The page; whatever a name or an error holds stands in it as text.

    Raises:
        InputError: the extra ``report`` is missing.
    """
    config = comparison.config
    return render_page(
        "comparison.html",
        comparison=comparison,
        base=config.settle(),
        tables=comparison_tables(comparison),
        charts=charts,
        captions={name: spec["description"] for name, spec in charts.items()},
        settings={m.name: json.dumps(m.settings, ensure_ascii=False) for m in config.methods},
        config=json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False),
    )


def draw(spec: Spec) -> str:
    """A plot as SVG, on white.

    Raises:
        InputError: the extra ``report`` is missing.
    """
    plotting_script()  # says what is missing
    import vl_convert

    words = {"labelColor": "#1b1b1f", "titleColor": "#1b1b1f"}
    colours = {"background": "white", "axis": words, "legend": words}
    fixed = {key: value for key, value in spec.items() if key != "autosize"}
    fixed |= {"width": _WIDTH, "config": colours | {"range": {"category": _COLOURS}}}
    drawn: str = vl_convert.vegalite_to_svg(fixed)
    return drawn


def comparison_charts(comparison: Comparison) -> dict[str, Spec]:
    """Perplexity on each text against sparsity, against tokens scored and against time.

    The names are those of files: the text's, as far as a file's name can hold it.
    """
    charts = {}
    names = [text.name for text in comparison.config.evaluation.texts]
    # All of them in each plot, so that a method keeps its colour and shape.
    methods = [method.name for method in comparison.config.methods]
    for number, text in enumerate(names, 1):
        plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        for axis in _AXES:
            rows = _rows(comparison, text, axis)
            if rows:
                charts[f"{number}-{plain}-{axis}".replace("--", "-")] = _chart(
                    rows, [*methods, DENSE_NAME] if axis == "sparsity" else methods, text, axis
                )
    return charts


def _rows(comparison: Comparison, text: str, axis: str) -> list[dict[str, Any]]:
    rows = []
    dense = comparison.dense.scores
    if axis == "sparsity" and dense is not None:
        value = dense.texts[text].perplexity
        rows.append(_row(DENSE_NAME, 0.0, 0.0, value, 0.0))
    for item in comparison.summary:
        found, x = item.perplexity.get(text), _x(item, axis)
        if found is not None and x is not None:
            rows.append(_row(item.method, item.target, x, found.mean, found.sd or 0.0))
    return rows


def _row(method: str, target: float, x: float, mean: float, sd: float) -> dict[str, Any]:
    # A low end that is not positive has no place on a logarithmic axis.
    low = mean - sd if sd < mean else mean
    label = f"{100 * target:.3g} %"
    return {"method": method, "target": label, "x": x, "y": mean, "low": low, "high": mean + sd}


def _x(item: Summary, axis: str) -> float | None:
    spread = {
        "sparsity": item.sparsity,
        "tokens": item.tokens_for_choosing,
        "seconds": item.seconds,
    }[axis]
    if spread is None:
        return None
    return 100 * spread.mean if axis == "sparsity" else spread.mean


def _chart(rows: list[dict[str, Any]], methods: list[str], text: str, axis: str) -> Spec:
    y = {"type": "quantitative", **_scale([row["y"] for row in rows], f"Perplexity, {text}", 3)}
    x: Spec = {"field": "x", "type": "quantitative", "title": _AXES[axis]}
    if axis != "sparsity":
        x |= _scale([row["x"] for row in rows], _AXES[axis], 10)
    legend = {"title": "Method", "orient": "bottom", "labelLimit": 280, "columns": 1}
    by = {"field": "method", "type": "nominal", "legend": legend}
    colour = {**by, "scale": {"domain": methods}}
    shape = {**by, "scale": {"domain": methods, "range": _SHAPES}}
    several = len({row["target"] for row in rows if row["method"] != DENSE_NAME}) > 1
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {
                "y": {**y, "field": "low"},
                "y2": {"field": "high"},
                "color": colour,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {
                "y": {**y, "field": "y"},
                "color": colour,
                "shape": shape,
                "tooltip": [
                    {"field": "method", "type": "nominal"},
                    {"field": "target", "type": "nominal"},
                    {"field": "x", "type": "quantitative", "title": axis, "format": ",.4~f"},
                    {"field": "y", "type": "quantitative", "title": "perplexity", "format": ".4f"},
                ],
            },
        },
    ]
    if several and axis == "sparsity":
        layers.append(
            {"mark": {"type": "line"}, "encoding": {"y": {**y, "field": "y"}, "color": colour}}
        )
    elif several:
        layers.append(
            {
                "mark": {"type": "text", "dx": 9, "align": "left", "fontSize": 10},
                "encoding": {"y": {**y, "field": "y"}, "text": {"field": "target"}},
            }
        )
    against = {"sparsity": "sparsity", "tokens": "tokens scored to choose masks", "seconds": "time"}
    return {
        "description": f"Perplexity on {text} against {against[axis]}: mean over seeds, with one "
        "standard deviation; lower is better"
        + ("" if axis == "sparsity" else ", and so is further left")
        + (". Numbers are target sparsities" if several and axis != "sparsity" else "")
        + ".",
        "width": "container",
        "height": 300,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": rows},
        "encoding": {"x": x},
        "layer": layers,
    }


def _scale(values: list[float], title: str, factor: float) -> Spec:
    """Logarithmic where one value would flatten the others."""
    if min(values) > 0 and max(values) > factor * min(values):
        return {
            "title": f"{title}, logarithmic",
            "scale": {"type": "log", "nice": False, "padding": 12},
        }
    return {"title": title, "scale": {"zero": False, "padding": 12}}
