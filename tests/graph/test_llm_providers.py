"""Every way in which asking can go wrong, with each provider's own client over the loopback."""

import json
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity.nap
import yaml
from loopback import FakeAnthropic, FakeGemini, FakeLLM, FakeOllama, FakeOpenAI, Reply, serve
from profiles import make_model
from typer.testing import CliRunner

from prunewright.graph.agents import Observation, make_agent, resolve_agent
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.chat.agent import MAX_WAIT, PLACEHOLDER
from prunewright.graph.agents.chat.reading import answer_schema
from prunewright.graph.agents.controls import GreedyAgent
from prunewright.graph.cli import app
from prunewright.state import AgentError, InputError, PruneContext, Spent, Step
from prunewright.state.config import AskingOptions

GOOD = (("0.mlp.down_proj", 0.1), ("2.mlp.down_proj", 0.05))
FULL = {"model.layers.0.mlp.down_proj": 0.1, "model.layers.2.mlp.down_proj": 0.05}

Ask = Callable[..., Step]


@pytest.fixture
def asked(llm: FakeLLM, make_observation: Callable[..., Observation]) -> Ask:
    """A function that asks the agent for one step, as the node does."""

    def run(spent: Spent | None = None, **options: Any) -> Step:
        asking = AskingOptions(**({"timeout": 20, "attempts": 3, "wait": 0.01} | options))
        context = PruneContext(
            agent=llm.agent, agent_options=llm.options(), asking=asking, out="runs/it's"
        )
        name, agent = make_agent(context, spent)
        return ask(name, agent, make_observation(), repairs=asking.repairs)

    return run


def deltas(report: Step) -> dict[str, float]:
    return report.decision.deltas


def test_a_good_answer(llm: FakeLLM, asked: Ask) -> None:
    llm.script = [llm.decision(*GOOD, tokens=321)]
    report = asked()
    assert deltas(report) == FULL
    assert (report.invalid_answers, report.notes) == ([], [])
    assert (report.llm_calls, report.repairs, report.llm_tokens) == (1, 0, 321)


def test_what_each_server_gets(
    llm: FakeLLM, asked: Ask, make_observation: Callable[..., Observation]
) -> None:
    llm.script = [llm.decision(*GOOD)]
    asked()
    (received,) = llm.received
    path = {
        "google_genai": "/v1beta/models/gemini-3-flash-preview:generateContent",
        "openai": "/v1/chat/completions",
        "anthropic": "/v1/messages",
        "ollama": "/api/chat",
    }[llm.provider]
    assert (received.path, received.key) == (path, llm.key)
    assert llm.key not in json.dumps(received.body)
    assert received.system.startswith("You decide how an LLM is pruned")
    assert [role for role, _ in received.turns] == ["user"]
    assert [row["name"] for row in received.table] == [f"{i}.mlp.down_proj" for i in range(4)]
    schema = answer_schema(make_observation(), strict=llm.provider == "openai")
    if llm.provider == "anthropic":  # its client moves bounds into the descriptions
        assert received.schema["required"] == schema["required"]
        assert received.schema["additionalProperties"] is False
    else:
        # OpenAI's client sends title and description beside the schema.
        beside = {"title": "Decision", "description": schema["description"]}
        assert received.schema | beside == schema
    if llm.provider == "openai":
        assert received.body["response_format"]["json_schema"]["strict"] is True
    if llm.provider == "ollama":
        options = received.body["options"]
        assert options == {"temperature": 0.5, "num_ctx": 16_384, "num_predict": 8_192}


