"""What killed processes leave is taken away by the next command; links lead nowhere."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import baseline, resume
from prunewright.graph.running.runner import collect_garbage
from prunewright.state import InputError, StoreError
from prunewright.tools.report import write_report
from prunewright.tools.store.packing import pack_model

DEAD, ALIVE, OLD = (f".writing-{prefix}{uuid.uuid4().hex}" for prefix in ("", "1-", ""))
OTHERS = f".writing-{os.getpid()}-{uuid.uuid4().hex}", ".writing-draft", "notes.txt"


@pytest.fixture(scope="module")
def config(pico_models: Callable[..., Path]) -> dict[str, Any]:
    windows = {"calibration": 1, "gradient": 1, "guard": 2, "test": 1, "length": 16}
    model = {"model": str(pico_models()), "dtype": "float32", "device": "cpu"}
    return model | {"target": 0.2, "texts": {"windows": windows}}


@pytest.fixture(scope="module")
def done(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline that took a directory in which another was killed before it began."""
    out = tmp_path_factory.mktemp("done") / "run"
    out.mkdir()
    for name in (DEAD, OLD, ".lock", ".lock-holder"):
        (out / name).write_bytes(b"")
    baseline(config, out=out)
    assert not any(p.name.startswith(".writing-") for p in out.iterdir())
    return out


def test_a_directory_that_holds_anything_else_is_not_taken(
    config: dict[str, Any], tmp_path: Path
) -> None:
    for name in (".writing-draft", "notes.txt"):
        out = tmp_path / name.strip(".")
        out.mkdir()
        (out / name).write_bytes(b"mine")
        with pytest.raises(InputError, match="exists and is not empty"):
            baseline(config, out=out)
        assert [p.name for p in out.iterdir()] == [name]


def test_a_process_that_has_the_number_of_a_killed_one_does_not_keep_its_files(
    done: Path, tmp_path: Path
) -> None:
    """In a container each process may be the first one."""
    name = f".writing-{os.getpid()}-{uuid.uuid4().hex}"
    for place, wanted in (("before", []), ("now", [name])):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_bytes(b"half")
        if place == "before":
            os.utime(tmp_path / place / name, (0, 0))
        write_report([done], tmp_path / place / "page.html")
        assert [p.name for p in (tmp_path / place).glob(".writing-*")] == wanted


def test_report_and_pack_take_away_what_was_left_beside_their_output(
    done: Path, tmp_path: Path
) -> None:
    acts: dict[str, Callable[[Path], object]] = {
        "report": lambda place: write_report([done], place / "page.html"),
        "pack": lambda place: pack_model(done / "model", place / "archive"),
    }
    for name, act in acts.items():
        place = tmp_path / name
        (place / DEAD).mkdir(parents=True)
        (place / DEAD / "part").write_bytes(b"half")
        for other in (ALIVE, *OTHERS):
            (place / other).write_bytes(b"")
        act(place)
        left = {p.name for p in place.iterdir() if p.stat().st_size == 0}
        assert left == {ALIVE, *OTHERS}
        assert not (place / DEAD).exists()


@pytest.mark.parametrize("name", ["revisions", "revisions/masks", "steps", ".lock", "config.yaml"])
@pytest.mark.parametrize("act", [resume, collect_garbage])
def test_a_link_out_of_a_run_is_refused(
    act: Callable[[Path], object], name: str, done: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "run"))
    (out / "metrics.json").unlink()
    mine = tmp_path / "mine"
    (out / name).rename(mine)
    if mine.is_dir():
        (mine / "letter").write_bytes(b"dear")
    before = sorted(mine.rglob("*")), mine.is_file() and mine.read_bytes()
    (out / name).symlink_to(mine)
    with pytest.raises(StoreError, match="is a link"):
        act(out)
    assert (sorted(mine.rglob("*")), mine.is_file() and mine.read_bytes()) == before
