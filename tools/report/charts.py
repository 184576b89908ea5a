"""The report's plots, made by Altair; a page draws them by itself, from the Vega-Lite in it.

Raises:
    InputError: on import, where Altair is missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prunewright.state import InputError, Step
from prunewright.state.metrics import Stage
from prunewright.tools.report.maps import Grid
from prunewright.tools.store.trace import Story, layer_sparsities

try:
    import altair as alt
except ImportError:
    raise InputError("the report needs altair: pip install 'prunewright[report]'") from None

Spec = dict[str, Any]

FINISHED = "after the last step"
"""In a step's place, what the stages at the end came to."""
FEW = 12
"""Steps that each have a tick."""
HEIGHT = 190
"""Pixels of a small plot."""
_LEGEND = alt.Legend(title="Run", orient="bottom", labelLimit=280, columns=1)


def step_charts(stories: Sequence[tuple[str, Story]]) -> dict[str, Spec]:
    """Sparsity and perplexity over the steps, a line a run; steps are counted from 1.

    The perplexity of a run alone has a line a domain, too, where its guard text has domains.

    Args:
        stories: each run with its label.
    """
    rows = [row for label, story in stories for row in _step_rows(label, story)]
    if not rows:
        return {}
    several = len(stories) > 1
    charts = {
        "sparsity": _over_steps(rows, "sparsity", "sparsity", several),
        "perplexity": _over_steps(
            rows, "accepted", "measured", several, [] if several else _domain_rows(stories[0][1])
        ),
    }
    if several:
        charts["tradeoff"] = _tradeoff(rows)
    return charts


def _step_rows(label: str, story: Story) -> list[dict[str, Any]]:
    records, metrics = story.records, story.metrics
    if not records:
        return []
    first = records[0]
    ends = []
    if metrics is not None and any(stage.kept for stage in metrics.stages):
        end = {"sparsity": 100 * metrics.sparsity, "measured": metrics.perplexity.guard.final}
        ends = [end | {"run": label, "step": len(records), "verdict": FINISHED}]
    start = {
        "run": label,
        "step": 0,
        "sparsity": 100 * first.sparsity_before,
        "accepted": first.perplexity_before,
    }
    return (
        [start]
        + [
            {
                "run": label,
                "step": record.step + 1,
                "verdict": record.verdict.replace("_", " "),
                "sparsity": 100 * record.sparsity,
                "accepted": record.accepted_perplexity,
                "measured": record.candidate_perplexity,
            }
            for record in records
        ]
        + ends
    )


def _domain_rows(story: Story) -> list[dict[str, Any]]:
    """Accepted perplexity of each domain, before the first step and after each."""
    first = story.records[0].domains
    return [{"domain": name, "step": 0, "accepted": one.before} for name, one in first.items()] + [
        {"domain": name, "step": record.step + 1, "accepted": value}
        for record in story.records
        for name, value in record.accepted_domains.items()
    ]