def test_each_provider_takes_the_proposal(
    llm: FakeLLM, make_observation: Callable[..., Observation]
) -> None:
    observation = make_observation(make_model(2, domains=("code", "german")).layers, target=0.6)
    name, agent = make_agent(PruneContext(agent=llm.agent, agent_options=llm.options()))
    llm.script = [
        llm.text('{"reasoning": "", "accept": true}'),
        llm.text('{"reasoning": "Spare it.", "accept": true, "weights": {"code": 0, "german": 1}}'),
    ]
    accepted, weighed = (ask(name, agent, observation, repairs=0) for _ in range(2))
    assert (accepted.invalid_answers, weighed.invalid_answers) == ([], [])
    assert deltas(accepted) == GreedyAgent().decide(observation).deltas
    assert weighed.ranking is not None
    assert weighed.ranking.weights == {"code": 0, "german": 1}
    for received in llm.received:
        weights = received.schema["properties"]["weights"]
        assert weights["required"] == list(weights["properties"]) == ["code", "german"]
        assert weights["additionalProperties"] is False


def mended(llm: FakeLLM) -> str:
    """The beginning of an answer, which LangChain's parser would close to a shorter decision."""
    whole = llm.answer(*GOOD)
    return whole[: whole.index("}") + 1]


INVALID: dict[str, tuple[Callable[[FakeLLM], Reply], str]] = {
    "malformed JSON": (lambda llm: llm.text("I would prune 0.mlp.down_proj."), "JSON"),
    "wrong schema": (lambda llm: llm.text('{"prune": "all"}'), "prune: Extra inputs"),
    "empty": (lambda llm: llm.text(" "), "the answer is empty"),
    "cut": (lambda llm: llm.text(mended(llm), llm.cut), "cut off or withheld (finish reason"),
    "cut after its end": (
        lambda llm: llm.text(llm.answer(*GOOD), llm.cut),
        "cut off or withheld (finish reason",
    ),
    "no finish reason": (lambda llm: llm.text(mended(llm), None), "no finish reason"),
    "out of bounds": (
        lambda llm: llm.decision(("0.mlp.down_proj", 0.5)),
        "delta 0.5 is not within 0.15 of 0",
    ),
    "unknown layer": (
        lambda llm: llm.decision(("9.mlp.down_proj", 0.1)),
        "unknown layer '9.mlp.down_proj'",
    ),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_answer_is_sent_back(llm: FakeLLM, asked: Ask, fault: str) -> None:
    make, problem = INVALID[fault]
    llm.script = [make(llm), llm.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert len(report.invalid_answers) == 1
    assert problem in report.invalid_answers[0]
    assert problem in llm.received[1].turns[-1][1]
    assert (report.llm_calls, report.repairs) == (2, 1)
    # An Ollama that is cut before its last line has not counted.
    uncounted = llm.provider == "ollama" and fault == "no finish reason"
    assert report.llm_tokens == (100 if uncounted else 200)


@pytest.mark.parametrize(
    ("llm", "make", "problem"),
    [
        ("google_genai", FakeGemini.withheld, "finish reason SAFETY"),
        ("google_genai", FakeGemini.blocked, "prompt blocked: PROHIBITED_CONTENT"),
        ("openai", FakeOpenAI.withheld, "the model refused: I cannot help with that."),
        ("openai", FakeOpenAI.filtered, "finish reason content_filter"),
        ("anthropic", FakeAnthropic.withheld, "finish reason refusal"),
        ("ollama", FakeOllama.withheld, "JSON"),
    ],
    indirect=["llm"],
)
def test_what_is_withheld_is_asked_for_again(
    llm: FakeLLM, asked: Ask, make: Callable[[Any], Reply], problem: str
) -> None:
    llm.script = [make(llm), llm.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert problem in report.invalid_answers[0]


TRANSIENT: dict[str, Callable[[FakeLLM], Reply]] = {
    "429": lambda llm: llm.error(429, f"quota of {llm.key}"),
    "500": lambda llm: llm.error(500, "internal"),
    "503": lambda llm: llm.error(503, "overloaded"),
    "dropped socket": lambda llm: llm.dropped(),
    "torn answer": lambda llm: llm.torn(),
    "page with 200": lambda llm: llm.html(),
    "page with 502": lambda llm: llm.html(502),
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_may_pass_is_tried_again(llm: FakeLLM, asked: Ask, fault: str) -> None:
    llm.script = [TRANSIENT[fault](llm), llm.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert (len(llm.received), report.llm_calls, report.repairs) == (2, 2, 0)
    assert report.invalid_answers == []
    (note,) = report.notes
    assert note.startswith("try 1 failed: ")
    assert llm.key not in report.model_dump_json()
    assert llm.received[0].turns == llm.received[1].turns  # not a repair


@pytest.mark.parametrize("fault", TRANSIENT)
def test_tries_are_ours_alone_and_bounded(llm: FakeLLM, asked: Ask, fault: str) -> None:
    llm.otherwise = TRANSIENT[fault](llm)
    with pytest.raises(AgentError, match=f"^the agent {llm.agent} gave no answer in 3 tries: "):
        asked()
    assert len(llm.received) == 3


def test_an_answer_that_never_comes(llm: FakeLLM, asked: Ask) -> None:
    llm.script = [llm.hanging()]
    llm.otherwise = llm.decision(*GOOD)
    report = asked(timeout=0.5, attempts=10)
    assert deltas(report) == FULL
    assert re.search("time", report.notes[0], re.IGNORECASE)


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_what_will_not_pass_is_not_tried_again(llm: FakeLLM, asked: Ask, code: int) -> None:
    llm.otherwise = llm.error(code, f"not with {llm.key}, said the provider")
    with pytest.raises(AgentError) as caught:
        asked()
    assert len(llm.received) == 1
    text = str(caught.value)
    assert text.startswith(f"the agent {llm.agent} gave no answer: ")
    assert str(code) in text
    assert "not with [redacted], said the provider" in text
    assert llm.key not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("asked_for", "waited"),
    [
        ("17", 17.0),
        ("100000", MAX_WAIT),
        ("Wed, 21 Oct 2999 07:28:00 GMT", MAX_WAIT),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ("soon", None),
        ("nan", None),
    ],
)
def test_a_server_that_asks_to_wait_is_waited_for(
    llm: FakeLLM,
    asked: Ask,
    monkeypatch: pytest.MonkeyPatch,
    asked_for: str,
    waited: float | None,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=slept.append))
    llm.script = [llm.error(429, "slow down", Retry_After=asked_for), llm.decision(*GOOD)]
    report = asked(wait=0.5)
    assert deltas(report) == FULL
    # Ollama's client does not hand headers on.
    if waited is None or llm.provider == "ollama":
        assert 0.5 <= slept[0] <= 1.0
        assert "asks to wait" not in report.notes[0]
    else:
        assert slept == [waited]
        assert "the server asks to wait " in report.notes[0]


@pytest.mark.parametrize(
    ("bound", "script", "made"),
    [
        ({"max_calls": 12}, ["invalid", "invalid", "good"], 2),
        ({"max_calls": 12}, ["500", "500", "good"], 2),
        ({"max_calls": 13}, ["500", "invalid", "good"], 3),
        ({"max_tokens": 1150}, ["invalid", "invalid", "good"], 2),
        ({"max_tokens": 1000}, ["good"], 0),
    ],
)
def test_the_budget_of_the_run(
    llm: FakeLLM, asked: Ask, bound: dict[str, int], script: list[str], made: int
) -> None:
    """Ten calls and 1,000 tokens were spent in earlier steps; retries and repairs count."""
    kinds = {
        "good": llm.decision(*GOOD),
        "invalid": llm.text("no"),
        "500": llm.error(500, "internal"),
    }
    llm.script = [kinds[kind] for kind in script]
    before = Spent(calls=10, tokens=1000)
    if made == len(script):
        assert deltas(asked(before, **bound)) == FULL
        return
    ((key, limit),) = bound.items()
    with pytest.raises(AgentError) as caught:
        asked(before, **bound)
    text = str(caught.value)
    assert f"asking.{key} is {limit}" in text
    assert f"Go on with: prunewright resume 'runs/it'\"'\"'s' --set asking.{key}=" in text
    assert len(llm.received) == made


@pytest.mark.parametrize("kind", [FakeOpenAI, FakeAnthropic])
def test_a_server_of_ones_own_needs_no_key(
    kind: type[FakeLLM],
    make_observation: Callable[..., Observation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(kind.variable, raising=False)
    with serve(kind) as llm:
        llm.otherwise = llm.decision(*GOOD)
        with pytest.raises(InputError, match=f"needs an API key.* {kind.variable}.*base_url"):
            resolve_agent(llm.agent)
        context = PruneContext(agent=llm.agent, agent_options=llm.options())
        why = resolve_agent(llm.agent, context.agent_options).why
        report = ask(*make_agent(context), make_observation(), repairs=0)
    assert deltas(report) == FULL
    words = f"{kind.variable} is not set: the server at base_url is sent a placeholder for the key"
    assert report.notes == [words]
    assert words in why
    assert llm.received[0].key == PLACEHOLDER


def test_a_temperature_that_a_model_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's client would drop it without a word."""
    monkeypatch.setenv("OPENAI_API_KEY", "k" * 20)
    make_agent(PruneContext(agent="openai:gpt-5"))
    context = PruneContext(agent="openai:gpt-5", agent_options={"temperature": 0.5})
    with pytest.raises(InputError, match="the model of openai:gpt-5 takes no temperature"):
        make_agent(context)


@pytest.fixture
def config_file(pico_config: dict[str, Any], llm: FakeLLM, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    config = pico_config | {
        "agent": llm.agent,
        "agent_options": llm.options(),
        "asking": {"timeout": 30, "attempts": 2, "wait": 0.01},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_failing_provider_costs_nothing_but_time_and_its_key_is_nowhere(
    llm: FakeLLM, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run fails by a refused key, then by dropped sockets, and is resumed to its end."""
    out, runner = tmp_path / "run", CliRunner()
    llm.script = [llm.sensible, llm.error(401, f"the key {llm.key} is not valid")]
    first = runner.invoke(app, ["--debug", "run", "-c", str(config_file), "-o", str(out)])
    assert first.exit_code == 1
    assert "401" in first.stderr
    assert f"go on with: prunewright resume {out}" in " ".join(first.stderr.split())
    before = (out / "trace.jsonl").read_bytes()
    assert len(before.splitlines()) == 1

    llm.otherwise = llm.dropped()
    second = runner.invoke(app, ["--debug", "resume", str(out)])
    assert second.exit_code == 1
    assert f"the agent {llm.agent} gave no answer in 2 tries" in " ".join(second.stderr.split())
    assert (out / "trace.jsonl").read_bytes() == before

    llm.otherwise = llm.sensible
    third = runner.invoke(app, ["resume", str(out), "--json"])
    assert third.exit_code == 0, third.stderr
    trace = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert (out / "trace.jsonl").read_bytes().startswith(before)
    metrics = json.loads((out / "metrics.json").read_text())
    shown = runner.invoke(app, ["show", str(out)]).stdout
    calls, tokens = metrics["llm_calls"], metrics["tokens"]["llm"]
    assert f"{len(trace)} decisions; LLM: {calls} calls, {tokens:,} tokens" in shown
    assert (
        "asked      4 calls, 100 tokens"
        in runner.invoke(app, ["show", str(out), "--step", "2"]).stdout
    )
    # The calls of the tries that failed count too: one refused, two dropped.
    assert [record["llm_calls"] for record in trace[:3]] == [1, 4, 1]
    assert metrics["llm_calls"] == len(llm.received) == len(trace) + 3
    assert metrics["tokens"]["llm"] == 100 * len(trace)

    streams = capfd.readouterr()
    for text in (streams.out, streams.err, *(r.output for r in (first, second, third))):
        assert llm.key not in text
    for result in (first, second):
        assert result.exception is not None
        assert llm.key not in "".join(traceback.format_exception(result.exception))
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"trace.jsonl", "state.sqlite", "config.yaml"} <= {path.name for path in files}
    assert [path for path in files if llm.key.encode() in path.read_bytes()] == []
    assert os.environ[llm.variable] == llm.key
