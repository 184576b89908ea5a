"""The page of a comparison, and its plots as files.

Raises:
    InputError: on import, where the extra ``report`` is missing.
"""

import json
import re
from pathlib import Path
from typing import Any

from prunewright.state.study import DENSE_NAME, Comparison, Summary
from prunewright.tools.report import FILE, render_page
from prunewright.tools.report.charts import Spec, axis, finished
from prunewright.tools.report.tables import BEST, comparison_tables
from prunewright.tools.store.storage import write_atomic

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
_WIDTH, _HEIGHT = 640, 300


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
        best=BEST,
        reports={
            e.key: f"experiments/{e.key}/{FILE}"
            for e in comparison.experiments
            if e.state == "done"
        },
        captions={name: spec["description"] for name, spec in charts.items()},
        settings={m.name: json.dumps(m.settings, ensure_ascii=False) for m in config.methods},
        config=json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False),
    )


def draw(spec: Spec) -> str:
    """A plot as SVG, on white."""
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
        for name in _AXES:
            rows = _rows(comparison, text, name)
            if rows:
                charts[f"{number}-{plain}-{name}".replace("--", "-")] = _chart(
                    rows, [*methods, DENSE_NAME] if name == "sparsity" else methods, text, name
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


def _chart(rows: list[dict[str, Any]], methods: list[str], text: str, name: str) -> Spec:
    import altair as alt

    y = alt.Y("y:Q", **axis([row["y"] for row in rows], f"Perplexity, {text}", 3))
    x = alt.X("x:Q", title=_AXES[name])
    if name != "sparsity":
        x = alt.X("x:Q", **axis([row["x"] for row in rows], _AXES[name], 10))
    legend = alt.Legend(title="Method", orient="bottom", labelLimit=280, columns=1)
    colour = alt.Color("method:N", legend=legend, scale=alt.Scale(domain=methods))
    shape = alt.Shape("method:N", legend=legend, scale=alt.Scale(domain=methods, range=_SHAPES))
    tooltip = [
        "method:N",
        "target:N",
        alt.Tooltip("x:Q", title=name, format=",.4~f"),
        alt.Tooltip("y:Q", title="perplexity", format=".4f"),
    ]
    several = len({row["target"] for row in rows if row["method"] != DENSE_NAME}) > 1
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    parts = [
        base.mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q", color=colour),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            color=colour, shape=shape, tooltip=tooltip
        ),
    ]
    if several and name == "sparsity":
        parts.append(base.mark_line().encode(color=colour))
    elif several:
        parts.append(base.mark_text(dx=9, align="left", fontSize=10).encode(text="target:N"))
    against = {"sparsity": "sparsity", "tokens": "tokens scored to choose masks", "seconds": "time"}
    words = (
        f"Perplexity on {text} against {against[name]}: mean over seeds, with one standard "
        "deviation; lower is better"
        + ("" if name == "sparsity" else ", and so is further left")
        + (". Numbers are target sparsities" if several and name != "sparsity" else "")
        + "."
    )
    return finished(alt.layer(*parts), words, _HEIGHT)
