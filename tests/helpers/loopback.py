"""Servers on the loopback that speak the real protocols of LLM providers, from a script.

What a provider's own client sends is read back into the prompt's parts, and what the script says
goes out in the provider's form, faults included.
"""

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from prunewright.graph.agents.chat.agent import GREETING

CANARY = "canary-AIzaSyD4-never-to-be-seen-0123456789"


@dataclass(frozen=True)
class Received:
    """One request as the server got it.

    Attributes:
        system: the text of the system's instruction.
        turns: role (user or model) and text of every message after it.
        schema: the JSON schema that the answer was asked for in.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    system: str
    turns: list[tuple[str, str]]
    schema: dict[str, Any]

    @property
    def generation(self) -> dict[str, Any]:
        """Gemini's options of one request."""
        config: dict[str, Any] = self.body["generationConfig"]
        return config

    @property
    def table(self) -> list[dict[str, float | str]]:
        """The rows of the prompt's table, as a reader of the prompt alone would take them."""
        lines = self.turns[0][1].splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("name | "))
        columns = [column.split(" ")[0] for column in lines[start].split(" | ")]
        rows: list[dict[str, float | str]] = []
        for line in lines[start + 1 :]:
            cells = line.split(" | ")
            if len(cells) != len(columns):
                break
            row: dict[str, float | str] = dict(zip(columns, cells, strict=True))
            row["share"] = float(row["share"])
            row["cost"] = float(str(row["cost"]).split("/")[0])
            rows.append(row)
        return rows

    @property
    def budget(self) -> float:
        found = re.search(r"may add at most ([\d.e-]+)\.\n", self.turns[0][1])
        assert found is not None
        return float(found[1])

    @property
    def key(self) -> str:
        """The key, in whichever header a version of the provider's client puts it."""
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
        named = (self.headers.get(name) for name in ("x-goog-api-key", "x-api-key"))
        return next((key for key in named if key), bearer)


@dataclass(frozen=True)
class Reply:
    """What the server sends back."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Close the connection without an answer, or in the middle of it if there is a body."""
    hang: bool = False
    """Answer only when the test is over."""
    then: bytes = b""
    """What follows the body, again and again, without an end."""
    raw: bool = False
    """The body holds the status line and the headers, too."""
    pause: float = 0
    """Seconds between two of these."""


Script = Callable[[Received], Reply]


