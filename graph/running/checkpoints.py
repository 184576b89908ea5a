"""A run's checkpoints as plain data: what a database holds is never made into an object.

LangGraph's own serializer imports and calls what a checkpoint names, so that a database from
somebody else runs their code. Here each value is a string, a number, a boolean, None, or a list
or a dict of such, and whatever else is found is refused.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.types import Interrupt
from pydantic import TypeAdapter, ValidationError

from prunewright.state import PruneUpdate, StoreError
from prunewright.state.loading import problem_words

_INTERRUPTS = "interrupts"
"""The stored type of what waits for a person: the value and the id of each interrupt."""
_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_UUID
    # An LLM's words may hold lone ones, which no file can.
    | ormsgpack.OPT_REPLACE_SURROGATES
)
_STATE = TypeAdapter(PruneUpdate)
_FOREIGN = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What LangGraph raises for rows of another form than its own."""


class PlainSerializer:
    """Writes and reads the values of checkpoints; plain ones, and LangGraph's interrupts."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """The stored type of a value, and its bytes.

        Raises:
            TypeError: it is not plain.
        """
        if obj is None:
            return "null", b""
        if _are_interrupts(obj):
            return _INTERRUPTS, _pack([[item.value, item.id] for item in obj])
        return "msgpack", _pack(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """The value of what `dumps_typed` gave.

        Raises:
            StoreError: it is anything else.
        """
        kind, content = data
        if kind == "null":
            return None
        try:
            if kind not in ("msgpack", _INTERRUPTS):
                raise ValueError(f"a value of type {str(kind)[:40]!r}")
            # Without a hook every extension type is an error.
            value = ormsgpack.unpackb(content)
            if kind == _INTERRUPTS:
                return [Interrupt(value=value, id=str(name)) for value, name in value]
            return value
        except _FOREIGN as error:
            raise StoreError(
                f"{self._database} is damaged, or not of this version: it holds more than plain "
                f"values ({error}). Nothing of it was run"
            ) from error


def _are_interrupts(obj: object) -> bool:
    return (
        isinstance(obj, Sequence)
        and len(obj) > 0
        and all(isinstance(item, Interrupt) for item in obj)
    )


def _pack(value: Any) -> bytes:
    return ormsgpack.packb(value, default=_plain, option=_OPTIONS)


def _plain(value: object) -> str:
    if isinstance(value, BaseException):  # of a task that failed
        return repr(value)
    raise TypeError(f"a checkpoint holds plain values only, not a {type(value).__name__}")


class _RunSaver(SqliteSaver):
    """Checkpoints of runs, each looked at before anybody uses it."""

    def __init__(self, connection: sqlite3.Connection, database: Path) -> None:
        super().__init__(connection, serde=PlainSerializer(database))
        self._database = database

    def with_allowlist(self, extra_allowlist: object) -> "_RunSaver":
        """Itself: there is nothing that could be allowed."""
        return self

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """As LangGraph's.

        Raises:
            StoreError: it is not a checkpoint of a run.
        """
        try:
            found = super().get_tuple(config)
        except _FOREIGN as error:
            raise self._damaged(error) from error
        return self._checked(found) if found is not None else None

    def list(self, *args: Any, **options: Any) -> Iterator[CheckpointTuple]:
        """As LangGraph's.

        Raises:
            StoreError: one is not a checkpoint of a run.
        """
        try:
            for found in super().list(*args, **options):
                yield self._checked(found)
        except _FOREIGN as error:
            raise self._damaged(error) from error

    def _checked(self, found: CheckpointTuple) -> CheckpointTuple:
        checkpoint: Any = found.checkpoint
        parts = ("channel_values", "channel_versions", "versions_seen")
        metadata: Any = found.metadata
        form = isinstance(checkpoint, dict) and isinstance(metadata, dict)
        form = form and isinstance(metadata.get("step"), int)
        if not form or not all(isinstance(checkpoint.get(part), dict) for part in parts):
            raise self._damaged("it holds something else than checkpoints")
        writes = [{name: value} for _, name, value in found.pending_writes or ()]
        try:
            for values in (checkpoint["channel_values"], *writes):
                own = {k: v for k, v in values.items() if k in PruneUpdate.__annotations__}
                _STATE.validate_python(own, strict=True)
        except ValidationError as error:
            raise self._damaged(problem_words(error, "state", most=3)) from error
        return found

    def _damaged(self, why: object) -> StoreError:
        return StoreError(f"{self._database} is damaged: {why}")


class _ServerSaver(AsyncSqliteSaver):
    def with_allowlist(self, extra_allowlist: object) -> "_ServerSaver":
        """Itself: there is nothing that could be allowed."""
        return self


@contextmanager
def write_checkpoints(database: Path) -> Iterator[SqliteSaver]:
    """A run's checkpoints, to go on with; the file is made if there is none.

    Raises:
        StoreError: damaged, or it holds more than checkpoints; or it cannot be written.
    """
    try:
        with closing(sqlite3.connect(database, check_same_thread=False)) as connection:
            _check_schema(connection, database)
            yield _RunSaver(connection, database)
    except sqlite3.Error as error:
        raise StoreError(
            f"cannot write {database}: {error}. Nothing recorded so far is lost: free some space "
            "if the disk is full, then resume the run"
        ) from error


@contextmanager
def read_checkpoints(database: Path) -> Iterator[SqliteSaver]:
    """A run's checkpoints, to read only; another process may be writing them.

    Raises:
        StoreError: missing or damaged, when it is opened or while it is read.
    """
    path = database.resolve()
    # Without a log nobody writes, and a reader that says so leaves no files of its own behind.
    still = not path.with_name(f"{path.name}-wal").exists()
    uri = f"{path.as_uri()}?mode=ro{'&immutable=1' if still else ''}"
    try:
        with closing(sqlite3.connect(uri, uri=True, check_same_thread=False)) as connection:
            _check_schema(connection, database)
            saver = _RunSaver(connection, database)
            saver.is_setup = True  # nothing is written
            yield saver
    except sqlite3.Error as error:
        raise StoreError(f"{database} cannot be read: {error}") from error


@asynccontextmanager
async def serve_checkpoints(database: Path) -> AsyncIterator[AsyncSqliteSaver]:
    """The checkpoints of LangGraph's server.

    Raises:
        StoreError: damaged, or it holds more than checkpoints.
    """

    def check() -> None:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database)) as connection:
            _check_schema(connection, database)

    await asyncio.to_thread(check)
    async with _ServerSaver.from_conn_string(str(database)) as saver:
        saver.serde = PlainSerializer(database)
        yield saver


def _check_schema(connection: sqlite3.Connection, database: Path) -> None:
    """Refuse views, triggers and foreign tables: SQL of somebody else's that would be executed."""
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        rows = connection.execute("SELECT type, name, tbl_name FROM sqlite_schema").fetchall()
    except sqlite3.Error as error:
        raise StoreError(f"{database} cannot be read: {error}") from error
    for kind, name, table in rows:
        if kind not in ("table", "index") or table not in ("checkpoints", "writes"):
            raise StoreError(f"{database} is damaged: its {kind} {name[:40]!r} is not of a run")
