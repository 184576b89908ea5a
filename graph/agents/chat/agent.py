"""The agent that asks a chat model, with bounded retries."""

import difflib
import json
import logging
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

from langchain.chat_models import init_chat_model
from langchain_core.exceptions import ModelError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langsmith import tracing_context
from pydantic import ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from prunewright.graph.agents.base import InvalidAnswerError, Observation
from prunewright.graph.agents.chat.providers import PROVIDERS, check_access
from prunewright.graph.agents.chat.reading import MAX_ANSWER, answer_schema, read_answer
from prunewright.graph.agents.chat.transport import ReplyError, address, guard, watched
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.running.stopping import call_stoppable
from prunewright.state import AgentError, Decision, InputError, Spent, Trials
from prunewright.state.config import AskingOptions
from prunewright.state.loading import problem_words
from prunewright.state.secrets import redact, resolve_references
from prunewright.state.shown import one_line

_log = logging.getLogger("prunewright")

GREETING = "Answer with the one word: ready"
"""What is asked before a run begins; any answer will do."""
MAX_WAIT = 120.0
"""Seconds between two tries, whatever a server asks for."""

PLACEHOLDER = "none"
"""Stands for the key where a server of the user's own is asked and no key is set."""

# Finish reasons, in all providers' words; whatever is of none of the three is told in the trace.
_FINISHED = re.compile(r"stop|end_turn|completed?|tool_(calls|use)|eos(_token)?", re.IGNORECASE)
_MOST_TOKENS = 10**9
"""Tokens of one call that nobody counts."""
_CUT = re.compile(r"length|tokens|context|truncat|incomplete|limit", re.IGNORECASE)
_WITHHELD = re.compile(
    r"safety|filter|refus|recitation|block|prohibit|spii|guard|moderat|malformed|error|fail|cancel",
    re.IGNORECASE,
)
# Of a quota that no waiting fills.
_USED_UP = re.compile(
    r"insufficient[_ ](user[_ ])?(quota|balance|credits?|funds)|billing_(hard_limit|not_active)"
    r"|credit balance|PerDay",
    re.IGNORECASE,
)
# Google's servers say so with status 400.
_BAD_KEY = re.compile(r"api.?key", re.IGNORECASE)
# Gemini says so in an error's details and Retry-After is not sent.
_RETRY_DELAY = re.compile(r"retryDelay['\"]?: ?['\"]?(\d+(?:\.\d+)?)s")
_THOUGHTS = re.compile(
    r"\"(reasoning_content|reasoning|thinking)\"\s*:\s*\"[^\"]|\"thought\"\s*:\s*true"
)


