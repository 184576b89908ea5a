"""A batch of windows run one by one through each block of a model in turn.

The model's own forward pass is what runs: all that lies between the blocks stays as its family
wrote it, and only the blocks are given one window of the batch at a time. So each block is at work
once in a pass, and can be away, or be changed, before and after.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunewright.tools.model.head import hidden_states
from prunewright.tools.model.layers import named_blocks

Forward = Callable[..., Any]

_TRIED = 24
"""Tokens of the pass in which a split batch is compared with its windows alone."""


class SplitError(Exception):
    """A model's blocks cannot be run on one window of a batch at a time; the words say why."""


class Enough(Exception):  # noqa: N818  # no error
    """Raised by who observes a block in `Run.partly`, to end the window that is at work."""


@dataclass(frozen=True)
class _Batch:
    """How the arguments of each block divide into windows.

    Attributes:
        windows: in the batch.
        places: by block, the dimension of each tensor among the block's arguments, in order, along
            which windows lie, and how much of it one window has; None where all windows share the
            tensor.
    """

    windows: int
    places: list[list[tuple[int, int] | None]]

    def of(self, index: int, window: int, states: Tensor) -> Tensor:
        """A window's part of the hidden states at a block: a view."""
        place = self.places[index][0]
        assert place is not None
        return states.narrow(place[0], window * place[1], place[1])

    def part(self, index: int, window: int, call: Any, tensors: list[Tensor]) -> Any:
        """A block's arguments for one window.

        Raises:
            SplitError: they are not those that the batch was divided by.
        """
        if len(self.places[index]) != len(tensors):
            raise SplitError("a block's arguments change from pass to pass")
        parts = (
            tensor if place is None else tensor.narrow(place[0], window * place[1], place[1])
            for tensor, place in zip(tensors, self.places[index], strict=True)
        )
        return _replaced(call, parts)


@dataclass(frozen=True)
class Run:
    """A block with what it is given of all windows.

    Attributes:
        entering: the hidden states of the batch [windows, length, width]; must not be written to.
        windows: how many there are.
    """

    entering: Tensor
    windows: int
    _splitter: "Splitter"
    _index: int
    _forward: Forward
    _call: Any
    _batch: _Batch

    def __call__(self, entering: Tensor | None = None) -> Tensor:
        """The hidden states [windows, length, width] that leave the block.

        Args:
            entering: others of that shape in place of those that the block is given.
        """
        given = self.entering if entering is None else entering
        leaving = torch.empty_like(given)
        for window in range(self.windows):
            self.part(window, leaving).copy_(self.window(window, given))
        return leaving

    def partly(self, windows: int) -> None:
        """Run each window until whoever observes it raises `Enough`.

        Args:
            windows: how many of them, from the first on.
        """
        for window in range(windows):
            with suppress(Enough):
                self.window(window, self.entering)

    def part(self, window: int, states: Tensor) -> Tensor:
        """A window's part of hidden states [windows, length, width]: a view, [1, length, width]."""
        return self._batch.of(self._index, window, states)

    def window(self, window: int, entering: Tensor) -> Tensor:
        """What leaves the block of one window, shaped as `part`; gradients flow through it.

        Args:
            window: its index.
            entering: as for a call.
        """
        tensors = [entering, *list(_tensors(self._call))[1:]]
        args, keywords = self._batch.part(self._index, window, self._call, tensors)
        self._splitter.passed += 1
        self._splitter.window = window
        return _states(self._forward(*args, **keywords))

    def backward(self, gradients: Tensor) -> Tensor:
        """The gradient at what enters the block, [windows, length, width].

        Window by window, so that whoever is told of a weight's gradient is told of one window's.

        Args:
            gradients: at what leaves it.
        """
        tensors = [tensor.detach() for tensor in _tensors(self._call)]
        entering = torch.empty_like(gradients)
        for window in range(self.windows):
            self._splitter.window = window
            call = self._batch.part(self._index, window, self._call, tensors)
            hidden = next(_tensors(call)).detach().requires_grad_()
            args, keywords = _replaced(call, _first(hidden, call))
            with torch.enable_grad():
                states = _states(self._forward(*args, **keywords))
            torch.autograd.backward(states, self.part(window, gradients))
            assert hidden.grad is not None
            self.part(window, entering).copy_(hidden.grad)
        return entering


