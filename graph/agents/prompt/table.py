"""The layers in a prompt: a line each while they are few, else maps, else a shortlist."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from statistics import fmean, median, pstdev

from prunewright.graph.agents.base import Observation, quote_name
from prunewright.graph.correction import DEPTHS, depth_of
from prunewright.state import COST_DELTAS, LayerProfile
from prunewright.state.decision import SHOWN
from prunewright.state.profile import COST_SIGNAL, SIGNALS
from prunewright.tools.signals import Signal, find_signals

MAX_ROWS = 256
"""Layers shown in one prompt; with more, a shortlist and summaries."""
LINES = 96
"""Layers shown with a line each; up to `MAX_ROWS` are in maps, which take fewer tokens."""
PROJECTIONS = 12
"""Projections told of one step."""
BANDS = 9
"""Rows of maps where costs are shown: the ranking's proposal sees each layer, its reader kinds."""
APART = 1.5
"""By how many times a layer's cost must differ from its band's to be told."""
ODD = 6
"""Layers told of those whose cost differs most."""
RECENT = 6
"""Steps that maps tell the layers of."""
GROUPS = 64
"""Lines of a summary."""
REPEAT = 24
"""Rows after which the head of a table comes again."""
NEAR = 0.1
"""Part of the target that may be missing where restoring is shown, and the next weights' cost."""
GAIN = f"gain of {COST_DELTAS[0]:g} restored"


