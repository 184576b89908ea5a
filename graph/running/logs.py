"""Logs for whoever operates runs: what the logger ``prunewright`` says, and how it is written.

As a library Prunewright only speaks; where it is heard is the application's to say. The command
line sets up a handler of its own.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

from prunewright.state.shown import clean

Level = Literal["debug", "info", "warning", "error"]
LOGGER = "prunewright"

# LangGraph hands the caller's context variables on to the threads of the nodes.
_fields: ContextVar[dict[str, Any] | None] = ContextVar("prunewright_log_fields", default=None)


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Inside the block each record carries these as attributes, such as run, step and node."""
    token = _fields.set({**(_fields.get() or {}), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def _add_fields(record: logging.LogRecord) -> bool:
    for name, value in (_fields.get() or {}).items():
        record.__dict__.setdefault(name, value)
    return True


logging.getLogger(LOGGER).addFilter(_add_fields)


def log_progress(label: str, done: int, total: int) -> None:
    """Log how far the work is, for whoever debugs it or drives it from another process."""
    told = {"label": label, "done": done, "total": total}
    logging.getLogger(LOGGER).debug("%s: %d of %d", label, done, total, extra=told)


class _TextFormatter(logging.Formatter):
    """One line a record; control characters, which a model or an LLM may bring, written out."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = clean(record.message).replace("\n", "\\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, and the lines of its error."""
        return clean(super().format(record))


class _JsonFormatter(JsonFormatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, and the fields."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        names = {"asctime": "time", "levelname": "level", "name": "logger", "message": "message"}
        renamed = names | {"exc_info": "exception"}
        super().__init__(list(names), rename_fields=renamed, json_default=str)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """The record's object, its level as it is given to ``--log-level``."""
        return log_data | {"level": log_data["level"].lower()}


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard error; on a terminal above the progress bar, which stands in for it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._shared = self.stream.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line."""
        if self._shared:
            self.stream = sys.stderr
        super().emit(record)


@contextmanager
def logging_to_stderr(level: Level | None, *, as_json: bool, libraries: int) -> Iterator[None]:
    """Inside the block, what is logged goes to standard error.

    Args:
        level: the least that Prunewright says; None for warnings, as bare
            messages.
        as_json: write JSON lines.
        libraries: the least, as a number, that other libraries say.
    """
    handler, root = _Handler(), logging.getLogger()
    stamped = "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(
        _JsonFormatter() if as_json else _TextFormatter(stamped if level else "%(message)s")
    )
    root.setLevel(libraries)
    logging.getLogger(LOGGER).setLevel((level or "warning").upper())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
