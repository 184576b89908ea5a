"""Reading an answer: the schema that a provider is sent, and the strict way back."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prunewright.graph.agents.base import InvalidAnswerError
from prunewright.graph.agents.chat.finding import find_object
from prunewright.state import Decision
from prunewright.state.loading import problem_words

MAX_ANSWER = 200_000
"""Characters of an answer beyond which it is refused unread."""
MAX_ENTRIES = 4_096
"""Layers that an answer may name one by one."""

_Model = TypeVar("_Model", bound=BaseModel)


def plain_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model as a provider is sent it: without its bounds on lengths.

    Gemini is known to refuse schemas with long lists ("too many states for serving"), and not
    every provider follows references. Every answer is held to the whole schema afterwards.
    """
    schema = model.model_json_schema()
    definitions = schema.pop("$defs")

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return plain(definitions[node["$ref"].rpartition("/")[2]])
        node = dict(node)
        for form in node.pop("anyOf", []):  # a value or null: a value is asked for
            if form.get("type") != "null":
                node = form | node
        dropped = ("title", "default", "maxLength", "maxItems")
        kept = {key: plain(value) for key, value in node.items() if key not in dropped}
        if "properties" in kept:
            kept["required"] = list(kept["properties"])
        return kept

    closed: dict[str, Any] = plain(schema)
    return closed | {"title": schema["title"]}


def answer_schema() -> dict[str, Any]:
    """The schema of a decision as a provider is sent it."""
    return plain_schema(Decision)


def read_answer(text: str, notes: list[str] | None = None) -> Decision:
    """The decision that an answer's text holds as its one JSON object; no repair of any kind.

    Args:
        text: the answer.
        notes: takes what the trace must tell: what was around the object.

    Raises:
        InvalidAnswerError: with what is wrong.
    """
    decision = read_strictly(Decision, text, notes)
    if len(decision.layers) > MAX_ENTRIES:
        raise InvalidAnswerError(
            f"the answer names {len(decision.layers)} layers one by one, more than {MAX_ENTRIES}: "
            "use groups",
            text[:2000],
        )
    return decision


def read_strictly(model: type[_Model], text: str, notes: list[str] | None = None) -> _Model:
    """A model from the one JSON object of a text; no repair of any kind.

    Args:
        model: what the object must be.
        text: an answer, or a tool call's arguments.
        notes: takes what the trace must tell: what was around the object.

    Raises:
        InvalidAnswerError: with what is wrong.
    """
    if len(text) > MAX_ANSWER:
        raise InvalidAnswerError(
            f"the answer has {len(text)} characters, more than {MAX_ANSWER}", text[:2000]
        )
    # Lone surrogates are legal JSON escapes that no file can hold.
    plain = text.encode("utf-8", "replace").decode()
    try:
        found = find_object(plain)
        read = model.model_validate_json(found.text, strict=True)
        read.model_dump_json()
    except ValidationError as error:
        problems = problem_words(error, "answer", most=8)
        if found.around:
            problems += f" (of the JSON object in the answer; {found.around})"
        raise InvalidAnswerError(problems[:2000], text) from None
    except (ValueError, RecursionError) as error:
        raise InvalidAnswerError(str(error)[:2000], text) from None
    if found.around and notes is not None:
        notes.append(f"the answer's one JSON object was read; {found.around}")
    return read
