"""`adapt`: the kept weights of a pruned model are trained."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunewright.graph.cli.evaluating import run_of
from prunewright.graph.cli.options import (
    REQUEST,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    OutOption,
    SeedOption,
    SetOption,
    config_option,
    model_option,
    with_calibration,
)
from prunewright.graph.cli.runs import live_screen, new_directory, print_head, report_end
from prunewright.graph.cli.session import Session, quiet_transformers
from prunewright.state import InputError, PruneConfig, load_config
from prunewright.state.config import BASELINE, AdaptOptions
from prunewright.state.loading import read_settings

if TYPE_CHECKING:
    from prunewright.tools.store.rundir import RunDirectory

_AS_IT_IS = ["criterion=wanda", "reconstruct=none"]
"""Kept weights are solved for only where that is asked for, too."""
_NOT_TAKEN_OVER = [
    *("agent_options={}", "allocation=null", "allocation_options={}"),
    *("prompts=null", "review=false", "with_control=false", "out=null"),
]
"""What a run's configuration says of how its masks were made, as --set takes it back."""


def adapt_command(
    ctx: typer.Context,
    pruned: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="Directory of a finished run, or a pruned model: a directory or a hub name.",
            show_default=False,
        ),
    ],
    config: Annotated[
        Path | None,
        config_option("YAML file with the configuration. Default: the run's, where there is one."),
    ] = None,
    overrides: SetOption = None,
    model: Annotated[
        str | None,
        model_option(
            "The dense model that it was made from, which is the teacher. Default: the run's, or "
            "what the model's README names."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, help="Tokens of text to train on.", rich_help_panel=REQUEST
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Its highest value, such as 3e-4.", rich_help_panel=REQUEST
        ),
    ] = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    _json: JsonOption = False,
) -> None:
    """Train the kept weights of a pruned model to follow the dense one; its zeros stay.

    This is training, by distillation on the calibration text. It leaves a new run directory with
    the files of a baseline; what it begins from is not changed. What was stopped goes on with
    `prunewright resume`.
    """
    session: Session = ctx.obj
    quiet_transformers(session.debug)
    wanted = {"adapt.tokens": tokens, "adapt.learning_rate": learning_rate}
    changes = [
        *with_calibration(overrides, calibration),
        *(f"{key}={value}" for key, value in wanted.items() if value is not None),
    ]
    settled = _settled(pruned, config, changes, model, seed=seed, device=device)
    settled = settled.model_copy(update={"adapt": settled.adapt or AdaptOptions()})
    session.run = new_directory(settled, out)
    screen = session.screen
    print_head(screen, settled, session.run, "none: the zeros of a pruned copy")
    with live_screen(screen, settled, session.run) as live:
        from prunewright.graph.running import runner

        result = runner.baseline(settled, session.run, live.on_event)
    report_end(session, screen, result)


def _settled(
    pruned: str, config: Path | None, overrides: list[str], model: str | None, **values: Any
) -> PruneConfig:
    """The configuration, on the ground of a run's if that is what is named.

    Args:
        pruned: the run or model.
        config: a file in place of the run's own.
        overrides: as of --set.
        model: the dense model, if it is named.
        values: top-level keys that win over all, as in `load_config`.

    Raises:
        InputError: nothing can be begun from it.
    """
    from prunewright.tools.store.rundir import RunDirectory

    values["agent"] = BASELINE
    named = read_settings(config) if config else {}
    as_it_is = [setting for setting in _AS_IT_IS if setting.split("=")[0] not in named]
    run = run_of(pruned)
    if run is None:
        base = model or _base_of(pruned)
        return load_config(config, [*as_it_is, *overrides], model=base, pruned=pruned, **values)
    directory = RunDirectory(run)
    _check_finished(directory)
    settled = load_config(
        config or directory.config_file,
        [*as_it_is, *([] if config else _NOT_TAKEN_OVER), *overrides],
        model=model or (directory.config().model if config else None),
        pruned=str(directory.model),
        **values,
    )
    return directory.locate(settled)


def _check_finished(directory: "RunDirectory") -> None:
    """Refuse a run that has no pruned model.

    Raises:
        InputError: saying what to do.
    """
    from prunewright.tools.store.trace import load_metrics

    name = shlex.quote(str(directory.path))
    if not directory.metrics_file.exists():
        raise InputError(
            f"the run in {directory.path} is not finished: prunewright resume {name}. (With --set "
            "adapt.tokens=... it is trained at its own end)"
        )
    if not load_metrics(directory).saved:
        raise InputError(f"the run in {directory.path} pruned nothing: there is nothing to adapt")
    if not directory.model.exists():
        raise InputError(f"the model of {directory.path} was deleted: prunewright save {name}")


def _base_of(pruned: str) -> str:
    """The dense model of a pruned one that no run of ours is around.

    Raises:
        InputError: its README names none.
    """
    from prunewright.tools.model.loading import resolve_directory
    from prunewright.tools.saving.card import base_of

    found = base_of(resolve_directory(pruned, weights=False))
    if found is None:
        raise InputError(
            f"the README of {pruned} names no model that it was made from: name the dense model, "
            "which is the teacher, by --model"
        )
    return found
