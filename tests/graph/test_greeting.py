"""A key that is wrong and a server that is dead are found before the model is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import CANARY, FakeGemini, FakeLLM, FakeOllama, serve
from typer.testing import CliRunner, Result

from prunewright.graph import resume, run
from prunewright.graph.agents import CONTROLS, greet_agent
from prunewright.graph.agents.available import available
from prunewright.graph.cli import app
from prunewright.state import AgentError, PruneContext


def invoke(config: dict[str, Any], tmp_path: Path) -> Result:
    """A run that would fail on its model, were it loaded."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"model": str(tmp_path / "no model")}))
    return CliRunner().invoke(app, ["run", "-c", str(path), "-o", str(tmp_path / "run")])


def asking(llm: FakeLLM, **options: Any) -> dict[str, Any]:
    return {
        "agent": llm.agent,
        "agent_options": llm.options(**options),
        "asking": {"attempts": 2, "wait": 0.01},
    }


def test_a_wrong_key_is_named_before_the_model_is_loaded(llm: FakeLLM, tmp_path: Path) -> None:
    llm.greeting = llm.error(401, "who are you?")
    result = invoke(asking(llm), tmp_path)
    assert result.exit_code == 1
    words = " ".join(result.stderr.split())
    assert "who are you?" in words
    assert f"for the server at {llm.url}" in words
    if not isinstance(llm, FakeOllama):  # which knows no keys
        assert llm.variable in words
    assert "no model" not in words
    assert CANARY not in result.output
    assert (len(llm.greeted), llm.received) == (1, [])
    assert not (tmp_path / "run").exists()


def test_googles_words_for_a_wrong_key(gemini: FakeGemini, tmp_path: Path) -> None:
    gemini.greeting = gemini.error(400, "API key not valid.", "INVALID_ARGUMENT")
    words = " ".join(invoke(asking(gemini), tmp_path).stderr.split())
    assert "is the key in GOOGLE_API_KEY or GEMINI_API_KEY right" in words


def test_a_dead_server_is_named_before_the_model_is_loaded(llm: FakeLLM, tmp_path: Path) -> None:
    with serve(type(llm)) as other:
        config = asking(other)
    result = invoke(config, tmp_path)
    assert result.exit_code == 1
    words = " ".join(result.stderr.split())
    assert f"the address is {other.url}" in words
    assert "in 2 tries" in words
    assert "no model" not in words


def test_whoever_answers_is_asked_once_and_the_model_is_loaded_then(
    llm: FakeLLM, tmp_path: Path
) -> None:
    result = invoke(asking(llm), tmp_path)
    assert result.exit_code == 2
    assert "no model" in result.stderr
    assert (len(llm.greeted), llm.received) == (1, [])


def test_the_small_question_counts_towards_no_budget(
    gemini: FakeGemini, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    gemini.otherwise = gemini.sensible
    config = pico_config | asking(gemini) | {"max_steps": 1}
    config["asking"] |= {"max_calls": 1}
    metrics = run(config, out=tmp_path / "run").metrics
    assert metrics.llm_calls == len(gemini.received) == 1
    assert len(gemini.greeted) == 1


def test_its_tries_count_towards_no_budget(llm: FakeLLM, tmp_path: Path) -> None:
    llm.greeting = llm.error(503, "still loading")
    config = asking(llm)
    config["asking"] |= {"max_calls": 1, "max_tokens": 1}
    words = " ".join(invoke(config, tmp_path).stderr.split())
    assert "in 2 tries" in words
    assert "budget" not in words
    assert len(llm.greeted) == 2


def test_a_step_that_was_decided_ends_the_run_without_the_llm(
    gemini: FakeGemini, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    def stop(_mode: str, event: dict[str, Any]) -> None:
        if "step" in event:
            raise KeyboardInterrupt

    gemini.otherwise = gemini.sensible
    config = pico_config | asking(gemini) | {"max_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "run", on_event=stop)
    gemini.greeting = gemini.error(401, "your key has expired")
    assert resume(tmp_path / "run").metrics.steps == 1
    with pytest.raises(AgentError, match="your key has expired"):
        resume(tmp_path / "run", max_steps=2)


@pytest.mark.parametrize(
    "name",
    [*CONTROLS, "exchange:answers", "import:prunewright.graph.agents.controls:GreedyAgent"],
)
def test_nobody_else_is_asked(name: str) -> None:
    told: list[Any] = []
    greet_agent(PruneContext(agent=name), lambda *words: told.append(words))
    assert told == []


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(FakeOllama) as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        assert isinstance(fake, FakeOllama)
        yield fake


def row() -> tuple[bool, str]:
    return next((r.ready, r.words) for r in available() if r.name == "ollama:MODEL")


def test_ollama_is_available_where_one_answers(ollama: FakeOllama) -> None:
    ollama.pages["/api/tags"] = json.dumps({"models": [{"model": "qwen3:8b"}]}).encode()
    assert row() == (True, "an LLM; the server has qwen3:8b")
    ollama.pages["/api/tags"] = b'{"models": []}'
    assert row() == (True, "an LLM; the server has no model yet")


def test_ollama_is_not_available_where_none_answers(
    ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not row()[0]  # something else is there
    with serve(FakeOllama) as gone:
        monkeypatch.setenv("OLLAMA_HOST", gone.url)
    ready, words = row()
    assert not ready
    assert words.startswith(f"no Ollama answers at {gone.url} (")
    assert "OLLAMA_HOST" in words
