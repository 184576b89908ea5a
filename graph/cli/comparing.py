"""`compare`."""

from pathlib import Path
from typing import Annotated

import typer

from prunewright.graph.cli.options import JsonOption, SetOption
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.session import DONE, FAILURE, Session, quiet_transformers


def compare_command(
    ctx: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file with base, methods, seeds, targets, control and evaluation.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Its directory. Default: runs/<name of CONFIG>."),
    ] = None,
    overrides: SetOption = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Instead of those of CONFIG, such as 0,1,2.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Only this one, and the control; may be repeated."),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the pruned models; masks are always kept.")
    ] = False,
    _json: JsonOption = False,
) -> None:
    """Compare methods over seeds and sparsities, on the same texts, at equal sparsity.

    The same command goes on after a stop and runs only what is not done. Writes comparison.json,
    .md, .html and plots. Exit code 1 if an experiment failed; the others are done all the same.
    """
    session: Session = ctx.obj
    from prunewright.state.study import load_comparison_config

    settled = load_comparison_config(config, overrides, seeds=seeds, methods=methods)
    from prunewright.graph.cli.screen.study import Experiments, print_tables
    from prunewright.graph.running.study import compare
    from prunewright.tools.report.tables import comparison_tables

    quiet_transformers(session.debug)
    directory = out or Path("runs") / config.stem
    session.repeatable()
    screen = session.screen
    with Experiments(screen) as experiments:
        found = compare(settled, directory, experiments.on_event, keep_models=keep_models)
    *tables, _ = comparison_tables(found)
    print_tables(screen, tables)
    screen.line()
    screen.pairs([("comparison", str(directory))])
    failed = found.errors
    code = FAILURE if failed else DONE
    session.emit({"directory": str(directory), "exit_code": code, **found.model_dump(mode="json")})
    if failed:
        count = f"{len(failed)} of {len(found.experiments) + 1} experiments failed:"
        Screen(stderr=True).line(("Error: ", "bold red"), count)
        for name, error in failed.items():
            Screen(stderr=True).line(f"{name}: {error}")
    raise typer.Exit(code)
