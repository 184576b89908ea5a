"""The agent that is a causal LM in this process, its answers bound to a grammar as it writes."""

import atexit
import json
import math
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import TemplateError
from langchain_core.messages import BaseMessage
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prunewright.graph.agents.base import InvalidAnswerError, Observation
from prunewright.graph.agents.llm import check_budget
from prunewright.graph.agents.prompt import prompt, shown_layers
from prunewright.graph.agents.reading import MAX_ANSWER, read_answer
from prunewright.graph.stopping import check_stop
from prunewright.state import AgentError, Decision, InputError, LayerProfile, Spent
from prunewright.state.config import AskingOptions, Options, describe_validation_error
from prunewright.tools.models import LoadedModel, load_model, resolve_directory

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

PREFIX = "local:"
MAX_ROWS = 63
"""Layers that one answer can choose from: what the 64 bits of a rule's parameter can count."""

_ROLES = {"system": "system", "human": "user", "ai": "assistant"}
# Nothing in an answer may go on without end, and no escape may stand for half a character.
_WRITING = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": '"\\',
}


class LocalOptions(Options):
    """The ``agent_options`` of a local model."""

    max_new_tokens: int = Field(
        1200, ge=16, le=32_768, description="longest answer; then it is cut"
    )
    temperature: float = Field(0.5, ge=0, le=2, description="0: always the likeliest token")
    rows: int = Field(24, ge=1, le=MAX_ROWS, description="layers in the table, the cheapest")
    max_layers: int = Field(12, ge=1, le=MAX_ROWS, description="layers that one answer may name")
    # On busy cores two threads that wait for each other decode slower than one.
    threads: int = Field(1, ge=1, le=1024, description="torch's threads while decoding on a CPU")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")


@dataclass(frozen=True)
class _Held:
    """The model that this process holds for its agents."""

    key: tuple[str, str, str]
    loaded: LoadedModel
    tokenizer: "LLTokenizer"


_held: _Held | None = None
_lock = threading.Lock()
# A stopped run leaves its thread behind, which ends with the token in hand: were Python to exit
# under it, torch would abort the process.
atexit.register(_lock.acquire)


