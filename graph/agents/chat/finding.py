"""Finding the one JSON object in an answer, among fences, thoughts and words around it."""

import json
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

# What models write around their thoughts; some servers drop the tag that opens them.
_MARK = re.compile(
    r"[<\[◁](?P<close>/)?(?:think|thinking|thoughts?|reasoning)[>\]▷]|(?P<brace>\{)", re.IGNORECASE
)
# An object's beginning, unlike the braces of a set, a formula or a template.
_BEGINS = re.compile(r'\{\s*["}]')
_INVISIBLE = " \t\r\n\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x2010))
)
_SHOWN = 60
"""Characters of an answer that are quoted."""


@dataclass(frozen=True)
class Found:
    """An answer's JSON object.

    Attributes:
        text: the object as it is there.
        around: what else is there, in words; "" if nothing is.
    """

    text: str
    around: str


class _AmbiguousError(ValueError):
    """Valid JSON to a lenient reader, and yet no object that says one thing."""


def find_object(text: str) -> Found:
    """The one JSON object of a text; one that is there twice in the same words counts as one.

    Thoughts between ``<think>`` and ``</think>`` are not looked into. Nothing is mended.

    Raises:
        ValueError: none, several, or one that is not valid JSON; the message says which and
            quotes the place.
        RecursionError: nested too deeply.
    """
    bare = text.strip(_INVISIBLE)
    if not bare:
        raise ValueError("the answer is empty")
    if bare.startswith('"') and (inner := _inside(bare)):
        found = find_object(inner)
        return Found(found.text, f"it was written as a JSON string; {found.around}".rstrip("; "))
    spans, thought, other = _scan(bare)
    if not spans:
        _refuse(bare, thought, other)
    kinds = {json.dumps(value, sort_keys=True) for _, _, value in spans}
    if len(kinds) > 1:
        raise ValueError(
            f"the answer holds {len(spans)} different JSON objects, at characters "
            f"{', '.join(str(start) for start, _, _ in spans[:8])}: answer with one JSON object"
        )
    start, end, _ = spans[0]
    before, after = bare[:start].strip(_INVISIBLE), bare[end:].strip(_INVISIBLE)
    words = [f"{_quote(before, last=True)} before it"] if before else []
    words += [f"{_quote(after)} after it"] if after else []
    return Found(bare[start:end], f"there was {' and '.join(words)}" if words else "")


def _scan(text: str) -> tuple[list[tuple[int, int, Any]], bool, int | None]:
    """The objects of a text, whether thoughts were left out, and where another brace is.

    Raises:
        ValueError: an object that is not valid JSON.
    """
    spans: list[tuple[int, int, Any]] = []
    thought, other, position = False, None, 0
    closes = [mark.end() for mark in _MARK.finditer(text) if mark["close"]]
    while mark := _MARK.search(text, position):
        position = mark.end()
        if not mark["brace"]:
            if mark["close"]:  # all before it was thought
                spans, thought, other = [], True, None
            elif (index := bisect_left(closes, position)) < len(closes):
                position, thought = closes[index], True
        elif _BEGINS.match(text, mark.start()):
            try:
                value, position = _DECODER.raw_decode(text, mark.start())
                spans.append((mark.start(), position, value))
            except (ValueError, RecursionError) as error:
                if not closes or closes[-1] <= position:
                    raise ValueError(_problem(error, text)) from None
                spans, thought, other, position = [], True, None, closes[-1]
        elif other is None:
            other = mark.start()
    return spans, thought, other


def _refuse(text: str, thought: bool, other: int | None) -> NoReturn:
    """Say what is wrong with a text without an object."""
    if other is not None:
        try:
            _DECODER.raw_decode(text, other)
        except (ValueError, RecursionError) as error:
            raise ValueError(_problem(error, text)) from None
    if thought:
        raise ValueError(
            "there is no JSON object after the thoughts: answer with the JSON object after them"
        )
    raise ValueError(
        f"there is no JSON object in the answer, which is {_quote(text)}: answer with the JSON "
        "object alone"
    )


def _problem(error: Exception, text: str) -> str:
    """Why something is not valid JSON, with the place, in words to act on."""
    if isinstance(error, RecursionError):
        return "not valid JSON: it is nested too deeply"
    if isinstance(error, _AmbiguousError):
        return f"not valid JSON: {error}"
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {str(error)[:200]}"
    place, before = text[error.pos :], text[: error.pos].rstrip()
    if not place.strip() or error.msg.startswith("Unterminated string"):
        return f"not valid JSON: it is not complete, it was cut off or left open ({error.msg})"
    hint = ""
    if place[0] in "'\u2018\u2019\u201c\u201d":
        hint = ': keys and strings need double quotes, "'
    elif place.startswith(("/", "#")):
        hint = ": JSON has no comments"
    elif place[0] in "]}" and before.endswith(","):
        hint = ": no comma before a closing bracket"
    elif error.msg.startswith("Invalid control"):
        hint = ": in a string it is written as an escape, such as \\n"
    what = f"{error.msg.removesuffix(' at')} at character {error.pos}"
    return f"not valid JSON: {what}, before {_quote(place)}{hint}"


def _quote(text: str, *, last: bool = False) -> str:
    """A text's first or last characters as a string of ASCII, with its length if it is cut."""
    if len(text) <= _SHOWN:
        return ascii(text)
    part = f"...{text[-_SHOWN:]}" if last else f"{text[:_SHOWN]}..."
    return f"{part!a} ({len(text)} characters)"


def _inside(text: str) -> str | None:
    """What a JSON string holds, if a text is one and it holds an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if "{" in value and not value.startswith('"') else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that is in it twice could be read either way."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _AmbiguousError(f"the key {_quote(twice)} is in one object twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise _AmbiguousError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_once, parse_constant=_no_number, parse_int=float, parse_float=float
)
