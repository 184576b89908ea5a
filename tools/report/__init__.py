"""report.html: a run, or several side by side, as one page that needs no network."""

import base64
import hashlib
import importlib.metadata
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from prunewright.state import InputError, PruneConfig, StoreError
from prunewright.state.config import BASELINE, EMBEDDED
from prunewright.state.metrics import NEGLIGIBLE
from prunewright.state.profile import short_name
from prunewright.state.run import TOLERANCE, Status
from prunewright.state.shown import clean
from prunewright.tools.ending import control_words, describe_ending, ended_words
from prunewright.tools.report.maps import Grid
from prunewright.tools.saving.card import BASE_OF_EMBEDDED
from prunewright.tools.signals import SIGNALS
from prunewright.tools.signatures import failure_signatures
from prunewright.tools.store.cache import cache_directory
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import remove_unfinished, write_atomic
from prunewright.tools.store.trace import Story, layer_sparsities, read_story

FILE = "report.html"
"""Its name in a run directory."""
SAME_SPARSITY = 2 * TOLERANCE
"""How far two sparsities may lie apart that are compared as equal: each is that near its target."""

_PLOTTER = "vl-convert-python"
_GLOBALS = "window.vegaEmbed = vegaEmbed;"
# Two runs can only be compared where these are equal; the rest is told.
_COMPARABLE = {"model": "the model", "texts.test": "the test text", "dtype": "the dtype"}
_TOLD = {
    "texts.calibration": "the calibration text",
    "texts.guard": "the guard text",
    "seed": "the seed",
}


@dataclass(frozen=True)
class Compared:
    """A run beside the first one.

    Attributes:
        label: what the page calls it.
        story: the run.
        manifest: what it stands on; empty before it began.
        obstacles: what makes its perplexities say nothing about the first run's.
        differences: what else differs.
        ratio: test perplexity of the first run over this one's, below 1 if the first is better;
            None where obstacles or an unfinished run forbid it.
    """

    label: str
    story: Story
    manifest: dict[str, Any]
    obstacles: list[str]
    differences: list[str]
    ratio: float | None

    @property
    def is_baseline(self) -> bool:
        """Whether it is one-shot pruning."""
        return self.story.config.agent == BASELINE

    @property
    def is_uniform(self) -> bool:
        """Whether it is one-shot pruning with every layer alike."""
        config = self.story.config
        return self.is_baseline and config.one_shot == "uniform" and config.pruned is None

    @property
    def method(self) -> str:
        """Who decided."""
        if self.story.config.pruned is not None:
            return "the pruned copy"
        if self.is_baseline:
            return f"{self.story.config.one_shot}, one shot"
        agents = dict.fromkeys(record.agent for record in self.story.records)
        return ", then ".join(agents) or self.story.config.agent


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and of others beside it.

    Args:
        run_dirs: the run that is reported, then those that it is compared with.
        out: the file; default ``report.html`` in the first run's directory.

    Returns:
        The file.

    Raises:
        InputError: no run there, a newer version made it, or the extra ``report`` is missing.
        StoreError: a file is damaged, or the page cannot be written.
    """
    path = Path(out) if out is not None else Path(run_dirs[0]) / FILE
    remove_unfinished(path.parent)
    write_atomic(path, build_report(run_dirs).encode("utf-8", "backslashreplace"))
    return path


def build_report(run_dirs: Sequence[str | Path]) -> str:
    """The page of `write_report`.

    Whatever a model, a file or an LLM wrote stands in it as text: the template escapes all, and
    the page's own policy lets no script run but the page's, and nothing be loaded.

    Raises:
        InputError: no run there, a newer version made it, or the extra ``report`` is missing.
        StoreError: a file is damaged.
    """
    # Not at the top: they need what the extra brings.
    from prunewright.tools.report.charts import (
        curve_chart,
        heat_maps,
        prediction_chart,
        step_charts,
    )

    stories = [read_story(RunDirectory(path)) for path in run_dirs]
    runs = _compare(stories)
    first = stories[0]
    grid = Grid.of(layer_sparsities(first))
    charts = step_charts([(run.label, run.story) for run in runs])
    prediction = prediction_chart(first.records)
    if prediction is not None:
        charts["prediction"] = prediction
    if first.metrics is not None and (curves := curve_chart(first.metrics.stages)) is not None:
        charts["curve"] = curves
    control = first.metrics.control if first.metrics is not None else None
    deltas = [abs(delta) for record in first.records for delta in record.applied.values()]
    uniform, commands = _against_uniform(runs)
    try:
        return render_page(
            "page.html",
            runs=runs,
            run=runs[0],
            name=_model_name(first.config.model),
            headline=_headline(runs[0]),
            uniform=uniform,
            commands=commands,
            going_on=_going_on(first),
            bars=_bars(runs),
            # Of a signal from outside the name alone: a report runs nobody's code.
            titles={name: signal.title for name, signal in SIGNALS.items()},
            charts=charts | {f"heat-{k}": spec for k, spec in heat_maps(first, grid).items()},
            grid=grid,
            most=max(deltas, default=0.0) or 1.0,
            signatures=failure_signatures(first.records),
            ended=ended_words(first.metrics) if first.metrics else "",
            domains=first.domains,
            control_domains=control.domains if control is not None else {},
            options=_flat(first.config),
            save=f"prunewright save {shlex.quote(str(first.directory.path))}",
        )
    except ValueError as error:
        raise StoreError(
            f"{first.directory.path} holds a number that is not finite, which no plot can show: "
            f"{error}"
        ) from error


def render_page(template: str, **values: Any) -> str:
    """A page of one of the templates here, in their common frame.

    What a name or an LLM brings of control and invisible characters is written out.

    Raises:
        InputError: the extra ``report`` is missing.
        ValueError: a chart holds a number that is not finite.
    """
    scripts = [plotting_script(), _page_file("page.js")]
    values["charts"] = _all_shown(values["charts"])
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            style=_page_file("page.css"),
            scripts=scripts,
            hashes=" ".join(_hash(script) for script in scripts),
        )
    )


@cache
def _environment() -> Environment:
    """Made once: compiling the templates takes as long as filling them in ten times."""
    environment = Environment(
        loader=FunctionLoader(_page_file),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short_name, "code": _with_code}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def _with_code(text: str) -> Markup:
    """Words of ours as HTML, with what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(clean(text)))))