class LLMAgent:
    """Asks a LangChain chat model for one decision a step.

    Attributes:
        calls: requests made so far, failed ones too.
        tokens: tokens exchanged so far, as the provider counts them.
        notes: what was retried since the last decision.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        asking: AskingOptions,
        spent: Spent | None = None,
        run: str = "RUN_DIR",
    ) -> None:
        """Build the client, which asks nobody.

        Args:
            name: ``provider:model``.
            options: for the client.
            asking: tries, waits and the run's budget.
            spent: what the run has spent of the budget before.
            run: the run directory, for the command that goes on with it.

        Raises:
            InputError: a package or key is missing, or the client does not take the options.
        """
        unusual = check_access(name, options)
        options = resolve_references(options)
        provider, _, model_name = name.partition(":")
        defaults: dict[str, Any] = {}
        if provider == "ollama":
            own = options.get("client_kwargs") or {}
            options = {**options, "client_kwargs": {"timeout": asking.timeout, **own}}
        elif provider in PROVIDERS:  # another client may not take it
            defaults["timeout"] = asking.timeout
        if unusual:
            defaults["api_key"] = PLACEHOLDER
        if provider in PROVIDERS:
            defaults |= PROVIDERS[provider].defaults
        try:
            model = init_chat_model(model_name, model_provider=provider, **{**defaults, **options})
        except ValidationError as error:
            problems = problem_words(error, "agent_options")
            raise InputError(f"cannot use the agent {name}: {redact(problems)}") from None
        except (ImportError, TypeError, ValueError) as error:
            words = redact(str(error)) or type(error).__name__
            raise InputError(f"cannot use the agent {name}: {words}") from None
        _check_options(name, model, options)
        remarks = [unusual] if unusual else []
        if not guard(model):
            if provider in PROVIDERS:
                raise InputError(
                    f"cannot use the agent {name}: this version of {PROVIDERS[provider].package} "
                    "keeps its HTTP client where redirects of it cannot be forbidden"
                )
            remarks.append(f"the client of {provider} may follow redirects and read without bound")
        self.name = name
        self.calls = 0
        self.tokens = 0
        self.notes: list[str] = []
        self._base_url = str(options.get("base_url") or "")
        self._seconds = max([asking.timeout, *_timeouts(options)])
        self._asking = asking
        self._spent = spent or Spent()
        self._run = run
        self._remarks = remarks
        self._backoff = wait_exponential_jitter(
            initial=asking.wait, max=MAX_WAIT, jitter=asking.wait
        )
        known = PROVIDERS.get(provider)
        # Every one of these says how an answer ended.
        self._known = known is not None
        self._asked = self._body = ""
        self._chat = model
        self._binding = known.binding if known else {}
        # One that takes no schema is found out before anything costs time.
        self._bound({"title": "Any", "type": "object", "properties": {}})

    def _bound(self, schema: dict[str, Any]) -> Any:
        """The chat model, bound to answer in a schema."""
        return _without_parser(
            self._chat.with_structured_output(
                schema, method="json_schema", include_raw=True, **self._binding
            )
        )

    def greet(self) -> None:
        """Ask a small question: a wrong key or a dead server shows before the model is loaded.

        Raises:
            AgentError: as `decide`.
        """
        with tracing_context(enabled=False):  # it belongs to no run
            self._ask([HumanMessage(GREETING)], self._chat)

    def decide(self, observation: Observation) -> Decision | Trials:
        """Ask once, with what was measured in this step, and the answers that were refused.

        Raises:
            InvalidAnswerError: cut, empty, not JSON or not of the schema.
            AgentError: the provider failed after the last retry, or will not be tried again, or
                the run's budget of calls or tokens is used up.
        """
        self.notes = [] if observation.tries else list(self._remarks)
        schema = answer_schema(observation, strict=bool(self._binding.get("strict")))
        message = self._ask(prompt(observation), self._bound(schema))
        text = str(message.text)
        if withheld := _withheld(message):
            raise InvalidAnswerError(
                f"the answer was cut off or withheld ({withheld}): answer again, more briefly",
                text[:MAX_ANSWER],
            )
        odd = _odd_ending(message) if self._known else ""
        try:
            answer = read_answer(text, self.notes)
        except InvalidAnswerError as error:
            words = str(error) if text.strip() else self._where_it_went(message)
            raise InvalidAnswerError(f"{words}; {odd}" if odd else words, error.answer) from None
        self.notes += [odd] if odd else []
        return answer

    def _where_it_went(self, message: AIMessage) -> str:
        """What to say of an answer without text."""
        if calls := [*message.tool_calls, *message.invalid_tool_calls]:
            name = str(calls[0]["name"])[:80]
            return (
                f"the answer is a call of the tool {name!r} and its content is empty: answer with "
                "the JSON object as content"
            )
        said = json.dumps([message.content, message.additional_kwargs], default=str)
        if _THOUGHTS.search(said) or _THOUGHTS.search(self._body):
            return (
                "the answer is in the reasoning, not in the content, which is empty: answer "
                "with the JSON object as content"
            )
        kinds = {str(b.get("type"))[:40] for b in message.content if isinstance(b, dict)}
        held = f": it holds {', '.join(sorted(kinds))} and no text" if kinds else ""
        return f"the answer is empty{held}"

    def _ask(self, messages: list[BaseMessage], model: Any) -> AIMessage:
        tries = self.calls
        retrying = Retrying(
            retry=retry_if_exception(_transient),
            stop=stop_after_attempt(self._asking.attempts),
            wait=self._wait,
            before_sleep=self._note_failure,
            reraise=True,
        )
        try:
            return retrying(self._call, messages, model)
        except AgentError:
            raise
        except Exception as error:
            tries = self.calls - tries
            times = f" in {tries} tries" if tries > 1 else ""
            raise AgentError(
                f"the agent {self.name} gave no answer{times}: {_words(error)}"
                f"{self._beginning(error)}{self._hint(error)}"
            ) from None

    def _beginning(self, error: BaseException) -> str:
        """How a reply begins that the client stumbled over: servers say in it what is wrong."""
        words = " ".join(redact(self._body).split())
        if not _is_malformed(error) or not words:
            return ""
        return f"; it begins: {words[:200]!r}"

    def _hint(self, error: BaseException) -> str:
        """What to look at after an error that no waiting mends."""
        provider, _, model = self.name.partition(":")
        keys = PROVIDERS[provider].keys if provider in PROVIDERS else ()
        server = address(self._base_url or urljoin(self._asked, "/")).rstrip("/")
        where = f" at {server}" if self._base_url or self._asked else ""
        code = _status(error)
        if _USED_UP.search(_said(error)):
            return "; what is paid for is used up: see the provider's billing, then resume"
        if isinstance(error, ReplyError):
            return ""
        if code in (401, 403) or (code == 400 and _BAD_KEY.search(_said(error))):
            named = f" in {' or '.join(keys)}" if keys else ""
            return f"; is the key{named} right{f' for the server{where}' if where else ''}?"
        if code == 404:
            return f"; is there a model {model!r}{where}?"
        return f"; the address is {server}" if where and code is None else ""

    def _call(self, messages: list[BaseMessage], model: Any) -> AIMessage:
        """One request, within the budget and counted."""
        spent = self._spent + Spent(calls=self.calls, tokens=self.tokens)
        check_budget(self._asking, spent, self._run)
        self.calls += 1
        began = time.perf_counter()
        with watched() as wire:
            try:
                # The clients bound the time between two bytes; the whole has a bound, too.
                result = call_stoppable(lambda: model.invoke(messages), 2 * self._seconds)
            except Exception as error:
                if wire.problem is not None:
                    raise wire.problem from None
                result = _cut_answer(error)
                if result is None:
                    raise
            finally:
                self._asked = wire.asked
                self._body = wire.body.decode("utf-8", "replace")
        raw = result["raw"] if isinstance(result, dict) else result
        if not isinstance(raw, AIMessage):
            raise AgentError(f"the agent {self.name} returned no chat message")
        tokens = _counted(raw)
        self.tokens += tokens
        seconds = time.perf_counter() - began
        _log.debug("%s answered in %.2f s, %d tokens", self.name, seconds, tokens)
        return raw

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next try."""
        error = state.outcome.exception() if state.outcome else None
        return max(self._backoff(state), min(_retry_after(error) or 0.0, MAX_WAIT))

    def _note_failure(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error)
        wait = f" (the server asks to wait {asked:g} s)" if asked else ""
        self.notes.append(f"try {state.attempt_number} failed: {_words(error)}{wait}")
        pause = state.next_action.sleep if state.next_action else 0.0
        _log.warning("%s: %s; asking again in %.3g s", self.name, self.notes[-1], pause)