Visitor = Callable[[int, Run], Tensor]
"""Is told a block's index and what runs it; gives the hidden states that the next one gets."""


class Splitter:
    """Stands in for the forward methods of a model's blocks: see `run`.

    Attributes:
        blocks: how many the model has.
        trying: whether what runs now only tries how batches can be split.
        recompute: make activations again in the backward pass instead of keeping them, where a
            batch is not split.
        told: called after each block, in the forward pass and in the backward pass.
        passed: how many times a window went through a block so far.
        window: index in its batch of the one that is going through a block, forward or backward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.blocks = len(named_blocks(model))
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._kinds: list[tuple[type, int] | None] = []
        """The sequence that each block puts its hidden states in, and its length; None where it
        gives them bare."""
        self._shapes: list[list[tuple[int, ...]]] | None = None
        self._dry = False
        self._batch: _Batch | None = None
        self._visitor: Visitor | None = None
        self.trying = False
        self.recompute = False
        self.told: Callable[[], None] = lambda: None
        self.passed = self.window = 0

    @contextmanager
    def splitting(self, ids: Tensor, visitor: Visitor | None = None) -> Iterator[None]:
        """Split the batch that passes inside the ``with`` block are made of.

        Args:
            ids: the batch, token ids [windows, length].
            visitor: is told of each block; None just runs it.

        Raises:
            SplitError: the blocks cannot be run so.
        """
        self._batch, self._visitor = self._divided(ids), visitor
        try:
            yield
        finally:
            self._batch = self._visitor = None

    def run(self, index: int, forward: Forward, *args: Any, **keywords: Any) -> Any:
        """What a block's forward method returns, window by window where the batch is split."""
        if self._shapes is not None:
            return self._recorded(index, forward, args, keywords)
        if self._batch is None:
            self.window = 0
            if self.recompute and torch.is_grad_enabled():
                outputs = checkpoint(forward, *args, use_reentrant=False, **keywords)
            else:
                outputs = forward(*args, **keywords)
            self.passed += len(_states(outputs))
        else:
            outputs = self._split(index, forward, (args, _in_order(keywords)), self._batch)
        if not self.trying:
            self.told()
        return outputs

    def _split(self, index: int, forward: Forward, call: Any, batch: _Batch) -> Any:
        hidden, *others = _tensors(call)
        run = Run(hidden, batch.windows, self, index, forward, call, batch)
        if torch.is_grad_enabled():
            if any(other.requires_grad for other in others):
                raise SplitError("gradients reach a block by more than its hidden states")
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            states: Tensor = _Recomputed.apply(run, self, hidden)  # type: ignore[no-untyped-call]
        else:
            states = run() if self._visitor is None else self._visitor(index, run)
        return self._returned(index, states)

    def _returned(self, index: int, states: Tensor) -> Any:
        """Hidden states as a block returns them; what it returns beside them is left out."""
        kind = self._kinds[index]
        return states if kind is None else kind[0]([states, *[None] * (kind[1] - 1)])

    def _divided(self, ids: Tensor) -> _Batch:
        """How a batch of a shape divides, found out by passes in which the blocks do nothing."""
        shape = tuple(ids.shape)
        if shape not in self._batches:
            if not self._kinds:
                self._try(ids)
            one, all_ = self._pass(ids[:1], dry=True), self._pass(ids, dry=True)
            places = [_places(a, b, len(ids)) for a, b in zip(one, all_, strict=True)]
            self._batches[shape] = _Batch(len(ids), places)
        return self._batches[shape]

    @torch.no_grad()
    def _pass(self, ids: Tensor, *, dry: bool) -> list[list[tuple[int, ...]]]:
        """The shapes of all tensors that each block is given; the blocks do nothing if ``dry``."""
        shapes: list[list[tuple[int, ...]]] = []
        self._shapes, self._dry = shapes, dry
        try:
            hidden_states(self._model, ids)
        finally:
            self._shapes = None
        if len(shapes) != self.blocks:
            raise SplitError(f"{self.blocks} blocks are called {len(shapes)} times in one pass")
        return shapes

    def _recorded(self, index: int, forward: Forward, args: Any, keywords: Any) -> Any:
        assert self._shapes is not None
        if index != len(self._shapes):
            raise SplitError("the blocks are not called once each, in their order")
        tensors = list(_tensors((args, _in_order(keywords))))
        self._shapes.append([tuple(tensor.shape) for tensor in tensors])
        if self._dry:
            return self._returned(index, tensors[0])
        outputs = forward(*args, **keywords)
        bare = isinstance(outputs, Tensor)
        self._kinds.append(None if bare else (type(outputs), len(outputs)))
        return outputs

    @torch.no_grad()
    def _try(self, like: Tensor) -> None:
        """Learn what the blocks return, and compare a split batch with its windows alone.

        Raises:
            SplitError: they differ, or a block returns more than its hidden states.
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        length = min(_TRIED, like.shape[1])
        ids = torch.arange(2 * length, device=like.device).view(2, length) % vocabulary
        self.trying = True
        try:
            self._pass(ids[:1], dry=False)
            alone = torch.cat([hidden_states(self._model, row.unsqueeze(0)) for row in ids])
            with self.splitting(ids):
                split = hidden_states(self._model, ids)
            # In half precision norms differ with the shapes that they are computed in.
            relative = 1e-4 if alone.dtype == torch.float32 else 0.02
            if not bool((alone - split).abs().max() <= relative * alone.abs().max() + 1e-6):
                raise SplitError("its hidden states change when windows take each block in turn")
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # each family fails its own way without what it hands on
            self._kinds, self._batches = [], {}
            if isinstance(error, SplitError):
                raise
            words = str(error).strip() or type(error).__name__
            raise SplitError(f"its blocks hand on more than hidden states: {words}") from error
        finally:
            self.trying = False


class _Recomputed(torch.autograd.Function):
    """A block over a split batch, whose activations are made again in the backward pass.

    As one node for the whole batch: it is reached once, with the gradients of all windows there.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, splitter: Splitter, _: Tensor) -> Tensor:
        ctx.run, ctx.splitter = run, splitter
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        entering = ctx.run.backward(gradients[0])
        ctx.splitter.told()
        return None, None, entering


