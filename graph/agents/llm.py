"""The agent that asks a chat model: prompt, bounded retries, strict reading of the answer."""

import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any
from urllib.parse import quote

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from langchain.chat_models import init_chat_model
from langchain_core.exceptions import ModelError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from pydantic import ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from prunewright.graph.agents.base import InvalidAnswerError, Observation, quote_name
from prunewright.state import COST_DELTAS, AgentError, Decision, InputError, LayerProfile
from prunewright.state.config import AskingOptions

MAX_ANSWER = 200_000
"""Characters of an answer beyond which it is refused unread."""
MAX_ROWS = 256
"""Layers shown in one prompt."""

_FINISHED = {"STOP", "END_TURN", "STOP_SEQUENCE", "COMPLETE", "COMPLETED"}
# The variables in which a provider's client looks for its key.
_KEYS = {
    "google_genai": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
}
_PACKAGES = {
    "google_genai": "langchain_google_genai",
    "openai": "langchain_openai",
    "anthropic": "langchain_anthropic",
    "ollama": "langchain_ollama",
}
# No retries but ours: Google's client reads 0 as its own default, and 1 as "try once".
_DEFAULTS: dict[str, dict[str, Any]] = {
    "google_genai": {"max_retries": 1, "temperature": 0.5},
    "openai": {"max_retries": 0},
    "anthropic": {"max_retries": 0},
}


def check_access(name: str) -> None:
    """Refuse a ``provider:model`` whose package or key is missing, before anything costs time.

    Raises:
        InputError: with the pip command or the variable to set.
    """
    provider, _, model = name.partition(":")
    if not provider or not model:
        raise InputError(f"the agent {name!r} is not of the form provider:model")
    package = _PACKAGES.get(provider)
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"the agent {name} needs another package: pip install {package.replace('_', '-')}"
        )
    keys = _KEYS.get(provider, ())
    if keys and not any(os.environ.get(key) for key in keys):
        raise InputError(
            f"the agent {name} needs an API key: set the environment variable "
            f"{' or '.join(keys)}, or choose an agent without an LLM (--agent greedy)"
        )


