"""A live model as lm-evaluation-harness asks models. Importing this needs the extra ``eval``."""

import math
from collections.abc import Callable
from typing import Any

from lm_eval.api.model import TemplateLM

from prunewright.state import InputError
from prunewright.tools.model.continuations import Continuations
from prunewright.tools.model.head import Head
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.tokens import check_ids, embedding_rows, start_tokens


class LiveModel(TemplateLM):  # type: ignore[misc]
    """Answers requests one by one, in an order in which most of each is computed already.

    On a processor that is several times as fast as lm-eval's own model, which computes the logits
    of every token and the examples of every question anew: see `Continuations`.
    """

    backend = "causal"

    def __init__(self, loaded: LoadedModel, tick: Callable[[], None]) -> None:
        """Make it.

        Args:
            loaded: the model.
            tick: called after each request.

        """
        super().__init__()
        self._loaded = loaded
        self._start = start_tokens(loaded.tokenizer)
        self._rows = embedding_rows(loaded.model)
        self._scorer = Continuations(loaded.model, Head(loaded.model))
        self._tick = tick

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        value = self._loaded.tokenizer.eos_token_id
        if not isinstance(value, int):
            raise InputError(f"the tokenizer of {self._loaded.name} has no token that ends a text")
        return value

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer begins a text with unless that is declined."""
        ids: list[int] = self._loaded.tokenizer(
            string, add_special_tokens=False, verbose=False
        ).input_ids
        check_ids(ids, self._loaded.tokenizer, self._rows, "a question or its examples")
        return ids if add_special_tokens is False else self._start + ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for index in sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2]):
            context, continuation = requests[index][1:]
            self._check(len(context) + len(continuation))
            scores = self._scorer.log_probabilities(context, continuation).cpu().double()
            greedy = bool((scores[:, 0] == scores[:, 1]).all())
            found[index] = float(scores[:, 0].sum()), greedy
            self._tick()
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        texts = [self.tok_encode(text, add_special_tokens=False) for (text,) in _args(requests)]
        pairs = [(("", ""), [self.prefix_token_id], ids) for ids in texts]
        return [value for value, _ in self._loglikelihood_tokens(pairs)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first of its stop sequences."""
        prompts = [(self.tok_encode(context), options) for context, options in _args(requests)]
        found: dict[int, str] = {}
        for index in sorted(range(len(prompts)), key=lambda i: prompts[i][0]):
            context, options = prompts[index]
            found[index] = self._answer(context, options["until"], options["max_gen_toks"])
            self._tick()
        return [found[index] for index in range(len(prompts))]

    def _answer(self, context: list[int], stops: list[str], most: int) -> str:
        self._check(len(context) + most)

        def text(tokens: list[int]) -> str:
            return str(self._loaded.tokenizer.decode(tokens, skip_special_tokens=True))

        def ended(tokens: list[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(s in text(tokens) for s in stops)

        words = text(self._scorer.greedy(context, most, ended))
        for stop in stops:
            words = words.partition(stop)[0]
        return words

    def _check(self, length: int) -> None:
        config = self._loaded.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if length > (limit if isinstance(limit, int) else math.inf):
            raise InputError(
                f"a question with its examples takes {length} tokens, more than the {limit} that "
                f"the model {self._loaded.name} was made for: ask with fewer --shots"
            )


def _args(requests: list[Any]) -> list[Any]:
    return [request.args for request in requests]
