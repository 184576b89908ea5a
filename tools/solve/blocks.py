"""A model's decoder blocks, run one by one on hidden states that are carried along.

What prunes a block with the inputs that the pruned blocks before it give (SparseGPT, arXiv
2301.00774) cannot use the model's own forward pass: that would run all blocks again for each.
"""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from prunewright.state import InputError
from prunewright.tools.model.head import Progress, hidden_states, told
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.observe import OnProduct, ProductObserver


@dataclass(frozen=True)
class _Call:
    """The arguments of a block but for the hidden states."""

    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    by_keyword: bool
    """Whether the hidden states come as ``hidden_states=``."""


class BlockTokens:
    """Counts the tokens that run through a model's blocks while it is entered.

    A token counts once where it went through all of them, and in part where through some.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = [block for _, block in named_blocks(model)]
        self._passed = 0
        self._handles: list[RemovableHandle] = []

    @property
    def tokens(self) -> int:
        """Tokens so far, rounded."""
        return round(self._passed / len(self._blocks))

    def __enter__(self) -> "BlockTokens":
        def after(_: nn.Module, __: Any, outputs: Any) -> None:
            states = _states(outputs)
            self._passed += states.shape[0] * states.shape[1]

        self._handles = [block.register_forward_hook(after) for block in self._blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _EnteredError(Exception):
    """Ends a pass of the whole model where its first block begins."""


class BlockRunner:
    """Runs single blocks of a model on the hidden states of some windows.

    The blocks' other arguments (masks, positions, whatever a family passes) are taken from a pass
    of the whole model and given to each block again as they were. Where those of two windows are
    equal they do not depend on the text, and of the other windows only the first block's inputs
    are made.

    Attributes:
        blocks: the model's decoder blocks.
        first: hidden states [1, length, width] that enter the first block, one a window.
    """

    @torch.no_grad()
    def __init__(
        self, loaded: LoadedModel, windows: Tensor, progress: Progress | None = None
    ) -> None:
        """Keep what the model's blocks are called with as it runs over the windows.

        Args:
            loaded: the model, with whatever weights are live.
            windows: token ids [windows, length].
            progress: told after each window.

        Raises:
            InputError: the model does more between its blocks than handing hidden states on.
        """
        self._loaded = loaded
        self.blocks = [block for _, block in named_blocks(loaded.model)]
        self.first: list[Tensor] = []
        self._calls: list[list[_Call]] = []
        for window in told("inputs of blocks", windows, len(windows), progress):
            self._enter(window.to(loaded.device))

    def _enter(self, window: Tensor) -> None:
        """Keep what enters the first block for a window, and what each block is called with."""
        if len(self._calls) > 1 and all(
            _equal(call, first) for call, first in zip(self._calls[1], self._calls[0], strict=True)
        ):
            entry, states = self._record(window, only_first=True)
            if _equal(_share(entry, self._calls[0][:1])[0], self._calls[0][0]):
                self.first.append(states[0])
                self._calls.append(self._calls[0])
                return
        calls, states = self._record(window)
        if self._calls:
            calls = _share(calls, self._calls[0])
        else:
            self._check(calls, states)
        self.first.append(states[0])
        self._calls.append(calls)

    def _record(
        self, window: Tensor, *, only_first: bool = False
    ) -> tuple[list[_Call], list[Tensor]]:
        """What each block, or the first, is called with, and the hidden states that it is given."""
        calls: list[_Call] = []
        states: list[Tensor] = []

        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rest = dict(keywords)
            hidden = arguments[0] if arguments else rest.pop("hidden_states")
            # Only the first block's are kept: the others' are checked, and made again.
            calls.append(_Call(tuple(arguments[1:]), rest, not arguments))
            states.append(hidden)
            if only_first:
                raise _EnteredError

        with ExitStack() as stack:
            if only_first:
                stack.enter_context(suppress(_EnteredError))
            for block in self.blocks:
                handle = block.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            hidden_states(self._loaded.model, window.unsqueeze(0))
        if not only_first and len(calls) != len(self.blocks):
            raise InputError(
                f"{len(self.blocks)} blocks were called {len(calls)} times in one pass: this "
                "model cannot be pruned block by block (criterion sparsegpt, reconstruct)"
            )
        return calls, states

    def _check(self, calls: list[_Call], states: list[Tensor]) -> None:
        for index, entering in enumerate(states[:-1]):
            left = self._call(index, calls[index], entering)
            if left.shape != states[index + 1].shape or not torch.equal(left, states[index + 1]):
                raise InputError(
                    f"between blocks {index} and {index + 1} the model changes the hidden states: "
                    "it cannot be pruned block by block (criterion sparsegpt, reconstruct)"
                )

    @torch.no_grad()
    def run(
        self,
        index: int,
        window: int,
        hidden: Tensor,
        on_product: OnProduct | None = None,
        layers: list[Layer] | None = None,
    ) -> Tensor:
        """What a block makes of hidden states, with its live weights.

        Args:
            index: which block.
            window: which window the hidden states are of.
            hidden: [1, length, width].
            on_product: told of each product of the observed layers.
            layers: those that are observed.

        Returns:
            [1, length, width].
        """
        call = self._calls[window][index]
        if on_product is None:
            return self._call(index, call, hidden)
        weights = [(layer, self._loaded.weight(layer)) for layer in layers or []]
        with ProductObserver(weights, on_product):
            return self._call(index, call, hidden)

    def _call(self, index: int, call: _Call, hidden: Tensor) -> Tensor:
        block = self.blocks[index]
        if call.by_keyword:
            outputs = block(*call.rest, hidden_states=hidden, **call.keywords)
        else:
            outputs = block(hidden, *call.rest, **call.keywords)
        return _states(outputs)


def _states(outputs: Any) -> Tensor:
    """The hidden states in what a block returns: alone, or first of several."""
    states: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return states


def _equal(call: _Call, first: _Call) -> bool:
    """Whether a call, shared with the first window's, has nothing of its own."""

    def equal(value: Any, other: Any) -> bool:
        if isinstance(value, tuple) and isinstance(other, tuple):
            return len(value) == len(other) and all(map(equal, value, other))
        plain = isinstance(value, bool | int | float | str) and type(value) is type(other)
        return value is other or (plain and bool(value == other))

    return (
        call.by_keyword == first.by_keyword
        and equal(call.rest, first.rest)
        and call.keywords.keys() == first.keywords.keys()
        and all(equal(value, first.keywords[key]) for key, value in call.keywords.items())
    )


def _share(calls: list[_Call], model: list[_Call]) -> list[_Call]:
    """The calls with every tensor that equals the first window's replaced by that one.

    Masks and positions are the same for all windows and would take much memory otherwise.
    """

    def shared(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            same = value.shape == other.shape and value.dtype == other.dtype
            return other if same and torch.equal(value, other) else value
        if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
            return tuple(shared(a, b) for a, b in zip(value, other, strict=True))
        return value

    return [
        _Call(
            shared(call.rest, first.rest),
            {key: shared(value, first.keywords.get(key)) for key, value in call.keywords.items()},
            call.by_keyword,
        )
        for call, first in zip(calls, model, strict=True)
    ]