def _in_order(keywords: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the hidden states first, should they have a name."""
    if "hidden_states" not in keywords:
        return keywords
    return {"hidden_states": keywords["hidden_states"]} | keywords


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A nested value with its tensors replaced, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return type(value)([_replaced(part, tensors) for part in value])
    if isinstance(value, dict):
        return {key: _replaced(part, tensors) for key, part in value.items()}
    return value


def _states(outputs: Any) -> Tensor:
    """The hidden states in what a block returns: alone, or first of several."""
    states: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return states


def _first(hidden: Tensor, call: Any) -> Iterator[Tensor]:
    """The tensors of a call with others in place of the hidden states."""
    _, *others = _tensors(call)
    return iter([hidden, *others])


def _places(
    one: list[tuple[int, ...]], all_: list[tuple[int, ...]], windows: int
) -> list[tuple[int, int] | None]:
    """Where windows lie in each tensor, from its shapes for one window and for all."""
    if len(one) != len(all_):
        raise SplitError("a block's arguments depend on the size of the batch")
    places: list[tuple[int, int] | None] = []
    for a, b in zip(one, all_, strict=True):
        apart = [dim for dim in range(len(a)) if len(a) == len(b) and a[dim] != b[dim]]
        if a == b:
            # Of a single window the hidden states are all its own.
            places.append((0, a[0]) if windows == 1 and not places else None)
        elif len(apart) == 1 and b[apart[0]] == windows * a[apart[0]]:
            places.append((apart[0], a[apart[0]]))
        else:
            raise SplitError("a block's arguments do not divide into windows")
    if not places or places[0] is None:
        raise SplitError("the hidden states do not divide into windows")
    return places
