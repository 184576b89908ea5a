"""`run`, `resume`, `fork`, `watch` and `baseline`."""

import logging
import shlex
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from prunewright.graph.agents import resolve_agent
from prunewright.graph.cli import completing
from prunewright.graph.cli.options import (
    REQUEST,
    AgentOption,
    CalibrationOption,
    ConfigOption,
    CriterionOption,
    DeviceOption,
    HigherOption,
    JsonOption,
    ModelOption,
    OutOption,
    PatternOption,
    PresetOption,
    RunArgument,
    SeedOption,
    SetOption,
    TargetOption,
    print_lines,
    with_calibration,
)
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import Live, print_step_line
from prunewright.graph.cli.screen.results import print_metrics
from prunewright.graph.cli.session import DONE, ENDED_EARLY, Session, quiet_transformers
from prunewright.graph.words.runs import request_rows
from prunewright.state import PruneConfig, Step, load_config
from prunewright.state.config import BASELINE
from prunewright.state.metrics import NEGLIGIBLE
from prunewright.state.run import Status, new_thread

if TYPE_CHECKING:
    from prunewright.graph.cli.screen.terminal import TerminalReviewer
    from prunewright.graph.running.drive import RunResult
    from prunewright.tools.store.rundir import RunDirectory


_GOOD_ENDS = ("target_reached", "baseline")


def run_command(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    agent: AgentOption = None,
    criterion: CriterionOption = None,
    pattern: PatternOption = None,
    model: ModelOption = None,
    target: TargetOption = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    review: Annotated[
        bool | None,
        typer.Option(
            "--review",
            help="Ask a person to approve, edit or reject each decision.",
            rich_help_panel=REQUEST,
        ),
    ] = None,
    with_control: Annotated[
        bool | None,
        typer.Option(
            "--with-control",
            help="Measure uniform pruning to the same sparsity, too, to compare the run with.",
        ),
    ] = None,
    out: OutOption = None,
    _json: JsonOption = False,
) -> None:
    """Prune a model step by step and save the result.

    Starts from the defaults, then --preset, --config, --set, and the other options. A run that was
    stopped or failed goes on with `prunewright resume RUN_DIR`.
    """
    session: Session = ctx.obj
    settled = load_config(
        config,
        with_calibration(overrides, calibration),
        preset=preset,
        agent=agent,
        criterion=criterion,
        pattern=pattern,
        model=model,
        target=target,
        seed=seed,
        device=device,
        review=review or None,
        with_control=with_control or None,
    )
    resolved = resolve_agent(settled.agent, settled.agent_options)
    session.run = new_directory(settled, out)
    screen = session.screen
    _check_person(settled)
    print_head(screen, settled, session.run, resolved.words)
    with live_screen(screen, settled, session.run) as live:
        # Seconds of imports: what will be done is said before them.
        from prunewright.graph.running import runner

        quiet_transformers(session.debug)
        result = runner.run(settled, session.run, live.on_event, _reviewer(screen, live))
    report_end(session, screen, result)


def resume_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    overrides: SetOption = None,
    target: HigherOption = None,
    _json: JsonOption = False,
) -> None:
    """Go on with a run that was stopped or failed; a finished one is only reported.

    One that ended before its target goes on with what --set changes: who decides and how (agent,
    guard.max_increase, max_steps ...), not what defines the run (model, texts ...). With --target a
    finished run goes on to a higher one; its first result stays only with `fork`.
    """
    session: Session = ctx.obj
    from prunewright.graph.running import runner
    from prunewright.tools.store.rundir import RunDirectory

    quiet_transformers(session.debug)
    directory = RunDirectory(run_directory)
    session.run = run_directory
    settled, changes = _changes(directory, overrides, target)
    screen = session.screen
    records = directory.read_trace()
    if changes or not directory.metrics_file.exists():
        _check_person(settled)
        who = settled.agent
        if who != BASELINE:
            resolved = resolve_agent(who, settled.agent_options)
            who = resolved.words
        print_head(screen, settled, run_directory, who)
        if records:
            screen.pairs([("resumed", f"after step {records[-1].step + 1}")])
            print_step_line(screen, records[-1])
    with live_screen(screen, settled, run_directory, records) as live:
        reviewer = _reviewer(screen, live)
        result = runner.resume(run_directory, live.on_event, reviewer, **changes)
    report_end(session, screen, result)


