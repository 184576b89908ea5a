"""Configurations from outside: YAML within bounds, `--set`, and the wording of what is wrong."""

import difflib
import math
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from prunewright.state.config import NUMBER, PruneConfig
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


PRESETS = ("paper", "fast", "best")
"""Configurations that come with the package, to begin from."""


def load_config(
    path: str | Path | None = None,
    overrides: Annotated[list[str] | None, "key=value"] = None,
    *,
    preset: str | None = None,
    **values: Any,
) -> PruneConfig:
    """Read a YAML file, apply ``key=value`` overrides (dots reach nested keys), validate.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: as given to ``--set``; lists, mappings and null in YAML's flow form.
        preset: one of `PRESETS`, which wins over the defaults alone.
        values: top-level keys that win over all; None values are ignored.

    Raises:
        InputError: unreadable file, unknown preset or key (with a suggestion), or invalid value.
    """
    data = read_settings(path, overrides, preset)
    data.update({k: v for k, v in values.items() if v is not None})
    return validate_config(data)


def read_preset(name: str) -> str:
    """The YAML of a preset.

    Raises:
        InputError: there is none of this name.
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; known: {', '.join(PRESETS)}")
    file = resources.files("prunewright.state") / "presets" / f"{name}.yaml"
    return file.read_text(encoding="utf-8")


def read_settings(
    path: str | Path | None = None, overrides: list[str] | None = None, preset: str | None = None
) -> dict[str, Any]:
    """The keys and values of a YAML file with ``key=value`` overrides applied, not validated yet.

    Those of a preset are below the file's, key by key.

    Raises:
        InputError: unreadable file, unknown preset, or an override of another form.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = parse_yaml(Path(path).read_text(encoding="utf-8"), f"{path} is")
        except OSError as error:
            raise InputError(f"cannot read the config file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict | None):
            raise InputError(f"{path} must hold a mapping of keys to values")
        data = loaded or {}
    if preset is not None:
        data = _over(parse_yaml(read_preset(preset), f"preset {preset} is"), data)
    for override in overrides or []:
        _apply_override(data, override)
    return data


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, nested ones, too; of a key that both have the second's value."""
    both = {
        key: _over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict) and key not in _FREE
    }
    return below | above | both


def validate_config(data: dict[str, Any]) -> PruneConfig:
    """Validate a mapping as a `PruneConfig`, turning errors into words for the user.

    Raises:
        InputError: unknown key (with a suggestion) or invalid value.
    """
    try:
        return PruneConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(describe_validation_error(error, PruneConfig)) from None


_FREE = frozenset({"agent_options", "allocation_options"})
"""Keys that hold what others define: nobody but YAML says what a text there stands for."""


def _scalar(text: str) -> Any:
    """A number or boolean where YAML reads one, or Python a number as 1e-3; else the text."""
    value: Any = text
    with suppress(InputError):
        value = parse_yaml(text, "it is")
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(text)
    plain = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else text


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set wants key=value, got {override!r}")
    # Only lists, mappings and null are YAML: pydantic reads numbers and booleans from text,
    # and YAML would read the pattern 2:4 as the number 124.
    value: Any = raw
    if raw[:1] in "[{" or raw in ("null", "~"):
        value = parse_yaml(raw, f"--set {key}:")
    *parents, last = key.split(".")
    if value is raw and _FREE.intersection(parents):
        value = _scalar(raw)
    for parent in parents:
        if data.get(parent) is None:  # a key that is off, which one of its own turns on
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise InputError(f"--set {key}: {parent} holds a value, not further keys")
    data[last] = value


def problem_words(error: ValidationError, whole: str, most: int | None = None) -> str:
    """What is wrong with a value, on one line: where, and why; never the value itself.

    Args:
        error: pydantic's.
        whole: what the value as a whole is called.
        most: problems that are told; None tells all.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or whole}: {e['msg']}" for e in found[:most])


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One line an error, each with the key's dotted path and, for typos, a suggestion."""
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"] if part != NUMBER)
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            lines.append(f"unknown key {path}{hint}")
        else:
            lines.append(f"{path or 'config'}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    found: Any = model
    for part in loc:
        # Else the place in a list, or which of several forms the value was taken for.
        if (known := _model_in(found)) and part in known.model_fields:
            found = known.model_fields[str(part)].annotation
    inner = _model_in(found)
    return list(inner.model_fields) if inner else []


def _model_in(found: Any) -> type[BaseModel] | None:
    """The model that a type is, or has the values of."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        return found
    return next(filter(None, map(_model_in, get_args(found))), None)
