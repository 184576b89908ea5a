"""What a server may do to a provider's client: each one's own, over the loopback."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from loopback import PROVIDERS, FakeGemini, FakeLLM, FakeOpenAI, Reply, serve

from prunewright.graph.agents import Observation, make_agent
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.chat.transport import MAX_BODY, address
from prunewright.state import AgentError, InputError, PruneContext, Step
from prunewright.state.config import AskingOptions

GOOD = (("0.mlp.down_proj", 0.1), ("2.mlp.down_proj", 0.05))
FULL = {"model.layers.0.mlp.down_proj": 0.1, "model.layers.2.mlp.down_proj": 0.05}

Ask = Callable[..., Step]


@pytest.fixture
def asked(llm: FakeLLM, make_observation: Callable[..., Observation]) -> Ask:
    """A function that asks the agent for one step, as the node does."""

    def run(**options: Any) -> Step:
        asking = AskingOptions(**({"timeout": 20, "attempts": 2, "wait": 0.01} | options))
        context = PruneContext(agent=llm.agent, agent_options=llm.options(), asking=asking)
        name, agent = make_agent(context)
        return ask(name, agent, make_observation(), repairs=asking.repairs)

    return run


def deltas(report: Step) -> dict[str, float]:
    return report.decision.deltas


def test_no_redirect_is_followed(llm: FakeLLM, asked: Ask) -> None:
    with serve(type(llm)) as other:
        other.otherwise = other.decision(*GOOD)
        hostile = f"http://user:{llm.key}@127.0.0.1:{other.url.rpartition(':')[2]}"
        targets = {
            f"{hostile}/v1/elsewhere?key={llm.key}#x": f"to {other.url}/v1/elsewhere, which",
            "/another/path": f"to {llm.url}/another/path, which",
            "https://other.example/": "to https://other.example/, which",
            f"//{other.url[7:]}": f"to {other.url}, which",
            "": "(308), which is not followed",
        }
        cases = list(zip((302, 301, 303, 307, 308), targets.items(), strict=True))
        # What refuses them is the same for all providers.
        for status, (target, words) in cases if llm.provider == "openai" else cases[:1]:
            llm.received.clear()
            headers = {"Location": target} if target else {}
            llm.otherwise = Reply(b"moved", status=status, headers=headers)
            with pytest.raises(AgentError) as caught:
                asked()
            said = str(caught.value)
            assert f"answers with a redirect ({status})" in said
            assert words in said
            assert llm.key not in said
            assert (len(llm.received), llm.fetched) == (1, [])
        assert (other.received, other.fetched) == ([], [])


def bomb(size: int = 4 * MAX_BODY) -> bytes:
    """A decision with blanks behind it."""
    return FakeLLM.answer(*GOOD).encode() + b" " * size


def packed(name: str, body: bytes, status: int = 200) -> Reply:
    return Reply(body, status=status, headers={"Content-Encoding": name})


ENDLESS: dict[str, Callable[[], Reply]] = {
    "gzip": lambda: packed("gzip", gzip.compress(bomb(), 1)),
    "deflate": lambda: packed("deflate", zlib.compress(bomb(), 1)),
    "gzip twice": lambda: packed("gzip, gzip", gzip.compress(gzip.compress(bomb(), 1))),
    "the words of an error": lambda: packed("gzip", gzip.compress(bomb(), 1), status=400),
    "without an end": lambda: Reply(b"{", then=b" " * 65_536),
}


def each(values: Iterable[Any], first: str = "openai") -> Any:
    """The first value with every provider, the others with one: what reads them is the same."""
    one, *more = values
    pairs = [(provider, one) for provider in PROVIDERS] + [(first, value) for value in more]
    return pytest.mark.parametrize(("llm", "case"), pairs, indirect=["llm"])


@each(ENDLESS)
def test_an_answer_without_bounds_is_not_read_to_its_end(
    llm: FakeLLM, asked: Ask, case: str
) -> None:
    llm.otherwise = ENDLESS[case]()
    with pytest.raises(AgentError, match="reply is longer than 16 MiB"):
        asked()
    assert len(llm.received) == 1


def test_an_answer_that_drips(llm: FakeLLM, asked: Ask) -> None:
    """Each byte comes in time; the answer does not."""
    llm.script = [Reply(b"{", then=b" ", pause=0.02)]
    llm.otherwise = llm.decision(*GOOD)
    report = asked(timeout=0.5, attempts=10)
    assert deltas(report) == FULL
    assert "not whole after 0.5 seconds; asking.timeout says" in report.notes[0]


@pytest.mark.parametrize("llm", ["openai"], indirect=True)
def test_headers_that_drip(llm: FakeLLM, asked: Ask) -> None:
    llm.script = [Reply(b"HTTP/1.1 200 OK\r\nX-Long: ", then=b"x", pause=0.02, raw=True)]
    llm.otherwise = llm.decision(*GOOD)
    report = asked(timeout=0.5, attempts=10)
    assert deltas(report) == FULL
    assert "no answer within 1 seconds" in report.notes[0]


@pytest.mark.parametrize("llm", ["openai"], indirect=True)
def test_headers_without_an_end(llm: FakeLLM, asked: Ask) -> None:
    llm.otherwise = Reply(b"HTTP/1.1 200 OK\r\nX-Long: ", then=b"x" * 65_536, raw=True)
    with pytest.raises(AgentError, match="in 2 tries: "):
        asked()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": lambda data: zlib.compress(data)[2:-4],
    "identity": bytes,
    "deflate, gzip": lambda data: gzip.compress(zlib.compress(data)),
}


@each(PACKED)
def test_a_packed_answer_is_read(llm: FakeLLM, asked: Ask, case: str) -> None:
    whole = llm.decision(*GOOD)
    llm.script = [replace(whole, body=PACKED[case](whole.body), headers={"Content-Encoding": case})]
    report = asked()
    assert (deltas(report), report.notes) == (FULL, [])
    assert llm.received[0].headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("name", "body", "words", "tries"),
    [
        ("br", b"\x0b\x02\x80", "packed as 'br', not asked for", 1),
        ("gzip", b"no gzip", "damaged", 2),
        ("gzip", gzip.compress(b"{}" * 1000, mtime=0)[:-9], "ended too early", 2),
    ],
)
@pytest.mark.parametrize("llm", ["anthropic"], indirect=True)
def test_an_answer_that_cannot_be_unpacked(
    llm: FakeLLM, asked: Ask, name: str, body: bytes, words: str, tries: int
) -> None:
    llm.otherwise = packed(name, body)
    with pytest.raises(AgentError, match=words):
        asked()
    assert len(llm.received) == tries


ERRORS: dict[str, tuple[dict[str, Any], str, int]] = {
    "502": ({"error": {"code": 502, "message": "Upstream is down"}}, "down (code 502)", 2),
    "429": ({"error": {"code": "429", "message": "Slow down"}}, "down (code 429)", 2),
    "a type": ({"error": {"type": "overloaded_error", "message": "Busy"}}, "Busy", 2),
    "400": ({"error": {"code": 400, "message": "No such thing"}}, "thing (code 400)", 1),
    "402": ({"error": {"code": 402, "message": "Insufficient credits"}}, "billing", 1),
    "quota": ({"error": {"code": 429, "message": "insufficient_quota"}}, "billing", 1),
    "words": ({"error": "Unexpected endpoint"}, "Unexpected endpoint", 1),
    "a choice": (
        {"choices": [{"error": {"code": 502, "message": "Gone"}, "finish_reason": "error"}]},
        "Gone (code 502)",
        2,
    ),
}


@each(ERRORS)
def test_an_error_in_an_answers_place_is_told(llm: FakeLLM, asked: Ask, case: str) -> None:
    body, words, tries = ERRORS[case]
    llm.otherwise = Reply(json.dumps(body).encode())
    with pytest.raises(AgentError, match="reports an error in an answer's place: ") as caught:
        asked()
    assert words in str(caught.value)
    assert len(llm.received) == tries


def _no_quota() -> Reply:
    kind = "insufficient_quota"
    error = {"message": "You exceeded your current quota.", "type": kind, "code": kind}
    return Reply(json.dumps({"error": error}).encode(), status=429)


@pytest.mark.parametrize(
    ("llm", "reply"),
    [
        ("openai", lambda llm: _no_quota()),
        ("anthropic", lambda llm: llm.error(400, "Your credit balance is too low to access it")),
        ("google_genai", lambda llm: llm.error(429, "quota GenerateRequestsPerDayPerProject")),
    ],
    indirect=["llm"],
)
def test_what_is_used_up_is_not_asked_for_again(
    llm: FakeLLM, asked: Ask, reply: Callable[[FakeLLM], Reply]
) -> None:
    llm.otherwise = reply(llm)
    with pytest.raises(AgentError, match="used up: see the provider's billing"):
        asked()
    assert len(llm.received) == 1


@pytest.mark.parametrize("llm", ["openai"], indirect=True)
def test_a_reply_of_another_form_is_shown(llm: FakeLLM, asked: Ask) -> None:
    """Servers that are no OpenAI say in many forms what is wrong."""
    for said in ({"detail": "No such user"}, {"object": "error", "message": "No such user"}):
        llm.otherwise = Reply(json.dumps(said).encode())
        with pytest.raises(
            AgentError, match=r"not of the provider's form.* it begins: .*such user"
        ):
            asked()
    llm.otherwise = Reply(b"[" * 100_000)
    with pytest.raises(AgentError, match=r"not of the provider's form.* it begins: '\[\[\["):
        asked()


@pytest.mark.parametrize("llm", ["openai"], indirect=True)
@pytest.mark.parametrize(("told", "counted"), [(2.5, 2), (-10, 0), (10**30, 0)])
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_tokens_that_cannot_be_are_not_counted(
    llm: FakeLLM, asked: Ask, told: float, counted: int
) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": told}
    llm.otherwise = changed(llm.decision(*GOOD), lambda body: body.update(usage=usage))
    assert asked().llm_tokens == counted


def test_a_refused_key_and_an_unknown_model_are_named(llm: FakeLLM, asked: Ask) -> None:
    for code in (401, 403):
        llm.otherwise = llm.error(code, "no")
        with pytest.raises(AgentError, match=f"is the key.* right for the server at {llm.url}"):
            asked()
    if llm.provider != "ollama":
        with pytest.raises(AgentError, match=f"is the key in {llm.variable}"):
            asked()
    llm.otherwise = llm.error(404, "not found")
    with pytest.raises(AgentError, match=f"is there a model '{llm.model}' at {llm.url}"):
        asked()


@each([None, "eos_token", "eos", "stop_sequence", "done"], "ollama")
@pytest.mark.filterwarnings("ignore:.* is not a valid FinishReason:UserWarning")
def test_a_whole_answer_counts_whatever_is_said_of_its_end(
    llm: FakeLLM, asked: Ask, case: str | None
) -> None:
    llm.script = [llm.text(llm.answer(*GOOD), case)]
    report = asked()
    assert (deltas(report), report.invalid_answers) == (FULL, [])
    known = case in ("eos_token", "eos")
    words = "no finish reason" if case is None else f"finish reason {case}"
    assert report.notes == ([] if known else [words])


@pytest.mark.parametrize(
    "reason",
    [
        *("length", "MAX_TOKENS", "model_length", "model_context_window_exceeded", "max_length"),
        *("context_length", "incomplete", "content_filter", "SAFETY", "RECITATION", "refusal"),
    ],
)
@pytest.mark.parametrize("llm", ["ollama"], indirect=True)
def test_what_was_cut_or_withheld_does_not_count(llm: FakeLLM, asked: Ask, reason: str) -> None:
    llm.script = [llm.text(llm.answer(*GOOD), reason), llm.decision(*GOOD)]
    report = asked()
    assert report.invalid_answers == [
        f"the answer was cut off or withheld (finish reason {reason}): answer again, more briefly"
    ]
    assert deltas(report) == FULL


def changed(reply: Reply, change: Callable[[Any], None]) -> Reply:
    body = json.loads(reply.body)
    change(body)
    return replace(reply, body=json.dumps(body).encode())


def _thought_of_gemini(body: Any) -> None:
    parts = [{"text": FakeLLM.answer(*GOOD), "thought": True}]
    body["candidates"][0]["content"] = {"role": "model", "parts": parts}


def _thought_of_claude(body: Any) -> None:
    said = FakeLLM.answer(*GOOD)
    body["content"] = [{"type": "thinking", "thinking": said, "signature": "s"}]


THOUGHTS: dict[str, Callable[[Any], Reply]] = {
    "google_genai": lambda llm: changed(llm.text(""), _thought_of_gemini),
    "openai": lambda llm: llm.text("", reasoning_content=llm.answer(*GOOD)),
    "anthropic": lambda llm: changed(llm.text(""), _thought_of_claude),
    "ollama": lambda llm: replace(
        llm.text(""),
        body=llm.text("").body.replace(b'"content"', b'"thinking": "I choose", "content"'),
    ),
}


def test_an_answer_among_the_thoughts_is_told_where_it_went(llm: FakeLLM, asked: Ask) -> None:
    llm.script = [THOUGHTS[llm.provider](llm), llm.decision(*GOOD)]
    report = asked()
    words = "the answer is in the reasoning, not in the content, which is empty"
    assert words in report.invalid_answers[0]
    assert words in llm.received[1].turns[-1][1]
    assert deltas(report) == FULL


@pytest.mark.parametrize("llm", ["openai"], indirect=True)
def test_a_call_of_a_tool_in_an_answers_place_is_told(llm: FakeOpenAI, asked: Ask) -> None:
    function = {"name": "Decision", "arguments": llm.answer(*GOOD)}
    calls = [{"id": "c1", "type": "function", "function": function}]
    llm.script = [llm.text("", "tool_calls", tool_calls=calls), llm.decision(*GOOD)]
    report = asked()
    assert "is a call of the tool 'Decision' and its content is empty" in report.invalid_answers[0]
    assert deltas(report) == FULL


def test_gemini_says_in_its_words_how_long_to_wait(
    make_observation: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FakeGemini.variable, "k" * 20)
    with serve(FakeGemini) as llm:
        details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.01s"}]
        error = {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", "details": details}
        llm.script = [Reply(json.dumps({"error": error}).encode(), 429), llm.decision(*GOOD)]
        asking = AskingOptions(wait=0)
        context = PruneContext(agent=llm.agent, agent_options=llm.options(), asking=asking)
        report = ask(*make_agent(context), make_observation(), repairs=0)
    assert "(the server asks to wait 0.01 s)" in report.notes[0]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@api.example:8443/v1?key=k#f", "https://api.example:8443/v1"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://h:99999/", "an address that is none"),
        ("http://h/" + "x" * 300, "http://h/" + "x" * 191 + "..."),
    ],
)
def test_addresses_are_told_without_what_may_be_secret(url: str, shown: str) -> None:
    assert address(url) == shown


@pytest.mark.parametrize("llm", ["openai", "google_genai", "anthropic"], indirect=True)
def test_a_header_with_a_key_comes_from_a_variable(
    llm: FakeLLM, make_observation: Callable[..., Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gets it; what it says of it is stored without it."""
    monkeypatch.delenv(llm.variable)
    monkeypatch.setenv("MY_GATEWAY", "q7Zk-w3xV9-hidden")
    name = "additional_headers" if llm.provider == "google_genai" else "default_headers"
    options = llm.options(**{name: {"X-Who": "env:MY_GATEWAY"}, "api_key": "env:MY_GATEWAY"})
    context = PruneContext(agent=llm.agent, agent_options=options)
    answer = json.loads(llm.answer(*GOOD))
    answer |= {"reasoning": "You are q7Zk-w3xV9-hidden.", "lessons": ["q7Zk-w3xV9-hidden"]}
    llm.script = [llm.text("q7Zk-w3xV9-hidden"), llm.text(json.dumps(answer))]
    report = ask(*make_agent(context), make_observation(), repairs=1)
    assert llm.received[0].headers["x-who"] == "q7Zk-w3xV9-hidden"
    assert deltas(report) == FULL
    assert report.decision.lessons == ["[redacted]"]
    assert "hidden" not in report.model_dump_json() + context.model_dump_json()
    monkeypatch.delenv("MY_GATEWAY")
    with pytest.raises(InputError, match="variable MY_GATEWAY, which is not set"):
        make_agent(context)