class LLMAgent:
    """Asks a LangChain chat model for one decision a step.

    Attributes:
        tokens: tokens exchanged so far, as the provider counts them.
        notes: what was retried since the last decision.
    """

    def __init__(self, name: str, options: dict[str, Any], asking: AskingOptions) -> None:
        check_access(name)
        provider, _, model_name = name.partition(":")
        defaults: dict[str, Any] = {}
        if provider in _DEFAULTS:  # another client may not take them
            defaults = {"timeout": asking.timeout, **_DEFAULTS[provider]}
        try:
            model = init_chat_model(model_name, model_provider=provider, **{**defaults, **options})
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'agent_options'}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False)
            )
            raise InputError(f"cannot use the agent {name}: {redact(problems)}") from None
        except (ImportError, TypeError, ValueError) as error:
            words = redact(str(error)) or type(error).__name__
            raise InputError(f"cannot use the agent {name}: {words}") from None
        _check_options(name, model, options)
        self._setup(name, model, asking)

    @classmethod
    def from_model(
        cls, model: BaseChatModel, asking: AskingOptions | None = None, name: str = "chat model"
    ) -> "LLMAgent":
        """An agent that asks a chat model made elsewhere."""
        agent = cls.__new__(cls)
        agent._setup(name, model, asking or AskingOptions())
        return agent

    def _setup(self, name: str, model: BaseChatModel, asking: AskingOptions) -> None:
        self.name = name
        self.tokens = 0
        self.notes: list[str] = []
        self._asking = asking
        self._model = _without_parser(
            model.with_structured_output(answer_schema(), method="json_schema", include_raw=True)
        )

    def decide(self, observation: Observation) -> Decision:
        """Ask once, with the answers of this step that were refused and why.

        Raises:
            InvalidAnswerError: cut, empty, not JSON or not of the schema.
            AgentError: the provider failed after the last retry, or will not be tried again.
        """
        self.notes = []
        message = self._ask(prompt(observation))
        usage = message.usage_metadata
        self.tokens += usage["total_tokens"] if usage else 0
        text = str(message.text)
        withheld = _withheld(message, strict=self.name.startswith("google_genai:"))
        if withheld:
            raise InvalidAnswerError(
                f"the answer was cut off or withheld ({withheld}): answer again, more briefly",
                text[:MAX_ANSWER],
            )
        return read_answer(text)

    def _ask(self, messages: list[BaseMessage]) -> AIMessage:
        retrying = Retrying(
            retry=retry_if_exception(_transient),
            stop=stop_after_attempt(self._asking.attempts),
            wait=wait_exponential_jitter(
                initial=self._asking.wait, max=120, jitter=self._asking.wait
            ),
            before_sleep=self._note_failure,
            reraise=True,
        )
        try:
            result = retrying(self._model.invoke, messages)
        except Exception as error:
            tries = f" in {len(self.notes) + 1} tries" if self.notes else ""
            raise AgentError(
                f"the agent {self.name} gave no answer{tries}: {_words(error)}"
            ) from None
        raw = result["raw"] if isinstance(result, dict) else result
        if not isinstance(raw, AIMessage):
            raise AgentError(f"the agent {self.name} returned no chat message")
        return raw

    def _note_failure(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.notes.append(f"try {state.attempt_number} failed: {_words(error)}")


def answer_schema() -> dict[str, Any]:
    """The JSON schema that a provider is sent: a decision without its bounds on lengths.

    Gemini is known to refuse schemas with long lists ("too many states for serving"), and not
    every provider follows references. `read_answer` holds every answer to the whole schema.
    """
    schema = Decision.model_json_schema()
    entry = schema.pop("$defs")["LayerDelta"]
    properties = schema["properties"]
    properties["layers"] = {"type": "array", "items": entry}
    change = properties["expected_ppl_change"]
    number = next(form for form in change["anyOf"] if form["type"] == "number")
    properties["expected_ppl_change"] = number | {"description": change["description"]}
    for field in (*properties.values(), *entry["properties"].values()):
        field.pop("title", None)
        field.pop("maxLength", None)
    return schema | {"required": list(properties)}


def read_answer(text: str) -> Decision:
    """A decision from an answer's text; no repair of any kind.

    Raises:
        InvalidAnswerError: with what is wrong.
    """
    if not text.strip():
        raise InvalidAnswerError("the answer is empty")
    if len(text) > MAX_ANSWER:
        raise InvalidAnswerError(
            f"the answer has {len(text)} characters, more than {MAX_ANSWER}", text[:2000]
        )
    try:
        # Lone surrogates are legal JSON escapes that no file can hold.
        decision = Decision.model_validate_json(text.encode("utf-8", "replace"), strict=True)
        decision.model_dump_json()
        return decision
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}"
            for e in error.errors(include_url=False, include_input=False, include_context=False)[:8]
        )
        raise InvalidAnswerError(problems[:2000], text) from None
    except (ValueError, RecursionError) as error:
        raise InvalidAnswerError(f"not valid JSON: {str(error)[:200]}", text) from None


