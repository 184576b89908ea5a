"""A write that is refused, whichever it is, has its words, and nothing recorded is lost."""

import errno
import os
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from quick import quick_config

from prunewright.graph import baseline, fork, resume, run
from prunewright.graph.running.runner import collect_garbage
from prunewright.state import StoreError
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

Act = Callable[[Path], object]


class Writes:
    """Counts what this process writes below a directory, and refuses one of it."""

    def __init__(self) -> None:
        self.below: Path | None = None
        self.seen = self.refused = 0
        self.number = errno.ENOSPC

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.below is None:
            return
        if event == "open":
            path = args[0] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        elif event in ("os.rename", "os.link", "shutil.copyfile"):
            path = args[1]
        else:
            path = args[0] if event in ("os.remove", "os.mkdir") else None
        name = str(path)
        # Who holds a lock is told at its end, too, where nothing can be done any more.
        if not name.startswith(str(self.below)) or name.endswith(".lock-holder"):
            return
        if event == "os.mkdir" and Path(name).is_dir():
            return
        self.seen += 1
        if self.seen == self.refused:
            raise OSError(self.number, os.strerror(self.number), name)


WRITES = Writes()
sys.addaudithook(WRITES.hear)


@pytest.fixture
def refuse() -> Iterator[Callable[[Path, int, int], Writes]]:
    def start(below: Path, nth: int, number: int) -> Writes:
        WRITES.below, WRITES.seen, WRITES.refused, WRITES.number = below, 0, nth, number
        return WRITES

    yield start
    WRITES.below = None


@pytest.fixture(scope="module")
def config(pico_models: Callable[..., Path]) -> dict[str, Any]:
    return quick_config(pico_models())


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(config, out=out)
    return out


@pytest.mark.parametrize("kind", ["run", "baseline", "fork", "gc"])
def test_every_refused_write_has_its_words(
    kind: str,
    config: dict[str, Any],
    finished: Path,
    refuse: Callable[[Path, int, int], Writes],
    tmp_path: Path,
) -> None:
    acts: dict[str, Act] = {
        "run": lambda out: run(config, out=out),
        "baseline": lambda out: baseline(config, out=out),
        "fork": lambda out: fork(finished, 1, out=out),
        "gc": collect_garbage,
    }

    def act(number: int, nth: int, refusal: int) -> int:
        place = tmp_path / str(number)
        place.mkdir()
        if kind == "gc":
            shutil.copytree(finished, place / "run")
            (place / "run" / "revisions" / "masks" / ("0" * 64)).write_bytes(b"unused")
        writes = refuse(place, nth, refusal)
        try:
            acts[kind](place / "run")
        finally:
            writes.below = None
        return writes.seen

    count = act(0, 0, errno.ENOSPC)
    drawn = random.Random(kind).sample(range(1, count + 1), min(count, 6))
    for number, nth in enumerate(drawn, 1):
        refusal = (errno.ENOSPC, errno.EACCES, errno.EMFILE)[number % 3]
        out = tmp_path / str(number) / "run"
        words = None
        try:
            act(number, nth, refusal)
        except StoreError as error:
            words = str(error)
        assert words is None or os.strerror(refusal) in words
        if words is not None and (out / "config.yaml").exists():
            assert resume(out).metrics.sparsity == pytest.approx(0.2, abs=0.001)
    assert load_metrics(RunDirectory(finished)).status == "target_reached"


def test_a_database_that_cannot_be_written_while_a_fork_is_made(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(SqliteSaver, "put", full)
    with pytest.raises(StoreError, match=r"state\.sqlite: database or disk is full.*free some"):
        fork(finished, 1, out=tmp_path / "fork")
    assert list(tmp_path.iterdir()) == []
