"""The processes of a comparison's cells: ``python -m prunewright.graph.running.cell``.

It reads a `Job` from each line of standard input and does it in a process of its own, so that its
memory is its own and its crash is nobody else's. It writes JSON lines to standard output:
``["working", process]``, ``["event", mode, event]`` while that works, ``["failed", message]`` if
it does, and ``["ended", exit code]``. What was found stands in the cell's directory. All end at
once when standard input closes: nobody is left at work when the comparison is killed.
"""

import json
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prunewright.graph.running import runner
from prunewright.state import PruneConfig, PrunewrightError, StoreError
from prunewright.state.study import EvaluationOptions
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.saving.model import try_saving
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import write_json
from prunewright.tools.study import cell_result, score_model

RESULT = "cell.json"
"""What the cell came to: written last, so that a cell that has it is done."""

FORKS = sys.platform == "linux"
"""Whether cells are forked from the process that has imported everything, and computed nothing.

Elsewhere a fork is not safe once torch is imported: that process does one job itself, and ends.
"""


class Job(BaseModel):
    """What one process does.

    Attributes:
        kind: a run, a baseline, or the scores of the unpruned model.
        config: the cell's configuration.
        evaluation: what the model is scored on.
        directory: the cell's own; a run that was begun there is gone on with.
        log: where its standard output and error go.
        keep_model: leave the pruned model there.
        path: where Python looks for the user's own agents.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["run", "baseline", "dense"]
    config: PruneConfig
    evaluation: EvaluationOptions
    directory: Path
    log: Path
    keep_model: bool
    path: list[str]


def work(job: Job, on_event: runner.OnEvent) -> None:
    """Run the cell, or go on with it, score its model and write its result.

    Raises:
        PrunewrightError: as `runner.run`, `runner.resume` and `score_model`.
    """

    def progress(label: str, done: int, total: int) -> None:
        on_event("custom", {"progress": {"label": label, "done": done, "total": total}})

    config = job.config
    model, dtype = config.model, str(config.dtype)
    metrics = pruned = None
    if job.kind == "dense":
        _try_saving(job)
    else:
        result = _prune(job, on_event)
        metrics = result.metrics
        pruned = result.model_directory
        if pruned is not None:  # else what the run came to is the dense model
            if not pruned.is_dir():
                raise StoreError(
                    f"{pruned} is gone, and was not scored yet: delete {job.directory} and "
                    "compare again"
                )
            model, dtype = str(pruned), RunDirectory(job.directory).manifest()["dtype"]
    on_event("custom", {"progress": {"label": "scoring", "done": 0, "total": 1}})
    scores = score_model(
        model,
        job.evaluation,
        dtype=dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    found = scores if metrics is None else cell_result(metrics, scores)
    write_json(job.directory / RESULT, found.model_dump(mode="json"))
    if pruned is not None and not job.keep_model:
        shutil.rmtree(pruned)


def _try_saving(job: Job) -> None:
    """Find out before anything is scored whether the other cells' models could be saved."""
    bench = Workbench(job.config.request)
    try:
        try_saving(RunDirectory(job.directory), bench, revisions=1)
    finally:
        bench.loaded.close()


def _prune(job: Job, on_event: runner.OnEvent) -> runner.RunResult:
    directory = RunDirectory(job.directory)
    if directory.config_file.is_file():
        return runner.resume(directory.path, on_event)
    # Killed before it had begun: nothing is there but the rest of an unfinished write.
    shutil.rmtree(directory.path, ignore_errors=True)
    act = runner.run if job.kind == "run" else runner.baseline
    return act(job.config, directory.path, on_event)


def main() -> None:
    """The entry point."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def send(*parts: Any) -> None:
        lines.write(json.dumps(parts, default=str) + "\n")
        lines.flush()

    while line := sys.stdin.readline():
        job = Job.model_validate_json(line)
        if not FORKS:
            send("ended", _do(job, send))
            return
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _do(job, send)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        send("ended", os.waitstatus_to_exitcode(status))


def _do(job: Job, send: Callable[..., None]) -> int:
    """Do a job and say what came of it; the process's exit code."""
    # Whatever libraries print goes to the log.
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.captureWarnings(True)
    sys.path[:] = job.path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send("working", os.getpid())

    def on_event(mode: str, event: dict[str, Any]) -> None:
        # A node's update can be large, and only its name is shown.
        send("event", mode, dict.fromkeys(event) if mode == "updates" else event)

    try:
        work(job, on_event)
    except KeyboardInterrupt:
        send("failed", "interrupted")
        return 130
    except Exception as error:
        traceback.print_exc()
        foreseen = isinstance(error, PrunewrightError)
        send("failed", str(error) if foreseen else f"{type(error).__name__}: {error}")
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)  # all that is recorded is written atomically


if __name__ == "__main__":
    main()
