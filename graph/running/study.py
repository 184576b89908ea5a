"""Methods x seeds x sparsities on one calibration set and one evaluation.

Each experiment is a run directory, named by the content that its result follows from. It is made by
the command line in processes of its own: `run`, `baseline` or `resume`, then `evaluate`. So its
memory is its own, its crash leaves the others alone, and anyone can go on with it by hand.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prunewright.graph import agents
from prunewright.graph.agents import resolve_agent
from prunewright.graph.running.drive import OnEvent
from prunewright.state import InputError, PruneConfig, PrunewrightError, StoreError
from prunewright.state.study import (
    DENSE_NAME,
    Comparison,
    ComparisonConfig,
    DenseExperiment,
    ExperimentResult,
    ExperimentState,
    Method,
    Scores,
    load_comparison_config,
    validate_comparison,
)
from prunewright.tools import allocation, criteria, signals
from prunewright.tools.model.loading import model_skeleton
from prunewright.tools.report.tables import write_tables
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import put_into_words, sha256_file, write_atomic
from prunewright.tools.store.trace import load_metrics
from prunewright.tools.study import (
    Digests,
    Planned,
    build_comparison,
    dense_key,
    experiment_key,
    experiment_result,
    read_scores,
)

_log = logging.getLogger("prunewright")

EXPERIMENTS = "experiments"
"""Where the experiments lie in a comparison's directory."""
EVALUATION = "evaluation"
"""Where an experiment's scores lie in its directory; and, as YAML, what all are scored on."""

_GOOD_CODES = (0, 3)
"""Exit codes of commands that have done what they were asked to; 3: ended before the target."""


