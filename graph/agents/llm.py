"""The agent that asks a chat model, with bounded retries."""

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from langchain.chat_models import init_chat_model
from langchain_core.exceptions import ModelError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from pydantic import ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from prunewright.graph.agents.base import InvalidAnswerError, Observation
from prunewright.graph.agents.prompt import prompt
from prunewright.graph.agents.reading import MAX_ANSWER, answer_schema, read_answer
from prunewright.state import AgentError, Decision, InputError
from prunewright.state.config import AskingOptions

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
