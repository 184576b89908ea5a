"""`agents` and `ask`, as a user meets them."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import FakeOllama, serve
from typer.testing import CliRunner, Result

from prunewright.graph.agents import Observation
from prunewright.graph.agents.chat.reading import answer_schema
from prunewright.graph.agents.controls import GreedyAgent
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.cli import app
from prunewright.state import AgentError, Decision, InputError

CANARY = "canary-0123456789-never-to-be-seen"


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def listed() -> dict[str, dict[str, Any]]:
    result = invoke("agents", "--json")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)["agents"]}


# agents


def set_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """Let the packages of all LLM agents seem installed, or none of them."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name.startswith("langchain_") and name != "langchain_core":
            return ModuleSpec(name, None) if installed else None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_agents_without_packages_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch, False)
    rows = listed()
    for name in ("auto", "greedy", "balance", "zscore", "random", "uniform", "replay:FILE"):
        assert rows[name]["ready"] is True, name
    assert rows["auto"]["words"].startswith("greedy (")
    for name in ("google_genai", "openai", "anthropic", "ollama"):
        assert rows[f"{name}:MODEL"]["ready"] is False
        assert "pip install" in rows[f"{name}:MODEL"]["words"]
    text = invoke("agents").stdout
    for row in rows.values():
        assert row["name"] in text


def test_agents_with_packages_but_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch, True)
    rows = listed()
    for name, variable in (
        ("google_genai", "GOOGLE_API_KEY or GEMINI_API_KEY"),
        ("openai", "OPENAI_API_KEY"),
        ("anthropic", "ANTHROPIC_API_KEY"),
    ):
        assert rows[f"{name}:MODEL"]["ready"] is False
        assert variable in rows[f"{name}:MODEL"]["words"]


def test_agents_with_keys_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch, True)
    for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(variable, CANARY)
    with serve(FakeOllama) as ollama:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OLLAMA_HOST", ollama.url)
        ollama.pages["/api/tags"] = b'{"models": []}'
        rows = listed()
    assert [name for name, row in rows.items() if not row["ready"]] == []
    assert rows["auto"]["words"].startswith("google_genai:")
    for args in (["agents"], ["agents", "--json"]):
        assert CANARY not in invoke(*args).output


# ask


class Watching:
    """Greedy; keeps the prompts that an LLM in its place would have been asked."""

    seen: list[list[str]]
    stop_at: int | None

    def decide(self, observation: Observation) -> Decision:
        Watching.seen.append([str(message.text) for message in prompt(observation)])
        if observation.step == Watching.stop_at:
            raise AgentError("the line is dead")
        return GreedyAgent().decide(observation)


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of `Watching` as an agent."""
    monkeypatch.setitem(sys.modules, "watching_of_test_cli_agents", sys.modules[__name__])
    monkeypatch.setattr(Watching, "seen", [], raising=False)
    monkeypatch.setattr(Watching, "stop_at", None, raising=False)
    return "import:watching_of_test_cli_agents:Watching"


@pytest.fixture
def config_file(pico_config: dict[str, Any], watching: str, tmp_path: Path) -> Path:
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(pico_config | {"agent": watching}))
    return path


def asked(*args: str | Path) -> dict[str, Any]:
    result = invoke("ask", *args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def texts(found: dict[str, Any]) -> list[str]:
    return [message["content"] for message in found["messages"]]


def contents(path: Path) -> dict[str, str]:
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def test_ask_shows_what_is_asked_and_changes_nothing(
    config_file: Path, tmp_path: Path, make_observation: Callable[..., Observation]
) -> None:
    out = tmp_path / "run"
    Watching.stop_at = 1
    assert invoke("run", "-c", config_file, "-o", out).exit_code == 1
    before = contents(out)
    found = asked(out)
    # The step that is asked for next, and the one before it.
    assert texts(found) == Watching.seen[1]
    assert (found["step"], found["about"]) == (2, "the step that the run is at")
    # As of any step of a run with one text.
    schema = answer_schema(make_observation(max_probes=4))
    assert found["schema"] == schema
    assert [message["role"] for message in found["messages"]] == ["system", "human"]
    assert texts(asked(out, "--step", "1")) == Watching.seen[0]
    assert contents(out) == before
    shown = invoke("ask", out)
    assert shown.exit_code == 0
    for text in Watching.seen[1]:
        assert text in shown.stdout
    assert json.dumps(schema, indent=2) in shown.stdout
    for step in ("3", "99"):
        late = invoke("ask", out, "--step", step)
        assert late.exit_code == 2
        assert f"has the profile of no step {step}" in " ".join(late.stderr.split())

    # The run goes on, and was asked just that.
    Watching.stop_at = None
    assert invoke("resume", out).exit_code == 0
    assert Watching.seen[2] == texts(found)
    finished = asked(out)
    assert finished["step"] == len(Watching.seen) - 1
    assert texts(finished) == Watching.seen[-1]
    assert "the run has ended, the target sparsity is reached" in finished["about"]
    assert texts(asked(out, "--step", "2")) == Watching.seen[1]


def test_ask_between_two_steps(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second profile fails: the last prompt that there is, and words that say so."""
    from prunewright.tools.bench.workbench import Workbench

    out = tmp_path / "run"
    real, calls = Workbench.profile, []

    def profile(self: Workbench, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise InputError("no second profile")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "profile", profile)
        assert invoke("run", "-c", config_file, "-o", out).exit_code == 2
    found = asked(out)
    assert (found["step"], texts(found)) == (1, Watching.seen[0])
    assert found["about"] == "the step before the next: step 2 has no profile yet"


def test_ask_before_the_first_profile(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunewright.tools.bench.workbench import Workbench

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "profile", fail)
        assert invoke("run", "-c", config_file, "-o", out).exit_code == 130
    result = invoke("ask", out)
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert "has the profile of no step yet" in words
    assert f"prunewright resume {out}" in words


def test_ask_while_the_run_goes_on(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a decision: the database is open and locked by the run."""
    out = tmp_path / "run"
    found: list[dict[str, Any]] = []
    real = Watching.decide

    def decide(self: Watching, observation: Observation) -> Decision:
        found.append(asked(out))
        return real(self, observation)

    monkeypatch.setattr(Watching, "decide", decide)
    assert invoke("run", "-c", config_file, "-o", out).exit_code == 0
    assert len(found) > 1
    assert [texts(f) for f in found] == Watching.seen
    assert [f["step"] for f in found] == list(range(1, len(found) + 1))


def test_ask_of_what_has_no_prompt(config_file: Path, tmp_path: Path) -> None:
    result = invoke("ask", tmp_path)
    assert result.exit_code == 2
    assert "is not a run directory" in " ".join(result.stderr.split())
    out = tmp_path / "uniform"
    assert invoke("baseline", "-c", config_file, "-o", out).exit_code == 0
    result = invoke("ask", out)
    assert result.exit_code == 2
    assert "holds a baseline: no agent is asked in it" in " ".join(result.stderr.split())


def test_a_damaged_database_is_named(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Watching.stop_at = 0
    assert invoke("run", "-c", config_file, "-o", out).exit_code == 1
    for name in ("state.sqlite-wal", "state.sqlite-shm"):
        (out / name).unlink(missing_ok=True)
    (out / "state.sqlite").write_bytes(b"\0garbage" * 1000)
    result = invoke("ask", out)
    assert result.exit_code == 1
    assert "state.sqlite cannot be read" in " ".join(result.stderr.split())
