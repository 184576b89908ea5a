"""The report's plots, as Vega-Lite specifications: plain values, nothing drawn here."""

from collections.abc import Sequence
from typing import Any

from prunewright.state import Step
from prunewright.state.profile import short_name
from prunewright.tools.signals import SIGNALS
from prunewright.tools.store.trace import Story, layer_sparsities

Spec = dict[str, Any]

VERDICTS = {"accepted": "accepted", "rolled_back": "rolled back", "empty": "empty"}
"""Each verdict in words, as plots and tables show it."""
_SHAPES = ["circle", "triangle-down", "square"]


def step_charts(stories: Sequence[tuple[str, Story]]) -> dict[str, Spec]:
    """Sparsity and perplexity over the steps, a line a run; steps are counted from 1.

    Args:
        stories: each run with its label.
    """
    rows = [row for label, story in stories for row in _step_rows(label, story.records)]
    if not rows:
        return {}
    several = len(stories) > 1
    charts = {
        "sparsity": _over_steps(rows, "sparsity", "sparsity", several),
        "perplexity": _over_steps(rows, "accepted", "measured", several),
    }
    if several:
        charts["tradeoff"] = _tradeoff(rows)
    return charts


def _step_rows(label: str, records: list[Step]) -> list[dict[str, Any]]:
    if not records:
        return []
    first = records[0]
    start = {
        "run": label,
        "step": 0,
        "sparsity": 100 * first.sparsity_before,
        "accepted": first.perplexity_before,
    }
    return [start] + [
        {
            "run": label,
            "step": record.step + 1,
            "verdict": VERDICTS[record.verdict],
            "sparsity": 100 * record.sparsity,
            "accepted": record.accepted_perplexity,
            "measured": record.candidate_perplexity,
        }
        for record in records
    ]


def _over_steps(rows: list[dict[str, Any]], line: str, point: str, several: bool) -> Spec:
    y: Spec = {"type": "quantitative", "title": "Sparsity, per cent"}
    if line == "accepted":
        values = [row[key] for row in rows for key in (line, point) if row.get(key) is not None]
        y |= _perplexity_axis(values)
    measured = [row for row in rows if "verdict" in row and row[point] is not None]
    marked = [row for row in measured if row["verdict"] == VERDICTS["rolled_back"]]
    return _base(rows, f"{y['title']}, over the steps; rolled-back steps are marked") | {
        "encoding": {"x": {"field": "step", "type": "quantitative", "axis": _whole("Step")}},
        "layer": [
            {
                "mark": {"type": "line", "interpolate": "step-after"},
                "encoding": {"y": {**y, "field": line}, **_by_run(several)},
            },
            {
                "data": {"values": measured},
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "y": {**y, "field": point},
                    "shape": _by_verdict(),
                    "tooltip": _tooltip("run", "step", "verdict", "sparsity", "measured"),
                    **_by_run(several),
                },
            },
            {
                "data": {"values": marked},
                "mark": {"type": "text", "dy": -11, "fontSize": 10},
                "encoding": {"y": {**y, "field": point}, "text": {"value": "rolled back"}},
            },
        ][: 3 if marked else 2],
    }


def _tradeoff(rows: list[dict[str, Any]]) -> Spec:
    accepted = [row for row in rows if row.get("verdict", "accepted") == "accepted"]
    return _base(accepted, "Guard perplexity against sparsity, a line a run") | {
        "mark": {"type": "line", "point": {"size": 50}},
        "encoding": {
            "x": {"field": "sparsity", "type": "quantitative", "title": "Sparsity, per cent"},
            "y": {
                "field": "accepted",
                "type": "quantitative",
                **_perplexity_axis([row["accepted"] for row in accepted]),
            },
            "order": {"field": "step"},
            "shape": {"field": "run", "type": "nominal", "legend": _legend("Run")},
            "tooltip": _tooltip("run", "step", "sparsity", "accepted"),
            **_by_run(True),
        },
    }


def prediction_chart(records: list[Step]) -> Spec | None:
    """Measured against predicted change of each step; None where no step has both."""
    rows: list[dict[str, Any]] = [
        {
            "step": record.step + 1,
            "verdict": VERDICTS[record.verdict],
            "predicted": 100 * record.predicted_change,
            "measured": 100 * record.change,
            "low": 100 * (record.change - (record.change_stderr or 0)),
            "high": 100 * (record.change + (record.change_stderr or 0)),
        }
        for record in records
        if record.predicted_change is not None and record.change is not None
    ]
    if not rows:
        return None
    ends = [row[key] for row in rows for key in ("predicted", "measured")]
    equal = [{"predicted": end, "same": end} for end in (min(ends), max(ends))]
    x = {"type": "quantitative", "title": "Predicted perplexity change, per cent"}
    y = {"type": "quantitative", "title": "Measured, per cent"}
    return _base(rows, "Measured against predicted perplexity change; the line is equality") | {
        "encoding": {"x": {**x, "field": "predicted"}},
        "layer": [
            {
                "data": {"values": equal},
                "mark": {"type": "line", "strokeDash": [4, 4], "opacity": 0.7},
                "encoding": {"y": {**y, "field": "same"}},
            },
            {"mark": "rule", "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "y": {**y, "field": "measured"},
                    "shape": _by_verdict(),
                    "tooltip": _tooltip("step", "verdict", "predicted", "measured"),
                },
            },
            {
                "mark": {"type": "text", "dx": 11, "fontSize": 10},
                "encoding": {"y": {**y, "field": "measured"}, "text": {"field": "step"}},
            },
        ],
    }


