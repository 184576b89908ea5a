"""Layers are found by structure, in every family."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunewright.state import InputError
from prunewright.tools.model.layers import Layer, find_blocks, find_layers, left_dense, named_blocks
from prunewright.tools.model.loading import LoadedModel

Load = Callable[..., LoadedModel]

ATTENTION = {"self_attn.q_proj": (32, 32), "self_attn.o_proj": (32, 32)} | {
    f"self_attn.{n}_proj": (16, 32) for n in "kv"
}
MLP = {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "LlamaConfig": ("model.layers", ATTENTION | MLP),
    "Qwen3Config": ("model.layers", ATTENTION | MLP),
    "Gemma2Config": ("model.layers", ATTENTION | MLP),
    "OPTConfig": (
        "model.decoder.layers",
        {f"self_attn.{n}_proj": (32, 32) for n in ("q", "k", "v", "out")}
        | {"fc1": (64, 32), "fc2": (32, 64)},
    ),
    "GPT2Config": (
        "transformer.h",
        {
            "attn.c_attn": (32, 96),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (32, 128),
            "mlp.c_proj": (128, 32),
        },
    ),
    "GPTNeoXConfig": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": (96, 32),
            "attention.dense": (32, 32),
            "mlp.dense_h_to_4h": (64, 32),
            "mlp.dense_4h_to_h": (32, 64),
        },
    ),
    "PhiConfig": (
        "model.layers",
        {f"self_attn.{n}": (32, 32) for n in ("q_proj", "k_proj", "v_proj", "dense")}
        | {"mlp.fc1": (64, 32), "mlp.fc2": (32, 64)},
    ),
    "MixtralConfig": (
        "model.layers",
        ATTENTION
        | {"mlp.experts.gate_up_proj": (4, 128, 32), "mlp.experts.down_proj": (4, 32, 64)},
    ),
    "Qwen3MoeConfig": (
        "model.layers",
        ATTENTION | {"mlp.experts.gate_up_proj": (4, 32, 32), "mlp.experts.down_proj": (4, 32, 16)},
    ),
}


def test_each_family_has_exactly_its_projections(load: Load, family: str) -> None:
    prefix, projections = EXPECTED[family]
    layers = load(family).layers
    assert {name: layer.shape for name, layer in layers.items()} == {
        f"{prefix}.{block}.{projection}": shape
        for block in range(2)
        for projection, shape in projections.items()
    }
    for name, layer in layers.items():
        assert layer.name == name
        assert name == f"{prefix}.{layer.block}.{layer.projection}"
        assert layer.numel == torch.zeros(layer.shape).numel()
        assert layer.transposed == (family == "GPT2Config")


def test_layers_cover_the_blocks_but_for_norms_biases_and_routers(load: Load, family: str) -> None:
    loaded = load(family)
    covered = {layer.parameter for layer in loaded.layers.values()}
    _, blocks = find_blocks(loaded.model)
    inside = {id(p) for p in blocks.parameters()}
    left = [n for n, p in loaded.model.named_parameters() if n not in covered and id(p) in inside]
    routers = [n for n in left if n.endswith(("gate.weight", "router.weight"))]
    assert bool(routers) == (family in ("MixtralConfig", "Qwen3MoeConfig"))
    for name in set(left) - set(routers):
        assert "norm" in name or "ln_" in name or name.endswith("bias"), name
    outside = [n for n, p in loaded.model.named_parameters() if id(p) not in inside]
    assert not covered & set(outside)
    assert any("embed" in n or "wte" in n for n in outside)


def test_matrix_shows_a_transposed_layer_as_outputs_by_inputs(load: Load) -> None:
    loaded = load("GPT2Config")
    layer = loaded.layers["transformer.h.1.mlp.c_fc"]
    module = loaded.model.get_submodule(layer.name)
    x = torch.randn(5, 32)
    expected = x @ layer.matrix(loaded.weight(layer)).T + module.bias
    torch.testing.assert_close(module(x), expected)
    assert layer.matrix(layer.matrix(loaded.weight(layer))).shape == layer.shape


class Config:
    num_local_experts = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)  # as many outputs as experts: a router
        self.shared_expert_gate = nn.Linear(256, 1)
        self.proj = nn.Linear(16, 16)
        self.mixing = nn.Linear(15, 17)  # one weight less than `proj`
        self.norm = nn.LayerNorm(64)
        self.conv = Conv1D(6, 64)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(64, 16)})  # a projection that is named gate


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(4096, 64)
        self.small = nn.ModuleList([nn.Linear(32, 32)])
        self.body = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
        self.lm_head = nn.Linear(64, 4096)


def test_routers_go_by_name_and_width_together_and_what_is_small_stays_dense() -> None:
    model = Model()
    layers = find_layers(model)
    assert [layer.projection for layer in layers.values() if layer.block == 0] == [
        "proj",
        "conv",
        "mlp.gate",
    ]
    assert layers["body.blocks.1.conv"] == Layer(
        "body.blocks.1.conv", "body.blocks.1.conv.weight", 1, "conv", (64, 6), True
    )
    assert "mixing (fewer than 256 weights)" in left_dense(model, layers, {})[0]


class Moe(nn.Module):
    """Routers of other makers; the last two are none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"proj": nn.Linear(64, 4)})
        self.modality_router = nn.Linear(64, 3)
        self.gate = nn.ModuleDict({"down_proj": nn.Linear(64, 48), "wg": nn.Linear(48, 4)})
        self.classifier = nn.Linear(64, 4)  # as many outputs as experts, beside experts
        self.experts = nn.ModuleList([nn.Linear(64, 4) for _ in range(4)])
        self.gate_proj = nn.Linear(64, 128)
        self.output_gate = nn.Linear(64, 64)


