"""What several commands take, and under which heading their help has it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prunewright.graph.cli import completing
from prunewright.state.loading import PRESETS

CONFIGURATION = "Configuration"
REQUEST = "What is asked for"

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="Directory of the run.",
        show_default=False,
        autocompletion=completing.run_directories,
    ),
]


def config_option(words: str, heading: str | None = CONFIGURATION) -> Any:
    """--config with a help of its own."""
    return typer.Option("--config", "-c", help=words, rich_help_panel=heading)


ConfigOption = Annotated[Path | None, config_option("YAML file with the configuration.")]


PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Begin from settings that come with the package: paper, fast or best; "
        "`prunewright config --preset best` prints them.",
        autocompletion=completing.values(*PRESETS),
        rich_help_panel=CONFIGURATION,
    ),
]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Any key of the configuration; dots reach nested ones: texts.windows.guard=16. "
        "May be repeated.",
        autocompletion=completing.settings,
        rich_help_panel=CONFIGURATION,
    ),
]


def model_option(words: str) -> Any:
    """--model with a help of its own."""
    return typer.Option(
        "--model",
        "-m",
        help=words,
        autocompletion=completing.values("embedded"),
        rich_help_panel=REQUEST,
    )


ModelOption = Annotated[str | None, model_option("embedded, a model directory or a hub name.")]


TargetOption = Annotated[
    float | None,
    typer.Option(
        "--target",
        "-t",
        help="Sparsity over all prunable weights, such as 0.45.",
        rich_help_panel=REQUEST,
    ),
]


HigherOption = Annotated[
    float | None,
    typer.Option("--target", "-t", help="Go on to this sparsity, above the run's own target."),
]


PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="unstructured, or the number kept of each group: 2:4. A baseline takes all layers to "
        "it, which fixes the sparsity; in a run the agent chooses layers, each as a whole.",
        autocompletion=completing.patterns,
        rich_help_panel=REQUEST,
    ),
]


CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Text for the statistics: embedded, self (the model writes it), a file or a hub data "
        "set. Repeated, a mix.",
        rich_help_panel=REQUEST,
    ),
]


SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Draws the windows and seeds the agent.", rich_help_panel=REQUEST),
]


DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="auto, cpu, cuda, mps ...",
        autocompletion=completing.devices,
        rich_help_panel=REQUEST,
    ),
]


def with_calibration(overrides: list[str] | None, calibration: list[str] | None) -> list[str]:
    """The values of --set and --calibration, which wins."""
    named = [f"texts.calibration={json.dumps(calibration)}"] if calibration else []
    return [*(overrides or []), *named]


OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run directory, new or empty. Default: runs/<time>-<id>."),
]


AgentOption = Annotated[
    str | None,
    typer.Option(
        "--agent",
        "-a",
        help="Who decides, such as provider:model, greedy, replay:FILE, exchange:DIR; "
        "`prunewright agents` lists all.",
        autocompletion=completing.agents,
        rich_help_panel=REQUEST,
    ),
]


CriterionOption = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        help="magnitude, wanda, gblm, fisher, sparsegpt, obs or import:...",
        autocompletion=completing.criteria,
        rich_help_panel=REQUEST,
    ),
]


def _keep_stdout(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().obj.json = True
    return value


def print_lines(ctx: typer.Context, value: bool) -> bool:
    """As --json does, but with an object a line."""
    ctx.find_root().obj.lines = value
    return _keep_stdout(ctx, value)


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_keep_stdout,
        help="Print one JSON object on standard output; all else goes to standard error.",
    ),
]
