"""The command line. What needs torch is imported inside the commands: ``--help`` is quick."""

import importlib.metadata
import json
import logging
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from prunewright.graph import console
from prunewright.graph.console import Live, Screen
from prunewright.graph.logs import LOGGER, Level, logging_to_stderr
from prunewright.graph.stopping import stop_requested
from prunewright.state import InputError, PruneConfig, PrunewrightError, StepRecord, load_config
from prunewright.state.config import BASELINE

if TYPE_CHECKING:
    from prunewright.graph.runner import RunResult
    from prunewright.graph.terminal import TerminalReviewer
    from prunewright.tools.packing import Sizes
    from prunewright.tools.plan import Plan
    from prunewright.tools.rundir import RunDirectory

_log = logging.getLogger(LOGGER)

DONE, FAILURE, BAD_INPUT, ENDED_EARLY = 0, 1, 2, 3
_GOOD_ENDS = ("target_reached", "baseline")

_MEMORY_ADVICE = (
    "There is not enough memory. What takes less: texts.windows.length (shorter windows), "
    "profile.gradient_checkpointing=true (recomputes instead of keeping), dtype=bfloat16. "
    "`prunewright plan` predicts what a run needs"
)


@dataclass
class Session:
    """What holds for one invocation.

    Attributes:
        debug: show tracebacks.
        json: standard output carries one JSON object and nothing else.
        lines: it carries several, a line each.
        log_json: standard error carries JSON lines and nothing else.
        run: the run directory that is worked on, once known.
        again: the command that goes on where it is not `resume`.
    """

    debug: bool = False
    json: bool = False
    lines: bool = False
    log_json: bool = False
    run: Path | None = None
    again: str | None = None

    @property
    def screen(self) -> Screen:
        """Where people read."""
        return Screen(stderr=self.json, quiet=self.json and self.log_json)

    def complain(self, level: int, head: tuple[str, str], words: str) -> None:
        """Say on standard error why the command did not simply succeed."""
        if self.log_json:
            _log.log(level, "%s", head[0] + words)
        else:
            Screen(stderr=True).line(head, words)

    def emit(self, value: dict[str, Any]) -> None:
        """Print the JSON object, if one was asked for."""
        if self.json:
            indent = None if self.lines else 2
            sys.stdout.write(json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n")
            sys.stdout.flush()

    def resume_command(self) -> str | None:
        """The command that goes on with the run; None if there is nothing to go on with."""
        if self.again is not None:
            return self.again
        if self.run is None or not (self.run / "config.yaml").is_file():
            return None
        return f"prunewright resume {shlex.quote(str(self.run))}"


class _Commands(TyperGroup):
    """Turns every error of a command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        session = Session()
        ctx.obj = session
        try:
            with _signals(session):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _interrupted(session, error)
        except PrunewrightError as error:
            code = BAD_INPUT if isinstance(error, InputError) else FAILURE
            _failed(session, error, str(error), code)
        except Exception as error:
            # Usage errors and typer.Exit carry their own code and are the framework's to show.
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError):
                raise
            _failed(session, error, _unforeseen(error), FAILURE)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One LLM prunes another: step by step, with rollback, resume and a decision trace. "
    "Exit codes: 0 done, 2 bad usage or configuration, 3 ended before the target, 1 failure, "
    "130 interrupted.",
)

_RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="Directory of the run.", show_default=False)
]
_ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file with the configuration.")
]
_SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Any key of the configuration; dots reach nested ones: texts.windows.guard=16. "
        "May be repeated.",
    ),
]
_ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="embedded, a model directory or a hub name.")
]
_TargetOption = Annotated[
    float | None,
    typer.Option("--target", "-t", help="Sparsity over all prunable weights, such as 0.45."),
]
_OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run directory, new or empty. Default: runs/<time>-<id>."),
]


def _keep_stdout(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().obj.json = True
    return value


def _print_lines(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().obj.lines = value
    return _keep_stdout(ctx, value)


_JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_keep_stdout,
        help="Print one JSON object on standard output; all else goes to standard error.",
    ),
]


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


@app.command("run")
def run_command(
    ctx: typer.Context,
    config: _ConfigOption = None,
    overrides: _SetOption = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            "-a",
            help="Who decides, such as provider:model, greedy, replay:FILE, exchange:DIR; "
            "`prunewright agents` lists all.",
        ),
    ] = None,
    model: _ModelOption = None,
    target: _TargetOption = None,
    out: _OutOption = None,
    _json: _JsonOption = False,
) -> None:
    """Prune a model step by step and save the result.

    Starts from the defaults, then --config, then --set, then the other options. A run that was
    stopped or failed goes on with `prunewright resume RUN_DIR`.
    """
    session: Session = ctx.obj
    settled = load_config(config, overrides, agent=agent, model=model, target=target)
    from prunewright.graph import runner
    from prunewright.graph.agents import resolve_agent

    _quiet_transformers(session.debug)
    resolved = resolve_agent(settled.agent, settled.agent_options)
    session.run = _directory(settled, out)
    screen = session.screen
    _check_person(settled)
    _print_head(screen, settled, session.run, resolved.words)
    with _live(screen, settled, session.run) as live:
        result = runner.run(settled, session.run, live.on_event, _reviewer(screen, live))
    _report(session, screen, result)


@app.command("resume")
def resume_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    overrides: _SetOption = None,
    _json: _JsonOption = False,
) -> None:
    """Go on with a run that was stopped or failed; a finished one is only reported.

    --set may change who decides and how (agent, guard.max_increase, max_steps ...), not what
    defines the run (model, target, texts ...).
    """
    session: Session = ctx.obj
    from prunewright.graph import runner
    from prunewright.graph.agents import resolve_agent
    from prunewright.tools.rundir import RunDirectory

    _quiet_transformers(session.debug)
    directory = RunDirectory(run_directory)
    session.run = run_directory
    settled, changes = _changes(directory, overrides)
    screen = session.screen
    if not directory.metrics_file.exists():
        _check_person(settled)
        who = settled.agent
        if who != BASELINE:
            resolved = resolve_agent(who, settled.agent_options)
            who = resolved.words
        _print_head(screen, settled, run_directory, who)
        records = directory.read_trace()
        if records:
            screen.pairs([("resumed", f"after step {records[-1].step + 1}")])
            screen.line(*console.step_line(records[-1]))
    with _live(screen, settled, run_directory) as live:
        reviewer = _reviewer(screen, live)
        result = runner.resume(run_directory, live.on_event, reviewer, **changes)
    _report(session, screen, result)


@app.command("fork")
def fork_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    step: Annotated[
        int,
        typer.Option(
            "--step",
            min=0,
            help="Steps to take over, rolled-back ones included; 0 starts from the dense model.",
            show_default=False,
        ),
    ],
    overrides: _SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Run directory, new or empty. Default: <time>-<id> beside RUN_DIR."
        ),
    ] = None,
    _json: _JsonOption = False,
) -> None:
    """Go on from just after a step of a run, in a new directory; the run stays as it is.

    It may be finished, or going on elsewhere. --set changes what `resume` may change.
    """
    session: Session = ctx.obj
    from prunewright.graph import runner
    from prunewright.graph.agents import resolve_agent
    from prunewright.tools.rundir import RunDirectory

    _quiet_transformers(session.debug)
    parent = RunDirectory(run_directory)
    settled, changes = _changes(parent, overrides)
    _check_person(settled)
    session.run = out or run_directory.parent / _fresh_name()
    resolved = resolve_agent(settled.agent, settled.agent_options)
    screen = session.screen
    _print_head(screen, settled, session.run, resolved.words)
    screen.pairs([("forked", f"from {run_directory} after step {step}")])
    with _live(screen, settled, session.run, parent.read_trace()[:step]) as live:
        result = runner.fork(
            run_directory, step, session.run, live.on_event, _reviewer(screen, live), **changes
        )
    _report(session, screen, result)


@app.command("watch")
def watch_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    _lines: Annotated[
        bool,
        typer.Option(
            "--json",
            callback=_print_lines,
            help="Print JSON lines on standard output: each step, who works on the run, and the "
            "results; all else goes to standard error.",
        ),
    ] = False,
) -> None:
    """Follow a run that another terminal, a notebook or Studio drives, until it ends or Ctrl-C.

    Only its files are read. Ends with the exit code of the run.
    """
    session: Session = ctx.obj
    from prunewright.graph.runner import RunResult
    from prunewright.graph.watch import follow
    from prunewright.tools.rundir import RunDirectory
    from prunewright.tools.trace import load_metrics

    directory = RunDirectory(run_directory)
    config = directory.config()
    screen = session.screen
    _print_head(screen, config, run_directory, config.agent)
    command = f"prunewright resume {shlex.quote(str(run_directory))}"
    try:
        with Live(screen) as live:
            for mode, event in follow(directory):
                live.on_event(mode, event)
                if mode == "holder":
                    number = event["process"]
                    words = f"nobody works on it; go on with: {command}"
                    screen.pairs([("at work", f"process {number}" if number else words)])
                    live.say("" if number else "waiting for someone to go on with it")
                if mode == "holder" or "step" in event:
                    session.emit(event)
    except KeyboardInterrupt:
        Screen(stderr=True).line("No longer watching; the run is left as it is.")
        raise typer.Exit(128 + signal.SIGINT) from None
    _report(session, screen, RunResult(run_directory, load_metrics(directory)))


@app.command("baseline")
def baseline_command(
    ctx: typer.Context,
    config: _ConfigOption = None,
    overrides: _SetOption = None,
    criterion: Annotated[
        str | None,
        typer.Option("--criterion", help="magnitude, wanda, gblm, fisher, sparsegpt or obs."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            help="unstructured, or the number kept of each group, 2:4, which fixes the sparsity.",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="How the layers share the target: uniform, owl, alphapruning, atp, greedy, "
            "evolutionary, global, or from:RUN_DIR, another run's final one. "
            "Options: --set allocation_options.lam=0.05.",
        ),
    ] = None,
    model: _ModelOption = None,
    target: _TargetOption = None,
    out: _OutOption = None,
    _json: _JsonOption = False,
) -> None:
    """Prune in one shot, every layer alike or by --allocation: the controls for `run`.

    The same texts, evaluation and output files as a run.
    """
    session: Session = ctx.obj
    settled = load_config(
        config,
        overrides,
        criterion=criterion,
        pattern=pattern,
        allocation=allocation,
        model=model,
        target=target,
    )
    from prunewright.graph import runner

    _quiet_transformers(session.debug)
    session.run = _directory(settled, out)
    screen = session.screen
    one_shot = settled.model_copy(update={"agent": BASELINE})
    _print_head(screen, one_shot, session.run, f"none: {settled.allocation}, one shot")
    with Live(screen) as live:
        result = runner.baseline(settled, session.run, live.on_event)
    _report(session, screen, result)


@app.command("compare")
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
    overrides: _SetOption = None,
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
    _json: _JsonOption = False,
) -> None:
    """Compare methods over seeds and sparsities, on the same texts, at equal sparsity.

    The same command goes on after a stop and runs only what is not done. Writes comparison.json,
    .md, .html and plots. Exit code 1 if a cell failed; the others are done all the same.
    """
    session: Session = ctx.obj
    from prunewright.state.comparison import load_comparison_config

    settled = load_comparison_config(config, overrides, seeds=seeds, methods=methods)
    from prunewright.graph.compare import compare
    from prunewright.graph.compare_screen import Cells, print_tables
    from prunewright.tools.report.tables import comparison_tables

    _quiet_transformers(session.debug)
    directory = out or Path("runs") / config.stem
    session.again = " ".join(map(shlex.quote, ["prunewright", *sys.argv[1:]]))
    screen = session.screen
    with Cells(screen) as cells:
        found = compare(settled, directory, cells.on_event, keep_models=keep_models)
    *tables, _ = comparison_tables(found)
    print_tables(screen, tables)
    screen.line()
    screen.pairs([("comparison", str(directory))])
    failed = found.errors
    code = FAILURE if failed else DONE
    session.emit({"directory": str(directory), "exit_code": code, **found.model_dump(mode="json")})
    if failed:
        count = f"{len(failed)} of {len(found.cells) + 1} cells failed:"
        Screen(stderr=True).line(("Error: ", "bold red"), count)
        for name, error in failed.items():
            Screen(stderr=True).line(f"{name}: {error}")
    raise typer.Exit(code)


@app.command("show")
def show_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    step: Annotated[
        int | None,
        typer.Option("--step", min=1, help="Show this step whole, its reasoning included."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer's sparsity, block by block.")
    ] = False,
    _json: _JsonOption = False,
) -> None:
    """Show what happened in a run, finished or not, step by step."""
    session: Session = ctx.obj
    from prunewright.graph import show
    from prunewright.tools.rundir import RunDirectory
    from prunewright.tools.trace import read_story

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


@app.command("report")
def report_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
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
    _json: _JsonOption = False,
) -> None:
    """Write a run, finished or not, as one web page: plots, decisions, and runs side by side.

    Each finished run has one already; name a baseline after it to compare. Opens without a network.
    """
    session: Session = ctx.obj
    from prunewright.tools.report import write_report

    path = write_report([run_directory, *(others or [])], out)
    session.emit({"report": str(path)})
    session.screen.pairs([("report", f"{path} ({console.size(path.stat().st_size)})")])


@app.command("ask")
def ask_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    step: Annotated[
        int | None,
        typer.Option(
            "--step", min=1, help="An earlier step's. Default: the latest with a profile."
        ),
    ] = None,
    _json: _JsonOption = False,
) -> None:
    """Print the exact prompt of a run's next step, and the schema of the answer.

    Nobody is asked and nothing is changed, also while the run goes on in another process.
    """
    session: Session = ctx.obj
    from prunewright.graph.preview import preview
    from prunewright.tools.rundir import RunDirectory

    found = preview(RunDirectory(run_directory), None if step is None else step - 1)
    session.emit({"directory": str(run_directory), **found.as_json()})
    if session.json:
        return
    screen = session.screen
    screen.line((f"Step {found.step + 1}: {found.about}", "bold"))
    for message in found.messages:
        screen.line((f"--- {message.type} ---", "bold"))
        screen.line(str(message.text))
    screen.line(("--- JSON schema of the answer ---", "bold"))
    screen.line(json.dumps(found.schema, indent=2))


@app.command("agents")
def agents_command(ctx: typer.Context, _json: _JsonOption = False) -> None:
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


@app.command("evaluate")
def evaluate_command(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, a run directory, a hub name, or embedded.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="embedded, a local .txt/.jsonl/.parquet file, or a hub data set name[:config]; "
            "may be repeated. Default: embedded, if no --task is named.",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            help="windows: the first of each text. literature: all of them, cut from the text "
            "tokenized once, 2048 tokens each unless --length says otherwise.",
        ),
    ] = "windows",
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, help="Windows of each text. Default: 20."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", min=8, help="Tokens in one window. Default: 1024."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="mmlu (letters), mmlu-cloze (the answers' words) or facts (FreebaseQA's form); "
            "may be repeated. Needs the extra eval.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TASK=SOURCE",
            help="Questions of a task: a .jsonl, .json or .parquet file, a hub data set "
            "name[:config[:split]], or embedded, which is the default. May be repeated.",
        ),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            "--examples",
            metavar="TASK=SOURCE",
            help="Where a task's examples are from. Default: other questions of its own.",
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=0, help="Examples before each question.")
    ] = 5,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Questions of each task, equally many of a subject."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Another model, mostly the dense one, that is asked the same and compared.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Directory for evaluation.json and all answers so far: the same command goes on "
            "after a kill.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
    _json: _JsonOption = False,
) -> None:
    """Measure perplexity and answers of any model, dense or pruned, alone or against another."""
    session: Session = ctx.obj
    # The config's own bounds, before anything is loaded.
    bounds = load_config(None, None, dtype=dtype, device=device)
    if protocol not in ("windows", "literature"):
        raise InputError(f"--protocol is windows or literature, not {protocol!r}")
    if protocol == "literature" and windows is not None:
        raise InputError("--protocol literature takes all windows of a text: leave out --windows")
    from prunewright.tools.evaluation import evaluate
    from prunewright.tools.evaluation.harness import prepare_quizzes

    _quiet_transformers(session.debug)
    quizzes = prepare_quizzes(
        task or [],
        data=_by_task("--data", data),
        examples=_by_task("--examples", examples),
        shots=shots,
        limit=limit,
    )
    with Live(session.screen) as live:
        found = evaluate(
            _model_of(model),
            list(dict.fromkeys(text or ([] if task else ["embedded"]))),
            quizzes,
            against=None if against is None else _model_of(against),
            protocol="literature" if protocol == "literature" else "windows",
            windows=windows or 20,
            length=length or (2048 if protocol == "literature" else 1024),
            dtype=bounds.dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            store=out,
            progress=live.progress,
        )
    session.emit(found.model_dump(mode="json"))
    console.print_evaluation(session.screen, found)


def _by_task(option: str, values: list[str] | None) -> dict[str, str]:
    """The sources of ``TASK=SOURCE`` options."""
    found = {}
    for value in values or []:
        task, equals, source = value.partition("=")
        if not (task and equals and source):
            raise InputError(f"{option} wants TASK=SOURCE, got {value!r}")
        found[task] = source
    return found


@app.command("pack")
def pack_command(
    ctx: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_OR_RUN_DIR", help="A model directory or a run's.", show_default=False
        ),
    ],
    archive: Annotated[
        Path,
        typer.Argument(metavar="ARCHIVE", help="Directory, new or empty.", show_default=False),
    ],
    _json: _JsonOption = False,
) -> None:
    """Pack a pruned model without loss: a bit for each weight, and the weights that are not zero.

    Only for storage: `unpack` gives the model's directory back, every file byte for byte.
    """
    session: Session = ctx.obj
    from prunewright.tools.packing import pack_model

    with Live(session.screen) as live:
        sizes = pack_model(_model_of(str(model)), archive, live.progress)
    _print_sizes(session, sizes, archive)


@app.command("unpack")
def unpack_command(
    ctx: typer.Context,
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="What `pack` wrote.", show_default=False)
    ],
    model: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory, new or empty.", show_default=False),
    ],
    _json: _JsonOption = False,
) -> None:
    """Unpack what `pack` wrote, and check every file against its hash."""
    session: Session = ctx.obj
    from prunewright.tools.packing import unpack_model

    with Live(session.screen) as live:
        sizes = unpack_model(archive, model, live.progress)
    _print_sizes(session, sizes, model)


@app.command("gc")
def gc_command(
    ctx: typer.Context,
    run_directory: _RunArgument,
    _json: _JsonOption = False,
) -> None:
    """Delete the masks that no checkpoint of a run refers to, such as those of a killed step."""
    session: Session = ctx.obj
    from prunewright.graph.runner import collect_garbage

    files, size = collect_garbage(run_directory)
    session.emit({"files": files, "bytes": size})
    session.screen.line(f"{files} files deleted, {size:,} bytes")


@app.command("plan")
def plan_command(
    ctx: typer.Context,
    config: _ConfigOption = None,
    overrides: _SetOption = None,
    model: _ModelOption = None,
    target: _TargetOption = None,
    out: _OutOption = None,
    _json: _JsonOption = False,
) -> None:
    """Say what a run would load, and predict its memory, disk and time. Nothing is pruned.

    Only a model's configuration is read, and one short matrix product timed.
    """
    session: Session = ctx.obj
    settled = load_config(config, overrides, model=model, target=target)
    from prunewright.graph.whole_layers import check_request
    from prunewright.tools.plan import make_plan

    check_request(settled.request)

    _quiet_transformers(session.debug)
    plan = make_plan(settled.request, out or Path(settled.out or "runs"))
    session.emit(plan.model_dump(mode="json"))
    _print_plan(session.screen, settled, plan)


def _directory(config: PruneConfig, out: Path | None) -> Path:
    """The run directory, named now so that every message can name it."""
    if out is not None or config.out is not None:
        return Path(out or config.out or "")
    return Path("runs") / _fresh_name()


def _fresh_name() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"


def _changes(
    directory: "RunDirectory", overrides: list[str] | None
) -> tuple[PruneConfig, dict[str, Any]]:
    """A run's configuration with --set applied, and what that changes."""
    before = directory.config()
    settled = load_config(directory.config_file, overrides) if overrides else before
    old = before.model_dump()
    return settled, {k: v for k, v in settled.model_dump().items() if v != old[k]}


def _check_person(config: PruneConfig) -> None:
    if config.review:
        from prunewright.graph.terminal import check_terminal

        check_terminal()


def _reviewer(screen: Screen, live: Live) -> "TerminalReviewer":
    from prunewright.graph.terminal import TerminalReviewer

    return TerminalReviewer(screen, live)


def _model_of(name: str) -> str:
    """A run directory stands for the model in it."""
    inside = Path(name).expanduser() / "model"
    return str(inside) if (inside / "config.json").is_file() else name


def _print_sizes(session: Session, sizes: "Sizes", written: Path) -> None:
    """What an archive saves."""
    session.emit({"directory": str(written), **asdict(sizes)})
    rows = [
        ("model", f"{console.size(sizes.model)} in all"),
        ("archive", f"{console.size(sizes.archive)}, {sizes.archive / sizes.model:.3f} of that"),
    ]
    if sizes.pruned:
        before, after = console.size(sizes.pruned), console.size(sizes.packed)
        words = f"{before} of tensors with zeros became {after}, {sizes.packed / sizes.pruned:.3f}"
        rows.append(("packed", words))
    session.screen.pairs([*rows, ("written", str(written))])


def _print_head(screen: Screen, config: PruneConfig, directory: Path, agent: str) -> None:
    screen.pairs(
        [
            ("model", config.model),
            ("agent", agent),
            *console.request_rows(config),
            ("run", str(directory)),
        ]
    )


@contextmanager
def _live(
    screen: Screen,
    config: PruneConfig,
    directory: Path,
    records: list[StepRecord] | None = None,
) -> Iterator[Live]:
    from prunewright.tools.rundir import RunDirectory
    from prunewright.tools.storage import read_json

    def loaded(dense: float | None) -> None:
        facts = read_json(directory / "manifest.json")
        model, windows = facts["model"], config.texts.windows
        screen.pairs(
            [
                (
                    "loaded",
                    f"{facts['dtype']} on {facts['device']}, {model['prunable_layers']} layers, "
                    f"{model['prunable_weights']:,} prunable weights",
                )
            ]
        )
        if dense is not None:
            screen.pairs(
                [
                    (
                        "dense",
                        f"perplexity {dense:.3f} on {windows.guard} guard windows of "
                        f"{windows.length} tokens",
                    )
                ]
            )

    with Live(screen, loaded, records or RunDirectory(directory).read_trace()) as live:
        yield live


def _report(session: Session, screen: Screen, result: "RunResult") -> NoReturn:
    """Print how a run ended, and leave with the exit code that says it."""
    from prunewright.graph.whole_layers import MISSING
    from prunewright.tools.report import FILE
    from prunewright.tools.rundir import RunDirectory
    from prunewright.tools.signatures import failure_signatures

    metrics = result.metrics
    records = RunDirectory(result.directory).read_trace()
    signatures = failure_signatures(records)
    console.print_metrics(screen, metrics, str(result.directory), str(result.model_directory))
    for note in records[-1].notes if records else []:
        if note.endswith(MISSING):
            screen.pairs([("target", note)])
    page = result.directory / FILE
    if page.is_file():
        screen.pairs([("report", str(page))])
    for words in signatures:
        screen.line(("warning    ", "yellow"), words)
    reached = metrics.status in _GOOD_ENDS
    code = DONE if reached else ENDED_EARLY
    reason = console.status_words(metrics.status)
    session.emit(
        {
            "directory": str(result.directory),
            "model_directory": str(result.model_directory),
            "reason": reason,
            "exit_code": code,
            "signatures": signatures,
            **metrics.model_dump(mode="json"),
        }
    )
    if not reached:
        head = ("Ended before the target: ", "yellow")
        session.complain(logging.WARNING, head, f"{reason}. Sparsity {metrics.sparsity:.4f}.")
    raise typer.Exit(code)


def _print_plan(screen: Screen, config: PruneConfig, plan: "Plan") -> None:
    stored = ", ".join(f"{console.size(n)} in {kind}" for kind, n in plan.stored.items())
    memory, seconds = plan.memory, plan.seconds
    screen.pairs(
        [
            ("model", f"{plan.model} in {plan.directory}"),
            (
                "layers",
                f"{plan.layers} in {plan.blocks} blocks, {plan.prunable:,} prunable of "
                f"{plan.parameters:,} parameters",
            ),
            ("stored", stored or "weights not on this machine yet"),
            ("loaded", f"{console.size(plan.weights)} in {plan.dtype} on {plan.device}"),
            *console.request_rows(config),
            (
                "memory",
                f"about {console.size(memory['peak'])} at most, "
                f"{console.size(plan.memory_available)} available",
            ),
            (
                "disk",
                f"about {console.size(plan.disk['total'])} (model "
                f"{console.size(plan.disk['model'])}, masks {console.size(plan.disk['masks'])} "
                f"if every layer changes), {console.size(plan.disk_free)} free",
            ),
            (
                "time",
                f"about {console.duration(seconds['step'])} a step, {plan.steps} steps or more, "
                f"{console.duration(seconds['run'])} in all, at "
                f"{plan.flops_per_second / 1e9:.0f} GFLOP/s, to within a factor of two, and what "
                "the agent takes to answer",
            ),
        ]
    )
    for words in plan.warnings:
        screen.line(("warning    ", "yellow"), words)


def _quiet() -> None:
    """Keep the libraries' progress bars and remarks off the screen."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.captureWarnings(True)


def _quiet_transformers(debug: bool) -> None:
    """The same for transformers, which does not read the environment for it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not debug:
        transformers_logging.set_verbosity_error()


@contextmanager
def _signals(session: Session) -> Iterator[None]:
    """SIGINT and SIGTERM interrupt; while a run is already stopping, they end the process."""

    def on_signal(number: int, _: FrameType | None) -> None:
        if not stop_requested():
            raise KeyboardInterrupt(number)
        command = session.resume_command()
        os.write(2, f"\nStopped at once. {_go_on(command)}\n".encode())
        # All that is recorded is written atomically; the threads at work are left where they are.
        os._exit(128 + number)

    earlier: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                earlier[number] = signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: whoever is there handles signals
        earlier = {}
    try:
        yield
    finally:
        for caught, handler in earlier.items():
            signal.signal(caught, handler)


def _go_on(command: str | None) -> str:
    return f"What was done is kept; go on with: {command}" if command else "Nothing was begun."


def _interrupted(session: Session, error: KeyboardInterrupt) -> NoReturn:
    number = error.args[0] if error.args else signal.SIGINT
    command = session.resume_command()
    session.complain(logging.WARNING, ("Interrupted. ", ""), _go_on(command))
    session.emit({"error": "interrupted", "exit_code": 128 + number, "resume": command})
    raise typer.Exit(128 + int(number))


def _failed(session: Session, error: Exception, message: str, code: int) -> NoReturn:
    if session.debug and session.log_json:
        _log.error("%s", error, exc_info=error)
    elif session.debug:
        traceback.print_exception(error)
    session.complain(logging.ERROR, ("Error: ", "bold red"), message)
    command = session.resume_command() if code == FAILURE else None
    if command and command not in message:
        session.complain(logging.ERROR, ("What was done is kept; ", ""), f"go on with: {command}")
    session.emit(
        {"error": message, "kind": type(error).__name__, "exit_code": code, "resume": command}
    )
    raise typer.Exit(code)


def _unforeseen(error: Exception) -> str:
    """Words for an error that no part of ours foresaw."""
    text = f"{type(error).__name__}: {error}"
    short = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate")
    if isinstance(error, MemoryError) or any(s in str(error).lower() for s in short):
        return f"{_MEMORY_ADVICE}.\n({console.one_line(text, 300)})"
    return (
        f"{text}\nThis was not foreseen. For the traceback: prunewright --debug COMMAND, or "
        "PRUNEWRIGHT_DEBUG=1"
    )


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="prunewright")


if __name__ == "__main__":
    main()
