"""Which layers a pass of a model uses, and how: what is pruned must be seen, and must matter."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunewright.state import InputError
from prunewright.tools.model.layers import Layer, find_layers, left_dense
from prunewright.tools.model.observe import Use, UseObserver

FEW, MANY = 65, 256
"""Tokens of the pass that looks, more than the 64 that recurrences take at a time; of a second
one, where the first has not reached everything."""
LEAST = 0.5
"""Share of the blocks' weights below which a model is refused."""


class PassError(Exception):
    """A pass of the model over a few tokens fails; the words are its own."""


def used_layers(model: PreTrainedModel) -> tuple[dict[str, Layer], str]:
    """The layers of `find_layers` that can be pruned, and what is left dense, in words.

    A pass over a few tokens says in what form products see each parameter, and whether the
    logits' gradient can flow back to it. Left dense is what takes part in no product of whole
    matrices, and what no gradient reaches (an indexer that only chooses): nothing is known of its
    weights. An expert that is a module of its own and got no token stays in if one of its like did.

    Args:
        model: on its device, in the dtype to compute in.

    Raises:
        PassError: the model's code fails.
        InputError: most of the blocks' weights would be left dense.
    """
    layers = find_layers(model)
    uses: dict[str, Use] = {}
    reached: set[str] = set()
    for tokens in (FEW, MANY):
        more = _pass(model, layers, tokens)
        uses, reached = more[0] | uses, reached | more[1]
        if all(layer.parameter in uses and layer.parameter in reached for layer in layers.values()):
            break
    kept: dict[str, Layer] = {}
    why: dict[str, str] = {}
    seen = {(ly.block, ly.kind) for ly in layers.values() if ly.parameter in uses}
    for name, layer in layers.items():
        use = uses.get(layer.parameter)
        if use is None:
            if (layer.block, layer.kind) in seen:
                kept[name] = layer
            else:
                why[layer.parameter] = "in no product of a pass"
        elif not use.form:
            why[layer.parameter] = "its products cannot be told apart"
        elif layer.parameter not in reached:
            why[layer.parameter] = "no gradient reaches it"
        else:
            view = None if use.form == layer.shape else use.form
            kept[name] = replace(layer, view=view, transposed=use.transposed)
    words, share = left_dense(model, kept, why)
    if share > 1 - LEAST:
        raise InputError(f"most of this model cannot be pruned. Left dense would be {words}")
    return kept, words


def _pass(
    model: PreTrainedModel, layers: dict[str, Layer], tokens: int
) -> tuple[dict[str, Use], set[str]]:
    """How products use the layers' parameters over some tokens, and which the gradient reaches."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    tokens = min(tokens, limit) if isinstance(limit, int) else tokens
    ids = torch.arange(1, tokens + 1, device=model.device) % min(512, config.vocab_size)
    parameters = {ly.parameter: model.get_parameter(ly.parameter) for ly in layers.values()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), UseObserver(parameters) as observer:
            logits: Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits
        leaves = _leaves(logits)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each family fails its own way
        words = str(error).strip() or type(error).__name__
        raise PassError(words.splitlines()[0]) from error
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return observer.uses, {name for name, p in parameters.items() if id(p) in leaves}


def _leaves(outputs: Tensor) -> set[int]:
    """Ids of the tensors that a gradient of the outputs would flow back to."""
    found: set[int] = set()
    seen = {outputs.grad_fn}
    stack = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return found
