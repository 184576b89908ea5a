"""The command line. What needs torch is imported inside the commands: ``--help`` is quick."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from prunewright.graph.cli import comparing, evaluating, planning, runs, showing, storing
from prunewright.graph.cli.session import Commands, Session
from prunewright.graph.running.logs import Level, logging_to_stderr

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One LLM prunes another: step by step, with rollback, resume and a decision trace. "
    "Exit codes: 0 done, 2 bad usage or configuration, 3 ended before the target, 1 failure, "
    "130 interrupted.",
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "run": runs.run_command,
    "resume": runs.resume_command,
    "fork": runs.fork_command,
    "watch": runs.watch_command,
    "baseline": runs.baseline_command,
    "compare": comparing.compare_command,
    "show": showing.show_command,
    "report": showing.report_command,
    "ask": showing.ask_command,
    "agents": showing.agents_command,
    "evaluate": evaluating.evaluate_command,
    "save": storing.save_command,
    "pack": storing.pack_command,
    "unpack": storing.unpack_command,
    "gc": storing.gc_command,
    "config": planning.config_command,
    "plan": planning.plan_command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"prunewright {importlib.metadata.version('prunewright')}\n")
        raise typer.Exit


@app.callback()
def _common(
    ctx: typer.Context,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="PRUNEWRIGHT_DEBUG", help="Show tracebacks and warnings."),
    ] = False,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    log_level: Annotated[
        Level | None,
        typer.Option(
            "--log-level",
            case_sensitive=False,
            help="Log at least this to standard error, a line each with the time. Default: "
            "warnings, bare.",
            show_default=False,
        ),
    ] = None,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json",
            help="Log JSON lines to standard error: time, level, logger, message, run, step, node.",
        ),
    ] = False,
) -> None:
    session: Session = ctx.obj
    session.debug, session.log_json = debug, log_json
    _quiet()
    libraries = logging.WARNING if debug else logging.ERROR
    ctx.with_resource(logging_to_stderr(log_level, as_json=log_json, libraries=libraries))


def _quiet() -> None:
    """Keep the libraries' progress bars and remarks off the screen."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.captureWarnings(True)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="prunewright")