def shown_layers(observation: Observation, rows: int = MAX_ROWS) -> list[LayerProfile]:
    """The layers with room left that the table holds, in the model's order.

    Of more than ``rows`` the likeliest to be chosen, `LINES` of them at most: by predicted cost a
    weight where that is shown, else by the mean of the z-scores shown, else evenly spread.
    """
    room = observation.room()
    layers = [p for p in observation.profile.layers if room[p.name] > 1e-6]
    if len(layers) <= rows:
        return layers
    rows = min(rows, LINES)
    visible = _scores_told(observation)
    if observation.costs_shown:
        costs = observation.cost_deltas
        order = sorted(layers, key=lambda p: p.cost_of(costs[0]) / p.parameters)
    elif visible:
        order = sorted(layers, key=lambda p: fmean(p.signals[s] for s in visible))
    else:
        order = [layers[i * len(layers) // rows] for i in range(rows)]
    kept = {p.name for p in order[:rows]}
    return [p for p in layers if p.name in kept]


def signals_shown(observation: Observation) -> list[Signal]:
    """The signals that an LLM is shown.

    One that was named after the profile had been taken, on resume, is shown from the next step on.
    """
    held = observation.profile.layers[0].signals
    return [signal for signal in find_signals(observation.signals) if signal.name in held]


def signals_told(observation: Observation) -> list[Signal]:
    """Those of them that the table holds: beside costs maps have none of the project's own.

    They would take a tenth of the prompt, and have decided nothing.
    """
    shown, count = signals_shown(observation), len(observation.profile.layers)
    if not observation.costs_shown or not LINES < count <= MAX_ROWS:
        return shown
    return [signal for signal in shown if signal.name not in SIGNALS]


def _scores_told(observation: Observation) -> list[str]:
    """Names of the signals told beside the cost, whose own z-score tells nothing more."""
    return [s.name for s in signals_told(observation) if s.name != COST_SIGNAL]


def table(
    observation: Observation,
    last: Mapping[str, str],
    proposed: Mapping[str, float],
    rows: int = MAX_ROWS,
) -> str:
    """All that an LLM is shown of the layers: of their signals, those in ``signals`` only.

    Args:
        observation: what the agent may see.
        last: the step that last changed each layer, in words.
        proposed: deltas of the ranking's proposal; of no use where costs are hidden.
        rows: layers shown at most.
    """
    layers = observation.profile.layers
    shown = shown_layers(observation, rows)
    room = observation.room()
    taken = {p.name: "" for p in layers if p.patterned}
    full = {p.name: "" for p in layers if room[p.name] <= 1e-6 and not p.patterned}
    parts = []
    if len(shown) + len(taken) + len(full) < len(layers):
        parts += [
            _summary(observation, proposed),
            f"{len(shown)} of {len(layers)} layers, {_order(observation)}:",
        ]
    parts.append(
        _lines(observation, shown, last, proposed)
        if len(shown) <= LINES
        else _maps(observation, last, proposed)
    )
    if taken:
        words = f"Have the pattern {observation.pattern} already"
        if observation.costs_shown:
            prunable, costs = observation.prunable, observation.cost_deltas
            words += ", with the cost that restoring the layer takes away"
            rates = {n: cost_rates(p, prunable, costs)[0] for p in layers if (n := p.name) in taken}
            taken = {name: f"{rate:.2g}" for name, rate in rates.items()}
        parts.append(f"{words}: {by_blocks(layers, taken, LINES)}")
    if full:
        parts.append(f"No room left in: {by_blocks(layers, full, LINES)}")
    own = {p.name: f"{1000 * p.dense_sparsity:.0f}" for p in layers if p.dense_sparsity >= SHOWN}
    if own:
        words = "in thousandths of a layer, part of its sparsity; they cannot be restored"
        if observation.pattern_sparsity is not None:
            words += ", and the pattern adds as much less"
        parts.append(f"Zeros of the dense model, {words}: {by_blocks(layers, own, LINES)}")
    if not observation.costs_shown and (behind := _behind(observation)):
        parts.append(f"Behind the scores, mean ± standard deviation over the layers: {behind}")
    return "\n".join(parts)


def _behind(observation: Observation) -> str:
    """What the scores shown are of: a score tells nothing of how far apart the layers are."""
    found = {
        name: [p.measured[name] for p in observation.profile.layers if name in p.measured]
        for name in _scores_told(observation)
    }
    return ", ".join(
        f"{name} {fmean(values):.3g} ± {pstdev(values):.2g}"
        for name, values in found.items()
        if values
    )


def by_blocks(layers: Iterable[LayerProfile], values: Mapping[str, str], most: int) -> str:
    """Values of layers as ``mlp.up_proj 0-5 VALUE, 6 VALUE; ...``; at most so many items.

    A range runs over the blocks that hold the projection, from the first to the last named.
    """
    by_projection: dict[str, list[LayerProfile]] = {}
    for layer in sorted(layers, key=lambda p: p.block):
        by_projection.setdefault(layer.projection, []).append(layer)
    parts, items = [], 0
    for projection, held in by_projection.items():
        ranges = []
        for value, run in groupby(held, key=lambda p: values.get(p.name)):
            blocks = [p.block for p in run]
            if value is not None:
                span = f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"{blocks[0]}"
                ranges.append(f"{span} {value}".rstrip())
        shown = ranges[: max(0, most - items)]
        items += len(ranges)
        if shown:
            parts.append(f"{quote_name(projection)} {', '.join(shown)}")
    return "; ".join(parts) + (f"; and {items - most} more" if items > most else "")


def by_thirds(
    layers: Iterable[LayerProfile], deltas: Mapping[str, float], words: Callable[[float], str]
) -> str:
    """Mean deltas as ``up +5.0/+2.0/0``: of a projection's layers in each third of the blocks.

    One number stands for all thirds where they are alike. Of many projections those with the
    largest part in the step are told.

    Args:
        layers: the model's.
        deltas: by name, of the layers that changed.
        words: a mean delta as it is told.
    """
    layers = list(layers)
    blocks = 1 + max(p.block for p in layers)
    held: dict[str, dict[str, list[float]]] = {}
    part: dict[str, float] = {}
    for p in layers:
        delta = deltas.get(p.name, 0.0)
        thirds = held.setdefault(p.projection, {depth: [] for depth in DEPTHS})
        thirds[depth_of(p.block, blocks)].append(delta)
        part[p.projection] = part.get(p.projection, 0.0) + abs(delta) * p.parameters
    touched = [name for name in held if part[name] > 0]
    told = set(sorted(touched, key=lambda name: -part[name])[:PROJECTIONS])
    labels, parts = short_labels(list(held)), []
    for name in touched:
        means = [fmean(third) for third in held[name].values() if third]
        cells = [words(mean) if mean else "0" for mean in means]
        if name in told:
            parts.append(f"{labels[name]} {cells[0] if len(set(cells)) == 1 else '/'.join(cells)}")
    over = len(touched) - len(parts)
    return ", ".join(parts) + (f" and {over} more" if over else "")


def cost_rates(layer: LayerProfile, prunable: int, deltas: Iterable[float]) -> list[float]:
    """Per cent of perplexity for one per cent of the model's sparsity, at each of some deltas.

    A pattern's takes what the layer's own zeros do not make up of it; if that is nothing, 0.
    """
    taken = ((delta, delta - layer.pattern_own) for delta in deltas)
    return [
        layer.cost_of(delta) / (added * layer.parameters / prunable) if added > 0 else 0.0
        for delta, added in taken
    ]


def thousandths(delta: float) -> str:
    """A delta as ``+.052``."""
    return f"{delta:+z.3f}".replace("0.", ".", 1)


def _order(observation: Observation) -> str:
    if observation.costs_shown:
        return "those with the lowest cost"
    if _scores_told(observation):
        return "those with the lowest mean z-score"
    return "evenly spread"


def _lines(
    observation: Observation,
    shown: list[LayerProfile],
    last: Mapping[str, str],
    proposed: Mapping[str, float],
) -> str:
    """One line a layer."""
    prunable = observation.prunable
    columns: dict[str, Callable[[LayerProfile], str]] = {
        "name": lambda p: quote_name(p.short_name),
        "share": lambda p: f"{100 * p.parameters / prunable:.4g}",
        "sparsity": lambda p: f"{p.sparsity:.3f}",
    }
    for signal in signals_told(observation):
        columns[signal.name] = partial(_cell, signal)
    if observation.costs_shown:
        deltas = observation.cost_deltas
        columns[f"cost at {' / '.join(f'{d:.4g}' for d in deltas)}"] = lambda p: "/".join(
            f"{rate:.2g}" for rate in cost_rates(p, prunable, deltas)
        )
        if _near(observation) and observation.pattern_sparsity is None:
            columns[GAIN] = lambda p: _back([p], prunable, 1.0, ".2g")
        columns["proposed"] = lambda p: thousandths(proposed[p.name]) if p.name in proposed else "-"
    if last:
        columns["last"] = lambda p: last.get(p.name, "-")
    rows = [" | ".join(cell(p) for cell in columns.values()) for p in shown]
    return "\n".join(with_heads(" | ".join(columns), rows))


def with_heads(head: str, rows: list[str], every: int = REPEAT) -> list[str]:
    """Rows under their head, which comes again: far below it a column is misread."""
    found = []
    for index, row in enumerate(rows):
        found += [head, row] if index % every == 0 else [row]
    return found or [head]


def _maps(observation: Observation, last: Mapping[str, str], proposed: Mapping[str, float]) -> str:
    """A line a block: every layer under a label of its own, its numbers parted by slashes.

    With costs a line a band of blocks, with the means of their layers.
    """
    layers, prunable = observation.profile.layers, observation.prunable
    shares = {p.name: f"{100 * p.parameters / prunable:.4g}" for p in layers}
    projections = list(dict.fromkeys(p.projection for p in layers))
    labels = short_labels(projections)
    whole = (
        f"{labels[name]} = {by_blocks(held, shares, MAX_ROWS)}"
        for name in projections
        if (held := [p for p in layers if p.projection == name])
    )
    cells: dict[str, Callable[[list[LayerProfile]], str]] = {}
    width, tail = 1, []
    if observation.costs_shown:
        width = -(-(1 + max(p.block for p in layers)) // BANDS)
        deltas = observation.cost_deltas
        # Near the target the next weights count, before it a whole step.
        at = 0 if _near(observation) else len(deltas) // 2
        rates = {p.name: cost_rates(p, prunable, deltas) for p in layers}
        unit = _unit([rate[at] for rate in rates.values()])

        def cost(group: list[LayerProfile]) -> float:
            return _mean(group, lambda p: rates[p.name][at])

        cells["sparsity in per cent"] = lambda g: f"{100 * _mean(g, lambda p: p.sparsity):.0f}"
        cells[f"cost at {deltas[at]:.4g}, in units of {unit:g}"] = lambda g: f"{cost(g) / unit:.0f}"
        if _near(observation) and observation.pattern_sparsity is None:
            cells[f"{GAIN}, in the same units"] = lambda g: _back(g, prunable, unit, ".0f")
        cells["delta proposed, in thousandths"] = lambda g: (
            f"{1000 * _mean(g, lambda p: proposed.get(p.name, 0.0)):+.0f}"
        )
        for signal in _scores_told(observation):
            cells[f"{signal} in tenths"] = partial(_tenths, signal)
        if len(deltas) > 1:
            others = [i for i in range(len(deltas)) if i != at]
            tail.append(
                f"cost at {'/'.join(f'{deltas[i]:g}' for i in others)} over that, median: "
                f"{_growth(rates.values(), at, others)}"
            )
        if width > 1:
            odd = {n: f"{rates[n][at] / unit:.0f}" for n in _odd(layers, width, rates, at, cost)}
            tail += [f"layers whose cost is apart from their mean: {by_blocks(layers, odd, ODD)}"]
    else:
        cells["sparsity in thousandths (312 is 0.312)"] = lambda g: f"{1000 * g[0].sparsity:.0f}"
        for signal in _scores_told(observation):
            cells[f"{signal} in hundredths"] = partial(_hundredths, signal)
        if last:
            first = observation.step + 1 - RECENT
            recent = {name: step for name, step in last.items() if int(step.rstrip("x")) >= first}
            tail.append(
                f"last changed in step (others before step {max(first, 1)}, or never): "
                + by_blocks(layers, recent, MAX_ROWS)
            )
    means = f", means over {width} blocks" if width > 1 else ""
    parts = [
        "labels, the whole names that an answer takes, their blocks, share of each layer in per "
        f"cent: {'; '.join(whole)}",
        f"layers by block{means}, each as LABEL{'/'.join(map(str, range(1, len(cells) + 1)))}: "
        + "; ".join(f"{number} {words}" for number, words in enumerate(cells, 1)),
        *_rows(layers, labels, list(cells.values()), width),
        *tail,
    ]
    return "\n".join(parts)


def _mean(group: list[LayerProfile], value: Callable[[LayerProfile], float]) -> float:
    """A value's mean over the weights of some layers."""
    return sum(p.parameters * value(p) for p in group) / sum(p.parameters for p in group)


def _banded(
    layers: Iterable[LayerProfile], width: int
) -> dict[tuple[int, str], list[LayerProfile]]:
    """The layers by band of so many blocks and by projection."""
    groups: dict[tuple[int, str], list[LayerProfile]] = {}
    for p in layers:
        groups.setdefault((p.block // width, p.projection), []).append(p)
    return groups


def _odd(
    layers: list[LayerProfile],
    width: int,
    rates: Mapping[str, list[float]],
    at: int,
    cost: Callable[[list[LayerProfile]], float],
) -> list[str]:
    """The layers whose cost differs most from the mean of their cell."""
    apart = {}
    for group in _banded(layers, width).values():
        mean = cost(group)
        for p in group:
            rate = rates[p.name][at]
            if mean > 0 and not mean / APART <= rate <= mean * APART:
                apart[p.name] = abs(math.log(max(rate, 1e-3 * mean) / mean))
    return sorted(apart, key=lambda name: (-apart[name], name))[:ODD]


def _rows(
    layers: list[LayerProfile],
    labels: Mapping[str, str],
    cells: list[Callable[[list[LayerProfile]], str]],
    width: int,
) -> list[str]:
    """One line a band of blocks, the numbers of its layers behind their label."""
    bands: dict[int, list[str]] = {}
    last = max(p.block for p in layers)
    for (band, projection), group in _banded(layers, width).items():
        numbers = "/".join(cell(group) for cell in cells)
        label = labels[projection]
        # A separator more would be 256 tokens.
        mark = "" if label.isalpha() else ":"
        bands.setdefault(band, []).append(f"{label}{mark}{numbers}")
    found = []
    for band, row in sorted(bands.items()):
        first, end = band * width, min((band + 1) * width - 1, last)
        found.append(f"{first}{f'-{end}' if end > first else ''}: {' '.join(row)}")
    return found


def short_labels(projections: list[str]) -> dict[str, str]:
    """A short label of each projection: the last part of its name, where that tells it apart."""
    short = {n: n.rpartition(".")[2].removesuffix("_proj") for n in projections}
    held = list(short.values())
    fit = {n: held.count(s) == 1 and s.isidentifier() and s.isascii() for n, s in short.items()}
    return {n: short[n] if fit[n] and len(short[n]) <= 16 else quote_name(n) for n in projections}


def _near(observation: Observation) -> bool:
    """Whether so little is missing to the target that the next weights matter most."""
    return observation.target - observation.sparsity <= NEAR * observation.target


def _back(group: list[LayerProfile], prunable: int, unit: float, form: str) -> str:
    """Gain of restoring the last 0.05, as a rate like the cost; - for dense layers."""
    given = sum(min(COST_DELTAS[0], p.pruned) * p.parameters for p in group) / prunable
    if given <= 0:
        return "-"
    gain = sum(p.regrow_gain[0] for p in group if p.pruned > 0)
    return f"{gain / given / unit:{form}}"


def _cell(signal: Signal, layer: LayerProfile) -> str:
    return signal.format(layer.signals[signal.name])


def _tenths(signal: str, group: list[LayerProfile]) -> str:
    return f"{10 * _mean(group, lambda p: p.signals[signal]):z.0f}"


def _hundredths(signal: str, group: list[LayerProfile]) -> str:
    return f"{100 * group[0].signals[signal]:z.0f}"


def _growth(rates: Iterable[list[float]], at: int, others: list[int]) -> str:
    """How the cost at other deltas compares with that at the one shown."""
    held = [rate for rate in rates if rate[at] > 0]
    return "/".join(f"{median([r[i] / r[at] for r in held] or [1.0]):.2f}" for i in others)


def _unit(values: list[float]) -> float:
    """The power of ten in which nearly all of some costs have two digits or more."""
    positive = sorted(v for v in values if v > 0)
    if not positive:
        return 1.0
    low = positive[len(positive) // 10]
    return 10.0 ** math.floor(math.log10(low / 5))


def _summary(observation: Observation, proposed: Mapping[str, float]) -> str:
    """One line for each projection in each third of the blocks, so that groups can be chosen."""
    layers, prunable = observation.profile.layers, observation.prunable
    blocks = 1 + max(p.block for p in layers)
    groups: dict[tuple[str, str], list[LayerProfile]] = {}
    names = list(dict.fromkeys(p.projection for p in layers))
    many = len(names) * len(DEPTHS) > GROUPS
    for p in layers:
        # Experts that are modules of their own differ in a number only.
        name = re.sub(r"\d+", "*", p.projection) if many else p.projection
        groups.setdefault((name, depth_of(p.block, blocks)), []).append(p)
    visible = _scores_told(observation)
    deltas = observation.cost_deltas
    middle = deltas[len(deltas) // 2]
    columns = ["projection", "blocks", "layers", "share", "sparsity", *visible]
    if observation.costs_shown:
        columns += [f"cost at {middle:.4g}: lowest / median / highest", "delta proposed, mean"]
    lines = [
        "All layers by projection and depth (mean sparsity and z-scores, share of all together"
        f"{'; * stands for any number' if many else ''}):"
    ]
    rows = []
    for (name, _), group in list(groups.items())[:GROUPS]:
        held = [p.block for p in group]
        weights = sum(p.parameters for p in group)
        cells = [
            quote_name(name),
            f"{min(held)}-{max(held)}",
            str(len(group)),
            f"{100 * weights / prunable:.3g}",
            f"{sum(p.parameters * p.sparsity for p in group) / weights:.3f}",
            *(f"{fmean(p.signals[s] for p in group):.2f}" for s in visible),
        ]
        if observation.costs_shown:
            rates = sorted(cost_rates(p, prunable, [middle])[0] for p in group)
            cells.append(f"{rates[0]:.2g} / {median(rates):.2g} / {rates[-1]:.2g}")
            cells.append(thousandths(_mean(group, lambda p: proposed.get(p.name, 0.0))))
        rows.append(" | ".join(cells))
    lines += with_heads(" | ".join(columns), rows)
    if len(groups) > GROUPS:
        lines.append(f"and {len(groups) - GROUPS} groups more")
    return "\n".join(lines)