def test_what_routes_tokens_goes_by_any_part_of_its_path() -> None:
    model = nn.Module()
    model.config = {"text_config": {"ffn_config": {"moe_num_experts": 4}}}  # type: ignore[assignment]
    block = nn.ModuleDict({"mlp": Moe(), "attention": nn.ModuleDict({"k_proj": nn.Linear(64, 4)})})
    model.layers = nn.ModuleList([block])
    layers = find_layers(model)
    assert [layer.projection for layer in layers.values()] == [
        *(f"mlp.experts.{i}" for i in range(4)),
        "mlp.gate_proj",
        "mlp.output_gate",
        "attention.k_proj",
    ]
    words, lost = left_dense(model, layers, {})
    routers = 256 + 192 + 3072 + 192 + 256
    total = routers + 4 * 256 + 8192 + 4096 + 256
    assert words.startswith(f"{routers / total:.2%} of the blocks' weights: mlp.gate.down_proj")
    assert "mlp.router.proj (routes tokens)" in words
    assert lost == 256 / total  # by width alone: its name says nothing


def test_a_parameter_that_blocks_share_is_one_layer_and_tied_embeddings_are_none() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Module()
    model.embed = nn.Embedding(32, 16)
    head = nn.Linear(16, 32)
    head.weight = model.embed.weight
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"own": nn.Linear(16, 16), "shared": shared, "head": head}) for _ in range(3)
    )
    layers = find_layers(model)
    assert list(layers) == ["blocks.0.own", "blocks.0.shared", "blocks.1.own", "blocks.2.own"]


def test_stacks_of_like_blocks_are_numbered_through() -> None:
    model = nn.Module()
    model.core = nn.ModuleList([Block() for _ in range(3)])
    model.tower = nn.ModuleList([nn.Linear(32, 32)])
    model.coda = nn.ModuleList([Block() for _ in range(2)])
    assert [name for name, _ in named_blocks(model)] == [
        "core.0",
        "core.1",
        "core.2",
        "coda.0",
        "coda.1",
    ]
    assert {layer.block for layer in find_layers(model).values()} == set(range(5))


def test_blocks_are_the_outermost_list_with_the_most_weights() -> None:
    model = Model()
    name, blocks = find_blocks(model)
    assert name == "body.blocks"
    assert blocks is model.body["blocks"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="no list of decoder blocks"):
        find_blocks(nn.Linear(3, 3))


def test_blocks_without_matrices_are_refused() -> None:
    with pytest.raises(InputError, match="no prunable layer"):
        find_layers(nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(4)])}))
