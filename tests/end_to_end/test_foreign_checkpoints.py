"""A run directory from somebody else: nothing of its database is run, whoever opens it."""

import asyncio
import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from prunewright.graph import build_graph, fork, resume, run
from prunewright.graph.running.checkpoints import write_checkpoints
from prunewright.graph.running.preview import preview
from prunewright.graph.running.runner import collect_garbage
from prunewright.graph.running.studio import DATABASE_VARIABLE, checkpointer
from prunewright.state import StoreError
from prunewright.tools.store.rundir import RunDirectory

MARK = "payload-ran"


def command(directory: Path) -> str:
    return f"touch '{directory / MARK}'"


class Pickled:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


def extension(code: int, *parts: Any) -> Callable[[str], tuple[str, bytes]]:
    def make(command: str) -> tuple[str, bytes]:
        named = [command if part is None else [command] if part == [] else part for part in parts]
        inner = ormsgpack.Ext(code, ormsgpack.packb(named))
        return "msgpack", ormsgpack.packb({"channel_values": {"step": [inner]}})

    return make


PAYLOADS: dict[str, Callable[[str], tuple[str, bytes]]] = {
    "one argument": extension(0, "os", "system", None),
    "arguments": extension(1, "os", "system", []),
    "a method": extension(3, "os", "system", None, "__call__"),
    "keywords": extension(2, "langgraph.types", "Interrupt", {"value": 1, "id": "x"}),
    "pydantic": extension(5, "os", "system", None, "model_validate_json"),
    "an unknown code": extension(99, "os", "system", None),
    "json": lambda command: (
        "json",
        json.dumps(
            {"lc": 2, "type": "constructor", "id": ["os", "system"], "args": [command]}
        ).encode(),
    ),
    "pickle": lambda command: ("pickle", pickle.dumps(Pickled(command))),
    "deep": lambda _: ("msgpack", b"\x91" * 5000 + b"\xc0"),
    "another type": lambda _: ("msgpack", ormsgpack.packb([1, 2])),
}


@pytest.fixture(scope="module")
def finished(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("foreign") / "run"
    windows = {"calibration": 2, "gradient": 1, "guard": 2, "test": 1, "length": 16}
    config = {"model": str(pico_models()), "dtype": "float32", "device": "cpu", "agent": "greedy"}
    run(config | {"target": 0.2, "step": 0.1, "texts": {"windows": windows}}, out=out)
    return out


@pytest.fixture
def foreign(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def execute(out: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    with closing(sqlite3.connect(out / "state.sqlite")) as connection, connection:
        for statement, values in statements:
            connection.execute(statement, values)


def serve(out: Path) -> None:
    """What LangGraph's server reads of a thread."""

    async def read() -> None:
        async with checkpointer() as saver:
            thread = {"configurable": {"thread_id": RunDirectory(out).thread()}}
            await saver.aget_tuple(thread)  # type: ignore[arg-type]
            async for _ in saver.alist(None):
                pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE_VARIABLE, str(out / "state.sqlite"))
        asyncio.run(read())


OPENERS: dict[str, Callable[[Path], object]] = {
    "resume": resume,
    "fork": lambda out: fork(out, 1, out=out.with_name("forked")),
    "gc": collect_garbage,
    "ask": lambda out: preview(RunDirectory(out)),
    "studio": serve,
}


def test_the_payloads_are_live(tmp_path: Path) -> None:
    unsafe = JsonPlusSerializer(pickle_fallback=True, allowed_msgpack_modules=True)
    for name in ("one argument", "arguments", "pickle"):
        unsafe.loads_typed(PAYLOADS[name](command(tmp_path)))
        (tmp_path / MARK).unlink()


@pytest.mark.parametrize("where", ["checkpoints", "writes"])
@pytest.mark.parametrize("opener", OPENERS)
def test_nothing_of_a_database_is_run(opener: str, where: str, foreign: Path) -> None:
    for name, make in PAYLOADS.items():
        if name == "another type" and opener == "studio":
            continue  # the server shows what it holds
        kind, content = make(command(foreign))
        put = (
            ("UPDATE checkpoints SET type = ?, checkpoint = ?", (kind, content))
            if where == "checkpoints"
            else (
                "INSERT OR REPLACE INTO writes (thread_id, checkpoint_ns, checkpoint_id, "
                "task_id, idx, channel, type, value) SELECT thread_id, checkpoint_ns, "
                "checkpoint_id, 't', 0, 'step', ?, ? FROM checkpoints",
                (kind, content),
            )
        )
        execute(foreign, put)
        with pytest.raises(StoreError, match=r"state\.sqlite is damaged"):
            OPENERS[opener](foreign)
        assert not (foreign / MARK).exists(), name
        assert not foreign.with_name("forked").exists()


@pytest.mark.parametrize("opener", OPENERS)
def test_sql_in_a_database_is_refused(opener: str, foreign: Path) -> None:
    trigger = "CREATE TRIGGER t AFTER INSERT ON writes BEGIN DELETE FROM checkpoints; END"
    execute(foreign, (trigger, ()))
    with pytest.raises(StoreError, match=r"its trigger 't' is not of a run"):
        OPENERS[opener](foreign)


@pytest.mark.parametrize("opener", ["resume", "fork", "ask"])
@pytest.mark.parametrize(
    "column",
    [b"[" * 100_000, b"[1]", b"", b"\xff", b'{"a": 1}', None],
    ids=["deep", "list", "empty", "bytes", "other", "null"],
)
def test_metadata_of_another_form_is_refused(
    opener: str, column: bytes | None, foreign: Path
) -> None:
    execute(foreign, ("UPDATE checkpoints SET metadata = ?", (column,)))
    with pytest.raises(StoreError, match=r"state\.sqlite is damaged"):
        OPENERS[opener](foreign)


def test_a_checkpoint_does_not_choose_the_model_or_let_its_code_run(foreign: Path) -> None:
    directory = RunDirectory(foreign)
    thread = {"configurable": {"thread_id": directory.thread()}}
    (foreign / "metrics.json").unlink()
    with write_checkpoints(directory.database) as saver:
        request = build_graph(saver).get_state(thread).values["request"]  # type: ignore[arg-type]
        changed = request | {"model": str(foreign / "evil"), "trust_remote_code": True}
        values = {"request": changed, "status": "running", "result": None}
        build_graph(saver).update_state(thread, values, as_node="reflect")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"trust_remote_code was False, is True"):
        resume(foreign)


def test_what_a_database_of_plain_values_holds_is_read(foreign: Path) -> None:
    with closing(sqlite3.connect(foreign / "state.sqlite")) as connection:
        for kind, content in connection.execute("SELECT type, checkpoint FROM checkpoints"):
            plain = JsonPlusSerializer(allowed_msgpack_modules=()).loads_typed((kind, content))
            assert plain["channel_values"]
    assert resume(foreign).metrics.status == "target_reached"
    assert collect_garbage(foreign) == (0, 0)
    serve(foreign)
