"""Finding a model's blocks and prunable layers by their structure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunewright.state import InputError
from prunewright.state.profile import unnumbered

_ROUTER_NAMES = {"gate", "shared_expert_gate", "wg"}
_EXPERT_COUNTS = {
    "num_experts",
    "num_local_experts",
    "num_routed_experts",
    "n_routed_experts",
    "n_experts",
    "moe_num_experts",
}


_NAMED = 6
"""Kinds of weights that are named among those that are left dense."""
SMALLEST = 256
"""Weights of the smallest matrix that is pruned. What is smaller mixes a few streams, as `altup` of
Gemma 3n does, or gives a head one value. A step would take hardly a weight of it, its zeros save
less than the file that lists them, and its few inputs would keep a whole model from 2:4."""


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
        view: the shape that its products see it in, [rows, columns] or [experts, rows, columns],
            where that is another (DBRX's experts, one above the other); None: as stored.
    """

    name: str
    parameter: str
    block: int
    projection: str
    shape: tuple[int, ...]
    transposed: bool = False
    view: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(torch.Size(self.shape).numel())

    @property
    def form(self) -> tuple[int, ...]:
        """Shape as one matrix or several, [..., outputs, inputs] unless it is transposed."""
        return self.view or self.shape

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.form[-2 if self.transposed else -1]

    @property
    def outputs(self) -> int:
        """Number of outputs, of one expert."""
        return self.form[-1 if self.transposed else -2]

    @property
    def kind(self) -> str:
        """Its projection without the numbers of experts that are modules of their own."""
        return unnumbered(self.projection)

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter's tensor viewed as [..., outputs, inputs]."""
        weight = weight if self.view is None else weight.view(self.view)
        return weight.transpose(-1, -2) if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: values [..., outputs, inputs] in the parameter's shape."""
        values = matrix.transpose(-1, -2) if self.transposed else matrix
        return values if self.view is None else values.reshape(self.shape)


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


def named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All decoder blocks with their names, in the model's order; a layer's ``block`` counts them.

    Those of `find_blocks`, and of every other list of blocks of the same classes: a model may have
    a prelude and a coda, or two stacks.

    Raises:
        InputError: the model has no list of blocks.
    """
    name, main = find_blocks(model)
    kinds = {type(block) for block in main}
    stacks: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in (*stacks, name))
        if not isinstance(module, nn.ModuleList) or not len(module) or inside:
            continue
        if {type(block) for block in module} <= kinds:
            stacks[path] = module
    return [
        (f"{path}.{i}", block) for path, stack in stacks.items() for i, block in enumerate(stack)
    ]


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """What may be pruned in all blocks by its structure alone, in the model's order, by name.

    Linear and Conv1D weights and stacked matrices (experts) count; routers, gates of one output,
    matrices below `SMALLEST`, embeddings, norms and everything outside the blocks do not. A
    parameter that several modules share is listed once, where it comes first, and not at all if the
    embeddings share it.
    `reach.used_layers` tells which of them a pass of the model uses, and how.

    Raises:
        InputError: no block or no prunable layer was found.
    """
    experts = _expert_counts(getattr(model, "config", None))
    taken = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] == "lm_head"
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    layers: dict[str, Layer] = {}
    for index, (prefix, block) in enumerate(named_blocks(model)):
        for layer, parameter in _block_layers(block, prefix, index, experts):
            if id(parameter) not in taken and layer.inputs * layer.outputs >= SMALLEST:
                taken.add(id(parameter))
                layers[layer.name] = layer
    if not layers:
        raise InputError("no prunable layer was found inside the model's decoder blocks")
    return layers


def _block_layers(
    block: nn.Module, prefix: str, index: int, experts: set[int]
) -> Iterator[tuple[Layer, Tensor]]:
    for path, module in block.named_modules(remove_duplicate=False):
        name = f"{prefix}.{path}"
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.shape)
            if not _routes(block, path, shape[1 if transposed else 0], experts):
                layer = Layer(name, f"{name}.weight", index, path, shape, transposed)
                yield layer, module.weight
        elif not type(module).__module__.startswith("torch."):
            transposed = bool(getattr(module, "is_transposed", False))
            for key, parameter in module.named_parameters(recurse=False):
                if _stacked(f"{path}.{key}", parameter):
                    # `weight` is the whole of its module, as a Linear's is.
                    own, inside = (
                        (name, path) if key == "weight" else (f"{name}.{key}", f"{path}.{key}")
                    )
                    shape = tuple(parameter.shape)
                    yield Layer(own, f"{name}.{key}", index, inside, shape, transposed), parameter


def _stacked(path: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter that is no Linear's may hold matrices: several, or those of experts."""
    *modules, key = path.split(".")
    if "bias" in key or "norm" in key or min(parameter.shape, default=1) < 2:
        return False
    return parameter.ndim == 3 or (parameter.ndim == 2 and "experts" in modules)


def _routes(block: nn.Module, path: str, outputs: int, experts: set[int]) -> bool:
    """Whether a linear layer decides which expert, or how much of one, a token gets."""
    *modules, last = path.split(".")
    # A last name of gate alone says little: half of a gated MLP may have it.
    if outputs == 1 or "router" in last or any(map(_is_router, modules)):
        return True
    if outputs not in experts:
        return False
    if _is_router(last):
        return True
    if "experts" in modules or not modules:
        return False
    around = block.get_submodule(".".join(modules))
    return any(name == "experts" for name, _ in around.named_children())


def _is_router(name: str) -> bool:
    return name in _ROUTER_NAMES or "router" in name


def _expert_counts(config: Any) -> set[int]:
    """The numbers of experts that a configuration names, those nested in it included."""
    if not isinstance(config, dict):
        named = {key: getattr(config, key, None) for key in _EXPERT_COUNTS}
        config = named | (config.to_dict() if hasattr(config, "to_dict") else {})
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _expert_counts(value)
        elif key in _EXPERT_COUNTS and isinstance(value, int):
            found.add(value)
    return found


def left_dense(
    model: nn.Module, layers: dict[str, Layer], why: dict[str, str]
) -> tuple[str, float]:
    """What of the blocks' weights is in no prunable layer: in words, and its share but for routers.

    Norms and biases are not counted. The words are empty where nothing is left.

    Args:
        model: the model.
        layers: its prunable layers.
        why: the reason, by parameter, where one is known.
    """
    pruned = {id(model.get_parameter(layer.parameter)) for layer in layers.values()}
    total, lost, left, seen = 0, 0, dict[str, int](), set[int]()
    for prefix, block in named_blocks(model):
        for path, parameter in block.named_parameters():
            if parameter.ndim < 2 or id(parameter) in seen or re.search("bias|norm", path):
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if id(parameter) not in pruned:
                short = unnumbered(path.removesuffix(".weight"))
                router = any(_is_router(part) for part in path.split("."))
                reason = "routes tokens" if router else why.get(f"{prefix}.{path}")
                if not reason and parameter.shape[-2:].numel() < SMALLEST:
                    reason = f"fewer than {SMALLEST} weights"
                lost += 0 if router else parameter.numel()
                key = f"{short} ({reason})" if reason else short
                left[key] = left.get(key, 0) + parameter.numel()
    if not left:
        return "", 0.0
    names = sorted(left, key=lambda name: -left[name])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    named = f"{', '.join(names[:_NAMED])}{more}"
    return f"{sum(left.values()) / total:.2%} of the blocks' weights: {named}", lost / total