def _over_steps(
    rows: list[dict[str, Any]],
    line: str,
    point: str,
    several: bool,
    domains: Sequence[dict[str, Any]] = (),
) -> Spec:
    title = "Sparsity, per cent"
    y = alt.Y(f"{line}:Q", title=title)
    if line == "accepted":
        shown = [*rows, *domains]
        values = [row[key] for row in shown for key in (line, point) if row.get(key) is not None]
        title = "Guard perplexity"
        y = alt.Y(f"{line}:Q", **axis(values, title, 3))
    measured = [row for row in rows if "verdict" in row and row[point] is not None]
    back = [row for row in measured if row["verdict"] == "rolled back"]
    ends = [row for row in measured if row["verdict"] == FINISHED and line == "accepted"]
    kept = [row for row in measured if row["verdict"] not in ("rolled back", FINISHED)]
    steps = [row for row in rows if row.get("verdict") != FINISHED]
    tooltip = _tooltip("run", "step", "verdict", "sparsity", "measured")
    by: dict[str, Any] = {}
    dash: dict[str, Any] = {}
    if several:
        by["color"] = alt.Color("run:N", legend=_LEGEND, scale=_runs(rows))
        dash["strokeDash"] = alt.StrokeDash("run:N", legend=_LEGEND, scale=_runs(rows))
    parts = [
        alt.Chart(_data(steps)).mark_line(interpolate="step-after").encode(y=y, **by, **dash),
        alt.Chart(_data(kept)).mark_point(size=60).encode(y=f"{point}:Q", tooltip=tooltip, **by),
    ]
    if domains:
        # The first category's colour is that of the whole text's line.
        names = list(dict.fromkeys(row["domain"] for row in domains))
        legend = alt.Legend(title="Domain", orient="bottom", values=names)
        color = alt.Color("domain:N", scale=alt.Scale(domain=["", *names]), legend=legend)
        drawn = alt.Chart(_data(list(domains))).mark_line(interpolate="step-after")
        parts.append(
            drawn.encode(y=f"{line}:Q", color=color, tooltip=_tooltip("domain", "step", line))
        )
    if ends:
        marked = alt.Chart(_data(ends)).encode(y=f"{point}:Q", tooltip=tooltip, **by)
        parts.append(marked.mark_point(size=90, shape="diamond", filled=True))
    if back:
        marked = alt.Chart(_data(back)).encode(y=f"{point}:Q", tooltip=tooltip)
        parts.append(marked.mark_point(size=70, shape="triangle-down", style="rolled-back"))
        parts.append(marked.mark_text(dy=-11, style="rolled-back", text="rolled back"))
    last = max(row["step"] for row in rows)
    # Of few steps each has a tick: left alone, one step has one at its half, too.
    ticks: dict[str, Any] = {"values": list(range(last + 1))} if last <= FEW else {"tickMinStep": 1}
    x = alt.X("step:Q", title="Step", axis=alt.Axis(format="d", **ticks))
    words = f"{title}, over the steps; rolled-back steps are marked"
    return finished(alt.layer(*(part.encode(x=x) for part in parts)), words, HEIGHT)


def _tradeoff(rows: list[dict[str, Any]]) -> Spec:
    accepted = [row for row in rows if row.get("verdict", "accepted") == "accepted"]
    y = axis([row["accepted"] for row in accepted], "Guard perplexity", 3)
    chart = (
        alt.Chart(_data(accepted))
        .mark_line(point=alt.OverlayMarkDef(size=50))
        .encode(
            x=alt.X("sparsity:Q", title="Sparsity, per cent"),
            y=alt.Y("accepted:Q", **y),
            order="step:Q",
            color=alt.Color("run:N", legend=_LEGEND, scale=_runs(rows)),
            shape=alt.Shape("run:N", legend=_LEGEND, scale=_runs(rows)),
            tooltip=_tooltip("run", "step", "sparsity", "accepted"),
        )
    )
    return finished(chart, "Guard perplexity against sparsity, a line a run", HEIGHT)


def prediction_chart(records: list[Step]) -> Spec | None:
    """Measured against predicted change of each step; None where no step has both."""
    rows: list[dict[str, Any]] = [
        {
            "step": record.step + 1,
            "verdict": record.verdict.replace("_", " "),
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
    equal = [{"predicted": end, "measured": end} for end in (min(ends), max(ends))]
    y = alt.Y("measured:Q", title="Measured, per cent")
    points = alt.Chart(_data(rows))
    tooltip = _tooltip("step", "verdict", "predicted", "measured")
    parts = [
        alt.Chart(_data(equal)).mark_line(strokeDash=[4, 4], opacity=0.7).encode(y=y),
        points.mark_rule().encode(y="low:Q", y2="high:Q"),
        points.mark_text(dx=11).encode(y="measured:Q", text="step:N"),
    ]
    for words, style in (("rolled back", "rolled-back"), ("accepted", "point")):
        some = [row for row in rows if row["verdict"] == words]
        if some:
            shape = "circle" if words == "accepted" else "triangle-down"
            marked = alt.Chart(_data(some)).mark_point(size=60, shape=shape, style=style)
            parts.append(marked.encode(y="measured:Q", tooltip=tooltip))
    x = alt.X("predicted:Q", title="Predicted change of perplexity, per cent")
    words = "Measured against predicted perplexity change; the line is equality"
    return finished(alt.layer(*(part.encode(x=x) for part in parts)), words, HEIGHT)


def curve_chart(stages: Sequence[Stage]) -> Spec | None:
    """The loss of a stage that trains over the tokens that it has seen; None where none does."""
    rows: list[dict[str, Any]] = [
        {"tokens": tokens, "loss": loss} for stage in stages for tokens, loss in stage.curve
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows))
        .mark_line(point=alt.OverlayMarkDef(size=30))
        .encode(
            x=alt.X("tokens:Q", title="Tokens"),
            y=alt.Y("loss:Q", **axis([row["loss"] for row in rows], "Loss, nats a token", 3)),
            tooltip=_tooltip("tokens", "loss"),
        )
    )
    return finished(chart, "Loss of the training after the last step, over its tokens", HEIGHT)


