"""What comes after the last step: judged, stored at once, done once, and begun from masks alone."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page import Page
from typer.testing import CliRunner

from prunewright.graph import baseline, fork, resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.runner import collect_garbage, save
from prunewright.graph.running.watch import follow
from prunewright.state import StoreError
from prunewright.tools import load_trace
from prunewright.tools.criteria import Criterion, wanda
from prunewright.tools.store.revisions import RevisionStore
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics
from tests.end_to_end.conftest import learned_config

Submit = Callable[[dict[str, Any]], dict[str, Any]]

OVERFITTING = Criterion(
    group="row", score=lambda w, s: wanda.score(w, s.input_square), dampings=(1e-6,)
)
"""Its sweep fits the kept weights to the chance of a few tokens: only its masks are any good."""


@pytest.fixture(scope="module")
def settings(learned_model: Path) -> dict[str, Any]:
    """A run of two steps, at whose end there is a stage that helps."""
    config = learned_config(learned_model)
    more = {"calibration": 16, "gradient": 16, "guard": 8}
    return config | {
        "reconstruct": True,
        "target": 0.3,
        "step": 0.15,
        "max_layer_sparsity": 0.75,
        "guard": {"max_increase": 10.0},
        "texts": {"windows": config["texts"]["windows"] | more},
    }


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of such a run."""
    return run(settings, out=tmp_path_factory.mktemp("finished") / "run").directory


@pytest.fixture(scope="module")
def once(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a baseline with the same stage."""
    return baseline(settings, out=tmp_path_factory.mktemp("once") / "run").directory


@pytest.fixture(scope="module")
def at_its_end(
    settings: dict[str, Any], submit: Submit, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of such a run that was killed once its stage was stored."""
    out = tmp_path_factory.mktemp("killed") / "run"
    kill = {"at": "prunewright.tools.finishing:write_json", "when": "after", "nth": 2}
    job = {"do": "run", "config": settings, "out": str(out), "kill": kill}
    assert submit(job) == {"signal": signal.SIGKILL}
    return out


@pytest.fixture
def killed(at_its_end: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(at_its_end, tmp_path / "killed"))


@pytest.fixture
def worse(config: dict[str, Any]) -> dict[str, Any]:
    """A run at whose end the guard text gets worse."""
    windows = config["texts"]["windows"] | {"calibration": 1, "gradient": 1}
    return config | {
        "criterion": "import:test_finishing:OVERFITTING",
        "target": 0.3,
        "guard": {"max_increase": 10.0},
        "texts": {"windows": windows},
    }


def holds_values(path: Path, revision: str) -> bool:
    """Whether a revision of a run has values of kept weights, too."""
    store = RevisionStore(path / "revisions")
    masks = store.manifest(revision).values()
    return any(b'"kept"' in (store.directory / "masks" / name).read_bytes() for name in masks)


def metrics(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "metrics.json").read_text())
    return content


