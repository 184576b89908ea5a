"""What LangSmith is told, by real processes whose real client sends to a loopback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from fake_langsmith import CANARY, FakeLangSmith, serve_langsmith
from loopback import FakeGemini

NODES = {"profile", "agent_decide", "apply_prune", "evaluate_ppl", "reflect", "finish"}


def start(
    config: dict[str, Any], folder: Path, langsmith: FakeLangSmith, **variables: str
) -> subprocess.Popen[bytes]:
    """A run of the command line in a process of its own; LANGSMITH_TRACING as given or unset."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | langsmith.environment | {"OMP_NUM_THREADS": "1"}
    environment.pop("LANGSMITH_TRACING")
    command = [sys.executable, "-m", "prunewright.graph.cli", "run", "-c", "config.yaml"]
    with (folder / "screen").open("wb") as screen:
        return subprocess.Popen(
            [*command, "-o", "run"],
            cwd=folder,
            env=environment | variables,
            stdout=screen,
            stderr=screen,
        )


def test_langsmith_is_told_of_a_run_if_its_variables_are_set_and_else_nothing(
    pico_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    gemini.otherwise = gemini.sensible
    config = pico_config | {
        "target": 0.2,
        "agent": gemini.agent,
        "agent_options": gemini.options(),
        "asking": {"timeout": 60, "wait": 0.01},
    }
    with serve_langsmith() as told, serve_langsmith() as untold:
        runs = [
            start(config, tmp_path / "traced", told, LANGSMITH_TRACING="true"),
            start(config, tmp_path / "silent", untold),
        ]
        screens = [tmp_path / name / "screen" for name in ("traced", "silent")]
        for run, screen in zip(runs, screens, strict=True):
            assert run.wait() == 0, screen.read_text()

    assert untold.requests == []
    assert told.keys == {CANARY}
    expected = {
        "model": config["model"],
        "agent": gemini.agent,
        "criterion": "wanda",
        "target": 0.2,
    }
    (root,) = told.roots()
    assert root["name"] == "prunewright"
    # Whoever is told at all is told the end, too: nothing was lost when the process ended.
    assert all(run["end_time"] and not run.get("error") for run in told.runs.values())
    for run in told.runs.values():
        assert expected.items() <= run["extra"]["metadata"].items(), run["name"]
        assert {"wanda", gemini.agent} <= set(run["tags"]), run["name"]
    children = [r["name"] for r in told.runs.values() if r.get("parent_run_id") == root["id"]]
    assert set(children) == NODES
    asked = [run for run in told.runs.values() if run["run_type"] == "llm"]
    assert len(asked) == children.count("agent_decide") == children.count("reflect") >= 2

    sent = b"".join(told.bodies)
    assert b"The cheapest layers of the table." in sent
    for key in (gemini.key, CANARY):
        assert key.encode() not in sent
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {"trace.jsonl", "state.sqlite", "screen"} <= {path.name for path in files}
        assert [path for path in files if key.encode() in path.read_bytes()] == []
