"""The model run as it is, some windows at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from prunewright.state import InputError
from prunewright.tools.execution.splitting import Enough, Run, SplitError, Splitter, Visitor
from prunewright.tools.execution.weights import LiveWeights
from prunewright.tools.model.head import Head, Progress, hidden_states, token_losses
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.observe import OnProduct, ProductObserver

__all__ = ["Enough", "Execution", "Run", "Visitor"]

TOKENS = 8192
"""Tokens of a batch on a GPU, where nobody says how many windows it has."""


@contextmanager
def ordered_attention(device: torch.device) -> Iterator[None]:
    """Attention whose gradients are the same each time: others add up in the order of threads."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True), _Ordered():
        yield


class _Ordered(TorchFunctionMode):
    """Has flash attention add up its gradients in order.

    It does so only where deterministic algorithms are a must, not where a warning is enough. Other
    functions may have no ordered form and would raise there, so it is a must for that one alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and mark what computes its gradients."""
        found = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            node = found.grad_fn
            for _ in range(3):  # padded heads are cut to size after it
                if node is not None and "ScaledDotProduct" in node.name():
                    node.register_prehook(lambda _: _must_be_ordered(True))
                    node.register_hook(lambda *_: _must_be_ordered(False))
                    break
                node = node.next_functions[0][0] if node and node.next_functions else None
        return found


def _must_be_ordered(must: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=not must)


class _EndedError(Exception):
    """Ends a pass after the last block that is asked for."""


