"""Finding a model's blocks and prunable layers by their structure."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunewright.state import InputError

_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "wg"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Layer:
    """One prunable weight matrix (or one fused tensor of experts' matrices).

    Attributes:
        name: ``model.layers.7.mlp.down_proj``.
        parameter: name of its parameter, ``model.layers.7.mlp.down_proj.weight``.
        block: index of the decoder layer that holds it.
        projection: its name inside the block, ``mlp.down_proj``.
        shape: shape of the parameter as stored.
        transposed: stored as [..., inputs, outputs] (GPT-2's Conv1D).
    """

    name: str
    parameter: str
    block: int
    projection: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.shape[-2 if self.transposed else -1]

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter's tensor viewed as [..., outputs, inputs]."""
        return weight.transpose(-1, -2) if self.transposed else weight


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks, those that make logits of tokens.

    That is the ModuleList with the most weights beside the input embeddings: in the smallest
    module that holds both. The towers of other modalities, models of their own, are not looked
    at, however large.

    Raises:
        InputError: the model has no list of blocks.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    }
    if not lists:
        raise InputError("the model has no list of decoder blocks, so nothing in it can be pruned")
    embeddings = _embeddings_name(model)
    towers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and not _inside(embeddings, name)
    }
    lists = {n: m for n, m in lists.items() if not any(_inside(n, t) for t in towers)} or lists
    place = embeddings
    while place and not any(_inside(name, place) for name in lists):
        place = place.rpartition(".")[0]
    # An outer list comes first and holds all of an inner one: the first of the largest is taken.
    name = max(
        (name for name in lists if _inside(name, place)),
        key=lambda name: sum(p.numel() for p in lists[name].parameters()),
    )
    return name, lists[name]


def find_body(model: nn.Module) -> str:
    """Name of the smallest model of its own, or else of the outermost part, that holds the blocks.

    Raises:
        InputError: the model has no list of blocks.
    """
    blocks = find_blocks(model)[0]
    bodies = (n for n, m in model.named_modules() if isinstance(m, PreTrainedModel))
    body = max((name for name in bodies if _inside(blocks, name)), key=len, default="")
    return body or blocks.partition(".")[0]


def _embeddings_name(model: nn.Module) -> str:
    """Name of the module that turns token ids into vectors; empty where a model does not say."""
    try:
        embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:
        return ""
    return next((name for name, module in model.named_modules() if module is embeddings), "")


def _inside(name: str, place: str) -> bool:
    """Whether a module's name is that of a place or of something in it."""
    return not place or name == place or name.startswith(f"{place}.")


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Prunable layers of all blocks in the model's order, by name.

    Linear and Conv1D weights and fused tensors of experts count; routers, gates of one output,
    embeddings, norms and everything outside the blocks do not.

    Raises:
        InputError: no block or no prunable layer was found.
    """
    prefix, blocks = find_blocks(model)
    config = getattr(model, "config", None)
    experts = {n for key in _EXPERT_COUNTS if isinstance(n := getattr(config, key, None), int)}
    layers: dict[str, Layer] = {}
    for index, block in enumerate(blocks):
        for layer in _block_layers(block, f"{prefix}.{index}", index, experts):
            layers[layer.name] = layer
    if not layers:
        raise InputError("no prunable layer was found inside the model's decoder blocks")
    return layers


def _block_layers(block: nn.Module, prefix: str, index: int, experts: set[int]) -> Iterator[Layer]:
    for path, module in block.named_modules():
        last = path.rpartition(".")[2]
        name = f"{prefix}.{path}"
        if isinstance(module, nn.Linear | Conv1D):
            outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            if outputs == 1 or (last in _ROUTER_NAMES and outputs in experts):
                continue
            yield Layer(
                name,
                f"{name}.weight",
                index,
                path,
                tuple(module.weight.shape),
                isinstance(module, Conv1D),
            )
        elif last == "experts":
            transposed = bool(getattr(module, "is_transposed", False))
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield Layer(
                        f"{name}.{key}",
                        f"{name}.{key}",
                        index,
                        f"{path}.{key}",
                        tuple(parameter.shape),
                        transposed,
                    )