def _shown(value: Any) -> Any:
    """A value as the page shows it; what a macro has made is done already."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _all_shown(value: Any) -> Any:
    """A chart with all its words as the page shows them."""
    if isinstance(value, dict):
        return {_shown(key): _all_shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_all_shown(inner) for inner in value]
    return _shown(value)


def plotting_script() -> str:
    """Vega-Lite as one script, made once by vl-convert-python and kept in the cache directory.

    Raises:
        InputError: vl-convert-python is not installed.
    """
    try:
        version = importlib.metadata.version(_PLOTTER)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"the report needs {_PLOTTER}: pip install 'prunewright[report]'"
        ) from None
    kept = cache_directory() / f"vega-{version}.js"
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    import vl_convert

    # Inside a page neither may be in a script, not even in a string.
    script = re.sub(r"<(?=/script|!--)", r"\\x3c", vl_convert.javascript_bundle(_GLOBALS))
    with suppress(StoreError):  # it is made again next time
        write_atomic(kept, script.encode())
    return script


def _page_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The source expression that allows a script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _compare(stories: list[Story]) -> list[Compared]:
    names = [story.directory.path.resolve().name for story in stories]
    labels = [
        name if names.count(name) == 1 else str(story.directory.path)
        for name, story in zip(names, stories, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise InputError("the same run is named twice: name each run once")
    first = stories[0]
    manifest = _manifest(first)
    found = []
    for label, story in zip(labels, stories, strict=True):
        own = _manifest(story)
        obstacles = _differing(manifest, own, _COMPARABLE)
        ratio = None
        if first.metrics is not None and story.metrics is not None and not obstacles:
            ratio = first.metrics.perplexity.test.final / story.metrics.perplexity.test.final
        differences = _differing(manifest, own, _TOLD)
        found.append(Compared(label, story, own, obstacles, differences, ratio))
    return found


def _manifest(story: Story) -> dict[str, Any]:
    directory = story.directory
    return directory.manifest() if directory.manifest_file.exists() else {}


def _differing(one: dict[str, Any], other: dict[str, Any], facts: dict[str, str]) -> list[str]:
    return [words for key, words in facts.items() if _fact(one, key) != _fact(other, key)]


def _fact(manifest: dict[str, Any], key: str) -> Any:
    """A fact by its dotted key; its hash, where it has one."""
    value: Any = manifest
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value.get("sha256", value) if isinstance(value, dict) else value


def _headline(run: Compared) -> list[str]:
    """What was pruned, by whom, to what, and what it cost, in sentences."""
    story, metrics = run.story, run.story.metrics
    config, records = story.config, story.records
    model = run.manifest.get("model", {})
    weights = "the prunable weights"
    if model:
        weights = (
            f"the {model.get('prunable_weights', 0):,} weights in "
            f"{model.get('prunable_layers', 0):,} linear layers"
        )
    by = f"by the criterion {config.criterion}"
    if config.pruned is not None:
        by = f"as {config.pruned} has them"
    if config.pattern != "unstructured":
        by += f" in the pattern {config.pattern}"
    undone = {one.name for one in metrics.stages if not one.kept} if metrics is not None else set()
    if config.reconstruct != "none" and "reconstruct" not in undone:
        by += ", with the kept weights reconstructed"
    if metrics is None:
        done = f"{len(records)} steps were done" if records else "No step had ended yet"
        reached = f", at a sparsity of {records[-1].sparsity:.2%}" if records else ""
        return [
            f"{run.method} prunes {weights} {by}.",
            f"The run is not finished: {done}{reached} when this page was written.",
        ]
    if not metrics.saved:
        return [f"{run.method} pruned nothing of {weights}: the model would be the dense one."]
    steps = f"{metrics.steps} steps, {metrics.rollbacks or 'none'} of them rolled back"
    test = metrics.perplexity.test
    words = [
        f"{run.method} set {metrics.sparsity:.2%} of {weights} to zero {by}"
        + ("." if run.is_baseline else f", in {steps}."),
        f"Perplexity on the test text {'rose' if test.final > test.dense else 'fell'} from "
        f"{test.dense:.2f} to {test.final:.2f}, by {abs(test.final / test.dense - 1):.1%}.",
    ]
    if metrics.trained_words:
        words.insert(1, f"After that {metrics.trained_words}.")
    if metrics.dense_sparsity >= NEGLIGIBLE:
        words.append(f"{metrics.dense_sparsity:.2%} were zero in the dense model already.")
    if metrics.knowledge is not None:
        known = metrics.knowledge
        words.append(
            f"Right answers to facts fell from {known.dense:+.3f} to {known.final:+.3f} nats a "
            "token."
        )
    return words


def _against_uniform(runs: list[Compared]) -> tuple[list[str], list[str]]:
    """What measured uniform controls say of the first run; or the commands that measure one."""
    run = runs[0]
    if run.is_uniform:
        return ["This is the uniform control itself."], []
    if run.story.config.pruned is not None:
        return ["It was pruned elsewhere, so there is no uniform control of it."], []
    own = run.story.metrics
    words = [_against(run, other) for other in runs[1:] if other.is_uniform]
    if own is not None and own.control is not None:
        words.insert(0, f"Against a uniform control: {control_words(own.control)}.")
    if words:
        return words, []
    path = run.story.directory.path
    out = shlex.quote(str(path.with_name(f"{path.resolve().name}-uniform")))
    config = shlex.quote(str(run.story.directory.config_file))
    # A run has no options of an allocation to take away.
    options = "--set 'allocation_options={}' " if run.is_baseline else ""
    return [
        "Uniform pruning was not measured, so nothing here says that this is better. `run "
        "--with-control` measures it at the end of a run; now, these two commands do:"
    ], [
        f"prunewright baseline --config {config} --allocation uniform {options}--out {out}",
        f"prunewright report {shlex.quote(str(path))} {out}",
    ]


def _against(run: Compared, control: Compared) -> str:
    name = f"uniform pruning ({control.story.config.criterion}, {control.label})"
    own, other = run.story.metrics, control.story.metrics
    if control.obstacles:
        return f"Not comparable with {name}: other are {', '.join(control.obstacles)}."
    if own is None or other is None or control.ratio is None:
        return f"Not compared with {name}: one of the two is not finished."
    than = "lower" if control.ratio < 1 else "not lower"
    words = (
        f"Against {name}, at {other.perplexity.test.final:.2f}: perplexity on the test text is "
        f"{than}, the ratio {control.ratio:.3f}."
    )
    if abs(own.sparsity - other.sparsity) > SAME_SPARSITY:
        words += (
            f" The sparsities differ ({own.sparsity:.4f} and {other.sparsity:.4f}): the ratio is "
            "no fair comparison."
        )
    if control.differences:
        words += f" Other are {', '.join(control.differences)}."
    return words


def _going_on(story: Story) -> list[str]:
    """Commands that go on with a run that is not finished, or ended before its target."""
    path = shlex.quote(str(story.directory.path))
    metrics = story.metrics
    if metrics is None:
        return [f"prunewright resume {path}"]
    if metrics.status in ("target_reached", BASELINE):
        return []
    config, status = story.config, cast(Status, metrics.status)
    ending = describe_ending(status, story.records, config, config.target, saved=metrics.saved)
    changes = " ".join(f"--set {shlex.quote(setting)}" for setting in ending.settings)
    return [f"prunewright resume {path} {changes}"] if changes else []


def _bars(runs: list[Compared]) -> list[tuple[str, str, float]]:
    """Test perplexities to draw side by side: what is measured, its kind, and the value.

    Other runs only where they are comparable with the first.
    """
    own = runs[0].story.metrics
    if own is None:
        return []
    test = own.perplexity.test
    bars = [("dense", "dense", test.dense), (runs[0].label, "own", test.final)]
    if own.control is not None and own.control.test is not None:
        bars.append(("uniform control", "other", own.control.test))
    for other in runs[1:]:
        if other.ratio:
            bars.append((other.label, "other", test.final / other.ratio))
    return bars


def _model_name(name: str) -> str:
    """What people call a model: not the path that it lies at."""
    return (BASE_OF_EMBEDDED if name == EMBEDDED else name).rstrip("/").rpartition("/")[2]


def _flat(config: PruneConfig) -> list[tuple[str, str]]:
    """Each key of a configuration, dotted, with its value as JSON writes it."""

    def walk(prefix: str, value: Any) -> list[tuple[str, str]]:
        if isinstance(value, dict) and value:
            return [row for key, inner in value.items() for row in walk(f"{prefix}.{key}", inner)]
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return [(prefix.removeprefix("."), shown)]

    return walk("", config.model_dump(mode="json"))
