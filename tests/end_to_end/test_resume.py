"""Resume: what may change, what may not, what is damaged, and a full disk."""

import hashlib
import json
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from prunewright.graph import baseline, resume, run
from prunewright.state import InputError, StoreError

Submit = Callable[[dict[str, Any]], dict[str, Any]]
KILL = {"at": "prunewright.graph.nodes.decide:ask", "when": "before", "nth": 3}
"""In agent_decide of step 2, after an accepted and a rolled-back step."""


@pytest.fixture(scope="module")
def killed(
    reference_config: dict[str, Any],
    submit: Submit,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run that died in its third step."""
    out = tmp_path_factory.mktemp("killed") / "run"
    job = {"do": "run", "config": reference_config, "out": str(out), "kill": KILL}
    assert submit(job) == {"signal": signal.SIGKILL}
    with closing(sqlite3.connect(out / "state.sqlite")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all in the one file
    return out


@pytest.fixture
def stopped(
    killed: Path, tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of it that a test may damage, as a new process finds it: no model is live."""
    assert config["agent"] == "greedy"  # the fixture makes the agents of the tests importable
    monkeypatch.setattr("prunewright.tools.bench.workbench._current", None)
    return Path(shutil.copytree(killed, tmp_path / "run"))


def contents(path: Path) -> dict[str, str]:
    """Hash of every file, but for the checkpoints, which record a failed node, too."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if not p.name.startswith(".lock")  # who works there, not what lies there
        if p.is_file() and not p.name.startswith("state.sqlite")
    }


def database_bytes(path: Path) -> bytes | None:
    file = path / "state.sqlite"
    return file.read_bytes() if file.exists() else None


def trace(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


def test_a_finished_run_is_only_reported(
    reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    before = contents(out)
    again = resume(out)
    assert again.metrics.model_dump(mode="json") == json.loads(
        (reference / "metrics.json").read_text()
    )
    # Neither a missing key of an LLM nor a change matters to a run that has ended; it is told.
    assert not caplog.text
    assert resume(out, agent="google_genai:gemini-3-flash-preview").metrics == again.metrics
    assert "is finished: nothing of it is changed" in caplog.text
    assert f"prunewright fork {out} --step N" in caplog.text
    assert contents(out) == before


def test_a_finished_baseline_takes_no_changes_and_says_what_does(
    pico_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    first = baseline(pico_config, out=out)
    assert resume(out, adapt={"tokens": 48}).metrics == first.metrics
    assert f"the baseline in {out} is finished" in caplog.text
    assert f"prunewright adapt {out}; for anything else begin another" in caplog.text
    assert "fork" not in caplog.text


def test_the_agent_may_change_and_the_trace_says_when(stopped: Path) -> None:
    result = resume(stopped, agent="zscore", agent_options={}, max_steps=9)
    assert result.metrics.status == "target_reached"
    agents = [step["agent"] for step in trace(stopped)]
    assert agents[:2] == ["import:scripted_agents:HarmfulOnce"] * 2
    assert set(agents[2:]) == {"zscore"}
    text = (stopped / "config.yaml").read_text()
    assert "agent: zscore" in text
    assert "max_steps: 9" in text


def test_max_steps_may_be_lowered(stopped: Path) -> None:
    metrics = resume(stopped, max_steps=3).metrics
    assert (metrics.status, metrics.steps) == ("max_steps", 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": 0.2}, "needs a new run"),
        ({"seed": 7}, "needs a new run"),
        ({"criterion": "magnitude"}, "needs a new run"),
        ({"max_stepz": 7}, "did you mean max_steps?"),
        ({"max_steps": 0}, "max_steps"),
        ({"agent": "greeedy"}, "did you mean greedy?"),
        ({"agent": "google_genai:gemini-3-flash-preview"}, "GOOGLE_API_KEY"),
    ],
)
def test_other_changes_are_refused_and_change_nothing(
    stopped: Path, change: dict[str, Any], words: str
) -> None:
    before = contents(stopped)
    with pytest.raises(InputError) as caught:
        resume(stopped, **change)
    assert words in str(caught.value)
    assert contents(stopped) == before


def test_who_decides_edited_into_the_config_file_is_told_once(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = stopped / "config.yaml"
    unbounded = {"max_increase": float("inf")}
    changes = {"agent": "zscore", "agent_options": {}, "max_steps": 3, "guard": unbounded}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    assert resume(stopped).metrics.status == "max_steps"
    assert "config.yaml was edited since the run was last at work" in caplog.text
    assert "agent was import:scripted_agents:HarmfulOnce, is zscore" in caplog.text
    assert "guard.max_increase was 0.08, is Infinity" in caplog.text
    caplog.clear()
    resume(stopped)
    assert not caplog.text
    # What an edit lets go on goes on, as with --set.
    file.write_text(file.read_text().replace("max_steps: 3", "max_steps: 9"))
    assert resume(stopped).metrics.status == "target_reached"
    assert "max_steps was 3, is 9" in caplog.text


def test_a_target_edited_into_the_config_file_is_refused(stopped: Path) -> None:
    file = stopped / "config.yaml"
    file.write_text(file.read_text().replace("target: 0.3", "target: 0.2"))
    with pytest.raises(StoreError, match=r"config\.yaml is not what the run began with"):
        resume(stopped)


@pytest.mark.parametrize("when", [1, 3])
def test_a_model_that_changed_under_the_run_is_refused(
    when: int, reference_config: dict[str, Any], submit: Submit, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(reference_config["model"], tmp_path / "model"))
    out = tmp_path / "run"
    # The change is found whichever node comes next: here apply_prune or evaluate_ppl.
    kill = {"at": "prunewright.tools.bench.workbench:Workbench.guard_losses", "when": "before"}
    job = {"config": reference_config | {"model": str(model)}, "out": str(out)}
    died = submit(job | {"do": "run", "kill": kill | {"nth": when + 1}})
    assert died == {"signal": signal.SIGKILL}
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = contents(out)
    answer = submit(job | {"do": "resume"})
    assert answer["error"] == "StoreError"
    assert "its model is no longer what it began with (sha256 was" in answer["message"]
    assert contents(out) == before


def test_a_text_that_changed_under_the_run_is_refused(
    reference_config: dict[str, Any], submit: Submit, tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    words = [f"the {n} birds of the {n * 7} hills sang {n * n} songs." for n in range(900)]
    text.write_text("\n".join(words))
    config = json.loads(json.dumps(reference_config))
    config["texts"]["calibration"] = str(text)
    out = tmp_path / "run"
    job = {"config": config, "out": str(out)}
    died = submit(job | {"do": "run", "kill": KILL | {"nth": 1}})
    assert died == {"signal": signal.SIGKILL}
    text.write_text("\n".join(reversed(words)))
    answer = submit(job | {"do": "resume"})
    assert answer["error"] == "StoreError"
    assert "its texts is no longer" in answer["message"]
    assert "calibration was" in answer["message"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for index in range(len(data) // 3, len(data), 5):
        data[index] ^= 0x55
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def accepted_mask(run_directory: Path) -> Path:
    revision = trace(run_directory)[0]["revision"]
    manifest = json.loads((run_directory / "revisions/manifests" / f"{revision}.json").read_text())
    digest = min(manifest["layers"].values())
    return run_directory / "revisions" / "masks" / digest


def accepted_manifest(run_directory: Path) -> Path:
    revision = trace(run_directory)[0]["revision"]
    return run_directory / "revisions" / "manifests" / f"{revision}.json"


FILES: dict[str, Callable[[Path], Path]] = {
    "config": lambda run: run / "config.yaml",
    "manifest": lambda run: run / "manifest.json",
    "database": lambda run: run / "state.sqlite",
    "mask": accepted_mask,
    "revision": accepted_manifest,
    "trace": lambda run: run / "trace.jsonl",
}


@pytest.mark.parametrize("damage", [truncate, empty, garble, remove])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_nothing_is_destroyed(
    file: str, damage: Callable[[Path], None], stopped: Path
) -> None:
    path = FILES[file](stopped)
    damage(path)
    before, database = contents(stopped), database_bytes(stopped)
    with pytest.raises(StoreError) as caught:
        resume(stopped)
    assert path.name in str(caught.value)
    assert contents(stopped) == before
    if file in ("config", "manifest", "database"):
        assert database_bytes(stopped) == database


@pytest.mark.parametrize("damage", [truncate, garble, remove])
def test_damaged_metrics_of_a_finished_run(
    damage: Callable[[Path], None], reference: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    damage(out / "metrics.json")
    with pytest.raises(StoreError, match=r"metrics\.json"):
        resume(out)


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        resume(tmp_path)
    with pytest.raises(InputError, match="not a run directory"):
        resume(tmp_path / "nowhere")


def test_a_run_goes_only_into_a_new_or_empty_directory(
    config: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("important")
    file = tmp_path / "file"
    file.write_text("important")
    before = contents(reference)
    with pytest.raises(InputError, match="holds another run: resume it"):
        run(config, out=reference)
    with pytest.raises(InputError, match="not empty"):
        run(config, out=other)
    with pytest.raises(InputError, match="file exists"):
        run(config, out=file)
    assert contents(reference) == before
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert run(config, out=tmp_path / "empty").metrics.status == "target_reached"


PUT = {"at": "prunewright.tools.bench.workbench:Workbench.prune", "nth": 2, "bytes": 60}
SAVE = {"at": "prunewright.tools.saving.model:rewrite", "bytes": 5_000}
STATE = {"at": "prunewright.graph.nodes.decide:ask", "nth": 2, "bytes": 5_000}


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize(
    ("disk", "words"), [(PUT, "revisions"), (SAVE, "save the model"), (STATE, "")]
)
def test_a_full_disk_is_reported_and_the_run_goes_on_afterwards(
    disk: dict[str, Any],
    words: str,
    for_good: bool,
    reference: Path,
    reference_config: dict[str, Any],
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    if disk is STATE and not for_good:
        disk = disk | {"at": "langgraph.checkpoint.sqlite:SqliteSaver.put", "nth": 4}
    out = tmp_path / "run"
    job = {"config": reference_config, "out": str(out)}
    answer = submit(job | {"do": "run", "disk": disk | {"for_good": for_good}})
    assert answer.get("error") == "StoreError", answer
    assert str(out) in answer["message"]
    assert "resume" in answer["message"]
    assert words in answer["message"] or for_good
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(reference, out)
