"""`prunewright compare`, as a user meets it: experiments, cache, crash, failure, files."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from prunewright.graph import baseline, run
from prunewright.graph.cli import app
from prunewright.graph.running.study import plan_experiments
from prunewright.state.study import Comparison, validate_comparison
from prunewright.tools.evaluation import evaluate
from prunewright.tools.evaluation.harness import evaluate_tasks
from prunewright.tools.model.loading import load_model
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.study import Digests

HOSTILE = "greedy <b>|`x`"
AGENTS = '''
import time
from pathlib import Path

from prunewright.graph.agents.controls import GreedyAgent


class Broken:
    def decide(self, observation):
        raise ZeroDivisionError("nobody thought of this")


class Patient(GreedyAgent):
    """Waits at each step but its first until it may go on."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def decide(self, observation):
        if observation.step:
            (self.folder / f"waiting-{observation.step}").touch()
            while not (self.folder / f"go-{observation.step}").exists():
                time.sleep(0.02)
        return super().decide(observation)
'''


@pytest.fixture(scope="module")
def study(
    pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The configuration of two methods over two seeds, with texts of its own."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("calibration", "scored"):
        words = [f"{name} {n} of the many words in {n * n} pieces of text." for n in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(words))
    return {
        "base": {
            "model": str(pico_models()),
            "dtype": "float32",
            "device": "cpu",
            "step": 0.1,
            "max_delta": 0.5,
            "criterion": "wanda",
            "reconstruct": "none",
            "guard": {"max_increase": 10.0},
            "texts": {
                "calibration": str(folder / "calibration.txt"),
                "windows": {"calibration": 4, "gradient": 2, "guard": 3, "test": 1, "length": 48},
            },
        },
        "methods": [
            {"name": "uniform wanda", "settings": {"allocation": "uniform"}},
            {"name": HOSTILE, "settings": {"agent": "greedy"}},
        ],
        "seeds": [1],
        "targets": [0.2],
        "control": "uniform wanda",
        "evaluation": {
            "length": 48,
            "texts": [
                {"name": "own", "source": str(folder / "scored.txt"), "windows": 5},
                {"name": "embedded", "source": "embedded", "windows": 3},
            ],
            "tasks": [{"name": "facts", "task": "facts", "shots": 1, "limit": 6}],
        },
    }


def write(study: dict[str, Any], folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | keys))
    return path


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(arg) for arg in args)])


@pytest.fixture(scope="module")
def finished(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of the finished study, and what the command printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = invoke(write(study, folder), "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out", result.stdout


@pytest.fixture
def copy(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished comparison that a test may go on with."""
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "agents_of_test_compare.py").write_text(AGENTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "import:agents_of_test_compare:"
    sys.modules.pop("agents_of_test_compare", None)


def read_comparison(out: Path) -> Comparison:
    return Comparison.model_validate_json((out / "comparison.json").read_text())


def names_of(out: Path) -> set[str]:
    return {path.name for path in (out / "experiments").iterdir()}


def test_every_experiment_is_what_run_and_baseline_come_to(
    finished: tuple[Path, str], study: dict[str, Any], tmp_path: Path
) -> None:
    out, printed = finished
    found = read_comparison(out)
    assert [(c.method, c.seed, c.state) for c in found.experiments] == [
        (name, 1, "done") for name in ("uniform wanda", HOSTILE)
    ]
    assert len({experiment.key for experiment in found.experiments} | {found.dense.key}) == 3
    assert names_of(out) == {experiment.key for experiment in found.experiments} | {found.dense.key}
    control, method = found.experiments
    base = study["base"] | {"seed": 1, "target": 0.2}
    # The baseline last: in one process it could take over the run's statistics, and vice versa.
    ours = [
        (method, run(base | {"agent": "greedy"}, tmp_path / "r")),
        (control, baseline(base | {"allocation": "uniform"}, tmp_path / "b")),
    ]
    scored = {}
    for experiment, result in ours:
        metrics, own = result.metrics, experiment.result
        assert own is not None
        assert (own.status, own.revision, own.sparsity, own.steps, own.rollbacks) == (
            metrics.status,
            metrics.revision,
            metrics.sparsity,
            metrics.steps,
            metrics.rollbacks,
        )
        assert own.tokens == metrics.tokens
        uses = ("calibration", "gradient", "guard", "probe")
        assert own.tokens_for_choosing == sum(metrics.tokens[use] for use in uses)
        assert own.seconds > 0
        directory = out / "experiments" / experiment.key
        assert json.loads((directory / "metrics.json").read_text())["revision"] == own.revision
        assert not (directory / "model").exists()
        texts = study["evaluation"]["texts"]
        for text in texts:
            (score,) = evaluate(
                str(result.model_directory),
                [(text["source"], text["windows"])],
                length=48,
                dtype="float32",
                device="cpu",
            ).texts
            mine = own.scores.texts[text["name"]]
            assert mine.perplexity == pytest.approx(score.perplexity)
            assert len(mine.losses) == text["windows"]
            scored[experiment.method, text["name"]] = mine.perplexity
        answered = own.scores.tasks
        assert answered == pytest.approx(ask_facts(str(result.model_directory)), abs=1e-4)
        assert found.dense.scores is not None
        assert answered != found.dense.scores.tasks
    assert found.dense.scores is not None
    dense = ask_facts(study["base"]["model"])
    # An experiment counts with as many threads as there are cores, this process with one.
    assert found.dense.scores.tasks == pytest.approx(dense, abs=1e-4)
    table = (out / "comparison.md").read_text()
    assert f"{found.summary[0].tasks['facts, log p'].mean:.3f}" in table
    assert method.ratio == {
        name: pytest.approx(scored[HOSTILE, name] / scored["uniform wanda", name])
        for name in ("own", "embedded")
    }
    # Once for its statistics; the guard before and after.
    assert control.result is not None
    assert control.result.tokens["calibration"] == 4 * 48
    assert control.result.tokens["guard"] == 2 * 3 * 48
    for name in ("comparison.json", "comparison.md", "comparison.html"):
        assert (out / name).stat().st_size > 1000
    assert len(list((out / "plots").glob("*.svg"))) == 6
    assert HOSTILE in printed
    assert f"experiment   2 of 3  done    {HOSTILE}, 20 %, seed 1" in " ".join(printed.split(" "))


def ask_facts(model: str) -> dict[str, float]:
    loaded = load_model(model, dtype="float32", device="cpu")
    (asked,) = evaluate_tasks(loaded, ["facts"], shots=1, limit=6)
    return {"facts": asked.accuracy, "facts, log p": asked.log_probability}


def test_another_question_is_another_experiment(
    finished: tuple[Path, str], study: dict[str, Any]
) -> None:
    def keys(limit: int) -> set[str]:
        (task,) = study["evaluation"]["tasks"]
        evaluation = study["evaluation"] | {"tasks": [task | {"limit": limit}]}
        config = validate_comparison(study | {"evaluation": evaluation})
        return {experiment.key for experiment in plan_experiments(config, Digests())}

    made = {experiment.key for experiment in read_comparison(finished[0]).experiments}
    assert keys(6) == made
    assert len(keys(7)) == len(made)
    assert keys(7).isdisjoint(made)


def test_a_second_call_computes_nothing(copy: Path, study: dict[str, Any], tmp_path: Path) -> None:
    before, experiments = (copy / "comparison.json").read_bytes(), names_of(copy)
    stamps = {p: p.stat().st_mtime_ns for p in (copy / "experiments").rglob("*")}
    result = invoke(write(study, tmp_path), "-o", copy, "--json")
    assert result.exit_code == 0, result.output
    assert (copy / "comparison.json").read_bytes() == before
    assert names_of(copy) == experiments
    assert {p: p.stat().st_mtime_ns for p in (copy / "experiments").rglob("*")} == stamps
    assert result.stderr.count("cached") == 3
    found = json.loads(result.stdout)
    assert (found.pop("directory"), found.pop("exit_code")) == (str(copy), 0)
    assert Comparison.model_validate(found) == read_comparison(copy)


def test_a_failure_a_stop_a_kill_and_a_changed_text(
    copy: Path,
    study: dict[str, Any],
    agents: str,
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    tmp_path: Path,
) -> None:
    texts = study["base"]["texts"]
    changed = tmp_path / "calibration.txt"
    changed.write_text(Path(texts["calibration"]).read_text() + " One more word.")
    base = study["base"] | {"texts": texts | {"calibration": str(changed)}}
    methods: list[dict[str, Any]] = [
        {"name": "broken", "settings": {"agent": f"{agents}Broken"}},
        {
            "name": "patient",
            "settings": {
                "agent": f"{agents}Patient",
                "step": 0.07,
                "agent_options": {"folder": str(tmp_path)},
            },
        },
    ]
    path = write(study, tmp_path, base=base, methods=methods, seeds=[0], control=None)
    before, known = read_comparison(copy), names_of(copy)

    def interrupt() -> None:
        wait_for((tmp_path / "waiting-1").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    result = invoke(path, "--out", copy)
    assert result.exit_code == 130, result.output
    assert "go on with: prunewright" in result.stderr
    found = read_comparison(copy)
    assert [experiment.state for experiment in found.experiments] == ["failed", "pending"]
    assert found.dense == before.dense
    broken, patient = (copy / "experiments" / experiment.key for experiment in found.experiments)
    assert {broken.name, patient.name}.isdisjoint(known)  # the text has changed
    assert "Traceback" in broken.with_suffix(".log").read_text()
    first = (patient / "trace.jsonl").read_bytes()
    assert first.count(b"\n") == 1

    config = yaml.safe_load(path.read_text()) | {"methods": [methods[1]], "control": None}
    (tmp_path / "go-1").touch()
    told = {
        "at": "prunewright.graph.running.study:json.loads",
        "match": "reflect took",
        "when": "after",
    }
    job = {"do": "compare", "config": config, "out": str(copy), "path": str(tmp_path)}
    assert submit(job | {"kill": told}) == {"signal": signal.SIGKILL}
    wait_for(lambda: RunDirectory(patient).holder() is None)  # though nobody let it go on
    second = (patient / "trace.jsonl").read_bytes()
    assert second.startswith(first)
    assert second.count(b"\n") == 2

    (tmp_path / "go-2").touch()
    # A process that holds much must not be counted for the small ones that it starts.
    ballast = bytearray(os.urandom(1024)) * (900 * 1024)
    result = invoke(path, "--out", copy, "--keep-models")
    assert result.exit_code == 1
    words = "broken, 20 %, seed 0: ZeroDivisionError: nobody thought of this"
    assert f"Error: 1 of 3 experiments failed:\n{words}" in result.stderr
    found = read_comparison(copy)
    assert [experiment.state for experiment in found.experiments] == ["failed", "done"]
    assert "ZeroDivisionError" in (copy / "comparison.md").read_text()
    assert (patient / "trace.jsonl").read_bytes().startswith(second)
    assert not patient.with_suffix(".log").exists()
    whole = run(base | {"target": 0.2, "step": 0.07, "agent": "greedy"}, tmp_path / "whole")
    done = found.experiments[1].result
    assert done is not None
    assert 2**24 < done.peak_memory_bytes < len(ballast)
    assert (patient / "model" / "model.safetensors").is_file()
    assert done.revision == whole.metrics.revision


def test_a_full_disk_is_the_experiments_error_and_it_goes_on(
    study: dict[str, Any], submit: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    config = study | {"methods": study["methods"][:1]}
    job = {"do": "compare", "path": str(tmp_path), "config": config, "out": str(tmp_path / "out")}
    at = {"at": "prunewright.graph.running.study:_Work._command", "bytes": 100, "for_good": False}
    told = submit(job | {"disk": at})
    assert told.keys() == {"uniform wanda, 20 %, seed 1", "dense", "signal"}
    words = told["uniform wanda, 20 %, seed 1"]
    assert "cannot write" in words
    assert os.strerror(errno.EFBIG) in words
    assert submit(job) == {"signal": 0}


def test_it_refuses_what_is_no_comparison_and_two_at_once(
    copy: Path, study: dict[str, Any], tmp_path: Path
) -> None:
    path = write(study, tmp_path)
    result = invoke(path, "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds something else than a comparison" in result.stderr
    result = invoke(write(study, tmp_path, contol="x"), "--out", copy)
    assert result.exit_code == 2
    assert "did you mean control?" in result.stderr
    path = write(study, tmp_path, base=study["base"] | {"model": str(tmp_path / "none")})
    result = invoke(path, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()
    config = json.loads((Path(study["base"]["model"]) / "config.json").read_text())
    quantised = tmp_path / "quantised"
    shutil.copytree(study["base"]["model"], quantised)
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(config))
    path = write(study, tmp_path, base=study["base"] | {"model": str(quantised)})
    result = invoke(path, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "holds a quantised model" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "new").exists()
    old = tmp_path / "old"
    (old / "cells").mkdir(parents=True)
    result = invoke(write(study, tmp_path), "--out", old)
    assert result.exit_code == 2
    assert "holds a comparison of version 0.1.0" in result.stderr.replace("\n", " ")


def test_damaged_scores_and_a_deleted_model_are_made_again(
    copy: Path, study: dict[str, Any], tmp_path: Path
) -> None:
    before = (copy / "comparison.json").read_bytes()
    key = read_comparison(copy).experiments[1].key
    (copy / "experiments" / key / "evaluation" / "evaluation.json").write_text("{}")
    result = invoke(write(study, tmp_path), "--out", copy)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert (copy / "comparison.json").read_bytes() == before


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")
