"""The real Gemini client, asked over the loopback: every way in which an answer can go wrong."""

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from loopback import FakeGemini, Reply

from prunewright.graph.agents import InvalidAnswerError, Observation, make_agent
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.chat.agent import LLMAgent
from prunewright.graph.agents.chat.reading import answer_schema, read_answer
from prunewright.state import AgentError, InputError, PruneContext, Step
from prunewright.state.config import AskingOptions
from prunewright.state.decision import MAX_REASONING, Decision

GOOD = (("0.mlp.down_proj", 0.1), ("2.mlp.down_proj", 0.05))
FULL = {"model.layers.0.mlp.down_proj": 0.1, "model.layers.2.mlp.down_proj": 0.05}

Ask = Callable[..., Step]


@pytest.fixture
def asked(gemini: FakeGemini, make_observation: Callable[..., Observation]) -> Ask:
    """A function that asks the agent for one step, as the node does."""

    def run(observation: Observation | None = None, *, repairs: int = 2, **options: Any) -> Step:
        asking = {"timeout": 20, "attempts": 3, "wait": 0.01, "repairs": repairs} | options
        context = PruneContext(
            agent=gemini.agent, agent_options=gemini.options(), asking=AskingOptions(**asking)
        )
        name, agent = make_agent(context)
        return ask(name, agent, observation or make_observation(), repairs=repairs)

    return run


def deltas(report: Step) -> dict[str, float]:
    return report.decision.deltas