def fork_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    step: Annotated[
        int | None,
        typer.Option(
            "--step",
            min=0,
            help="Steps to take over, rolled-back ones included; 0 starts from the dense model. "
            "Default: all.",
        ),
    ] = None,
    overrides: SetOption = None,
    target: HigherOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Run directory, new or empty. Default: <time>-<id> beside RUN_DIR."
        ),
    ] = None,
    _json: JsonOption = False,
) -> None:
    """Go on from just after a step of a run, in a new directory; the run stays as it is.

    It may be finished, or going on elsewhere. --set changes what `resume` may change.
    """
    session: Session = ctx.obj
    from prunewright.graph.running.forking import fork as go_on
    from prunewright.tools.store.rundir import RunDirectory

    quiet_transformers(session.debug)
    parent = RunDirectory(run_directory)
    settled, changes = _changes(parent, overrides, target)
    _check_person(settled)
    session.run = out or run_directory.parent / new_thread()
    resolved = resolve_agent(settled.agent, settled.agent_options)
    screen = session.screen
    print_head(screen, settled, session.run, resolved.words)
    after = "its last step" if step is None else f"step {step}"
    screen.pairs([("forked", f"from {run_directory} after {after}")])
    with live_screen(screen, settled, session.run, parent.read_trace()[:step]) as live:
        result = go_on(
            run_directory, step, session.run, live.on_event, _reviewer(screen, live), **changes
        )
    report_end(session, screen, result)


def watch_command(
    ctx: typer.Context,
    run_directory: RunArgument,
    _lines: Annotated[
        bool,
        typer.Option(
            "--json",
            callback=print_lines,
            help="Print JSON lines on standard output: each step, who works on the run, and the "
            "results; all else goes to standard error.",
        ),
    ] = False,
) -> None:
    """Follow a run that another terminal, a notebook or Studio drives, until it ends or Ctrl-C.

    Only its files are read. Ends with the exit code of the run.
    """
    session: Session = ctx.obj
    from prunewright.graph.running.drive import RunResult
    from prunewright.graph.running.watch import follow
    from prunewright.tools.store.rundir import RunDirectory
    from prunewright.tools.store.trace import load_metrics

    directory = RunDirectory(run_directory)
    config = directory.config()
    screen = session.screen
    print_head(screen, config, run_directory, config.agent)
    command = f"prunewright resume {shlex.quote(str(run_directory))}"
    try:
        with Live(screen, config=None if config.agent == BASELINE else config) as live:
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
    report_end(session, screen, RunResult(run_directory, load_metrics(directory)))


def baseline_command(
    ctx: typer.Context,
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    criterion: CriterionOption = None,
    pattern: PatternOption = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help=f"How the layers share the target: {', '.join(completing.ALLOCATIONS)}, or "
            "from:RUN_DIR, another run's final one. Options: --set allocation_options.lam=0.05.",
            autocompletion=completing.allocations,
            rich_help_panel=REQUEST,
        ),
    ] = None,
    model: ModelOption = None,
    target: TargetOption = None,
    calibration: CalibrationOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    _json: JsonOption = False,
) -> None:
    """Prune in one shot, every layer alike or by --allocation: the controls for `run`.

    The same texts, evaluation and output files as a run.
    """
    session: Session = ctx.obj
    settled = load_config(
        config,
        with_calibration(overrides, calibration),
        preset=preset,
        criterion=criterion,
        pattern=pattern,
        allocation=allocation,
        model=model,
        target=target,
        seed=seed,
        device=device,
    )
    session.run = new_directory(settled, out)
    screen = session.screen
    one_shot = settled.model_copy(update={"agent": BASELINE})
    print_head(screen, one_shot, session.run, f"none: {settled.one_shot}, one shot")
    with live_screen(screen, one_shot, session.run) as live:
        from prunewright.graph.running import runner

        quiet_transformers(session.debug)
        result = runner.baseline(settled, session.run, live.on_event)
    report_end(session, screen, result)


def new_directory(config: PruneConfig, out: Path | None) -> Path:
    """The run directory, named now so that every message can name it."""
    if out is not None or config.out is not None:
        return Path(out or config.out or "")
    return Path("runs") / new_thread()


def _changes(
    directory: "RunDirectory", overrides: list[str] | None, target: float | None
) -> tuple[PruneConfig, dict[str, Any]]:
    """A run's configuration with --set and --target applied, and what they change.

    A target is among it in any case: that it is not higher is for the runner to say.
    """
    before = directory.config()
    settled = before
    if overrides or target is not None:
        settled = load_config(directory.config_file, overrides, target=target)
    old, new = before.model_dump(), settled.model_dump()
    named = {} if target is None else {"target": settled.target}
    return settled, {k: v for k, v in new.items() if v != old[k]} | named