def heat_maps(story: Story, grid: Grid) -> dict[str, Spec]:
    """Projection x block of the final sparsity and of each signal of the last profile.

    Raises:
        StoreError: the last profile is missing or damaged.
    """
    found = layer_sparsities(story)
    if not found:
        return {}
    # White text is used where a colour is dark: at one end of the one scheme, at both of the other.
    sparsity = alt.Scale(scheme="blues", domain=[0, 100])
    scores = alt.Scale(scheme="purpleorange", domain=[-3, 3], clamp=True)
    per_cent = {name: 100 * value for name, value in found.items()}
    maps = {"sparsity": _heat_map(grid, per_cent, "sparsity", sparsity, ".0f", "datum.value > 55")}
    profile = story.records[-1].profile
    layers = story.directory.read_profile(profile).layers if profile else []
    for signal in layers[0].signals if layers else ():
        values = {p.name: p.signals[signal] for p in layers if signal in p.signals}
        maps[signal] = _heat_map(grid, values, signal, scores, ".1f", "abs(datum.value) > 1.8")
    return maps


def _heat_map(
    grid: Grid, values: Mapping[str, float], title: str, scale: alt.Scale, form: str, dark: str
) -> Spec:
    rows = [
        {"projection": projection, "block": block, "value": value}
        for (projection, block), value in grid.means(values).items()
    ]
    cells = alt.Chart(_data(rows)).encode(
        x=alt.X(
            "block:N",
            sort=None,
            title="Block",
            axis=alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=5),
        ),
        y=alt.Y("projection:N", sort=None, title=None, axis=alt.Axis(labelLimit=110)),
        tooltip=[
            alt.Tooltip("projection:N"),
            alt.Tooltip("block:N"),
            alt.Tooltip("value:Q", title=title, format=".4f"),
        ],
    )
    # No number where a cell has no room for it, as on a phone.
    room = alt.OpacityValue(**alt.condition("bandwidth('x') > 20", alt.value(1), alt.value(0)))
    ink = alt.ColorValue(**alt.condition(dark, alt.value("white"), alt.value("black")))
    both = alt.layer(
        cells.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None)),
        cells.mark_text(fontSize=10).encode(
            text=alt.Text("value:Q", format=form), color=ink, opacity=room
        ),
    )
    words = f"{title} of each layer; a column a block, a row a projection"
    return finished(both, words, 22 * len(grid.projections))


def finished(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart, description: str, height: int
) -> Spec:
    """The Vega-Lite of a chart that is as wide as the page lets it."""
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = chart.properties(
        description=description, width="container", height=height, autosize=fit
    )
    # The tests hold every chart against the schema; here that would take half of a page's time.
    spec: Spec = chart.to_dict(validate=False)
    del spec["config"]  # Altair's theme: the page has colours of its own
    return spec


def axis(values: list[float], title: str, factor: float) -> dict[str, Any]:
    """Title and scale of an axis, logarithmic where one value would flatten the others.

    Args:
        values: that it shows.
        title: what they are.
        factor: between the largest and the smallest from which it is logarithmic.
    """
    if min(values) > 0 and max(values) > factor * min(values):
        log = alt.Scale(type="log", nice=False, padding=12)
        return {"title": f"{title}, logarithmic", "scale": log}
    return {"title": title, "scale": alt.Scale(zero=False, padding=12)}


def _data(rows: list[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=rows)


def _runs(rows: list[dict[str, Any]]) -> alt.Scale:
    """The runs in the order given: the page's own keeps its colour beside others."""
    return alt.Scale(domain=list(dict.fromkeys(row["run"] for row in rows)))


def _tooltip(*fields: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{field}:N")
        if field in ("run", "verdict", "domain")
        else alt.Tooltip(f"{field}:Q", format="d" if field in ("step", "tokens") else ".4f")
        for field in fields
    ]