class LocalAgent:
    """Asks a Hugging Face causal LM for one decision a step; it only prunes, layer by layer.

    A finished answer keeps every bound of a decision, because no token that would break one can
    be drawn. Whether it makes sense is the model's affair. The same observation gives the same
    answer: draws are seeded by the run's seed, the step and the number of refused answers.

    Attributes:
        calls: answers asked for so far.
        tokens: tokens read and written so far.
        notes: what was settled without the model since the last decision.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        asking: AskingOptions,
        spent: Spent | None = None,
        run: str = "RUN_DIR",
    ) -> None:
        """Check the options; the model is loaded for the first decision.

        Args:
            name: ``local:MODEL``.
            options: as `LocalOptions` has them.
            asking: the run's budget.
            spent: what the run has spent of the budget before.
            run: the run directory, for the command that goes on with it.

        Raises:
            InputError: the options do not fit.
        """
        try:
            self._options = LocalOptions(**options)
        except ValidationError as error:
            problems = describe_validation_error(error, LocalOptions)
            raise InputError(f"the agent {name}, agent_options: {problems}") from None
        self.name = name
        self.calls = 0
        self.tokens = 0
        self.notes: list[str] = []
        self._asking = asking
        self._spent = spent or Spent()
        self._run = run

    def check_model(self) -> None:
        """Find the model, of the hub only its configuration and tokenizer, without loading it.

        Raises:
            InputError: there is no such model.
        """
        resolve_directory(self.name.removeprefix(PREFIX), weights=False)

    def decide(self, observation: Observation) -> Decision:
        """Have the model write one answer.

        Raises:
            InvalidAnswerError: the answer was not finished within ``max_new_tokens``.
            AgentError: the prompt does not fit into the model, decoding failed, or the run's
                budget of calls or tokens is used up.
            InputError: the model cannot be loaded.
        """
        self.notes = []
        options = self._options
        shown = shown_layers(observation, options.rows)
        if observation.pattern_sparsity is None:
            most = options.max_layers
            items = _choices(observation, shown, most)
        else:
            items, most = _whole_choices(observation, shown, options.max_layers)
        if not items:
            self.notes.append("no layer has room left: the model was not asked")
            return Decision(reasoning="No layer has room left.", layers=[])
        spent = self._spent + Spent(calls=self.calls, tokens=self.tokens)
        check_budget(self._asking, spent, self._run)
        self.calls += 1
        with _lock:
            held = _hold(self.name, options)
            read = tokenize_prompt(held.loaded.tokenizer, prompt(observation, options.rows))
            self._check_length(held.loaded, read.shape[1])
            matcher = _matcher(held, answer_grammar(items, most))
            seed = f"{observation.seed}/{observation.step}/{len(observation.refusals)}"
            try:
                written = _generate(held.loaded, read, matcher, options, seed)
            except RuntimeError as error:  # torch's: out of memory, nan among the probabilities
                raise AgentError(f"the agent {self.name} failed: {error}") from error
        self.tokens += read.shape[1] + len(written)
        text = held.tokenizer.decode_str(written)
        if not matcher.is_stopped():
            raise InvalidAnswerError(
                f"the answer was cut off after {len(written)} tokens (max_new_tokens): "
                "answer again, more briefly",
                text[:MAX_ANSWER],
            )
        return read_answer(text)

    def _check_length(self, loaded: LoadedModel, tokens: int) -> None:
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and tokens + self._options.max_new_tokens > limit:
            raise AgentError(
                f"the prompt of {tokens} tokens and an answer of {self._options.max_new_tokens} "
                f"do not fit into the {limit} positions of the agent {self.name}: lower "
                "agent_options.rows or agent_options.max_new_tokens, and resume"
            )


def answer_grammar(items: list[dict[str, Any]], max_layers: int) -> str:
    """A decision that prunes, in llguidance's Lark form: no item twice, none without a bound.

    Args:
        items: schemas of the layers to choose from, at most `MAX_ROWS`.
        max_layers: items in one answer, at least one.
    """

    def rule(name: str, schema: dict[str, Any]) -> str:
        return f"{name}: %json {json.dumps(schema | {'x-guidance': _WRITING})}"

    # The parameter's bits say which items the answer holds already.
    picks = [f"item_{i} rest::set_bit({i}) %if bit_clear({i})" for i in range(len(items))]
    return "\n".join(
        [
            'start: "{\\"reasoning\\": " reasoning ", \\"layers\\": [" next::0x0 "], "'
            ' "\\"expected_ppl_change\\": " change "}"',
            rule("reasoning", {"type": "string", "maxLength": 200}),
            rule("change", {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.001}),
            "next::_: " + "\n  | ".join(picks),
            f'rest::_: "" \n  | ", " next::_ %if bit_count_lt(_, {max_layers})',
            *(rule(f"item_{i}", item) for i, item in enumerate(items)),
        ]
    )


def _choices(
    observation: Observation, layers: list[LayerProfile], max_layers: int
) -> list[dict[str, Any]]:
    """What an answer may say of each layer; any ``max_layers`` of them stay within the budget."""
    room = observation.room()
    share = observation.budget * observation.prunable / min(max_layers, max(1, len(layers)))
    items = []
    for layer in layers:
        most = min(observation.max_delta, room[layer.name], share / layer.parameters)
        if most < 1e-6:
            continue
        grain = 10.0 ** (math.floor(math.log10(most)) - 1)  # two digits
        delta = {"type": "number", "minimum": grain, "maximum": most, "multipleOf": grain}
        items.append(_item(layer, delta))
    return items


def _whole_choices(
    observation: Observation, layers: list[LayerProfile], max_layers: int
) -> tuple[list[dict[str, Any]], int]:
    """With a pattern: the layers that fit the budget, and how many of them fit it in any case."""
    room, budget = observation.room(), observation.budget * observation.prunable + 1e-3
    fitting = {p.name: s for p in layers if (s := room[p.name] * p.parameters) <= budget}
    items = [
        _item(p, {"const": round(room[p.name], 4)}) for p in layers if fitting.get(p.name, 0.0) > 0
    ]
    return items, min(max_layers, int(budget / max(fitting.values()))) if items else 0


def _item(layer: LayerProfile, delta: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": layer.short_name}, "delta": delta},
        "required": ["name", "delta"],
        "additionalProperties": False,
    }


def _hold(name: str, options: LocalOptions) -> _Held:
    """The model of an agent, loaded once; the one of another agent is dropped first."""
    import llguidance.hf

    global _held
    key = (name.removeprefix(PREFIX), options.dtype, options.device)
    if _held is None or _held.key != key:
        if _held is not None:
            _held.loaded.close()
            _held = None
        model, dtype, device = key
        loaded = load_model(model, dtype=dtype, device=device, keep_dense=False)
        # The model's own settings for free text (penalties, cut-offs) have no place here.
        loaded.model.generation_config = GenerationConfig(pad_token_id=0)
        if not isinstance(loaded.tokenizer, PreTrainedTokenizerFast):
            raise InputError(f"the agent {name} has no tokenizer.json, which llguidance needs")
        width = loaded.model.get_output_embeddings().weight.shape[0]
        try:
            tokenizer = llguidance.hf.from_tokenizer(loaded.tokenizer, n_vocab=width)
        except ValueError as error:
            raise InputError(f"the agent {name}: its tokenizer cannot be used: {error}") from error
        _held = _Held(key, loaded, tokenizer)
    return _held


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[BaseMessage]) -> Tensor:
    """The prompt's token ids (1, tokens), by the model's chat template if it has one.

    Raises:
        AgentError: the template takes no such conversation.
    """
    if not tokenizer.chat_template:
        text = "\n\n".join(str(message.text) for message in messages) + "\n\n"
        return torch.tensor([tokenizer(_plain(tokenizer, text)).input_ids])
    for roles in (_ROLES, _ROLES | {"system": "user"}):  # some know no system
        chat: list[dict[str, str]] = []
        for message in messages:
            content = _plain(tokenizer, str(message.text))
            if chat and chat[-1]["role"] == roles[message.type]:  # most want turns to alternate
                chat[-1]["content"] += "\n\n" + content
            else:
                chat.append({"role": roles[message.type], "content": content})
        try:
            text = str(
                tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
                )
            )
            return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        except TemplateError as error:
            problem = error
    raise AgentError(f"the model's chat template does not take the prompt: {problem}")


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in which nothing is read as one of the special tokens, such as a turn's end."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[:1]} {token.content[1:]}")
    return text


def _matcher(held: _Held, grammar: str) -> "LLMatcher":
    from llguidance import LLMatcher

    matcher = LLMatcher(held.tokenizer, grammar)
    _check(matcher)
    return matcher


def _check(matcher: "LLMatcher") -> None:
    if matcher.is_error():
        raise AgentError(f"the answer's grammar failed: {matcher.get_error()}")


def _generate(
    loaded: LoadedModel, read: Tensor, matcher: "LLMatcher", options: LocalOptions, seed: str
) -> list[int]:
    """The tokens written after those read, until the answer is whole or ``max_new_tokens``."""

    def only_allowed(_: Tensor, scores: Tensor) -> Tensor:
        check_stop()
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
        _check(matcher)
        return scores.masked_fill(allowed.to(scores.device) == 0, -math.inf)

    def whole(ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        matcher.consume_token(int(ids[0, -1]))
        _check(matcher)
        return torch.tensor([matcher.is_stopped()], device=ids.device)

    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    read = read.to(loaded.device)
    model: Any = loaded.model
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with _threads(options.threads), torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(random.Random(seed).getrandbits(63))
        ids = model.generate(
            read,
            attention_mask=torch.ones_like(read),
            max_new_tokens=options.max_new_tokens,
            logits_processor=[only_allowed],
            stopping_criteria=[whole],
            **sampling,
        )
    written: list[int] = ids[0, read.shape[1] :].tolist()
    return written


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
