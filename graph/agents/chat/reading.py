"""Reading an answer: the schema that a provider is sent, and the strict way back."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict

from prunewright.graph.agents.base import InvalidAnswerError, Observation
from prunewright.graph.agents.chat.finding import find_object
from prunewright.state import Decision, Move, Trials
from prunewright.state.decision import ENOUGH, MAX_MOVES
from prunewright.state.loading import problem_words

MAX_ANSWER = 200_000
"""Characters of an answer beyond which it is refused unread."""
MAX_ENTRIES = 4_096
"""Layers that an answer may name one by one."""


_PROBES: JsonDict = {
    "required": ["probes"],
    "properties": {"probes": {"type": "array", "minItems": 1}},
}


class Answer(Decision):
    """A decision, or moves to measure before one."""

    model_config = ConfigDict(
        title="Decision",
        json_schema_extra={"anyOf": [*ENOUGH, _PROBES]},
    )

    probes: list[Move] = Field(
        [],
        max_length=MAX_MOVES,
        description="in place of a decision: moves to be measured, not applied; layers and groups "
        "are empty then",
    )

    @model_validator(mode="before")
    @classmethod
    def _probes_are_enough(cls, data: Any) -> Any:
        """Who has moves measured need say nothing else."""
        if not isinstance(data, dict) or not data.get("probes"):
            return data
        said = {key: value for key, value in data.items() if value is not None}
        return {"reasoning": "", "layers": [], **said}

    @model_validator(mode="after")
    def _one_of_both(self) -> "Answer":
        if self.probes and (self.layers or self.groups or self.takes_proposal):
            raise ValueError(
                "probes stand in place of a decision: leave layers and groups empty, and accept "
                "and weights out"
            )
        return self


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


def answer_schema(observation: Observation, *, strict: bool = False) -> dict[str, Any]:
    """The schema of an answer as a provider is sent it.

    Where there is a proposal, an answer may take it in a dozen tokens; weights are asked for where
    they change it, a number for each domain.

    Args:
        observation: what is to be decided on; with no probes left moves are not asked for.
        strict: that every key must be there, as OpenAI wants it, null where nothing is said.
    """
    schema = plain_schema(Answer if observation.probes_left else Decision)
    keys: dict[str, Any] = schema["properties"]
    if not observation.weighable:
        del keys["weights"]
    else:
        domains = {name: {"type": "number", "minimum": 0} for name in observation.profile.domains}
        keys["weights"] = {
            "type": "object",
            "description": keys["weights"]["description"],
            "properties": domains,
            "required": list(domains),
            "additionalProperties": False,
        }
    if not observation.costs_shown:
        del keys["accept"]
        return schema | {"required": list(keys)}
    needed = ["reasoning", "accept"]
    if strict:
        for key in keys.keys() - needed:
            keys[key]["type"] = [keys[key]["type"], "null"]
        needed = list(keys)
    return schema | {"required": needed}


def read_answer(text: str, notes: list[str] | None = None) -> Decision | Trials:
    """What an answer's text holds as its one JSON object; no repair of any kind.

    Args:
        text: the answer.
        notes: takes what the trace must tell: what was around the object.

    Raises:
        InvalidAnswerError: with what is wrong.
    """
    answer = _read_strictly(text, notes)
    named = len(answer.layers) + sum(len(move.layers) for move in answer.probes)
    if named > MAX_ENTRIES:
        raise InvalidAnswerError(
            f"the answer names {named} layers one by one, more than {MAX_ENTRIES}: use groups",
            text[:2000],
        )
    if answer.probes:
        return Trials(moves=answer.probes)
    return Decision(**{key: getattr(answer, key) for key in Decision.model_fields})


def _read_strictly(text: str, notes: list[str] | None) -> Answer:
    if len(text) > MAX_ANSWER:
        raise InvalidAnswerError(
            f"the answer has {len(text)} characters, more than {MAX_ANSWER}", text[:2000]
        )
    # Lone surrogates are legal JSON escapes that no file can hold.
    plain = text.encode("utf-8", "replace").decode()
    try:
        found = find_object(plain)
        read = Answer.model_validate_json(found.text, strict=True)
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
