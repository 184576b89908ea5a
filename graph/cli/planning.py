"""Before a run: `config` and `plan`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunewright.graph.cli.options import (
    AgentOption,
    CalibrationOption,
    ConfigOption,
    CriterionOption,
    JsonOption,
    ModelOption,
    OutOption,
    PresetOption,
    SetOption,
    TargetOption,
    with_calibration,
)
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.session import Session, quiet_transformers
from prunewright.graph.words.numbers import duration, size
from prunewright.graph.words.runs import request_rows
from prunewright.state import InputError, PruneConfig, load_config
from prunewright.state.loading import read_preset, read_settings
from prunewright.state.reference import reference

if TYPE_CHECKING:
    from prunewright.tools.plan import Plan


def config_command(
    ctx: typer.Context, preset: PresetOption = None, _json: JsonOption = False
) -> None:
    """Print every key of the configuration with its meaning, type, bounds and default, as YAML.

    Redirect it to a file, edit that, and give it to `--config`. With --json its JSON schema. With
    --preset what that sets, and nothing else.
    """
    session: Session = ctx.obj
    if preset is not None:
        session.emit(read_settings(preset=preset))
    else:
        session.emit(PruneConfig.model_json_schema())
    if not session.json:
        sys.stdout.write(reference() if preset is None else read_preset(preset))


def plan_command(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    agent: AgentOption = None,
    criterion: CriterionOption = None,
    model: ModelOption = None,
    target: TargetOption = None,
    calibration: CalibrationOption = None,
    out: OutOption = None,
    timed: Annotated[
        bool,
        typer.Option("--time", help="Load the model and time one window, to predict the time."),
    ] = False,
    _json: JsonOption = False,
) -> None:
    """Say what a run would load, and predict its memory and disk. Nothing is pruned.

    Only a model's configuration is read, unless --time asks for the time, too.
    """
    session: Session = ctx.obj
    settled = load_config(
        config,
        with_calibration(overrides, calibration),
        preset=preset,
        agent=agent,
        criterion=criterion,
        model=model,
        target=target,
    )
    from prunewright.graph.agents import check_agent
    from prunewright.graph.whole_layers import check_request
    from prunewright.tools.plan import make_plan

    check_request(settled.request)

    quiet_transformers(session.debug)
    place = out or Path(settled.out or "runs")
    plan = make_plan(
        settled.request, place, training=settled.adapt, signals=settled.signals, timed=timed
    )
    try:
        who = check_agent(settled.context).words
    except InputError as error:  # a run would be refused; what it takes can be said all the same
        who = settled.agent
        plan = plan.model_copy(update={"warnings": [*plan.warnings, str(error)]})
    session.emit(plan.model_dump(mode="json"))
    _print_plan(session.screen, settled, plan, who)


def _print_plan(screen: Screen, config: PruneConfig, plan: "Plan", agent: str) -> None:
    stored = ", ".join(f"{size(n)} in {kind}" for kind, n in plan.stored.items())
    memory = plan.memory
    copy = updated = ""
    if plan.disk["copy"]:
        copy = f"; dense weights in the cache {size(plan.disk['copy'])}"
    if plan.disk["updated"]:
        updated = f"; updated weights {size(plan.disk['updated'])}"
    screen.pairs(
        [
            ("model", " in ".join(dict.fromkeys([str(plan.model), str(plan.directory)]))),
            (
                "layers",
                f"{plan.layers} in {plan.blocks} blocks, {plan.prunable:,} prunable of "
                f"{plan.parameters:,} parameters",
            ),
            *([("left dense", plan.left_dense)] if plan.left_dense else []),
            ("stored", stored or "weights not on this machine yet"),
            ("loaded", f"{size(plan.weights)} in {plan.dtype} on {plan.device}"),
            *request_rows(config),
            ("agent", agent),
            (
                "memory",
                f"about {size(memory['peak'])} at most, {size(plan.memory_available)} available",
            ),
            *(
                []
                if plan.device == "cpu"
                else [
                    (
                        "of machine",
                        f"about {size(memory['host'])}, {size(plan.host_available)} available",
                    )
                ]
            ),
            ("offload", _offload_words(config, plan)),
            (
                "disk",
                f"about {size(plan.disk['total'])} (model "
                f"{size(plan.disk['model'])}, masks {size(plan.disk['masks'])} "
                f"if every layer changes{updated}{copy}), {size(plan.disk_free)} free",
            ),
            *([("training", _training_words(plan))] if plan.adapt else []),
            ("time", _time_words(plan)),
        ]
    )
    for words in plan.warnings:
        screen.warn(words)


def _offload_words(config: PruneConfig, plan: "Plan") -> str:
    """The peak of each way of running the model, and which one to take."""
    ways = ", ".join(
        f"{name} {size(way['device'])}"
        + ("" if plan.device == "cpu" else f" and {size(way['host'])} of the machine")
        for name, way in plan.ways.items()
    )
    return f"{ways}; recommended: {plan.recommended or 'a smaller model, since no way fits'}"


def _training_words(plan: "Plan") -> str:
    """What the training at the end takes."""
    found = plan.adapt
    words = (
        f"adapt takes about {size(int(found['memory']))} of memory at most, the weights among it, "
        f"and {size(int(found['disk']))} of disk while it goes on"
    )
    return f"{words}; about {duration(found['seconds'])}" if "seconds" in found else words


def _time_words(plan: "Plan") -> str:
    """How long a run takes, as far as that is known."""
    steps = f"{plan.steps} steps or more"
    if not plan.seconds:
        return f"{steps}; --time loads the model and times one window to say how long"
    window, step, run = (duration(plan.seconds[k]) for k in ("window", "step", "run"))
    own = plan.seconds.get("own text")
    written = "" if own is None else f" with {duration(own)} for text of its own"
    return (
        f"about {step} a step, {steps}, {run} in all{written}, by a window of {window}; to it come "
        "loading, saving, and what the agent takes to answer"
    )