class Execution:
    """Runs a model whose weights are all where they are needed.

    Attributes:
        model: the live model.
        layers: its prunable layers, by name.
        device: where token ids go and hidden states come from.
        weights: the live weights of the layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, Layer],
        device: torch.device,
        batch: int | None = None,
    ) -> None:
        """Make it.

        Args:
            model: the model, on its device.
            layers: its prunable layers, by name.
            device: see the attribute.
            batch: windows of one pass; None: one on a processor, `TOKENS` on other devices.
        """
        self.model = model
        self.layers = layers
        self.device = device
        self.weights = LiveWeights(model)
        self._batch = batch
        self._splitter = Splitter(model)

    def groups(
        self,
        label: str,
        windows: Tensor,
        progress: Progress | None = None,
        *,
        gradients: bool = False,
    ) -> Iterator[Tensor]:
        """The windows in parts of as many as one pass takes, on the model's device.

        Args:
            label: what is being done.
            windows: token ids [windows, length].
            progress: told when the work begins, and of each part.
            gradients: whether the passes go back, too, and see each window's gradients.
        """
        if progress is not None:
            progress(label, 0, len(windows))
        done = 0
        for group in windows.split(1 if gradients else self._at_once(windows.shape[1])):
            yield group.to(self.device)
            done += len(group)
            if progress is not None:
                progress(label, done, len(windows))

    @property
    def window(self) -> int:
        """Index in its group of the window whose gradients are being told of."""
        return 0  # of groups of one

    def hidden_states(self, ids: Tensor) -> Tensor:
        """The last hidden states [windows, length, width] of a group, after the final norm."""
        return hidden_states(self.model, ids).to(self.device)

    def window_losses(
        self,
        head: Head,
        windows: Tensor,
        progress: Progress | None = None,
        scored: Tensor | None = None,
    ) -> list[float]:
        """Mean token loss of each window.

        Args:
            head: the model's.
            windows: token ids [windows, length].
            progress: told of each part.
            scored: which tokens after the first the mean is over, bool [windows, length - 1], at
                least one in each window; None: all.

        Returns:
            One mean loss a window, nats a token.
        """
        return list(self.each_loss(head, windows, progress, scored))

    def each_loss(
        self,
        head: Head,
        windows: Tensor,
        progress: Progress | None = None,
        scored: Tensor | None = None,
    ) -> Iterator[float]:
        """As `window_losses`, each as soon as it is known."""
        picked: Iterator[slice | Tensor] = repeat(slice(None)) if scored is None else iter(scored)
        for group in self.groups("perplexity", windows, progress):
            # Not around the yield, which would leave it on for the caller.
            with torch.no_grad():
                if head.exact:
                    pairs = zip(self.hidden_states(group), group, strict=True)
                    losses = [head.losses(states, ids) for states, ids in pairs]
                else:
                    losses = [token_losses(self.model, head, ids) for ids in group]
                # One transfer: a device that computes on its own is waited for once.
                found = torch.stack(losses).cpu()
            yield from (float(one[next(picked)].double().mean()) for one in found)

    @contextmanager
    def observe(self, on_product: OnProduct, layers: list[Layer] | None = None) -> Iterator[None]:
        """Tell of each product of the layers' weights while the ``with`` block runs the model.

        Args:
            on_product: told of each.
            layers: which; None for all.
        """
        chosen = list(self.layers.values()) if layers is None else layers
        with ProductObserver([(ly, self.weights.read(ly)) for ly in chosen], on_product):
            yield

    @contextmanager
    def recomputing(self, wanted: bool) -> Iterator[None]:
        """Make activations again in the backward pass, block by block, if that is wanted."""
        if not wanted:
            yield
            return
        with self._hooked():
            before, self._splitter.recompute = self._splitter.recompute, True
            try:
                yield
            finally:
                self._splitter.recompute = before

    @torch.no_grad()
    def visit(self, windows: Tensor, blocks: int, visitor: Visitor) -> int:
        """Run all windows through one block after another, which the visitor may change.

        Args:
            windows: token ids [windows, length].
            blocks: how many of the blocks, from the first on.
            visitor: is told a block's index and what runs it on all windows, as often as it likes;
                gives the hidden states that the next block gets.

        Returns:
            Tokens that went through the whole model, rounded; a part of it counts as a part.

        Raises:
            InputError: the blocks cannot be run one by one.
        """

        def told(index: int, run: Run) -> Tensor:
            states = visitor(index, run)
            if index == blocks - 1:
                raise _EndedError
            return states

        ids = windows.to(self.device)
        with self._hooked():
            try:
                with self._splitter.splitting(ids, told), suppress(_EndedError):
                    before = self._splitter.passed
                    hidden_states(self.model, ids)
            except SplitError as error:
                raise InputError(_no_blocks_words(error)) from error
        passed = self._splitter.passed - before
        return round(passed * windows.shape[1] / self._splitter.blocks)

    def check_blocks(self, windows: Tensor) -> None:
        """Refuse a model whose blocks cannot be run one by one, as `visit` does.

        Args:
            windows: token ids [windows, length]; a few of them are tried.

        Raises:
            InputError: saying why.
        """
        ids = windows[:2].to(self.device)
        try:
            with self._hooked(), self._splitter.splitting(ids):
                pass
        except SplitError as error:
            raise InputError(_no_blocks_words(error)) from error

    def close(self) -> None:
        """Let go of the model."""

    def _at_once(self, length: int) -> int:
        """Windows of one pass."""
        if self._batch is not None:
            return self._batch
        return 1 if self.device.type == "cpu" else max(1, TOKENS // length)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Let the splitter stand in for the blocks' forward methods."""
        with ExitStack() as stack:
            for index, (_, block) in enumerate(named_blocks(self.model)):
                stack.enter_context(self._replaced(index, block))
            yield

    @contextmanager
    def _replaced(self, index: int, block: nn.Module) -> Iterator[None]:
        forward, own = block.forward, "forward" in vars(block)
        block.forward = partial(self._splitter.run, index, self._ready(index, forward))
        try:
            yield
        finally:
            del block.forward  # the class's own method again
            if own:  # unless something had replaced it before, as accelerate does
                block.forward = forward

    def _ready(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward method with what must be done before it."""
        return forward


def _no_blocks_words(error: SplitError) -> str:
    return (
        f"this model cannot be pruned block by block (criterion sparsegpt or obs, reconstruct): "
        f"{error}"
    )