def words(error: BaseException) -> str:
    """All that a user or a log can see of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


def test_a_good_answer(gemini: FakeGemini, asked: Ask) -> None:
    gemini.script = [gemini.decision(*GOOD, tokens=321)]
    report = asked()
    assert report.agent == gemini.agent
    assert deltas(report) == FULL
    assert report.invalid_answers == []
    assert report.notes == []
    assert report.llm_tokens == 321
    assert report.predicted_change == pytest.approx(0.004, rel=0.01)


def test_what_the_server_gets(
    gemini: FakeGemini, asked: Ask, make_observation: Callable[..., Observation]
) -> None:
    gemini.script = [gemini.decision(*GOOD)]
    asked()
    (received,) = gemini.received
    assert received.path == "/v1beta/models/gemini-3-flash-preview:generateContent"
    assert received.headers["x-goog-api-key"] == gemini.key
    assert received.generation["temperature"] == 0.5
    assert received.generation["responseMimeType"] == "application/json"
    schema = received.generation["responseJsonSchema"]
    assert schema == answer_schema(make_observation())
    assert gemini.key not in json.dumps(received.body)
    assert [role for role, _ in received.turns] == ["user"]
    assert [row["name"] for row in received.table] == [f"{i}.mlp.down_proj" for i in range(4)]
    assert received.budget == 0.05


def test_the_schema_that_is_sent(make_observation: Callable[..., Observation]) -> None:
    """Flat, closed, and without the length bounds that Gemini refuses to serve."""
    schema = answer_schema(make_observation())
    text = json.dumps(schema)
    assert all(word not in text for word in ("maxItems", "maxLength", "$ref", "$defs", "anyOf"))
    assert list(schema["properties"]) == [
        *("reasoning", "accept", "layers", "groups", "expected_ppl_change", "rebalance"),
        *("done", "lessons"),
    ]
    assert schema["additionalProperties"] is False
    entry = schema["properties"]["layers"]["items"]
    assert entry["required"] == ["name", "delta"]
    assert entry["additionalProperties"] is False
    assert entry["properties"]["delta"]["minimum"] == -1
    assert entry["properties"]["delta"]["maximum"] == 1
    assert all("description" in value for value in entry["properties"].values())
    assert schema["properties"]["expected_ppl_change"]["type"] == "number"
    assert schema["title"] == "Decision"
    # What it asks for is what is read.
    answer = {"reasoning": "r", "layers": [{"name": "n", "delta": 0.1}], "expected_ppl_change": 0}
    assert read_answer(json.dumps(answer)).layers[0].delta == 0.1


def test_no_parser_of_langchain_touches_an_answer(
    gemini: FakeGemini, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It mends cut answers, and needs minutes for a long one that is no JSON."""

    calls = []

    def called(*_: object, **__: object) -> None:
        calls.append("LangChain parsed an answer")

    monkeypatch.setattr(JsonOutputParser, "parse_result", called)
    monkeypatch.setattr(PydanticOutputParser, "parse_result", called)
    gemini.script = [gemini.text("I think " * 20_000), gemini.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert "JSON" in report.invalid_answers[0]
    assert calls == []


def test_without_options_of_its_own_the_temperature_is_the_default(
    gemini: FakeGemini, make_observation: Callable[..., Observation]
) -> None:
    gemini.script = [gemini.decision(*GOOD)]
    LLMAgent(gemini.agent, {"base_url": gemini.url}, AskingOptions()).decide(make_observation())
    assert gemini.received[0].generation["temperature"] == 0.5


def test_the_second_variable_for_the_key(
    gemini: FakeGemini, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOOGLE_API_KEY")
    monkeypatch.setenv("GEMINI_API_KEY", gemini.key)
    gemini.script = [gemini.decision(*GOOD)]
    assert deltas(asked()) == FULL
    assert gemini.received[0].headers["x-goog-api-key"] == gemini.key


BROKEN: dict[str, tuple[str, str]] = {
    "not json": ("I would prune 0.mlp.down_proj.", "JSON"),
    "two decisions": ('{"reasoning": "", "layers": []} or {"reasoning": "no"}', "2 different JSON"),
    "an unclosed object": ('{"reasoning": "a", "layers": [', "JSON"),
    "a list": ("[]", "object"),
    "a missing key": ('{"reasoning": "a"}', "layers must be there"),
    "an unknown key": ('{"reasoning": "", "layers": [], "prune_all": true}', "prune_all: Extra"),
    "a delta in words": (
        '{"reasoning": "", "layers": [{"name": "0.mlp.down_proj", "delta": "a lot"}]}',
        "layers.0.delta",
    ),
    "an infinite delta": (
        '{"reasoning": "", "layers": [{"name": "0.mlp.down_proj", "delta": 1e999}]}',
        "layers.0.delta",
    ),
    "reasoning without end": (
        json.dumps({"reasoning": "x" * (MAX_REASONING + 1), "layers": []}),
        "reasoning: String should have at most",
    ),
}

REFUSED: dict[str, tuple[list[tuple[str, float]], str]] = {
    "a delta above the bound": ([("0.mlp.down_proj", 0.16)], "delta 0.16 is not within 0.15 of 0"),
    "a delta of zero": ([("0.mlp.down_proj", 0.0)], "delta is 0"),
    "nothing gained": ([("0.mlp.down_proj", -0.1)], "the step as a whole gains no sparsity"),
    "an unknown layer": ([("9.mlp.down_proj", 0.1)], "unknown layer '9.mlp.down_proj'"),
    "a range of layers": ([("0-3.mlp.down_proj", 0.1)], "unknown layer '0-3.mlp.down_proj'"),
    "a layer twice": (
        [("0.mlp.down_proj", 0.05), ("0.mlp.down_proj", 0.05)],
        "model.layers.0.mlp.down_proj is named twice",
    ),
    "a layer under both of its names": (
        [("0.mlp.down_proj", 0.05), ("model.layers.0.mlp.down_proj", 0.05)],
        "model.layers.0.mlp.down_proj is named twice",
    ),
    "too large a step": (
        [(f"{i}.mlp.down_proj", 0.1) for i in range(4)],
        "adds 0.10000 to the model's sparsity, above the limit of 0.05000: "
        "choose fewer layers, or multiply every delta by 0.500",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_that_is_no_decision_is_sent_back(
    gemini: FakeGemini, asked: Ask, case: str
) -> None:
    text, problem = BROKEN[case]
    gemini.script = [gemini.text(text, tokens=100), gemini.decision(*GOOD, tokens=50)]
    report = asked()
    assert deltas(report) == FULL
    assert len(report.invalid_answers) == 1
    assert problem in report.invalid_answers[0]
    assert report.llm_tokens == 150
    _, (role, answer), (asker, complaint) = gemini.received[1].turns
    assert (role, answer) == ("model", text)
    assert asker == "user"
    assert problem in complaint


@pytest.mark.parametrize("case", REFUSED)
def test_a_decision_that_breaks_a_rule_is_sent_back(
    gemini: FakeGemini, asked: Ask, case: str
) -> None:
    layers, problem = REFUSED[case]
    gemini.script = [gemini.decision(*layers), gemini.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert len(report.invalid_answers) == 1
    assert problem in report.invalid_answers[0]
    _, (role, answer), (_, complaint) = gemini.received[1].turns
    assert role == "model"
    assert [(x["name"], x["delta"]) for x in json.loads(answer)["layers"]] == layers
    assert problem in complaint


def test_a_layer_without_room_is_neither_shown_nor_taken(
    gemini: FakeGemini,
    asked: Ask,
    make_observation: Callable[..., Observation],
    make_layer: Callable[..., Any],
) -> None:
    layers = [make_layer(0, sparsity=0.9), make_layer(1, sparsity=0.8), *map(make_layer, (2, 3))]
    gemini.script = [
        gemini.decision(("0.mlp.down_proj", 0.01)),
        gemini.decision(("1.mlp.down_proj", 0.11)),
        gemini.decision(("1.mlp.down_proj", 0.1)),
    ]
    report = asked(make_observation(layers, target=0.9))
    assert [row["name"] for row in gemini.received[0].table] == [
        f"{i}.mlp.down_proj" for i in (1, 2, 3)
    ]
    assert "exceeds the room left, 0.000" in report.invalid_answers[0]
    assert "exceeds the room left, 0.100" in report.invalid_answers[1]
    assert deltas(report) == {"model.layers.1.mlp.down_proj": 0.1}


def test_a_cut_answer_is_refused_though_it_could_be_mended(gemini: FakeGemini, asked: Ask) -> None:
    whole = gemini.answer(*GOOD)
    prefix = whole[: whole.index("}") + 1]
    mended = Decision.model_validate_json(prefix + "]}")
    assert [item.name for item in mended.layers] == ["0.mlp.down_proj"]
    gemini.script = [gemini.text(prefix, "MAX_TOKENS"), gemini.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert "MAX_TOKENS" in report.invalid_answers[0]
    assert gemini.received[1].turns[1] == ("model", prefix)


def test_an_answer_that_was_cut_after_its_end_is_refused_too(
    gemini: FakeGemini, asked: Ask
) -> None:
    gemini.script = [gemini.text(gemini.answer(*GOOD), "MAX_TOKENS"), gemini.decision(*GOOD)]
    assert len(asked().invalid_answers) == 1


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda g: g.text("", "SAFETY"), "SAFETY"),
        (lambda g: g.text("", "RECITATION"), "RECITATION"),
        (lambda g: g.text("", "STOP"), "the answer is empty"),
        (lambda g: g.text("I would", "A_REASON_OF_2031"), "A_REASON_OF_2031"),
        (lambda g: g.text("I would", None), "no finish reason"),
        (lambda g: g.blocked(), "prompt blocked: PROHIBITED_CONTENT"),
    ],
    ids=["safety", "recitation", "empty", "a new reason", "no reason", "blocked prompt"],
)
@pytest.mark.filterwarnings("ignore:A_REASON_OF_2031:UserWarning")
def test_an_answer_withheld_is_asked_for_again(
    gemini: FakeGemini, asked: Ask, make: Callable[[FakeGemini], Reply], problem: str
) -> None:
    gemini.script = [make(gemini), gemini.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert problem in report.invalid_answers[0]
    assert problem in gemini.received[1].turns[-1][1]


@pytest.mark.parametrize("repairs", [0, 1, 2])
def test_after_the_last_repair_the_decision_is_empty(
    gemini: FakeGemini, asked: Ask, repairs: int
) -> None:
    gemini.otherwise = lambda received: gemini.decision(
        (f"{len(gemini.received)}.not.there", 0.1), tokens=10
    )
    report = asked(repairs=repairs)
    assert len(gemini.received) == repairs + 1
    assert report.decision.layers == []
    assert report.decision.reasoning == "No valid answer: nothing is pruned."
    assert report.predicted_change is None
    assert len(report.invalid_answers) == repairs + 1
    for index, problem in enumerate(report.invalid_answers, start=1):
        assert f"unknown layer '{index}.not.there'" in problem
    assert report.llm_tokens == 10 * (repairs + 1)
    # Each repair carries all that was answered and refused before it.
    assert [len(received.turns) for received in gemini.received] == [
        1 + 2 * i for i in range(repairs + 1)
    ]


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (lambda g: g.error(429, "Resource has been exhausted", "RESOURCE_EXHAUSTED"), "429"),
        (lambda g: g.error(429, "input token limit per minute reached"), "token limit"),
        (lambda g: g.error(408, "slow"), "408"),
        (lambda g: g.error(500, "internal", "INTERNAL"), "500"),
        (lambda g: g.error(503, "overloaded", "UNAVAILABLE"), "overloaded"),
        (lambda g: g.html(502), "502"),
        (lambda g: g.html(), "JSON"),
        (lambda g: g.dropped(), "disconnected"),
    ],
    ids=["429", "429 a minute", "408", "500", "503", "502 page", "200 page", "dropped socket"],
)
def test_what_may_pass_is_tried_again_and_noted(
    gemini: FakeGemini, asked: Ask, make: Callable[[FakeGemini], Reply], note: str
) -> None:
    gemini.script = [make(gemini), make(gemini), gemini.decision(*GOOD)]
    report = asked()
    assert deltas(report) == FULL
    assert report.invalid_answers == []
    assert len(report.notes) == 2
    assert report.notes[0].startswith("try 1 failed: ")
    assert report.notes[1].startswith("try 2 failed: ")
    assert note in report.notes[0]
    # The same request, not a repair.
    assert [received.turns for received in gemini.received[1:]] == [gemini.received[0].turns] * 2


def test_an_answer_that_never_comes_is_given_up_and_asked_for_again(
    gemini: FakeGemini, asked: Ask
) -> None:
    gemini.script = [gemini.hanging()]
    gemini.otherwise = gemini.decision(*GOOD)
    report = asked(timeout=0.5, attempts=10)
    assert deltas(report) == FULL
    assert "Timeout" in report.notes[0]


def test_tries_are_bounded(gemini: FakeGemini, asked: Ask) -> None:
    gemini.otherwise = gemini.error(503, "The model is overloaded.", "UNAVAILABLE")
    with pytest.raises(AgentError, match=r"no answer in 3 tries: .*503 .*overloaded"):
        asked()
    assert len(gemini.received) == 3


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
        (401, "UNAUTHENTICATED", "Request had invalid authentication credentials."),
        (403, "PERMISSION_DENIED", "Your project has been denied access."),
        (404, "NOT_FOUND", "models/gemini-3-flash-preview is not found"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    gemini: FakeGemini, asked: Ask, code: int, status: str, message: str
) -> None:
    # The server's words quote the key: they are shown without it.
    gemini.otherwise = gemini.error(code, f"{message} ({gemini.key})", status)
    with pytest.raises(AgentError) as caught:
        asked()
    assert len(gemini.received) == 1
    text = str(caught.value)
    assert text.startswith(f"the agent {gemini.agent} gave no answer: ")
    assert f"{code} {status}" in text
    assert message in text
    assert "[redacted]" in text
    assert gemini.key not in words(caught.value)


def test_no_server_at_all(gemini: FakeGemini, make_observation: Callable[..., Observation]) -> None:
    asking = AskingOptions(attempts=2, wait=0.01)
    agent = LLMAgent(gemini.agent, {"base_url": "http://127.0.0.1:9"}, asking)
    with pytest.raises(AgentError, match="in 2 tries: ConnectError"):
        agent.decide(make_observation())


def test_the_key_appears_nowhere(
    gemini: FakeGemini, asked: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="langchain_google_genai")
    caplog.set_level(logging.DEBUG, logger="google_genai")
    gemini.script = [
        gemini.error(429, f"quota of key {gemini.key}"),
        gemini.error(500, f"?key={gemini.key}&alt=json"),
        gemini.text("no JSON at all"),
        gemini.blocked(),
        gemini.decision(*GOOD),
    ]
    report = asked()
    assert len(report.notes) == 2
    assert len(report.invalid_answers) == 2
    assert all("[redacted]" in note for note in report.notes)
    assert gemini.key not in report.model_dump_json()
    assert gemini.key not in caplog.text


def test_a_key_of_two_lines_is_not_quoted_by_the_complaint_about_it(
    gemini: FakeGemini,
    make_observation: Callable[..., Observation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOOGLE_API_KEY", f"{gemini.key}\nanother line")
    agent = LLMAgent(gemini.agent, gemini.options(), AskingOptions(wait=0.01))
    with pytest.raises(AgentError, match="Illegal header value") as caught:
        agent.decide(make_observation())
    assert "[redacted]" in str(caught.value)
    assert "tries" not in str(caught.value)
    assert gemini.key not in words(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 99}, "temperature must be in the range"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temprature": 0.5}, "no option temprature; did you mean temperature"),
        ({"model": "another"}, "multiple values for argument 'model'"),
    ],
)
@pytest.mark.filterwarnings("ignore:WARNING! temprature:UserWarning")
def test_options_that_the_client_does_not_take(
    gemini: FakeGemini, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_agent(PruneContext(agent=gemini.agent, agent_options=options))
    assert gemini.key not in words(caught.value)


def test_the_answer_may_come_in_parts_with_thoughts_before(gemini: FakeGemini, asked: Ask) -> None:
    whole = gemini.answer(*GOOD)
    reply = json.loads(gemini.text("").body)
    reply["candidates"][0]["content"]["parts"] = [
        {"text": "Let me think about layer 0.", "thought": True},
        {"text": whole[:40]},
        {"text": whole[40:]},
    ]
    gemini.script = [type(gemini.text(""))(json.dumps(reply).encode())]
    assert deltas(asked()) == FULL


def test_notes_are_those_of_one_question(
    gemini: FakeGemini, make_observation: Callable[..., Observation]
) -> None:
    agent = LLMAgent(gemini.agent, gemini.options(), AskingOptions(wait=0.01))
    gemini.script = [
        gemini.error(500, "once"),
        gemini.decision(*GOOD, tokens=40),
        gemini.decision(*GOOD, tokens=60),
        gemini.text("nonsense", tokens=15),
    ]
    agent.decide(make_observation())
    assert len(agent.notes) == 1
    agent.decide(make_observation())
    assert agent.notes == []
    with pytest.raises(InvalidAnswerError) as caught:
        agent.decide(make_observation())
    assert caught.value.answer == "nonsense"
    assert agent.tokens == 115


def test_nothing_is_written_where_the_process_is(
    gemini: FakeGemini, asked: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gemini.script = [gemini.decision(*GOOD)]
    asked()
    assert list(tmp_path.iterdir()) == []