@pytest.mark.parametrize(
    ("do", "kill", "again"),
    [
        ("run", {"at": "prunewright.tools.finishing:write_json", "nth": 1}, True),
        ("run", {"at": "prunewright.tools.bench.workbench:write_json", "nth": 1}, True),
        ("baseline", {"at": "prunewright.tools.bench.workbench:write_json", "nth": 1}, True),
        ("run", {"at": "prunewright.tools.bench.workbench:Workbench.solve", "nth": 1}, True),
        ("run", {"at": "prunewright.tools.finishing:write_json", "nth": 2}, False),
        ("run", {"at": "prunewright.tools.results:write_json", "nth": 1}, False),
    ],
    ids=[
        "before the stage",
        "one block",
        "one block of a baseline",
        "solved, not judged",
        "stage stored",
        "all written",
    ],
)
def test_a_kill_at_the_end_resumes_to_the_same_weights_and_does_no_stage_twice(
    do: str,
    kill: dict[str, Any],
    again: bool,
    settings: dict[str, Any],
    finished: Path,
    once: Path,
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    whole, out = {"run": finished, "baseline": once}[do], tmp_path / "run"
    job = {"config": settings, "out": str(out)}
    assert submit(job | {"do": do, "kill": kill | {"when": "after"}}) == {"signal": signal.SIGKILL}
    before = json.loads((out / "finishing.json").read_text())
    assert len(before["done"]) == (not again)
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(whole, out)
    (stage,) = answer["metrics"]["stages"]
    assert answer["metrics"]["tokens"]["solve"] == stage["tokens"]["solve"] > 0
    halfway = kill["at"] == "prunewright.tools.bench.workbench:write_json"
    assert (metrics(whole)["tokens"]["solve"] > stage["tokens"]["solve"]) == halfway
    if not again:  # the very record that was there before the kill, seconds and all
        assert stage == before["done"][0]["stage"]
        assert answer["metrics"]["seconds"]["reconstruct"] == stage["seconds"]


def test_what_leaves_the_guard_text_worse_is_not_kept_and_that_is_said(
    worse: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(worse, out=out)
    (stage,) = result.metrics.stages
    (*_, last) = RunDirectory(out).read_trace()
    assert stage.after is not None
    assert stage.before is not None
    assert stage.after > stage.before == last.candidate_perplexity
    assert not stage.kept
    # What is saved, and what is told of it, is the masks alone.
    assert result.metrics.revision == last.revision != stage.revision
    assert result.metrics.perplexity.guard.final == stage.before
    assert not holds_values(out, result.metrics.revision)
    words = f"reconstruct: guard perplexity {stage.before:.3f} to {stage.after:.3f}"
    shown = CliRunner().invoke(app, ["show", str(out)]).stdout
    page, card = ((out / name).read_text("utf-8") for name in ("report.html", "model/README.md"))
    for text in (shown, card):
        assert words in text
        assert "so it is not kept" in text
    assert "no: it was worse" in page
    # A baseline judges no otherwise.
    once = baseline(worse, out=tmp_path / "once").metrics
    assert [one.kept for one in once.stages] == [False]
    assert not holds_values(tmp_path / "once", once.revision)


def test_the_report_and_the_trace_tell_of_the_end(finished: Path) -> None:
    found = load_metrics(RunDirectory(finished))
    (stage,) = found.stages
    assert stage.kept
    page = Page((finished / "report.html").read_text("utf-8"))
    assert "After the last step" in page.text
    assert {stage.before, stage.after, stage.seconds} <= set(page.numbers)
    ends = [
        row
        for part in json.loads(page.scripts[0])["perplexity"]["layer"]
        for row in part["data"]["values"]
        if row.get("verdict") == "after the last step"
    ]
    assert {(row["step"], row["measured"]) for row in ends} == {(found.steps, stage.after)}
    trace = load_trace(finished)
    told = trace.stages[["stage", "before", "after", "kept"]].to_numpy().tolist()
    assert told == [["reconstruct", stage.before, stage.after, True]]
    assert trace.curves.empty


def test_a_run_goes_on_from_masks_alone(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    first = load_metrics(RunDirectory(out))
    assert first.stages[0].kept
    assert holds_values(out, first.revision)
    higher = fork(out, out=tmp_path / "fork", target=0.4).metrics
    assert metrics(out)["revision"] == first.revision
    here = resume(out, target=0.4).metrics
    assert (here.revision, here.stages[0].before) == (higher.revision, higher.stages[0].before)
    for record in RunDirectory(out).read_trace():
        assert not holds_values(out, record.revision)
    # Solved from the masks of the last step, whatever had been solved before.
    assert json.loads((out / "finishing.json").read_text())["revision"] == (
        RunDirectory(out).read_trace()[-1].revision
    )


def test_garbage_and_saving_know_what_the_end_made(killed: Path) -> None:
    assert collect_garbage(killed) == (0, 0)
    done = resume(killed).metrics
    assert collect_garbage(killed) == (0, 0)
    model = (killed / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(killed / "model")
    save(killed)
    assert (killed / "model" / "model.safetensors").read_bytes() == model
    assert holds_values(killed, done.revision)


def test_a_control_is_what_a_baseline_with_the_same_stages_comes_to(
    settings: dict[str, Any], once: Path, tmp_path: Path
) -> None:
    found = run(settings | {"with_control": True}, out=tmp_path / "run").metrics
    alone = load_metrics(RunDirectory(once))
    assert found.control is not None
    assert found.control.revision == alone.revision
    assert found.control.guard == alone.perplexity.guard.final
    assert found.tokens["control"] > alone.stages[0].tokens["solve"]
    assert not (tmp_path / "run" / "finishing-control.json").exists()


def test_who_watches_is_told_of_the_end_and_its_stages(killed: Path) -> None:
    shown = CliRunner().invoke(app, ["show", str(killed)]).stdout
    assert "reconstruct: guard perplexity" in shown
    assert "Not finished, 2 steps so far" in shown
    seen = follow(RunDirectory(killed), poll=0.01)
    told = [next(seen) for _ in range(4)]
    assert [*told[2][1], *told[3][1]] == ["finishing", "stage"]
    result = resume(killed)
    (last,) = [event for _, event in seen if "metrics" in event]
    assert told[3][1]["stage"] == last["metrics"]["stages"][0]
    assert result.metrics.stages[0].model_dump(mode="json") == told[3][1]["stage"]


def test_a_damaged_record_of_the_end_is_named(killed: Path) -> None:
    (killed / "finishing.json").write_text('{"revision": 1}')
    with pytest.raises(StoreError, match=r"finishing\.json is damaged.*delete it, then resume"):
        resume(killed)
    (killed / "finishing.json").unlink()
    assert resume(killed).metrics.stages[0].kept


def test_a_run_that_died_at_its_end_takes_more_steps_only_if_a_change_lets_it(
    settings: dict[str, Any], submit: Submit, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kill = {"at": "prunewright.tools.results:complete", "when": "before"}
    config = settings | {"max_steps": 1}
    submit({"do": "run", "config": config, "out": str(out), "kill": kill})
    asked = CliRunner().invoke(app, ["ask", str(out)])
    assert "Step 1: the last step: the run has ended, max_steps is used up" in asked.stdout
    longer, higher = (Path(shutil.copytree(out, tmp_path / name)) for name in ("long", "high"))
    ended = resume(out, agent="uniform").metrics
    assert (ended.status, ended.steps, len(ended.stages)) == ("max_steps", 1, 1)
    more = resume(longer, max_steps=9).metrics
    assert (more.status, more.steps) == ("target_reached", 2)
    further = resume(higher, max_steps=9, target=0.4).metrics
    assert (further.status, further.steps) == ("target_reached", 3)