def check_budget(asking: AskingOptions, spent: Spent, run: str) -> None:
    """Refuse one more call where the run's budget is used up.

    Args:
        asking: the budget.
        spent: what the run has spent of it.
        run: the run directory, for the command that goes on with it.

    Raises:
        AgentError: it is.
    """
    for key, used, bound in (
        ("max_calls", spent.calls, asking.max_calls),
        ("max_tokens", spent.tokens, asking.max_tokens),
    ):
        if bound is not None and used >= bound:
            raise AgentError(
                f"the run's budget for the LLM is used up: asking.{key} is {bound} and {used} "
                f"were spent. Go on with: prunewright resume {shlex.quote(run)} "
                f"--set asking.{key}={2 * used}"
            )


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
        # OpenAI's client drops the temperature of models that have none.
        if options[option] is not None and getattr(model, option, options[option]) is None:
            raise InputError(f"the model of {name} takes no {option}: leave it out")


def _timeouts(options: Mapping[str, Any]) -> Iterator[float]:
    """Seconds that options of the user's own let a client wait, whatever it calls them."""
    inner = options.get("client_kwargs")
    for key, value in {**options, **(inner if isinstance(inner, dict) else {})}.items():
        if key.endswith("timeout"):
            with suppress(TypeError, ValueError):
                yield float(value)


def _words(error: BaseException | None) -> str:
    text = one_line(redact(str(error)), 500)
    if isinstance(error, ReplyError):
        return text
    text = f"{type(error).__name__}: {text}"
    if error is not None and _is_malformed(error):
        return f"the server's reply is not of the provider's form; is it another's? ({text})"
    return text


