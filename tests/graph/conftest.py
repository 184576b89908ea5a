"""A Gemini on the loopback that answers from a script, and observations to decide on."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prunewright.graph.agents import Observation
from prunewright.state import LayerProfile, ModelProfile

CANARY = "canary-AIzaSyD4-never-to-be-seen-0123456789"
MODEL = "gemini-3-flash-preview"


@dataclass(frozen=True)
class Received:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def generation(self) -> dict[str, Any]:
        config: dict[str, Any] = self.body["generationConfig"]
        return config

    @property
    def system(self) -> str:
        return "".join(part["text"] for part in self.body["systemInstruction"]["parts"])

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and text of every message after the system's."""
        return [
            (turn["role"], "".join(part["text"] for part in turn["parts"]))
            for turn in self.body["contents"]
        ]

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


@dataclass(frozen=True)
class Reply:
    """What the server sends back."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    drop: bool = False
    """Close the connection without an answer."""
    hang: bool = False
    """Answer only when the test is over."""


Script = Callable[[Received], Reply]


@dataclass
class FakeGemini:
    """The server's script and what it was asked.

    Attributes:
        script: replies in order; after the last one, `otherwise` answers.
        received: the requests so far.
    """

    url: str
    script: list[Reply | Script] = field(default_factory=list)
    otherwise: Reply | Script | None = None
    received: list[Received] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    key: str = CANARY
    agent: str = f"google_genai:{MODEL}"

    def reply(self, received: Received) -> Reply:
        self.received.append(received)
        step = self.script.pop(0) if self.script else self.otherwise
        if step is None:
            return self.error(418, "the script has ended")
        return step(received) if callable(step) else step

    def options(self, **more: Any) -> dict[str, Any]:
        """agent_options that lead here."""
        return {"base_url": self.url, "temperature": 0.5, **more}

    @staticmethod
    def text(text: str, reason: str | None = "STOP", tokens: int = 100) -> Reply:
        """A candidate with some text."""
        candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}}
        if not text:
            candidate["content"] = {"role": "model"}
        if reason is not None:
            candidate["finishReason"] = reason
        usage = {
            "promptTokenCount": tokens - 10,
            "candidatesTokenCount": 10,
            "totalTokenCount": tokens,
        }
        body = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": MODEL}
        return Reply(json.dumps(body).encode())

    @staticmethod
    def decision(*layers: tuple[str, float], tokens: int = 100) -> Reply:
        """A whole, schema-valid decision."""
        return FakeGemini.text(FakeGemini.answer(*layers), tokens=tokens)

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
    def blocked(reason: str = "PROHIBITED_CONTENT") -> Reply:
        """No candidates: the prompt itself was refused."""
        body = {"promptFeedback": {"blockReason": reason}, "modelVersion": MODEL}
        return Reply(json.dumps(body).encode())

    @staticmethod
    def error(code: int, message: str, status: str = "ERROR") -> Reply:
        """An error in Google's form."""
        body = {"error": {"code": code, "message": message, "status": status}}
        return Reply(json.dumps(body).encode(), status=code)

    @staticmethod
    def html(status: int = 200) -> Reply:
        """What a proxy in between may say."""
        page = b"<!doctype html><title>Welcome</title><p>Please log in to this network."
        return Reply(page, status=status, content_type="text/html")

    @staticmethod
    def dropped() -> Reply:
        """A connection closed without an answer."""
        return Reply(drop=True)

    @staticmethod
    def hanging() -> Reply:
        """An answer that does not come while the test runs."""
        return Reply(hang=True)

    @staticmethod
    def sensible(received: Received) -> Reply:
        """A decision read from the prompt alone: its budget, over the cheaper half of its table."""
        rows = sorted(received.table, key=lambda row: float(row["cost"]))
        chosen = rows[: max(1, len(rows) // 2)]
        share = sum(float(row["share"]) for row in chosen) / 100
        delta = min(0.14, 0.99 * received.budget / share)
        return FakeGemini.decision(*((str(row["name"]), delta) for row in chosen))


class _Handler(BaseHTTPRequestHandler):
    gemini: FakeGemini

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        received = Received(
            self.path,
            {key.lower(): value for key, value in self.headers.items()},
            json.loads(self.rfile.read(length)),
        )
        reply = self.gemini.reply(received)
        if reply.hang:
            self.gemini.over.wait(30)
        if reply.drop or reply.hang:
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def gemini(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGemini]:
    """A server that speaks Gemini's protocol, and a canary for a key."""
    monkeypatch.setenv("GOOGLE_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    fake = FakeGemini(url=f"http://127.0.0.1:{server.server_address[1]}")
    handler.gemini = fake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., LayerProfile]:
    """A function that makes one layer's profile; what is not said is the same for all."""

    def make(index: int = 0, **values: Any) -> LayerProfile:
        block = values.get("block", index)
        projection = values.get("projection", "mlp.down_proj")
        defaults: dict[str, Any] = {
            "name": f"model.layers.{block}.{projection}",
            "block": block,
            "projection": projection,
            "parameters": 1000,
            "sparsity": 0.1,
            "s": 1.0,
            "g": 1.0,
            "loss_cost": (0.001, 0.003, 0.006),
            "z_s": 0.0,
            "z_g": 0.0,
            "z_c": 0.0,
        }
        return LayerProfile(**(defaults | values))

    return make


@pytest.fixture(scope="session")
def make_observation(make_layer: Callable[..., LayerProfile]) -> Callable[..., Observation]:
    """A function that makes an observation of some layers, four alike by default."""

    def make(layers: list[LayerProfile] | None = None, **values: Any) -> Observation:
        layers = layers if layers is not None else [make_layer(i) for i in range(4)]
        total = sum(p.parameters for p in layers)
        defaults: dict[str, Any] = {
            "step": 0,
            "steps_left": 10,
            "target": 0.5,
            "sparsity": sum(p.parameters * p.sparsity for p in layers) / total,
            "max_step": 0.05,
            "max_delta": 0.15,
            "max_layer_sparsity": 0.9,
            "max_increase": 0.15,
            "criterion": "wanda",
            "dense_perplexity": 20.0,
            "perplexity": 21.0,
            "profile": ModelProfile(revision="dense", gradient_revision="dense", layers=layers),
        }
        return Observation(**(defaults | values))

    return make