def heat_maps(story: Story) -> dict[str, Spec]:
    """Block x projection of the final sparsity and of each signal of the last profile.

    Raises:
        StoreError: the last profile is missing or damaged.
    """
    found = layer_sparsities(story)
    if not found:
        return {}
    title = "Sparsity, per cent, after the last step"
    values = {name: 100 * value for name, value in found.items()}
    maps = {"sparsity": _heat_map(values, title, _SEQUENTIAL, ".0f")}
    profile = story.records[-1].profile
    layers = story.directory.read_profile(profile).layers if profile else []
    for signal in layers[0].signals if layers else ():
        # Of one from outside the name alone: a report runs nobody's code.
        title = f": {SIGNALS[signal].title}" if signal in SIGNALS else ""
        words = f"{signal}{title}, z-score before the last step"
        scores = {p.name: p.signals[signal] for p in layers if signal in p.signals}
        maps[signal] = _heat_map(scores, words, _DIVERGING, ".1f")
    return maps


# White text stands where a colour is dark: at one end of the one scheme, at both of the other.
_SEQUENTIAL = {"scheme": "blues", "domain": [0, 100], "dark": "datum.value > 55"}
_DIVERGING = {
    "scheme": "purpleorange",
    "domain": [-3, 3],
    "clamp": True,
    "dark": "abs(datum.value) > 1.8",
}


def _heat_map(values: dict[str, float], title: str, colours: Spec, form: str) -> Spec:
    rows = []
    for name, value in values.items():
        block, _, projection = short_name(name).partition(".")
        rows.append({"layer": name, "block": block, "projection": projection, "value": value})
    scale = {key: value for key, value in colours.items() if key != "dark"}
    text = {"condition": {"test": colours["dark"], "value": "white"}, "value": "black"}
    return _base(rows, f"{title}; a row a block, a column a projection") | {
        "height": 17 * len({row["block"] for row in rows}),
        "encoding": {
            "x": {
                "field": "projection",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"orient": "top", "labelAngle": -45, "labelLimit": 160},
            },
            "y": {"field": "block", "type": "nominal", "sort": None, "title": "Block"},
            "tooltip": [
                {"field": "layer", "type": "nominal"},
                {"field": "value", "type": "quantitative", "format": ".4f"},
            ],
        },
        "layer": [
            {
                "mark": "rect",
                "encoding": {
                    "color": {
                        "field": "value",
                        "type": "quantitative",
                        "scale": scale,
                        "legend": None,
                    }
                },
            },
            {
                "mark": {"type": "text", "fontSize": 10},
                "encoding": {
                    "text": {"field": "value", "type": "quantitative", "format": form},
                    "color": text,
                },
            },
        ],
    }


def _base(rows: list[dict[str, Any]], description: str) -> Spec:
    return {
        "description": description,
        "width": "container",
        "height": 260,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": rows},
    }


def _by_run(several: bool) -> Spec:
    by = {"field": "run", "type": "nominal", "legend": _legend("Run")}
    return {"color": by, "strokeDash": by} if several else {}


def _by_verdict() -> Spec:
    return {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(VERDICTS.values()), "range": _SHAPES},
        "legend": _legend("Step"),
    }


def _legend(title: str) -> Spec:
    return {"title": title, "orient": "bottom", "labelLimit": 280, "columns": 1}


def _tooltip(*fields: str) -> list[Spec]:
    words = {"run", "verdict"}
    return [
        {"field": field, "type": "nominal"}
        if field in words
        else {"field": field, "type": "quantitative", "format": "d" if field == "step" else ".4f"}
        for field in fields
    ]


def _perplexity_axis(values: list[float]) -> Spec:
    """Logarithmic where a broken step would flatten all others."""
    title = "Guard perplexity"
    if max(values) > 3 * min(values):
        return {"title": f"{title}, logarithmic", "scale": {"type": "log", "nice": False}}
    return {"title": title, "scale": {"zero": False}}


def _whole(title: str) -> Spec:
    return {"title": title, "tickMinStep": 1, "format": "d"}
