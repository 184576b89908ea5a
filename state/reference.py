"""The configuration's reference: every key with its meaning, type, bounds and default, as YAML."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from prunewright.state.config import PruneContext, PruneRequest

_HALVES: tuple[tuple[type[BaseModel], str], ...] = (
    (PruneRequest, "What defines a run. It never changes on a thread."),
    (PruneContext, "Who decides and how. It may change on resume and fork."),
)
_TYPES = {"boolean": "true or false", "object": "mapping", "array": "list"}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}
WIDTH = 100


def reference() -> str:
    """Every key of the configuration as YAML that `load_config` reads back to the defaults."""
    parts = []
    for model, words in _HALVES:
        schema = model.model_json_schema()
        lines = "\n".join(_lines(schema, schema.get("$defs", {}), model().model_dump(mode="json")))
        parts.append(f"# {words}\n\n{lines}")
    return "\n".join(parts)


def _lines(
    schema: dict[str, Any], definitions: dict[str, Any], defaults: dict[str, Any], depth: int = 0
) -> Iterator[str]:
    """The lines of a model's keys, those of nested models two spaces further in."""
    indent = "  " * depth
    for name, key in schema["properties"].items():
        nested = definitions.get(str(key.get("$ref", "")).rpartition("/")[2])
        about = key.get("description", "")
        if nested is None:
            about = f"{about} ({_form(key)})"
        yield from textwrap.wrap(
            about, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if nested is None:
            written = yaml.safe_dump(defaults[name], default_flow_style=True, width=WIDTH)
            value = written.removesuffix("...\n").strip()  # which ends a bare scalar
            yield f"{indent}{name}: {value}"
            yield from _keys_inside(key, definitions, depth)
            yield ""
        else:
            yield f"{indent}{name}:"
            yield from _lines(nested, definitions, defaults[name], depth + 1)


def _keys_inside(key: dict[str, Any], definitions: dict[str, Any], depth: int) -> Iterator[str]:
    """The keys of a mapping that is null unless it is given, as comments."""
    names = [str(option.get("$ref", "")).rpartition("/")[2] for option in key.get("anyOf", ())]
    for nested in (definitions[name] for name in names if name):
        defaults = {name: inner.get("default") for name, inner in nested["properties"].items()}
        *lines, _ = _lines(nested, definitions, defaults, depth + 1)
        yield from (f"# {line}".rstrip() for line in lines)


def _form(key: dict[str, Any]) -> str:
    """Type and bounds of a key, in words."""
    if options := key.get("anyOf") or key.get("oneOf"):
        return " or ".join(_form(option) for option in options)
    if "$ref" in key:
        return "mapping"
    if "enum" in key:
        return "one of " + ", ".join(map(str, key["enum"]))
    words = _TYPES.get(key.get("type", ""), key.get("type", "any value"))
    if "items" in key:
        words += f" of {_form(key['items']).removeprefix('one of ')}"
    if "examples" in key:
        words += f", such as {', '.join(map(str, key['examples']))}"
    bounds = [f"{word} {key[bound]:g}" for bound, word in _BOUNDS.items() if bound in key]
    return ", ".join([words, *bounds])
