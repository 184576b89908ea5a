"""YAML from outside, as plain values within bounds."""

from typing import Any

import yaml

from prunewright.state.errors import InputError

MAX_VALUES = 100_000
"""Values of a document, each counted wherever an alias brings it in."""
MAX_DEPTH = 50
"""Lists and mappings inside one another."""


def parse_yaml(text: str, whole: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        whole: what it is called, with which the error begins: "x.yaml is".

    Raises:
        InputError: it cannot be read, or holds too much, as one that refers to itself does. The
            lines themselves are not told: someone may have put a key there.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{whole} not valid YAML{_words(error)}") from None
    except RecursionError:
        raise InputError(f"{whole} not usable YAML: it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
        # The library's own errors for a day like 2026-02-30 or a number like !!int x.
        words = "a date, a number or a tagged value is none; quote what is text"
        raise InputError(f"{whole} not valid YAML: {words}") from None
    if problem := _unbounded(value):
        raise InputError(f"{whole} not usable YAML: {problem}")
    return value


def _unbounded(value: Any) -> str:
    """What is too much in a value, in words; "" if nothing is."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        found, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH:
            return "it is nested too deeply, or refers to itself"
        if seen > MAX_VALUES:
            return f"it holds more than {MAX_VALUES:,} values"
        if isinstance(found, dict):
            waiting += [(inner, depth + 1) for inner in found.values()]
        elif isinstance(found, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in found]
    return ""


def _words(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{where}: {problem}" if problem else where
