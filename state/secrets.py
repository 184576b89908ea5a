"""Keys and passwords: where one is seen it is refused, where one was needed it is named.

A configuration holds none, since every run stores its own. Where a provider takes one in an
option, ``env:NAME`` stands for the value of an environment variable.
"""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from prunewright.state.errors import InputError

_NAME = re.compile(
    r"key$|secret|passw|passphrase|credential|(^|[_-])(token|pwd|sig|signature|auth|jwt|bearer)$"
    r"|authorization$|^cookie$",
    re.IGNORECASE,
)
# A key in an address or in a query; elsewhere it is a domain, say.
_CODE = "code"
_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
# What providers give out as keys, and how HTTP carries them.
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(sk|pk|rk|gsk|xai|hf|ghp|gho|ghs|github_pat|glpat|nvapi|r8|xox[abps])[-_]"
    r"[A-Za-z0-9_-]{16,}|AIza[A-Za-z0-9_-]{20,}|ya29\.|AKIA[A-Z0-9]{12,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}|^(Bearer|Basic|Token)\s+\S",
)
# Headers that hold what looks like a key and is none.
_HARMLESS = re.compile(
    r"accept.*|content-type|user-agent|(http-)?referer|origin|x-title|anthropic-(beta|version)"
    r"|openai-(beta|organization|project)|(x-)?api-version",
    re.IGNORECASE,
)
# Options whose entries a server is sent, whatever they are called.
_SENT = re.compile(r"(headers|query|params|cookies)$", re.IGNORECASE)

_referred: set[str] = set()


def find_secret(value: object, name: str = "", *, sent: bool = False, named: bool = False) -> str:
    """Where an option holds what looks like a secret, at any depth; "" if none does.

    Args:
        value: the option's.
        name: what it is called.
        sent: whether it is an entry of headers or of a query.
        named: whether it lies in something that is called a secret.
    """
    named = named or bool(_NAME.search(name)) or (sent and name.lower() == _CODE)
    sent = sent or bool(_SENT.search(name))
    if isinstance(value, Mapping):
        found = (find_secret(v, str(k), sent=sent, named=named) for k, v in value.items())
        return next(filter(None, found), "")
    if isinstance(value, list | tuple):
        found = (find_secret(v, name, sent=sent, named=named) for v in value)
        return next(filter(None, found), "")
    if value is None or isinstance(value, bool) or _is_reference(value):
        return ""
    if named:
        return name
    if not isinstance(value, str):
        return ""
    if redact(value) != value or _KNOWN.search(value):
        return f"the value of {name}"
    if "://" in value or re.search(r"\?[^=\s]+=", value):
        return _in_address(value, name)
    return f"the value of {name}" if sent and not _HARMLESS.fullmatch(name) and _odd(value) else ""


def _in_address(url: str, name: str) -> str:
    try:
        parts = urlsplit(url)
        told = parse_qsl(parts.query) + parse_qsl(parts.fragment)
    except ValueError:
        return ""
    if "@" in parts.netloc:
        return f"the password in {name}"
    for key, value in told:
        if _NAME.search(key) or key.lower() == _CODE or _odd(value):
            return f"{key} in {name}"
    return ""


def _odd(text: str) -> bool:
    """Whether a word is too long, or of letters and digits too mixed, to be one of a language."""
    return any(
        len(word) >= 20
        or (len(word) >= 12 and re.search(r"\d", word) and re.search("[A-Za-z]", word))
        for word in text.split()
    )


def _is_reference(value: object) -> bool:
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def resolve_references(value: Any) -> Any:
    """Options with the value of each variable in the place of its ``env:NAME``.

    Raises:
        InputError: a variable is not set.
    """
    if isinstance(value, Mapping):
        return {key: resolve_references(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolve_references(inner) for inner in value]
    if not isinstance(value, str) or (match := _REFERENCE.fullmatch(value)) is None:
        return value
    _referred.add(match[1])
    found = os.environ.get(match[1])
    if not found:
        raise InputError(
            f"agent_options refer to the environment variable {match[1]}, which is not set"
        )
    return found


def redact(text: str) -> str:
    """A text without the values of the environment's keys and tokens, however written.

    Variables that options referred to are among them, whatever their names.
    """
    for form in _forms():
        text = text.replace(form, "[redacted]")
    return text


def redact_all(value: Any) -> Any:
    """JSON values with every text in them as `redact` leaves it."""
    forms = _forms()

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        if isinstance(value, str):
            for form in forms:
                value = value.replace(form, "[redacted]")
        return value

    return walk(value) if forms else value


def _forms() -> list[str]:
    """The values of the environment's keys and tokens in the forms they are quoted in."""
    forms: set[str] = set()
    for name, value in os.environ.items():
        if _VARIABLE.search(name) or name in _referred:
            # A key pasted with a line's end is quoted whole by the HTTP client's complaint.
            forms |= {value, value.strip(), repr(value)[1:-1], quote(value.strip(), safe="")}
    return sorted((form for form in forms if len(form) >= 8), key=len, reverse=True)
