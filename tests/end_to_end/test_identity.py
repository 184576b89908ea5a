"""What a run stands on is content: paths are only where to look first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from quick import quick_config
from typer.testing import CliRunner

from prunewright.graph import baseline, fork, resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.study import plan_experiments
from prunewright.state import InputError, StoreError
from prunewright.state.study import validate_comparison
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.study import Digests

WORDS = [f"the {n} birds of the {n * 7} hills sang {n * n} songs." for n in range(400)]


@pytest.fixture
def project(
    pico_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a model, a text and a run that was stopped in its second step."""
    place = tmp_path / "project"
    (place / "data").mkdir(parents=True)
    shutil.copytree(pico_models(), place / "models" / "pico")
    (place / "data" / "own.txt").write_text("\n".join(WORDS))
    monkeypatch.chdir(place)

    begin(config(), "runs/one")
    monkeypatch.chdir(tmp_path)
    return place


def begin(settings: dict[str, Any], out: str) -> None:
    """Run one step."""

    def stop(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "reflect" in event:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, out=out, on_event=stop)


def config() -> dict[str, Any]:
    found = quick_config("models/pico")
    found["texts"]["calibration"] = "data/own.txt"
    return found


def test_a_run_goes_on_from_another_folder_and_where_its_project_was_moved(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(project, tmp_path / "elsewhere" / "deep" / "moved"))
    absolute = Path(shutil.copytree(project, tmp_path / "absolute"))
    revision = resume(project / "runs" / "one").metrics.revision  # from the folder above
    shutil.rmtree(project)
    monkeypatch.chdir("/")
    assert fork(moved / "runs" / "one", 1).metrics.revision == revision
    assert resume(moved / "runs" / "one").metrics.revision == revision
    # Paths that were given whole lead to the old place.
    file = absolute / "runs" / "one" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["model"] = str(project / "models" / "pico")
    values["texts"]["calibration"] = str(project / "data" / "own.txt")
    file.write_text(yaml.safe_dump(values))
    assert resume(absolute / "runs" / "one").metrics.revision == revision


def test_the_same_content_may_be_named_elsewhere_and_no_other(
    project: Path, pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    out = project / "runs" / "one"
    before = (out / "config.yaml").read_bytes()
    other = Path(shutil.copytree(project / "models" / "pico", tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.01}))
    with pytest.raises(InputError, match=r"needs a new run.*rms_norm_eps was 1e-06, is 0\.01"):
        resume(out, model=str(other))
    with pytest.raises(InputError, match=r"needs a new run.*model_type was llama"):
        resume(out, model=str(pico_models("MistralConfig")))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(reversed(WORDS)))
    texts = yaml.safe_load(before)["texts"] | {"calibration": str(text)}
    with pytest.raises(InputError, match=r"needs a new run.*calibration was"):
        resume(out, model=str(project / "models" / "pico"), texts=texts)
    assert (out / "config.yaml").read_bytes() == before
    (project / "models" / "pico").rename(tmp_path / "renamed")
    text.write_text("\n".join(WORDS))
    metrics = resume(out, model=str(tmp_path / "renamed"), texts=texts).metrics
    assert metrics.status == "target_reached"


@pytest.mark.parametrize("act", [resume, lambda out: fork(out, 1)])
def test_settings_that_change_what_a_model_computes_are_noticed(
    act: Callable[[Path], object], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    model = project / "models" / "pico"
    settings = json.loads((model / "config.json").read_text())
    harmless = {"do_sample": True, "temperature": 0.3}
    (model / "generation_config.json").write_text(json.dumps(harmless))
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.01}, indent=7))
    with pytest.raises(StoreError, match=r"its model .*rms_norm_eps was 1e-06, is 0\.01"):
        act(project / "runs" / "one")
    rest = settings | {"transformers_version": "9.9"}
    (model / "config.json").write_text(json.dumps(rest, indent=7))
    act(project / "runs" / "one")


def test_a_baseline_that_was_moved_goes_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    done = baseline(config(), out="runs/base")
    (done.directory / "metrics.json").unlink()
    monkeypatch.chdir("/")
    again = resume(project / "runs" / "base").metrics
    assert again.revision == done.metrics.revision


def test_experiments_of_a_comparison_are_named_by_content(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = {
        "base": config(),
        "methods": [
            {"name": "again", "kind": "run", "settings": {"agent": "replay:runs/one"}},
            {"name": "wanda", "kind": "baseline"},
        ],
        "seeds": [0],
        "control": "wanda",
        "evaluation": {"texts": [{"name": "own", "source": "embedded", "windows": 1}]},
    }

    def keys() -> list[str]:
        return [one.key for one in plan_experiments(validate_comparison(study), Digests())]

    monkeypatch.chdir(project)
    before = keys()
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "moved"))
    study["base"] = config() | {"model": str(project / "models" / "pico")}
    assert keys() == before
    Path("data/own.txt").write_text("\n".join(reversed(WORDS)))
    assert not set(keys()) & set(before)


def test_a_replay_of_a_run_on_something_else_is_told_once(project: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project / "models" / "pico", tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.01}))
    resume(project / "runs" / "one")
    recorded = f"replay:{project / 'runs' / 'one'}"
    file = tmp_path / "config.yaml"
    texts = {"windows": config()["texts"]["windows"]}
    changes = {"agent": recorded, "model": str(other), "texts": texts}
    file.write_text(yaml.safe_dump(config() | changes))
    result = CliRunner().invoke(app, ["run", "-c", str(file), "-o", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    words = "this run differs from the trace's: model.settings.config.json.rms_norm"
    assert shown.index(words) < shown.index("dense perplexity")
    first, *rest = RunDirectory(tmp_path / "again").read_trace()
    assert words in first.notes[0]
    assert "texts.calibration was" in first.notes[0]
    assert not any("does not stand" in note for record in rest for note in record.notes)


def test_a_replay_goes_on_where_it_was_moved_to(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    resume("runs/one")
    begin(config() | {"agent": "replay:runs/one"}, "runs/again")
    shutil.copytree(project, tmp_path / "moved")
    monkeypatch.chdir("/")
    shutil.rmtree(project)
    metrics = resume(tmp_path / "moved" / "runs" / "again").metrics
    assert metrics.status == "target_reached"
    records = RunDirectory(tmp_path / "moved" / "runs" / "again").read_trace()
    assert not any("replay" in note for record in records for note in record.notes)