def _check_person(config: PruneConfig) -> None:
    if config.review:
        from prunewright.graph.cli.screen.terminal import check_terminal

        check_terminal()


def _reviewer(screen: Screen, live: Live) -> "TerminalReviewer":
    from prunewright.graph.cli.screen.terminal import TerminalReviewer

    return TerminalReviewer(screen, live)


def print_head(screen: Screen, config: PruneConfig, directory: Path, agent: str) -> None:
    """Say what is about to be done."""
    screen.pairs(
        [
            ("model", config.model),
            ("agent", agent),
            *request_rows(config),
            ("run", str(directory)),
        ]
    )


@contextmanager
def live_screen(
    screen: Screen,
    config: PruneConfig,
    directory: Path,
    records: Iterable[Step] = (),
) -> Iterator[Live]:
    """The live lines of a run that begins or goes on.

    Args:
        screen: where.
        config: the run's.
        directory: its own.
        records: its steps so far.
    """

    def loaded(dense: float | None) -> None:
        from prunewright.graph.agents.replay import other_standing
        from prunewright.tools.store.rundir import RunDirectory

        facts = RunDirectory(directory).manifest()
        model, windows = facts["model"], config.texts.windows
        told = facts.get("notes")
        notes = [str(words) for words in told] if isinstance(told, list) else []
        if config.agent.startswith("replay:"):
            notes.append(other_standing(config.agent.partition(":")[2], directory))
        zeros = model.get("zero_weights", 0) / model["prunable_weights"]
        before = f", {zeros:.2%} of them zero already" if zeros >= NEGLIGIBLE else ""
        screen.pairs(
            [
                (
                    "loaded",
                    f"{facts['dtype']} on {facts['device']}, {model['prunable_layers']} layers, "
                    f"{model['prunable_weights']:,} prunable weights{before}",
                ),
                *(("note", words) for words in notes if words),
            ]
        )
        if facts.get("values"):
            screen.pairs([("values", str(facts["values"]))])
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

    steps = None if config.agent == BASELINE else config
    with Live(screen, loaded, records, steps) as live:
        yield live


def report_end(session: Session, screen: Screen, result: "RunResult") -> NoReturn:
    """Print how a run ended, and leave with the exit code that says it."""
    from prunewright.graph.whole_layers import MISSING
    from prunewright.tools.ending import describe_ending, ended_words
    from prunewright.tools.report import FILE
    from prunewright.tools.signatures import failure_signatures
    from prunewright.tools.store.rundir import RunDirectory

    metrics = result.metrics
    records = RunDirectory(result.directory).read_trace()
    signatures = failure_signatures(records)
    model = str(result.model_directory) if result.model_directory else None
    print_metrics(screen, metrics, str(result.directory), model)
    for note in records[-1].notes if records else []:
        if note.endswith(MISSING):
            screen.pairs([("target", note)])
    if result.model_directory and not result.model_directory.exists():
        command = f"prunewright save {shlex.quote(str(result.directory))}"
        screen.warn(f"the model was deleted; its masks are kept: {command}")
    page = result.directory / FILE
    if page.is_file():
        screen.pairs([("report", str(page))])
    for words in signatures:
        screen.warn(words)
    reached = metrics.status in _GOOD_ENDS
    code = DONE if reached else ENDED_EARLY
    reason = ended_words(metrics)
    session.emit(
        {
            "directory": str(result.directory),
            "model_directory": model,
            **metrics.model_dump(mode="json"),
            "reason": reason,
            "exit_code": code,
            "signatures": signatures,
        }
    )
    if not reached:
        head = ("Ended before the target: ", "yellow")
        words = f"{reason}. Sparsity {metrics.sparsity:.4f}."
        config = RunDirectory(result.directory).config()
        status = cast(Status, metrics.status)
        found = describe_ending(status, records, config, config.target, saved=metrics.saved)
        settings = " ".join(f"--set {setting}" for setting in found.settings)
        if settings:
            run = shlex.quote(str(result.directory))
            words += f" To go on with it, for example: prunewright resume {run} {settings}"
        session.complain(logging.WARNING, head, words)
    raise typer.Exit(code)
