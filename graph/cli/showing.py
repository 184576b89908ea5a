"""What is known of a run or of this machine: `show`, `report`, `ask` and `agents`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prunewright.graph.cli.options import JsonOption, RunArgument
from prunewright.graph.cli.session import Session
from prunewright.graph.words.numbers import size
from prunewright.state import InputError


def show_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Show this step whole, its reasoning included."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer's sparsity, block by block.")
    ] = False,
    _json: JsonOption = False,
) -> None:
    """Show what happened in a run, finished or not, step by step."""
    session: Session = ctx.obj
    from prunewright.graph.cli.screen import show
    from prunewright.tools.store.rundir import RunDirectory
    from prunewright.tools.store.trace import read_story

    story = read_story(RunDirectory(run_directory))
    if step is not None and step > len(story.records):
        raise InputError(f"{run_directory} has {len(story.records)} steps, so no step {step}")
    screen = session.screen
    if session.json:
        session.emit(show.as_json(story, step=step, layers=layers))
    elif step is not None:
        show.print_step(screen, story.records[step - 1])
    elif layers:
        show.print_layers(screen, story)
    else:
        show.print_story(screen, story)


def report_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[OTHER_DIR]...",
            help="Runs and baselines to show beside it.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file. Default: report.html in RUN_DIR."),
    ] = None,
    _json: JsonOption = False,
) -> None:
    """Write a run, finished or not, as one web page: plots, decisions, and runs side by side.

    Each finished run has one already; name a baseline after it to compare. Opens without a network.
    """
    session: Session = ctx.obj
    from prunewright.tools.report import write_report

    path = write_report([run_directory, *(others or [])], out)
    session.emit({"report": str(path)})
    session.screen.pairs([("report", f"{path} ({size(path.stat().st_size)})")])


def ask_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    step: Annotated[
        int | None,
        typer.Option(
            "--step", min=1, help="An earlier step's. Default: the latest with a profile."
        ),
    ] = None,
    _json: JsonOption = False,
) -> None:
    """Print the exact prompt of a run's next step, and the schema of the answer.

    Nobody is asked and nothing is changed, also while the run goes on in another process.
    """
    session: Session = ctx.obj
    from prunewright.graph.running.preview import preview
    from prunewright.tools.store.rundir import RunDirectory

    found = preview(RunDirectory(run_directory), None if step is None else step - 1)
    session.emit({"directory": str(run_directory), **found.as_json()})
    if session.json:
        return
    screen = session.screen
    screen.line((f"Step {found.step + 1}: {found.about}", "bold"))
    for message in found.messages:
        screen.line((f"--- {message.type} ---", "bold"))
        screen.exact(str(message.text))
    screen.line(("--- JSON schema of the answer ---", "bold"))
    screen.exact(json.dumps(found.schema, indent=2))


def agents_command(ctx: typer.Context, _json: JsonOption = False) -> None:
    """List who can decide here, and what the others lack."""
    session: Session = ctx.obj
    from prunewright.graph.agents.available import available

    rows = available()
    session.emit({"agents": [asdict(row) for row in rows]})
    if not session.json:
        session.screen.table(
            ["agent", "ready", "what it is, and what it lacks"],
            [[row.name, "yes" if row.ready else "no", row.words] for row in rows],
            left=3,
        )
