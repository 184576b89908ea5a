"""A LangSmith on the loopback that takes traces as the real one does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import zstandard

CANARY = "lsv2_canary-never-to-be-seen-9876543210"

_INFO = {
    "version": "0.10.0",
    "instance_flags": {"zstd_compression_enabled": True},
    "batch_ingest_config": {
        "use_multipart_endpoint": True,
        "size_limit": 100,
        "size_limit_bytes": 20_971_520,
        "scale_up_nthreads_limit": 16,
        "scale_up_qsize_trigger": 1000,
    },
}


@dataclass
class FakeLangSmith:
    """What was sent to it.

    Attributes:
        requests: methods and paths.
        bodies: what came with them, unpacked.
        keys: the API keys that came with them.
        runs: the runs that were traced by id, each as its beginning and its end left it.
    """

    url: str
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead here; tracing is not switched on by them."""
        return {
            "LANGSMITH_ENDPOINT": self.url,
            "LANGSMITH_API_KEY": CANARY,
            "NO_PROXY": "127.0.0.1",
        }

    def take(self, content_type: str, body: bytes) -> None:
        """Take a batch of runs: ``post.ID`` and ``patch.ID`` with their parts ``.inputs`` ..."""
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        found: dict[str, dict[str, Any]] = {}
        for part in BytesParser().parsebytes(head + body).walk():
            name = part.get_param("name", header="content-disposition")
            if name is None:
                continue
            _, run, *key = str(name).split(".")
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            value = json.loads(payload)
            found.setdefault(run, {}).update({key[0]: value} if key else value)
        for run, parts in found.items():  # whole, whoever reads meanwhile
            self.runs[run] = self.runs.get(run, {}) | parts

    def roots(self) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if not run.get("parent_run_id")]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeLangSmith

    def do_GET(self) -> None:
        self._answer(200, _INFO)

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Content-Encoding") == "zstd":
            body = zstandard.ZstdDecompressor().stream_reader(body).read()
        self.fake.bodies.append(body)
        if self.path == "/v1/metadata/submit":  # LangGraph's server tells of its use
            self._answer(204, {})
            return
        assert self.path == "/runs/multipart", self.path
        self.fake.take(self.headers["Content-Type"], body)
        self._answer(202, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        self.fake.requests.append(f"{self.command} {self.path}")
        self.fake.keys.add(self.headers.get("x-api-key"))
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serve_langsmith() -> Iterator[FakeLangSmith]:
    """The server while the block lasts."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.fake = FakeLangSmith(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield handler.fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
