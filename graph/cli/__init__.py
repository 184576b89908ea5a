"""The command line. What needs torch is imported inside the commands: ``--help`` is quick."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from prunewright.graph.cli import (
    adapting,
    comparing,
    evaluating,
    planning,
    runs,
    showing,
    storing,
)
from prunewright.graph.cli.session import Commands, Session
from prunewright.graph.running.logs import Level, logging_to_stderr

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One LLM prunes another: step by step, with rollback, resume and a decision trace. "
    "Exit codes: 0 done, 2 bad usage or configuration, 3 ended before the target, 1 failure, "
    "130 interrupted (143 by SIGTERM).",
)

_PRUNE, _LOOK, _BEFORE, _KEEP = "Prune", "Look", "Before a run", "Keep and tidy up"
# By their headings in the help, each with an example or two.
_COMMANDS: dict[str, tuple[str, Callable[..., None], list[str]]] = {
    "run": (
        _PRUNE,
        runs.run_command,
        ["run -m my-model -t 0.45 -o runs/mine", "run -c configs/demo.yaml --agent greedy"],
    ),
    "resume": (
        _PRUNE,
        runs.resume_command,
        ["resume runs/mine", "resume runs/mine --set guard.max_increase=0.3"],
    ),
    "fork": (_PRUNE, runs.fork_command, ["fork runs/mine --step 7 --set agent=greedy"]),
    "baseline": (
        _PRUNE,
        runs.baseline_command,
        ["baseline -m my-model -t 0.45 --allocation owl", "baseline -m my-model --pattern 2:4"],
    ),
    "adapt": (
        _PRUNE,
        adapting.adapt_command,
        ["adapt runs/mine --tokens 1000000", "adapt ./pruned-model -m ./my-model"],
    ),
    "compare": (
        _PRUNE,
        comparing.compare_command,
        ["compare configs/studies/smollm2-45.yaml --seeds 0,1,2"],
    ),
    "show": (_LOOK, showing.show_command, ["show runs/mine", "show runs/mine --step 3"]),
    "watch": (_LOOK, runs.watch_command, ["watch runs/mine"]),
    "report": (_LOOK, showing.report_command, ["report runs/mine runs/uniform"]),
    "ask": (_LOOK, showing.ask_command, ["ask runs/mine"]),
    "evaluate": (
        _LOOK,
        evaluating.evaluate_command,
        ["evaluate runs/mine --text my.txt", "evaluate runs/mine --task mmlu --against my-model"],
    ),
    "agents": (_BEFORE, showing.agents_command, ["agents"]),
    "config": (_BEFORE, planning.config_command, ["config > my.yaml"]),
    "plan": (_BEFORE, planning.plan_command, ["plan -m my-model -t 0.45"]),
    "save": (_KEEP, storing.save_command, ["save runs/mine"]),
    "pack": (_KEEP, storing.pack_command, ["pack runs/mine mine.pack"]),
    "unpack": (_KEEP, storing.unpack_command, ["unpack mine.pack my-model"]),
    "gc": (_KEEP, storing.gc_command, ["gc runs/mine", "gc --cache"]),
}
for _name, (_panel, _command, _examples) in _COMMANDS.items():
    app.command(
        _name,
        rich_help_panel=_panel,
        epilog="Such as:\n\n" + "\n".join(f"- `prunewright {example}`" for example in _examples),
    )(_command)


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