@dataclass
class FakeLLM(ABC):
    """The server's script and what it was asked.

    Attributes:
        script: replies in order; after the last one, `otherwise` answers.
        received: the requests so far.
    """

    provider: ClassVar[str]
    model: ClassVar[str]
    variable: ClassVar[str]
    """The environment variable of the key."""
    finished: ClassVar[str]
    """The finish reason of a whole answer."""
    cut: ClassVar[str]
    """The finish reason of one that ran out of tokens."""

    url: str
    script: list[Reply | Script] = field(default_factory=list)
    otherwise: Reply | Script | None = None
    received: list[Received] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    """Paths that were asked for with GET, as after a redirect."""
    over: threading.Event = field(default_factory=threading.Event)
    key: str = CANARY
    pages: dict[str, bytes] = field(default_factory=dict)
    """What is answered to GET, by path."""
    greeting: Reply | None = None
    """The reply to the small question before a run; None: a whole answer."""
    greeted: list[dict[str, str]] = field(default_factory=list)
    """The headers of each request that asked it."""

    @property
    def agent(self) -> str:
        return f"{self.provider}:{self.model}"

    def options(self, **more: Any) -> dict[str, Any]:
        """agent_options that lead here."""
        return {"base_url": self.url, "temperature": 0.5, **more}

    def reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        if GREETING in json.dumps(body):
            self.greeted.append(headers)
            return self.greeting or self.text("ready")
        received = Received(path, headers, body, *self.read(body))
        self.received.append(received)
        step = self.script.pop(0) if self.script else self.otherwise
        if step is None:
            return self.error(418, "the script has ended")
        return step(received) if callable(step) else step

    @abstractmethod
    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        """System instruction, turns and schema of a request."""

    @abstractmethod
    def text(self, text: str, reason: str | None = "", tokens: int = 100) -> Reply:
        """An answer with some text; the reason is that of a whole answer unless given."""

    @abstractmethod
    def withheld(self) -> Reply:
        """What the provider sends where its model or its filter will not answer."""

    @abstractmethod
    def error(self, code: int, message: str, **headers: str) -> Reply:
        """An error in the provider's form."""

    def decision(self, *layers: tuple[str, float], tokens: int = 100) -> Reply:
        """A whole, schema-valid decision."""
        return self.text(self.answer(*layers), tokens=tokens)

    @staticmethod
    def answer(*layers: tuple[str, float]) -> str:
        """The JSON text of a decision."""
        return json.dumps(
            {
                "reasoning": "The cheapest layers of the table.",
                "layers": [{"name": name, "delta": delta} for name, delta in layers],
                "expected_ppl_change": 0.01,
            }
        )

    @staticmethod
    def html(status: int = 200) -> Reply:
        """What a proxy in between may say."""
        page = b"<!doctype html><title>Welcome</title><p>Please log in to this network."
        return Reply(page, status=status, content_type="text/html")

    @staticmethod
    def dropped() -> Reply:
        """A connection closed without an answer."""
        return Reply(drop=True)

    def torn(self) -> Reply:
        """A connection closed in the middle of an answer."""
        whole = self.decision(("0.mlp.down_proj", 0.1))
        return Reply(whole.body[: len(whole.body) // 2], content_type=whole.content_type, drop=True)

    @staticmethod
    def hanging() -> Reply:
        """An answer that does not come while the test runs."""
        return Reply(hang=True)

    def sensible(self, received: Received) -> Reply:
        """A decision read from the prompt alone: its budget, over the cheaper half of its table."""
        rows = sorted(received.table, key=lambda row: float(row["cost"]))
        chosen = rows[: max(1, len(rows) // 2)]
        share = sum(float(row["share"]) for row in chosen) / 100
        delta = min(0.14, 0.99 * received.budget / share)
        return self.decision(*((str(row["name"]), delta) for row in chosen))


def _json(body: dict[str, Any], status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(json.dumps(body).encode(), status=status, headers=named)


class FakeGemini(FakeLLM):
    """Google's ``generateContent``."""

    provider = "google_genai"
    model = "gemini-3-flash-preview"
    variable = "GOOGLE_API_KEY"
    finished = "STOP"
    cut = "MAX_TOKENS"

    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        def words(content: dict[str, Any]) -> str:
            return "".join(part["text"] for part in content["parts"])

        turns = [(turn["role"], words(turn)) for turn in body["contents"]]
        schema = body["generationConfig"]["responseJsonSchema"]
        return words(body["systemInstruction"]), turns, schema

    def text(self, text: str, reason: str | None = "", tokens: int = 100) -> Reply:
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}}
        if not text:
            candidate["content"] = {"role": "model"}
        if reason is not None:
            candidate["finishReason"] = reason or self.finished
        usage = {
            "promptTokenCount": tokens - 10,
            "candidatesTokenCount": 10,
            "totalTokenCount": tokens,
        }
        return _json(
            {"candidates": [candidate], "usageMetadata": usage, "modelVersion": self.model}
        )

    def withheld(self) -> Reply:
        return self.text("", "SAFETY")

    def blocked(self, reason: str = "PROHIBITED_CONTENT") -> Reply:
        """No candidates: the prompt itself was refused."""
        return _json({"promptFeedback": {"blockReason": reason}, "modelVersion": self.model})

    def error(self, code: int, message: str, status: str = "ERROR", **headers: str) -> Reply:
        return _json(
            {"error": {"code": code, "message": message, "status": status}}, code, **headers
        )


class FakeOpenAI(FakeLLM):
    """OpenAI's chat completions, which vLLM, llama.cpp and LM Studio speak too."""

    provider = "openai"
    model = "gpt-4.1"
    variable = "OPENAI_API_KEY"
    finished = "stop"
    cut = "length"

    def options(self, **more: Any) -> dict[str, Any]:
        return super().options(base_url=f"{self.url}/v1", **more)

    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        roles = {"user": "user", "assistant": "model"}
        first, *rest = body["messages"]
        assert first["role"] == "system"
        turns = [(roles[message["role"]], message["content"]) for message in rest]
        assert body["response_format"]["type"] == "json_schema"
        return first["content"], turns, body["response_format"]["json_schema"]["schema"]

    def text(self, text: str, reason: str | None = "", tokens: int = 100, **message: Any) -> Reply:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None, **message},
            "finish_reason": self.finished if reason == "" else reason,
        }
        usage = {"prompt_tokens": tokens - 10, "completion_tokens": 10, "total_tokens": tokens}
        return _json(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": self.model,
                "choices": [choice],
                "usage": usage,
            }
        )

    def withheld(self) -> Reply:
        return self.text("", content=None, refusal="I cannot help with that.")

    def filtered(self) -> Reply:
        """An answer that a content filter cut."""
        return self.text("", "content_filter")

    def error(self, code: int, message: str, **headers: str) -> Reply:
        error = {"message": message, "type": "some_error", "param": None, "code": None}
        return _json({"error": error}, code, **headers)