def _transient(error: BaseException) -> bool:
    """Whether another try may succeed: rate limits, server errors, timeouts, broken transport."""
    if _USED_UP.search(_said(error)):
        return False
    if isinstance(error, ReplyError):
        return error.transient
    # The status comes first: LangChain takes a 429 about a "token limit" for a long prompt.
    if (code := _status(error)) is not None:
        # Ollama's client gives -1 to an error in the middle of an answer.
        return code in (-1, 408, 429) or code >= 500
    for cause in _causes(error):
        if isinstance(cause, ModelError) and cause.is_retryable:
            return True
        if isinstance(cause, ConnectionError | TimeoutError):
            return True
        # Of httpx or of its fork httpx2, whichever the provider's client has.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if "TransportError" in kinds:
            return not kinds & {"LocalProtocolError", "UnsupportedProtocol"}
    # A proxy's page may be gone the next time.
    return _is_malformed(error)


def _said(error: BaseException) -> str:
    """All that a server said with an error; some clients leave most of it out of their words."""
    return " ".join(f"{cause} {getattr(cause, 'body', '')}" for cause in _causes(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, if it stands for one."""
    for cause in _causes(error):
        code = getattr(cause, "code", None) or getattr(cause, "status_code", None)
        if isinstance(code, int):
            return code
    return None


def _is_malformed(error: BaseException) -> bool:
    """Whether a client stumbled over a reply of status 200 that is not of its protocol.

    None has an error of its own for it: they fail at the first part that is missing.
    """
    kinds = (json.JSONDecodeError, ValidationError, AttributeError, LookupError, TypeError)
    return isinstance(error, (*kinds, RecursionError))


def _counted(message: AIMessage) -> int:
    """Tokens exchanged, as the server counts them, or none where its count cannot be true."""
    usage = message.usage_metadata
    count = usage["total_tokens"] if usage else 0
    return int(count) if 0 <= count < _MOST_TOKENS else 0


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, Retry-After: seconds or a date)."""
    for cause in _causes(error):
        if delay := _RETRY_DELAY.search(str(cause)):
            return float(delay[1])
        headers = getattr(getattr(cause, "response", None), "headers", None)
        asked = headers.get("retry-after") if isinstance(headers, Mapping) else None
        if asked is None:
            continue
        try:
            seconds = float(asked)
        except ValueError:
            try:
                moment = parsedate_to_datetime(asked)
                seconds = (moment - datetime.now(UTC)).total_seconds()
            except (ValueError, TypeError):  # neither form, or a date without a zone
                return None
        return seconds if seconds > 0 else None
    return None


def _cut_answer(error: BaseException) -> AIMessage | None:
    """The message that OpenAI's client holds back where it raises on a cut or filtered answer."""
    reasons = {
        "LengthFinishReasonError": "length",
        "ContentFilterFinishReasonError": "content_filter",
    }
    reason = reasons.get(type(error).__name__)
    if reason is None:
        return None
    completion: Any = getattr(error, "completion", None)
    text, usage = "", None
    if completion is not None:
        text = completion.choices[0].message.content or ""
        if completion.usage is not None:
            usage = UsageMetadata(
                input_tokens=completion.usage.prompt_tokens,
                output_tokens=completion.usage.completion_tokens,
                total_tokens=completion.usage.total_tokens,
            )
    return AIMessage(text, response_metadata={"finish_reason": reason}, usage_metadata=usage)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    cause = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _withheld(message: AIMessage) -> str:
    """Why a message is not a whole answer; "" if nothing says so."""
    metadata = message.response_metadata
    if refusal := message.additional_kwargs.get("refusal"):
        return f"the model refused: {str(refusal)[:200]}"
    reason = _finish_reason(message)
    if not _FINISHED.fullmatch(reason) and (_CUT.search(reason) or _WITHHELD.search(reason)):
        return f"finish reason {reason}"
    blocked = (metadata.get("prompt_feedback") or {}).get("block_reason")
    if blocked:
        return f"prompt blocked: {getattr(blocked, 'name', str(blocked))[:40]}"
    return ""


def _odd_ending(message: AIMessage) -> str:
    """What is unusual about how a message says that it ended; "" if nothing is."""
    reason = _finish_reason(message)
    if _FINISHED.fullmatch(reason):
        return ""
    return f"finish reason {reason}" if reason else "no finish reason"


def _finish_reason(message: AIMessage) -> str:
    """As the provider says it; "" where it does not."""
    # The last is of OpenAI's responses API.
    for key in ("finish_reason", "stop_reason", "done_reason", "status"):
        if found := message.response_metadata.get(key):
            return str(found)[:40]
    return ""
