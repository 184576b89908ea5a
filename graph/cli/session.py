"""One invocation: where it writes, and how errors and signals become messages and exit codes."""

import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.running.logs import LOGGER
from prunewright.graph.running.stopping import stop_requested
from prunewright.state import InputError, PrunewrightError
from prunewright.state.shown import one_line

_log = logging.getLogger(LOGGER)

DONE, FAILURE, BAD_INPUT, ENDED_EARLY = 0, 1, 2, 3


_MEMORY_ADVICE = (
    "There is not enough memory. What takes less: offload=cpu or disk (one block at a time on the "
    "device), a smaller texts.windows.length (shorter windows), dtype=bfloat16. To `evaluate` they "
    "are given as --offload, --length and --dtype. `prunewright plan` predicts what a run needs"
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

    def repeatable(self) -> None:
        """Say that the same command goes on with what it has begun."""
        self.again = shlex.join(["prunewright", *sys.argv[1:]])

    def resume_command(self) -> str | None:
        """The command that goes on with the run; None if there is nothing to go on with."""
        if self.again is not None:
            return self.again
        if self.run is None or not os.path.isfile(self.run / "config.yaml"):  # noqa: PTH113 - never raises
            return None
        return f"prunewright resume {shlex.quote(str(self.run))}"


class Commands(TyperGroup):
    """Turns every error of a command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command with a session of its own."""
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
            _hint(error)
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError):
                raise
            _failed(session, error, _unforeseen(error), FAILURE)


def _hint(error: Any) -> None:
    """Add to a usage error how a model is named, where one stands by itself."""
    words = str(getattr(error, "message", ""))
    extra = re.match(r"Got unexpected extra argument\S* \(([^\s)]+)", words)
    command = getattr(getattr(error, "ctx", None), "command", None)
    if extra and command and any("--model" in parameter.opts for parameter in command.params):
        error.message = f"{words}. A model is named by -m: -m {extra[1]}"


def quiet_transformers(debug: bool) -> None:
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
    return f"What was done is kept; go on with: {command}" if command else "Nothing was kept."


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
        return f"{_MEMORY_ADVICE}.\n({one_line(text, 300, '...')})"
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"cannot use {error.filename}: {error.strerror}. Give another path, free some space "
            "or mend the permissions"
        )
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