class FakeAnthropic(FakeLLM):
    """Anthropic's messages."""

    provider = "anthropic"
    model = "claude-sonnet-4-6"
    variable = "ANTHROPIC_API_KEY"
    finished = "end_turn"
    cut = "max_tokens"

    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        def words(content: Any) -> str:
            if isinstance(content, str):
                return content
            return "".join(block["text"] for block in content)

        roles = {"user": "user", "assistant": "model"}
        turns = [
            (roles[message["role"]], words(message["content"])) for message in body["messages"]
        ]
        assert body["output_config"]["format"]["type"] == "json_schema"
        return words(body["system"]), turns, body["output_config"]["format"]["schema"]

    def text(self, text: str, reason: str | None = "", tokens: int = 100) -> Reply:
        return _json(
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": self.model,
                "content": [{"type": "text", "text": text}] if text else [],
                "stop_reason": self.finished if reason == "" else reason,
                "stop_sequence": None,
                "usage": {"input_tokens": tokens - 10, "output_tokens": 10},
            }
        )

    def withheld(self) -> Reply:
        return self.text("", "refusal")

    def error(self, code: int, message: str, **headers: str) -> Reply:
        error = {"type": "some_error", "message": message}
        return _json({"type": "error", "error": error}, code, **headers)


class FakeOllama(FakeLLM):
    """Ollama's ``/api/chat``, which streams one JSON object a line."""

    provider = "ollama"
    model = "qwen3:8b"
    variable = "OLLAMA_API_KEY"
    finished = "stop"
    cut = "length"

    def read(self, body: dict[str, Any]) -> tuple[str, list[tuple[str, str]], dict[str, Any]]:
        roles = {"user": "user", "assistant": "model"}
        first, *rest = body["messages"]
        assert first["role"] == "system"
        assert body["stream"] is True
        turns = [(roles[message["role"]], message["content"]) for message in rest]
        return first["content"], turns, body["format"]

    def text(self, text: str, reason: str | None = "", tokens: int = 100) -> Reply:
        head = {"model": self.model, "created_at": "2026-01-01T00:00:00Z"}
        half = len(text) // 2
        lines = [
            {**head, "message": {"role": "assistant", "content": part}, "done": False}
            for part in (text[:half], text[half:])
        ]
        if reason is not None:
            end = {"role": "assistant", "content": ""}
            counts = {"prompt_eval_count": tokens - 10, "eval_count": 10}
            reason = reason or self.finished
            lines.append({**head, "message": end, "done": True, "done_reason": reason, **counts})
        body = "".join(json.dumps(line) + "\n" for line in lines)
        return Reply(body.encode(), content_type="application/x-ndjson")

    def withheld(self) -> Reply:
        # Ollama has no filter: a model that will not answer says so.
        return self.text("I am sorry, but I cannot help with that.")

    def error(self, code: int, message: str, **headers: str) -> Reply:
        return _json({"error": message}, code, **headers)


PROVIDERS: dict[str, type[FakeLLM]] = {
    fake.provider: fake for fake in (FakeGemini, FakeOpenAI, FakeAnthropic, FakeOllama)
}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeLLM

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        headers = {key.lower(): value for key, value in self.headers.items()}
        reply = self.fake.reply(self.path, headers, json.loads(self.rfile.read(length)))
        if reply.hang:
            self.fake.over.wait(30)
        if reply.hang or (reply.drop and not reply.body):
            self.close_connection = True
            return
        if not reply.raw:
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            for name, value in reply.headers.items():
                self.send_header(name, value)
        if reply.then:
            self.close_connection = True
            if not reply.raw:
                self.end_headers()
            self.wfile.write(reply.body)
            with suppress(OSError):  # until the client has enough
                while not self.fake.over.wait(reply.pause):
                    self.wfile.write(reply.then)
            return
        # A torn answer promises more than it brings.
        self.send_header("Content-Length", str(len(reply.body) + reply.drop))
        self.end_headers()
        self.wfile.write(reply.body)
        self.close_connection = reply.drop

    def do_GET(self) -> None:
        self.fake.fetched.append(self.path)
        page = self.fake.pages.get(self.path)
        if page is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serve(kind: type[FakeLLM]) -> Iterator[FakeLLM]:
    """A provider's server while the block lasts."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    fake = kind(url=f"http://127.0.0.1:{server.server_address[1]}")
    handler.fake = fake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