def prompt(observation: Observation) -> list[BaseMessage]:
    """The messages of one step: rules, state and table, then refused answers and why."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("prunewright.graph.agents") / "prompts"

    def render(name: str, **values: Any) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        return environment.from_string(text).render(**values).strip()

    system = render(
        "system.md",
        criterion=observation.criterion,
        max_increase=observation.max_increase,
        max_delta=observation.max_delta,
        max_layer_sparsity=observation.max_layer_sparsity,
    )
    step = render(
        "step.md",
        o=observation,
        budget=floor_digits(observation.budget),
        rows=table_rows(observation),
        deltas=" / ".join(f"{d:g}" for d in COST_DELTAS),
    )
    messages: list[BaseMessage] = [SystemMessage(system), HumanMessage(step)]
    for refusal in observation.refusals:
        if refusal.answer:
            messages.append(AIMessage(refusal.answer[:20_000]))
        problems = "\n".join(f"- {problem}" for problem in refusal.problems)
        messages.append(
            HumanMessage(
                f"That answer was refused and nothing was pruned:\n{problems}\n"
                "Answer again with a whole, corrected JSON object."
            )
        )
    return messages


def table_rows(observation: Observation) -> list[str]:
    """One line a layer with room left; beyond `MAX_ROWS` those with the lowest cost."""
    room = observation.room()
    layers = [p for p in observation.profile.layers if room[p.name] > 1e-6]
    if len(layers) > MAX_ROWS:
        cheapest = sorted(layers, key=lambda p: p.loss_cost[0] / p.parameters)[:MAX_ROWS]
        kept = {p.name for p in cheapest}
        layers = [p for p in layers if p.name in kept]
    return [_row(p, observation.prunable) for p in layers]


def _row(layer: LayerProfile, prunable: int) -> str:
    # Per cent of perplexity for one per cent of the model's sparsity.
    costs = "/".join(
        f"{cost / (delta * layer.parameters / prunable):.2g}"
        for cost, delta in zip(layer.loss_cost, COST_DELTAS, strict=True)
    )
    return " | ".join(
        [
            quote_name(layer.short_name),
            f"{100 * layer.parameters / prunable:.4g}",
            f"{layer.sparsity:.3f}",
            f"{layer.z_s:.2f}",
            f"{layer.z_g:.2f}",
            f"{layer.z_c:.2f}",
            costs,
        ]
    )


def floor_digits(value: float, digits: int = 4) -> str:
    """A bound as it may be shown: rounded down, so that who keeps to it is not refused."""
    if value <= 0:
        return "0"
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return f"{math.floor(value * scale + 1e-6) / scale:.{digits}g}"


def redact(text: str) -> str:
    """A message without the values of the environment's keys and tokens, however written."""
    for key, value in os.environ.items():
        if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", key, re.IGNORECASE):
            # A key pasted with a line's end is quoted whole by the HTTP client's complaint.
            forms = {value, value.strip(), repr(value)[1:-1], quote(value.strip(), safe="")}
            for form in sorted(forms, key=len, reverse=True):
                if len(form) >= 8:
                    text = text.replace(form, "[redacted]")
    return text


def _without_parser(structured: Any) -> Any:
    """The chat model bound to a schema, without LangChain's parser behind it.

    That parser mends cut JSON silently, and on a long answer that is no JSON it needs minutes.
    """
    steps = getattr(getattr(structured, "first", None), "steps__", {})
    return steps.get("raw", structured)


def _check_options(name: str, model: BaseChatModel, options: dict[str, Any]) -> None:
    """Refuse options that the client does not have: it would pass them on, or drop them."""
    known = set(type(model).model_fields)
    known |= {f.alias for f in type(model).model_fields.values() if f.alias}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"the agent {name} has no option {option}{hint}")


def _words(error: BaseException | None) -> str:
    text = " ".join(redact(str(error)).split())
    return f"{type(error).__name__}: {text[:500]}"


def _transient(error: BaseException) -> bool:
    """Whether another try may succeed: rate limits, server errors, timeouts, broken transport."""
    for cause in _causes(error):
        # The status comes first: LangChain takes a 429 about a "token limit" for a long prompt.
        code = getattr(cause, "code", None) or getattr(cause, "status_code", None)
        if isinstance(code, int):
            return code in (408, 429) or code >= 500
        if isinstance(cause, ModelError) and cause.is_retryable:
            return True
        # An HTML page with status 200 (a proxy's) reaches us as a JSON error of the client.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return True
        # Of httpx or of its fork httpx2, whichever the provider's client has.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if "TransportError" in kinds:
            return not kinds & {"LocalProtocolError", "UnsupportedProtocol"}
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _withheld(message: AIMessage, *, strict: bool) -> str:
    """Why a message is not a whole answer; "" if it is.

    Args:
        message: the provider's.
        strict: whether a message without a finish reason is refused too.
    """
    metadata = message.response_metadata
    for key in ("finish_reason", "stop_reason", "done_reason"):
        if metadata.get(key):
            reason = str(metadata[key])
            return "" if reason.upper() in _FINISHED else f"finish reason {reason[:40]}"
    blocked = (metadata.get("prompt_feedback") or {}).get("block_reason")
    if blocked:
        return f"prompt blocked: {getattr(blocked, 'name', str(blocked))[:40]}"
    return "no finish reason" if strict else ""
