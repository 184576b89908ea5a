"""A live model for lm-evaluation-harness. Importing this needs the extra ``eval``."""

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from prunewright.state import InputError
from prunewright.tools.evaluation.kept import Value
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.tokens import check_ids, embedding_rows, start_tokens

_ENDLESS = 2**31
"""Tokens that a model takes which sets no limit."""


class LiveModel(HFLM):  # type: ignore[misc]
    """lm-eval's own model, whose answers are kept.

    What lm-eval would cut off at the left is refused, and so is a token that the model does not
    know. Texts begin as windows do: see `start_tokens`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kept: MutableMapping[str, Value],
        tick: Callable[[int], None],
    ) -> None:
        """Make it.

        Args:
            loaded: the model.
            kept: answers by lm-eval's hash of the request; new ones are added as they come.
            tick: told of each number of requests that are answered.

        Raises:
            InputError: no token of the model ends a text.
        """
        if loaded.tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {loaded.name} has no token that ends a text")
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            max_length=limit if isinstance(limit, int) else _ENDLESS,
            softmax_dtype=torch.float32,
        )
        self._loaded = loaded
        self._start = start_tokens(loaded.tokenizer)
        self._rows = embedding_rows(loaded.model)
        self._kept = kept
        self._tick = tick
        self.set_cache_hook(_Hook(kept, tick))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer begins a text with unless that is declined."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        check_ids(ids, self.tokenizer, self._rows, "a question or its examples")
        ids = ids if add_special_tokens is False else self._start + ids
        self._check(len(ids))
        return ids

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Token ids [1, length] of the one string of a batch, and a mask of ones."""
        ids = torch.tensor([self.tok_encode(string) for string in strings])
        self._check(ids.shape[1] + self.max_length - (left_truncate_len or self.max_length))
        return ids, torch.ones_like(ids)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        return self._answers("loglikelihood", super().loglikelihood, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Greedy answers, each cut before the first of its stop sequences."""
        return self._answers("generate_until", super().generate_until, requests)

    def _answers(self, kind: str, ask: Callable[..., Any], requests: list[Any]) -> list[Any]:
        """Ask what is not kept: the hook keeps each answer as it comes."""
        keys = [hash_args(kind, request.args) for request in requests]
        left = [r for key, r in zip(keys, requests, strict=True) if key not in self._kept]
        self._tick(len(requests) - len(left))
        if left:
            ask(left, disable_tqdm=True)
        return [self._kept[key] for key in keys]

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise InputError(
                f"a question with its examples takes {length} tokens, more than the "
                f"{self.max_length} that the model {self._loaded.name} was made for: ask with "
                "fewer --shots"
            )


class _Hook(CacheHook):  # type: ignore[misc]
    def __init__(self, kept: MutableMapping[str, Value], tick: Callable[[int], None]) -> None:
        self.dbdict = kept
        self._tick = tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        super().add_partial(attr, req, res)
        self._tick(1)
