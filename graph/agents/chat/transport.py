"""What a provider's HTTP client may do: follow no redirect, read no endless answer.

The clients are httpx's, or its fork's, in all providers' packages. Hooks of theirs act within
`watched` alone, since some packages share one client between all models of a process.
"""

import importlib
import json
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from urllib.parse import urljoin, urlsplit

from prunewright.state.shown import one_line

MAX_BODY = 16 * 2**20
"""Bytes of a reply that are read, as they come and when they are unpacked."""

# Where the packages keep their clients: Google's, OpenAI's and those built on it, Anthropic's and
# Ollama's; then others'.
_PLACES = (
    "client._api_client._httpx_client",
    "root_client._client",
    "_client._client",
    "client",
    "client._client",
    "client._client._client",
)
_ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_PASSING = re.compile(r"rate.?limit|overload|unavailable|time.?out|server.?error", re.IGNORECASE)


class ReplyError(Exception):
    """A reply that no client is shown, and why.

    Attributes:
        transient: whether another try may bring another one.
    """

    def __init__(self, words: str, *, transient: bool = False) -> None:
        super().__init__(words)
        self.transient = transient


@dataclass
class Wire:
    """What passed between client and server in one call.

    Attributes:
        asked: where the last request went; "" if none did.
        body: the last reply's, unpacked.
        problem: why a reply was not handed on.
    """

    asked: str = ""
    body: bytes = b""
    problem: ReplyError | None = None


_wire: ContextVar[Wire | None] = ContextVar("prunewright_wire", default=None)


@contextmanager
def watched() -> Iterator[Wire]:
    """Inside the block guarded clients follow no redirect and read no more than `MAX_BODY`."""
    wire = Wire()
    token = _wire.set(wire)
    try:
        yield wire
    finally:
        _wire.reset(token)


def guard(model: Any) -> bool:
    """Have the HTTP client of a chat model watched; whether one was found."""
    clients = []
    for place in _PLACES:
        try:
            client = attrgetter(place)(model)
        except AttributeError:
            continue
        if isinstance(getattr(client, "event_hooks", None), dict):
            clients.append(client)
    for client in clients:
        hooks = client.event_hooks
        # Once, however often a shared client comes by.
        client.event_hooks = {
            "request": [*(h for h in hooks["request"] if h is not _before), _before],
            "response": [_after, *(h for h in hooks["response"] if h is not _after)],
        }
    return bool(clients)


def address(url: str) -> str:
    """A URL without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that is none"
    text = f"{parts.scheme}://{host}{port}{parts.path}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _before(request: Any) -> None:
    if (wire := _wire.get()) is not None:
        wire.asked = str(request.url)
        request.headers["accept-encoding"] = "gzip, deflate"
        request.extensions["prunewright_began"] = time.monotonic()


def _after(response: Any) -> None:
    """Read a reply within bounds and hand it on whole, or refuse it."""
    wire = _wire.get()
    if wire is None:
        return
    try:
        _check_redirect(response)
        wire.body = _unpacked(response, _read(response))
        _check_error(response, wire.body)
    except ReplyError as error:
        wire.problem = error
        raise
    response.stream.close()
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        response.headers.pop(name, None)
    library = importlib.import_module(type(response).__module__.partition(".")[0])
    response.stream = library.ByteStream(wire.body)


def _check_redirect(response: Any) -> None:
    if 300 <= response.status_code < 400:
        asked = str(response.request.url)
        target = response.headers.get("location", "")
        where = f" to {address(urljoin(asked, target))}" if target else ""
        raise ReplyError(
            f"the server at {address(asked)} answers with a redirect ({response.status_code})"
            f"{where}, which is not followed: the key would go there, too. If that is the right "
            "server, name it (agent_options.base_url)"
        )


def _read(response: Any) -> bytes:
    """The reply's bytes as they come."""
    seconds = response.request.extensions.get("timeout", {}).get("read")
    began = response.request.extensions["prunewright_began"]
    body = bytearray()
    for chunk in response.stream:
        body += chunk
        if len(body) > MAX_BODY:
            raise _too_long()
        if seconds is not None and time.monotonic() - began > seconds:
            raise ReplyError(
                f"timeout: the answer was not whole after {seconds:g} seconds; asking.timeout "
                "says how long one may take",
                transient=True,
            )
    return bytes(body)


def _unpacked(response: Any, body: bytes) -> bytes:
    names = response.headers.get("content-encoding", "").lower().replace(" ", "").split(",")
    for name in reversed([name for name in names if name not in ("", "identity")]):
        if name not in _ENCODINGS:
            raise ReplyError(f"the server's reply is packed as {name[:20]!r}, not asked for")
        try:
            body = _inflated(body, _ENCODINGS[name])
        except zlib.error:
            try:  # what some servers call deflate has no header
                body = _inflated(body, -zlib.MAX_WBITS)
            except zlib.error as error:
                raise ReplyError(
                    f"the server's reply is damaged: {error}", transient=True
                ) from None
    return body


def _inflated(body: bytes, form: int) -> bytes:
    if not body:
        return body
    inflater = zlib.decompressobj(form)
    found = inflater.decompress(body, MAX_BODY + 1)
    if len(found) > MAX_BODY:
        raise _too_long()
    if not inflater.eof:
        raise ReplyError("the server's reply ended too early", transient=True)
    return found


def _too_long() -> ReplyError:
    return ReplyError(
        f"the server's reply is longer than {MAX_BODY // 2**20} MiB: it was not read to its end"
    )


def _check_error(response: Any, body: bytes) -> None:
    """Refuse an error in an answer's place, which some gateways send with status 200."""
    if response.status_code != 200 or "ndjson" in response.headers.get("content-type", ""):
        return
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return
    choices = said.get("choices") if isinstance(said, dict) else None
    places = [said, *choices] if isinstance(choices, list) else [said]
    for place in places:
        error = place.get("error") if isinstance(place, dict) else None
        if error:
            break
    else:
        return
    told = error if isinstance(error, dict) else {"message": error}
    words = one_line(str(told.get("message") or told), 500)
    code = str(told.get("code") or told.get("type") or "")[:80]
    number = int(code) if re.fullmatch(r"[1-5]\d\d", code) else 0
    raise ReplyError(
        f"the server reports an error in an answer's place: {words}"
        + (f" (code {code})" if code else ""),
        transient=number in (408, 429) or number >= 500 or bool(_PASSING.search(code)),
    )
