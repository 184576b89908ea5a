"""Methods x seeds x sparsities on one calibration set and one evaluation, cell by cell.

Each cell is a run directory of its own, named by the content that its result follows from, and is
worked on by a process of its own: its memory is its own, and its crash leaves the others alone.
"""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from prunewright.graph.agents import resolve_agent
from prunewright.graph.running.cell import FORKS, RESULT, Job
from prunewright.graph.running.runner import OnEvent
from prunewright.state import InputError, PruneConfig, PrunewrightError, StoreError
from prunewright.state.study import (
    DENSE_NAME,
    CellResult,
    Comparison,
    ComparisonConfig,
    DenseCell,
    Method,
    Scores,
    load_comparison_config,
    validate_comparison,
)
from prunewright.tools.model.loading import model_skeleton
from prunewright.tools.report.comparison import write_pages, write_tables
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import read_json, sha256_file
from prunewright.tools.study import (
    Digests,
    Planned,
    build_comparison,
    cell_key,
    dense_key,
)

_log = logging.getLogger("prunewright")

CELLS = "cells"
"""Where the cells lie in a comparison's directory."""


def compare(
    config: ComparisonConfig | dict[str, Any] | str | Path,
    out: str | Path,
    on_event: OnEvent | None = None,
    *,
    keep_models: bool = False,
) -> Comparison:
    """Run what is not done yet of a comparison, and write its results.

    Stopped or killed, it goes on when it is called again: cells that are done are not run again,
    a half-done one is resumed. Whatever changes a cell's result (configuration, model, texts,
    version) makes it another cell. A cell that fails is recorded, and tried again next time.

    Args:
        config: a `ComparisonConfig`, its keys as a dict, or the path of a YAML file.
        out: the comparison's directory: ``comparison.json``, ``.md`` and ``.html``, ``plots/``,
            and each cell's run directory in ``cells/``.
        on_event: told of each cell (``cell``: its name, how many there are, its state), and of
            what the one at work does, as `prunewright.graph.run` tells.
        keep_models: leave the pruned models in the directories of cells that are run now.

    Returns:
        What comparison.json holds; look for cells with an ``error``.

    Raises:
        InputError: the configuration, the model or a text cannot be used, an evaluation text
            chooses something, or another process works in the directory.
        StoreError: a result is damaged, or cannot be written.
    """
    if isinstance(config, str | Path):
        settled = load_comparison_config(config)
    else:
        settled = validate_comparison(config) if isinstance(config, dict) else config
    digests = Digests()
    base = settled.settle()
    plan = plan_cells(settled, digests)
    for model, trusted in {
        (c.model, c.trust_remote_code) for c in (base, *(p.config for p in plan))
    }:
        model_skeleton(model, trust_remote_code=trusted)  # refuses what no cell could load
    dense = Planned(
        Method(name=DENSE_NAME), 0, 0.0, base, dense_key(base, settled.evaluation, digests)
    )
    work = _Work(Path(out), settled, plan, dense, on_event, keep_models)
    with work.locked():
        return work.run()


def plan_cells(config: ComparisonConfig, digests: Digests) -> list[Planned]:
    """The cells of a comparison; all methods of one seed and target stand together.

    Raises:
        InputError: the model or a text cannot be used, or an evaluation text chooses something.
    """
    targets = {method.name: config.targets_of(method) for method in config.methods}
    cells = []
    for seed in config.seeds:
        for target in dict.fromkeys(t for own in targets.values() for t in own):
            for method in config.methods:
                if target not in targets[method.name]:
                    continue
                settled = config.settle(method, seed=seed, target=target)
                if settled.agent == "auto":
                    name = resolve_agent(settled.agent).name
                    settled = settled.model_copy(update={"agent": name})
                kind = method.resolved_kind
                files = _agent_files(settled) if kind == "run" else _allocation_files(settled)
                key = cell_key(kind, settled, config.evaluation, digests, files)
                cells.append(Planned(method, seed, target, settled, key))
    return cells


def _agent_files(config: PruneConfig) -> dict[str, str]:
    """Hashes of the files that an agent's decisions follow from; what is missing, a run tells.

    By their names, and a module by its own: where they lie says nothing.
    """
    kind, _, name = config.agent.partition(":")
    paths: list[Path] = []
    if kind == "replay":
        path = Path(name).expanduser()
        paths = [path / "trace.jsonl" if path.is_dir() else path]
    elif kind == "import":
        try:
            found = importlib.util.find_spec(name.rpartition(":")[0])
        except (ImportError, ValueError):
            found = None
        paths = [Path(found.origin)] if found is not None and found.origin else []
    if config.prompts is not None:
        paths += sorted(Path(config.prompts).expanduser().glob("*.md"))
    return {path.name: sha256_file(path) for path in paths if path.is_file()}


def _allocation_files(config: PruneConfig) -> dict[str, str]:
    """As `_agent_files`, of the run that a baseline's allocation is taken from."""
    kind, _, name = config.allocation.partition(":")
    path = RunDirectory(Path(name).expanduser()).trace_file
    return {path.name: sha256_file(path)} if kind == "from" and path.is_file() else {}


