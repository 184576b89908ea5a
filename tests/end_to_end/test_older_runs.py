"""A run directory that version 0.1.0 made: shown, reported, replayed, and not gone on with.

`tests/data/run-0.1.0` is such a run, of the tests' small Llama, without masks and checkpoints; the
only thing changed in it is where the model lay.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prunewright.graph import fork, resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.preview import preview
from prunewright.state import InputError, load_config
from prunewright.tools import load_trace
from prunewright.tools.store.rundir import RunDirectory
from tests.helpers.quick import quick_config

KEPT = Path(__file__).resolve().parents[1] / "data" / "run-0.1.0"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "older"))


def test_it_is_shown_and_reported(older: Path) -> None:
    steps = [json.loads(line) for line in (older / "trace.jsonl").read_text().splitlines()]
    shown = CliRunner().invoke(app, ["show", str(older)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("rolled back") >= sum(s["verdict"] == "rolled_back" for s in steps)
    assert "1032.726" in shown.output  # the test perplexity that metrics.json holds
    reported = CliRunner().invoke(app, ["report", str(older)])
    assert reported.exit_code == 0, reported.output
    assert "greedy" in (older / "report.html").read_text()


def test_its_trace_makes_frames(older: Path) -> None:
    steps = [json.loads(line) for line in (older / "trace.jsonl").read_text().splitlines()]
    trace = load_trace(older)
    assert list(trace.history["verdict"]) == [step["verdict"] for step in steps]
    assert list(trace.history["change"]) == [step["change"] for step in steps]
    profile = json.loads((older / steps[2]["profile"]).read_text())
    third = trace.profiles[trace.profiles["step"] == 3]
    assert list(third["layer"]) == [layer["name"] for layer in profile["layers"]]
    assert list(third["z_s"]) == [layer["z_s"] for layer in profile["layers"]]


def test_its_decisions_are_repeated(
    older: Path, pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_config(older / "config.yaml").model_dump()
    config |= {"model": str(pico_models()), "agent": f"replay:{older}"}
    result = run(config, out=tmp_path / "again")
    before = json.loads((older / "metrics.json").read_text())
    assert result.metrics.rollbacks == before["rollbacks"]
    assert result.metrics.sparsity == pytest.approx(before["sparsity"], abs=2e-4)
    test = before["perplexity"]["test"]["final"]
    assert result.metrics.perplexity.test.final == pytest.approx(test, rel=1e-3)


WORDS = r"version 0\.1\.0.*not gone on with.*--agent replay:"


def test_one_that_reconstructed_is_shown_and_not_gone_on_with(older: Path) -> None:
    config = (older / "config.yaml").read_text()
    assert "reconstruct: false" in config
    (older / "config.yaml").write_text(config.replace("reconstruct: false", "reconstruct: true"))
    shown = CliRunner().invoke(app, ["show", str(older)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "kept weights reconstructed by layer" in shown.output
    with pytest.raises(InputError, match=WORDS):
        resume(older, max_steps=9)


def test_a_run_whose_configuration_says_true_goes_on_by_layer(
    pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(quick_config(pico_models()) | {"reconstruct": "layer", "max_steps": 1}, out)
    config = yaml.safe_load((out / "config.yaml").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    for request in (config, manifest["request"]):
        assert request["reconstruct"] == "layer"
        request["reconstruct"] = True
        for key in ("fit", "pruned"):  # which did not exist then
            del request[key]
    del config["adapt"]
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    (out / "manifest.json").write_text(json.dumps(manifest))
    metrics = resume(out, max_steps=9).metrics
    assert (metrics.status, [stage.name for stage in metrics.stages]) == (
        "target_reached",
        ["reconstruct"],
    )


def test_it_is_not_gone_on_with(older: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=WORDS):
        resume(older, max_steps=9)
    with pytest.raises(InputError, match=WORDS):
        fork(older, 1, out=tmp_path / "fork")
    with pytest.raises(InputError, match=WORDS):
        preview(RunDirectory(older))
    assert not (tmp_path / "fork").exists()
    assert {path.name for path in older.iterdir()} - {path.name for path in KEPT.iterdir()} <= {
        ".lock"
    }
