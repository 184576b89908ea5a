"""gc: what no checkpoint refers to goes, what a run needs stays; one process at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import baseline, resume
from prunewright.graph.running.runner import collect_garbage
from prunewright.state import InputError, StoreError
from prunewright.tools.store.rundir import RunDirectory

Submit = Callable[[dict[str, Any]], dict[str, Any]]


def test_what_a_killed_step_left_goes_and_the_run_ends_as_if_unharmed(
    reference: Path,
    reference_config: dict[str, Any],
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    kill = {"at": "prunewright.tools.store.revisions:canonical_json", "when": "before", "nth": 3}
    job = {"do": "run", "config": reference_config, "out": str(out), "kill": kill}
    assert submit(job) == {"signal": signal.SIGKILL}
    masks = out / "revisions" / "masks"
    (masks / ".writing-0123").write_bytes(b"half a mask")
    before = {path.name for path in masks.iterdir()}
    files, size = collect_garbage(out)
    left = {path.name for path in masks.iterdir()}
    assert files >= 1
    assert size >= len(b"half a mask")
    assert left < before
    assert ".writing-0123" not in left
    assert "error" not in submit({"do": "resume", "out": str(out)})
    same_run(out, reference)


def test_blocks_that_a_stopped_solve_had_done_are_kept(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    config = pico_config | {"reconstruct": "block"}
    labels: list[str] = []

    def stop(_: str, event: dict[str, Any]) -> None:
        labels.append(event.get("progress", {}).get("label", ""))
        if labels[-1] == "solving block 2 of 2: fit, step":
            os.kill(os.getpid(), signal.SIGINT)

    whole = baseline(config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        baseline(config, out=tmp_path / "run", on_event=stop)
    assert "solving block 1 of 2: fit, step" in labels
    collect_garbage(tmp_path / "run")
    labels.clear()
    found = resume(
        tmp_path / "run",
        on_event=lambda _, event: labels.append(event.get("progress", {}).get("label", "")),
    )
    assert found.metrics.revision == whole.metrics.revision
    assert "solving block 2 of 2: fit, step" in labels
    assert "solving block 1 of 2: fit, step" not in labels


def test_a_finished_run_keeps_all_that_its_checkpoints_name(reference: Path) -> None:
    kept = sorted(path for path in (reference / "revisions").glob("*/*"))
    stray = reference / "revisions" / "masks" / ("0" * 64)
    stray.write_bytes(b"unnamed")
    assert collect_garbage(reference) == (1, len(b"unnamed"))
    assert sorted(path for path in (reference / "revisions").glob("*/*")) == kept


def test_nothing_goes_where_something_is_missing(
    reference_config: dict[str, Any], submit: Submit, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert "error" not in submit({"do": "run", "config": reference_config, "out": str(out)})
    revision = RunDirectory(out).read_trace()[0].revision
    (out / "revisions" / "manifests" / f"{revision}.json").unlink()
    (out / "revisions" / "masks" / ("0" * 64)).write_bytes(b"unnamed")
    before = sorted((out / "revisions").rglob("*"))
    with pytest.raises(StoreError, match=revision):
        collect_garbage(out)
    assert sorted((out / "revisions").rglob("*")) == before


def test_a_second_process_is_refused_and_told_who_holds_the_run(reference: Path) -> None:
    hold = (
        "import sys; from prunewright.tools.store.rundir import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(reference)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for act in (resume, collect_garbage):
            with pytest.raises(InputError, match=rf"process \(id {holder.pid}\)"):
                act(reference)
        holder.kill()  # the lock dies with its process
        holder.wait()
        assert collect_garbage(reference) == (0, 0)
