"""Watching a run from its files; run directories of other versions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunewright.graph import fork, resume
from prunewright.graph.cli import app
from prunewright.graph.running.watch import follow
from prunewright.state import (
    InputError,
)
from prunewright.tools.store.rundir import RunDirectory

Submit = Callable[[dict[str, Any]], dict[str, Any]]


def unsealed(line: str) -> dict[str, Any]:
    step: dict[str, Any] = json.loads(line)
    del step["seal"]
    return step


def trace(path: Path) -> list[dict[str, Any]]:
    return [unsealed(line) for line in (path / "trace.jsonl").read_text().splitlines()]


@pytest.fixture
def stopped(
    reference_config: dict[str, Any], submit: Submit, config: dict[str, Any], tmp_path: Path
) -> Path:
    """A run that died in its third step, before its decision."""
    assert config["agent"] == "greedy"  # the fixture makes the agents of the tests importable
    out = tmp_path / "run"
    kill = {"at": "prunewright.graph.nodes.decide:ask", "when": "before", "nth": 3}
    submit({"do": "run", "config": reference_config, "out": str(out), "kill": kill})
    return out


def test_a_run_is_followed_from_another_process_until_it_ends(stopped: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "prunewright.graph.cli", "watch", str(stopped), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        lines = (json.loads(line) for line in watching.stdout)
        first = list(islice(lines, 3))
        assert [event["step"]["verdict"] for event in first[:2]] == ["accepted", "rolled_back"]
        assert first[2] == {"process": None}  # whoever had the run was killed
        resume(stopped)
        rest = list(lines)
        words = watching.stderr.read()
        assert watching.wait() == 0
    # Whether it saw this process at work depends on how long that took.
    steps = [event["step"] for event in [*first, *rest] if "step" in event]
    assert steps == trace(stopped)
    assert {event["process"] for event in rest if "process" in event} <= {os.getpid(), None}
    metrics = json.loads((stopped / "metrics.json").read_text())
    assert rest[-1].items() >= metrics.items()
    assert rest[-1]["exit_code"] == 0
    assert f"nobody works on it; go on with: prunewright resume {stopped}" in words
    assert "step   2  rolled back" in words


def test_ctrl_c_ends_the_watching_and_nothing_else(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([None, None])

    def sleep(_: float) -> None:
        if next(looks, "pressed") == "pressed":
            raise KeyboardInterrupt

    monkeypatch.setattr("prunewright.graph.running.watch.time.sleep", sleep)
    directory = RunDirectory(stopped)
    assert directory.holder() is None  # the file that a killed process left says nothing
    with directory.locked():
        result = CliRunner().invoke(app, ["watch", str(stopped)])
        assert directory.holder() == os.getpid()
    assert result.exit_code == 128 + signal.SIGINT
    assert f"process {os.getpid()}" in result.stdout
    assert "step   2  rolled back" in result.stdout
    assert "the run is left as it is" in result.stderr


def events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return follow(RunDirectory(path), poll=0.01)


def test_a_step_that_was_taken_again_is_told_again(reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    metrics = (out / "metrics.json").rename(tmp_path / "metrics.json")
    lines = (out / "trace.jsonl").read_text().splitlines(keepends=True)
    (out / "trace.jsonl").write_text("".join(lines[:2]))
    seen = events(out)

    def steps(count: int) -> list[dict[str, Any]]:
        """The next steps; nothing else that is told meanwhile."""
        told = (event["step"] for mode, event in seen if mode == "custom" and "step" in event)
        return list(islice(told, count))

    assert steps(2) == [unsealed(line) for line in lines[:2]]
    # Somebody went back in time: the second step is another one.
    (out / "trace.jsonl").write_text("".join(lines[:3]))
    first, second, third = RunDirectory(out).read_trace()
    other = second.model_copy(update={"reason": "another"})
    RunDirectory(out).write_trace([first, other, third])
    assert steps(2) == trace(out)[1:]
    metrics.rename(out / "metrics.json")
    assert [mode for mode, event in seen if "metrics" in event] == ["custom"]


def test_only_a_run_can_be_watched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        next(events(tmp_path))


def test_a_run_of_a_newer_version_is_refused(reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    facts = json.loads((out / "manifest.json").read_text())
    facts["versions"]["prunewright"] = "99.1"
    (out / "manifest.json").write_text(json.dumps(facts))
    with (out / "config.yaml").open("a") as file:
        file.write("a_key_of_the_future: 1\n")
    acts: list[Callable[[], Any]] = [
        lambda: resume(out),
        lambda: fork(out, 1, out=tmp_path / "fork"),
        lambda: next(events(out)),
    ]
    for act in acts:
        with pytest.raises(InputError, match=r"made by prunewright 99\.1, and this is .*upgrade"):
            act()
    assert not (tmp_path / "fork").exists()