class _Work:
    """One call of `compare`."""

    def __init__(
        self,
        directory: Path,
        config: ComparisonConfig,
        plan: list[Planned],
        dense: Planned,
        on_event: OnEvent | None,
        keep_models: bool,
    ) -> None:
        self.directory = directory
        self.config = config
        self.plan = plan
        self.dense = dense
        self.on_event: OnEvent = on_event or (lambda _mode, _event: None)
        self.keep_models = keep_models
        self.worker = _Worker()
        self.errors: dict[str, str] = {}
        self.results: dict[str, CellResult] = {}
        self.dense_scores: Scores | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the directory.

        Raises:
            InputError: another one works there, or it holds something else.
            StoreError: it cannot be written.
        """
        path = self.directory
        known = (path / CELLS).is_dir() or not path.exists()
        if not known and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} holds something else than a comparison: give another --out")
        try:
            (path / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        with RunDirectory(path).locked(), closing(self.worker):
            yield

    def run(self) -> Comparison:
        """Run all cells that are not done."""
        for cell in (self.dense, *self.plan):
            self._read(cell)
        cells = [self.dense, *self.plan]
        for number, cell in enumerate(cells, 1):
            about = {"cell": cell.name, "number": number, "of": len(cells)}
            state = "cached"
            if self._found(cell) is None:
                self.on_event("cell", about | {"state": "running"})
                self._run(cell)
                write_tables(self.comparison(), self.directory)
                state = "failed" if cell.key in self.errors else "done"
            error = self.errors.get(cell.key, "")
            about |= {"state": state, "error": error, "result": self._found(cell)}
            self.on_event("cell", about)
        comparison = self.comparison()
        write_tables(comparison, self.directory)
        try:
            write_pages(comparison, self.directory)
        except PrunewrightError as error:
            _log.warning("The comparison is whole, but without its page and plots: %s", error)
        return comparison

    def comparison(self) -> Comparison:
        """What is known now."""
        key = self.dense.key
        state: Literal["done", "failed", "pending"] = "done"
        if self.dense_scores is None:
            state = "failed" if key in self.errors else "pending"
        dense = DenseCell(
            key=key, state=state, error=self.errors.get(key, ""), scores=self.dense_scores
        )
        return build_comparison(self.config, self.plan, self.results, self.errors, dense)

    def _path(self, cell: Planned) -> Path:
        return self.directory / CELLS / cell.key

    def _found(self, cell: Planned) -> CellResult | Scores | None:
        return self.dense_scores if cell is self.dense else self.results.get(cell.key)

    def _read(self, cell: Planned) -> None:
        """Take over what a cell came to, if it is done.

        Raises:
            StoreError: damaged.
        """
        path = self._path(cell) / RESULT
        if not path.exists():
            return
        try:
            if cell is self.dense:
                self.dense_scores = Scores.model_validate(read_json(path))
            else:
                self.results[cell.key] = CellResult.model_validate(read_json(path))
        except ValidationError as error:
            raise StoreError(f"{path} is damaged: delete {path.parent}: {error}") from error

    def _run(self, cell: Planned) -> None:
        """Run a cell in a process of its own, and take over or record what comes of it."""
        self.errors.pop(cell.key, None)  # a cell of the same content may have failed before
        job = Job(
            kind="dense" if cell is self.dense else cell.method.resolved_kind,
            config=cell.config,
            evaluation=self.config.evaluation,
            directory=self._path(cell),
            log=self._path(cell).with_suffix(".log"),
            keep_model=self.keep_models,
            path=sys.path,
        )
        error = self.worker.do(job, self.on_event)
        if error:
            self.errors[cell.key] = error
            return
        job.log.unlink(missing_ok=True)
        self._read(cell)


class _Worker:
    """The process that does jobs (`prunewright.graph.running.cell`); started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def do(self, job: Job, on_event: OnEvent) -> str:
        """Do a job in a process of its own.

        Args:
            job: what is done.
            on_event: told what it does.

        Returns:
            Why it failed; "" if it did not.

        Raises:
            KeyboardInterrupt: this process was interrupted; the other has stopped, resumably.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prunewright.graph.running.cell"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches it by us alone, and once
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        at_work, error, code = 0, "", None
        try:
            process.stdin.write(job.model_dump_json() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                kind, *parts = json.loads(line)
                if kind == "working":
                    at_work = parts[0]
                elif kind == "event":
                    on_event(parts[0], parts[1])
                elif kind == "failed":
                    error = parts[0]
                elif kind == "ended":
                    code = parts[0]
                    break
        except BaseException:
            if at_work:
                _log.warning(
                    "stopping after the window or layer in hand; press again to stop at once"
                )
                # Not SIGINT: what a shell starts in the background is made to ignore that.
                os.kill(at_work, signal.SIGTERM)
                for line in process.stdout:
                    if json.loads(line)[0] == "ended":
                        break
            raise
        if code is None or not FORKS:
            self.close()
        return error or _end_words(process.returncode if code is None else code, job.log)

    def close(self) -> None:
        """End the process, and at once whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        process.stdout.close()


def _end_words(code: int, log: Path) -> str:
    """Why a process ended that said nothing; "" if it did well."""
    if code == 0:
        return ""
    if code > 0:
        return f"its process ended with exit code {code}; its last words are in {log}"
    name = signal.Signals(-code).name
    memory = " (out of memory?)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}; its last words are in {log}"
