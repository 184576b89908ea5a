"""Token losses and perplexity without ever holding a sequence's full logits."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from prunewright.tools.model.layers import find_body

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the parts done and the parts in all."""

TOKENS_AT_ONCE = 256
_Part = TypeVar("_Part")


def told(
    label: str, parts: Iterable[_Part], total: int, progress: Progress | None
) -> Iterator[_Part]:
    """The parts of some work one by one; progress is told when it begins and after each part.

    Args:
        label: what is being done.
        parts: what is worked on.
        total: how many there are.
        progress: who is told; None for nobody.
    """
    if progress is not None:
        progress(label, 0, total)
    for done, part in enumerate(parts, start=1):
        yield part
        if progress is not None:
            progress(label, done, total)


def hidden_states(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """The last hidden state [batch, length, width]: the blocks and the final norm, no head.

    Args:
        model: the causal LM.
        ids: token ids [batch, length].
        options: what else the body of the model is told, such as ``attention_mask``.
    """
    base = model.base_model
    if base is model:  # a family that does not name its body: the smallest model with the blocks
        base = model.get_submodule(find_body(model))
    states: Tensor = base(input_ids=ids, **{"use_cache": False, **options}).last_hidden_state
    return states


class Head:
    """Logits from hidden states as the model itself makes them.

    Some families cap or scale the output of ``lm_head``; what is done here is compared once
    with the model's own logits, and a model for which it differs is scored through its whole
    forward pass instead, at the price of full logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        config = model.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1.0
        self._divide = getattr(config, "logits_scaling", None) or 1.0
        head = model.get_output_embeddings()
        self._head = head
        self.exact = head is not None and self._agrees()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32."""
        assert self._head is not None
        # Some families (Mamba) carry float32 from block to block in a model of half precision.
        hidden = hidden.to(next(self._head.parameters()).dtype)
        logits: Tensor = self._head(hidden).float() * self._scale / self._divide
        logits = self._cap * torch.tanh(logits / self._cap) if self._cap else logits
        return logits.to(hidden.device)  # where a model is spread over devices

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Next-token losses of one window, in pieces, so that its full logits never exist.

        Args:
            hidden: its last hidden states [length, width].
            ids: its token ids [length].

        Returns:
            Losses [length - 1] in nats, float32.
        """
        parts = zip(hidden[:-1].split(TOKENS_AT_ONCE), ids[1:].split(TOKENS_AT_ONCE), strict=True)
        return torch.cat(
            [
                functional.cross_entropy(self(part), target, reduction="none")
                for part, target in parts
            ]
        )

    @torch.no_grad()
    def _agrees(self) -> bool:
        ids = torch.arange(1, 9, device=self._model.device).unsqueeze(0)
        ids = ids % self._model.config.get_text_config().vocab_size
        whole = self._model(input_ids=ids, use_cache=False).logits.float()
        parts = self(hidden_states(self._model, ids))
        # In half precision logits differ with the shapes that they are computed in.
        relative = 1e-4 if self._model.dtype == torch.float32 else 0.02
        return bool((whole - parts).abs().max() <= relative * float(whole.abs().max()) + 1e-6)


@torch.no_grad()
def token_losses(model: PreTrainedModel, head: Head, ids: Tensor) -> Tensor:
    """Next-token losses of one window.

    Args:
        model: the causal LM.
        head: its head.
        ids: token ids [length].

    Returns:
        Losses [length - 1] in nats, float32.
    """
    ids = ids.to(model.device)
    if head.exact:
        return head.losses(hidden_states(model, ids.unsqueeze(0))[0], ids)
    logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    return functional.cross_entropy(logits, ids[1:], reduction="none")