def compare(
    config: ComparisonConfig | dict[str, Any] | str | Path,
    out: str | Path,
    on_event: OnEvent | None = None,
    *,
    keep_models: bool = False,
) -> Comparison:
    """Run what is not done yet of a comparison, and write its results.

    Stopped or killed, it goes on when it is called again: an experiment that is done is not run
    again, a half-done one is resumed. Whatever changes a result (configuration, model, texts,
    version) makes it another experiment. One that fails is recorded, and tried again next time.

    Args:
        config: a `ComparisonConfig`, its keys as a dict, or the path of a YAML file.
        out: the comparison's directory: ``comparison.json``, ``.md`` and ``.html``, ``plots/``,
            and each experiment's run directory in ``experiments/``.
        on_event: told of each experiment (``experiment``: its name, how many there are, its
            state), and of how far the one at work is (``custom``: progress).
        keep_models: leave the pruned models in the directories of experiments that are run now.

    Returns:
        What comparison.json holds; look for experiments with an ``error``.

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
    plan = plan_experiments(settled, digests)
    for model, trusted in {
        (c.model, c.trust_remote_code) for c in (base, *(p.config for p in plan))
    }:
        model_skeleton(model, trust_remote_code=trusted)  # refuses what no experiment could load
    dense = Planned(
        Method(name=DENSE_NAME), 0, 0.0, base, dense_key(base, settled.evaluation, digests)
    )
    work = _Work(Path(out), settled, plan, dense, on_event, keep_models)
    with work.locked():
        return work.run()


def plan_experiments(config: ComparisonConfig, digests: Digests) -> list[Planned]:
    """The experiments of a comparison; all methods of one seed and target are together.

    Raises:
        InputError: the model or a text cannot be used, or an evaluation text chooses something.
    """
    targets = {method.name: config.targets_of(method) for method in config.methods}
    experiments = []
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
                criteria.find_criterion(settled.criterion)  # none could run with an unknown one
                files = _experiment_files(settled, kind)
                key = experiment_key(kind, settled, config.evaluation, digests, files)
                experiments.append(Planned(method, seed, target, settled, key))
    return experiments


def _experiment_files(config: PruneConfig, kind: str) -> dict[str, str]:
    """Hashes of the files that an experiment follows from; what is missing, a run tells.

    By their names, and code from outside by what it is: where they lie says nothing.
    """
    code = {"criterion": criteria.REGISTRY.source(config.criterion)}
    paths: list[Path | None] = []
    if kind == "run":
        code |= {f"signal {name}": signals.REGISTRY.source(name) for name in config.signals}
        paths = [agents.REGISTRY.source(config.agent)]
        if config.agent.startswith("replay:"):
            path = Path(config.agent.removeprefix("replay:")).expanduser()
            paths = [path / "trace.jsonl" if path.is_dir() else path]
        if config.prompts is not None:
            paths += sorted(Path(config.prompts).expanduser().glob("*.md"))
    elif config.one_shot.startswith(allocation.FROM_RUN):
        path = Path(config.one_shot.removeprefix(allocation.FROM_RUN)).expanduser()
        paths = [RunDirectory(path).trace_file]
    else:
        code["allocation"] = allocation.REGISTRY.source(config.one_shot)
    found = [*code.items(), *((path.name, path) for path in paths if path is not None)]
    return {name: sha256_file(path) for name, path in found if path and path.is_file()}


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
        self.errors: dict[str, str] = {}
        self.results: dict[str, ExperimentResult] = {}
        self.dense_scores: Scores | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the directory.

        Raises:
            InputError: another one works there, or it holds something else.
            StoreError: it cannot be written.
        """
        path = self.directory
        if (path / "cells").is_dir():
            raise InputError(
                f"{path} holds a comparison of version 0.1.0, which this version cannot go on "
                "with: give another --out"
            )
        known = (path / EXPERIMENTS).is_dir() or not path.exists()
        if not known and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} holds something else than a comparison: give another --out")
        try:
            (path / EXPERIMENTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        with RunDirectory(path).locked():
            yield

    def run(self) -> Comparison:
        """Run all experiments that are not done."""
        write_atomic(self._evaluation_file, self.config.evaluation.to_yaml().encode())
        # The dense model last: what keeps a model from being saved is found by those before it.
        experiments = [*self.plan, self.dense]
        for experiment in experiments:
            if self._scores_file(experiment).exists():
                with self._recording_errors(experiment):
                    self._read(experiment)
        for number, experiment in enumerate(experiments, 1):
            about = {"experiment": experiment.name, "number": number, "of": len(experiments)}
            state = "cached"
            if self._found(experiment) is None:
                self.on_event("experiment", about | {"state": "running"})
                state = "done"
                with self._recording_errors(experiment):
                    if experiment is self.dense and not self.results:
                        raise InputError("not scored: no experiment came to a model")
                    self._run(experiment)
                write_tables(self.comparison(), self.directory)
            error = self.errors.get(experiment.key, "")
            state = "failed" if error else state
            about |= {"state": state, "error": error, "result": self._found(experiment)}
            self.on_event("experiment", about)
        comparison = self.comparison()
        write_tables(comparison, self.directory)
        try:
            from prunewright.tools.report.comparison import write_pages  # the extra's

            write_pages(comparison, self.directory)
        except PrunewrightError as error:
            _log.warning("The comparison is whole, but without its page and plots: %s", error)
        return comparison

    def comparison(self) -> Comparison:
        """What is known now."""
        key = self.dense.key
        state: ExperimentState = "done"
        if self.dense_scores is None:
            state = "failed" if key in self.errors else "pending"
        dense = DenseExperiment(
            key=key, state=state, error=self.errors.get(key, ""), scores=self.dense_scores
        )
        return build_comparison(self.config, self.plan, self.results, self.errors, dense)

    @property
    def _evaluation_file(self) -> Path:
        return self.directory / f"{EVALUATION}.yaml"

    def _path(self, experiment: Planned) -> Path:
        return self.directory / EXPERIMENTS / experiment.key

    def _scores_file(self, experiment: Planned) -> Path:
        """Written last, so that an experiment that has it is done."""
        return self._path(experiment) / EVALUATION / "evaluation.json"

    def _found(self, experiment: Planned) -> ExperimentResult | Scores | None:
        if experiment is self.dense:
            return self.dense_scores
        return self.results.get(experiment.key)

    @contextmanager
    def _recording_errors(self, experiment: Planned) -> Iterator[None]:
        """What fails in the block is the experiment's error: the others go on."""
        try:
            yield
        except PrunewrightError as error:
            self.errors[experiment.key] = str(error)

    def _read(self, experiment: Planned) -> None:
        """Take over what an experiment came to.

        Raises:
            StoreError: damaged.
            PrunewrightError: a score is not finite.
        """
        scores = read_scores(self._scores_file(experiment), self.config.evaluation)
        if experiment is self.dense:
            self.dense_scores = scores
        else:
            metrics = load_metrics(RunDirectory(self._path(experiment)))
            self.results[experiment.key] = experiment_result(metrics, scores)

    def _run(self, experiment: Planned) -> None:
        """Prune, score, and take over what comes of it.

        Raises:
            PrunewrightError: why the experiment failed.
        """
        self.errors.pop(experiment.key, None)  # one of the same content may have failed before
        path, config = self._path(experiment), experiment.config
        log = path.with_suffix(".log")
        log.unlink(missing_ok=True)
        model, dtype = config.model, str(config.dtype)
        run = RunDirectory(path)
        if experiment is not self.dense:
            if not run.metrics_file.exists():
                self._command(log, *self._pruning(experiment))
            if load_metrics(run).saved:  # else what the run came to is the dense model
                model, dtype = str(path), run.manifest()["dtype"]
                if not run.model.is_dir():
                    self._command(log, "save", str(path))
        scoring = ["evaluate", model, "--config", str(self._evaluation_file)]
        scoring += ["--out", str(path / EVALUATION), "--dtype", dtype, "--device", config.device]
        scoring += ["--trust-remote-code"] if config.trust_remote_code else []
        self._command(log, *scoring)
        self._read(experiment)
        for file in (log, path.with_suffix(".yaml")):
            file.unlink(missing_ok=True)
        if not self.keep_models:
            shutil.rmtree(run.model, ignore_errors=True)

    def _pruning(self, experiment: Planned) -> list[str]:
        """The command that prunes: a run that was begun is gone on with."""
        path = self._path(experiment)
        if RunDirectory(path).config_file.is_file():
            return ["resume", str(path)]
        # Killed before it had begun: nothing is there but the rest of an unfinished write.
        shutil.rmtree(path, ignore_errors=True)
        file = path.with_suffix(".yaml")
        write_atomic(file, experiment.config.to_yaml().encode())
        return [experiment.method.resolved_kind, "--config", str(file), "--out", str(path)]

    def _command(self, log: Path, *arguments: str) -> None:
        """Run a command of ours in a process of its own, and tell of its progress.

        Args:
            log: what it says is added to this file, but for the progress.
            arguments: of ``prunewright``.

        Raises:
            PrunewrightError: it failed; the message is its own.
            KeyboardInterrupt: this process was interrupted; the other has stopped, resumably.
        """
        command = [sys.executable, "-P", "-m", "prunewright.graph.cli.tethered", "--debug"]
        command += ["--log-json", "--log-level", "debug", *arguments, "--json"]
        with tempfile.TemporaryFile() as answer:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="backslashreplace",
                # Where the user's own agents lie.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C reaches it by us alone, and once
            )
            with process:
                try:
                    self._listen(process, log)
                except BaseException:
                    self._stop(process, log)
                    raise
            answer.seek(0)
            if process.returncode not in _GOOD_CODES:
                raise PrunewrightError(_error_words(process.returncode, answer.read(), log))

    def _listen(self, process: "subprocess.Popen[str]", log: Path) -> None:
        """Tell of a process's progress until it ends, and write down what else it says.

        Raises:
            StoreError: the log cannot be written.
        """
        assert process.stderr is not None
        for line in process.stderr:
            try:
                record = json.loads(line)
                progress = {name: record[name] for name in ("label", "done", "total")}
            except (ValueError, TypeError, KeyError):  # another record, or a library's words
                _add(log, line)
            else:
                self.on_event("custom", {"progress": progress})

    def _stop(self, process: "subprocess.Popen[str]", log: Path) -> None:
        """Let a process stop resumably; a second interrupt ends it at once."""
        _log.warning("stopping after the window or layer in hand; press again to stop at once")
        try:
            # Not SIGINT: what a shell starts in the background is made to ignore that.
            process.terminate()
            assert process.stderr is not None
            rest = process.stderr.read()
            with suppress(StoreError):  # what stopped it is told
                _add(log, rest)
            process.wait()
        finally:
            process.kill()


def _add(log: Path, words: str) -> None:
    with put_into_words(log), log.open("a", encoding="utf-8") as file:
        file.write(words)


def _error_words(code: int, answer: bytes, log: Path) -> str:
    """Why a process failed: what it says itself, or how it ended."""
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, TypeError, KeyError):
        pass
    if code > 0:
        return f"its process ended with exit code {code}; its last words are in {log}"
    name = signal.Signals(-code).name
    memory = " (out of memory?)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}; its last words are in {log}"
