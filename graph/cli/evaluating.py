"""`evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunewright.graph.cli.completing import devices, values
from prunewright.graph.cli.options import JsonOption, config_option
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import Live
from prunewright.graph.cli.screen.results import print_evaluation
from prunewright.graph.cli.session import Session, quiet_transformers
from prunewright.graph.running.logs import log_progress
from prunewright.state import InputError, load_config
from prunewright.state.config import Offload
from prunewright.state.study import load_evaluation_options

if TYPE_CHECKING:
    from prunewright.tools.evaluation.harness import Quiz


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
    config: Annotated[
        Path | None,
        config_option(
            "YAML file with texts, length and tasks, as evaluation of a comparison has them, in "
            "place of the options about these.",
            None,
        ),
    ] = None,
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
            autocompletion=values("windows", "literature"),
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
            autocompletion=values("mmlu", "mmlu-cloze", "facts"),
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
        str,
        typer.Option(
            "--dtype",
            help="auto, bfloat16, float16 or float32.",
            autocompletion=values("auto", "bfloat16", "float16", "float32"),
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", autocompletion=devices),
    ] = "auto",
    offload: Annotated[
        Offload,
        typer.Option(
            "--offload", help="Where the blocks are while they are not at work: none, cpu or disk."
        ),
    ] = "none",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
    _json: JsonOption = False,
) -> None:
    """Measure perplexity and answers of any model, dense or pruned, alone or against another."""
    session: Session = ctx.obj
    # The config's own bounds, before anything is loaded.
    bounds = load_config(None, None, dtype=dtype, device=device, offload=offload)
    if protocol not in ("windows", "literature"):
        raise InputError(f"--protocol is windows or literature, not {protocol!r}")
    if protocol == "literature" and windows is not None:
        raise InputError("--protocol literature takes all windows of a text: leave out --windows")
    from prunewright.tools.evaluation import evaluate
    from prunewright.tools.evaluation.harness import prepare_quizzes, prepare_tasks

    quiet_transformers(session.debug)
    if config is not None:
        given = (text, windows, length, task, data, examples, limit)
        if any(value is not None for value in given) or protocol != "windows":
            raise InputError("--config says what is scored: leave out the options about it")
        options = load_evaluation_options(config)
        texts: list[tuple[str, int | None]] = [(t.source, t.windows) for t in options.texts]
        length, quizzes = options.length, prepare_tasks(options.tasks)
    else:
        count = None if protocol == "literature" else windows or 20
        sources = dict.fromkeys(text or ([] if task else ["embedded"]))
        texts = [(source, count) for source in sources]
        quizzes = prepare_quizzes(
            task or [],
            data=_by_task("--data", data),
            examples=_by_task("--examples", examples),
            shots=shots,
            limit=limit,
        )
    for name in (model, against):
        if quizzes and name is not None and (run := run_of(name)):
            _check_unseen(run, quizzes, session.screen)
    if out is not None:
        session.repeatable()
    with Live(session.screen) as live:

        def progress(label: str, done: int, total: int) -> None:
            log_progress(label, done, total)
            live.progress(label, done, total)

        found = evaluate(
            model_of(model),
            texts,
            quizzes,
            against=None if against is None else model_of(against),
            length=length or (2048 if protocol == "literature" else 1024),
            dtype=bounds.dtype,
            device=device,
            offload=offload,
            trust_remote_code=trust_remote_code,
            store=out,
            progress=progress,
        )
    session.emit(found.model_dump(mode="json"))
    print_evaluation(session.screen, found)


def _check_unseen(run: Path, quizzes: "Sequence[Quiz]", screen: Screen) -> None:
    """Refuse questions whose answers a run has seen in its calibration or guard text.

    Raises:
        InputError: naming the text.
    """
    from prunewright.tools.store.rundir import RunDirectory
    from prunewright.tools.texts.windows import ROLES, read_questions

    directory = RunDirectory(run)
    config = directory.locate(directory.config())
    for role in ROLES[:2]:
        for one in config.texts.sources(role):
            try:
                answers = read_questions(one.source, role)
            except InputError as error:
                screen.warn(f"whether the run has seen these questions is not known: {error}")
                continue
            for quiz in quizzes:
                if quiz.answered_by(answers):
                    raise InputError(
                        f"the {role} text {one.source} of {run} answers questions of {quiz.source} "
                        f"that {quiz.task} asks: results are only worth something on others. Give "
                        f"others by --data {quiz.task}=..."
                    )
    if config.pruned is not None and (before := run_of(config.pruned)):
        _check_unseen(before, quizzes, screen)


def _by_task(option: str, values: list[str] | None) -> dict[str, str]:
    """The sources of ``TASK=SOURCE`` options."""
    found = {}
    for value in values or []:
        task, equals, source = value.partition("=")
        if not (task and equals and source):
            raise InputError(f"{option} wants TASK=SOURCE, got {value!r}")
        found[task] = source
    return found


def run_of(name: str) -> Path | None:
    """The run that is named, or whose model is; None for any other model."""
    path = Path(name).expanduser()
    for place in (path, *([path.parent] if path.name == "model" else [])):
        if (place / "config.yaml").is_file():
            return place
    return None


def model_of(name: str) -> str:
    """A run directory stands for the model in it.

    Raises:
        InputError: there is none.
    """
    given = Path(name).expanduser()
    if (given / "model" / "config.json").is_file():
        return str(given / "model")
    if (given / "config.yaml").is_file() and not (given / "config.json").is_file():
        raise InputError(
            f"{name} holds a run that saved no model: it is unfinished (go on with it: prunewright "
            f"resume {name}), or nothing was pruned and the model would be the dense one"
        )
    return name
