"""What a pass of a model uses is prunable, in the form that its products see; the rest is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from prunewright.state import InputError
from prunewright.tools.model.head import Head, token_losses
from prunewright.tools.model.layers import find_layers
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.model.reach import used_layers

Load = Callable[..., LoadedModel]
Form = tuple[tuple[int, ...], bool]
"""A layer's form, and whether it is transposed."""

STACKED: dict[str, dict[str, Form]] = {
    "DbrxConfig": {
        "ffn.experts.mlp.w1": ((4, 64, 32), False),
        "ffn.experts.mlp.v1": ((4, 64, 32), False),
        "ffn.experts.mlp.w2": ((4, 64, 32), True),
    },
    "JetMoeConfig": {
        "self_attention.experts.input_linear": ((4, 32, 32), False),
        "self_attention.experts.output_linear": ((4, 32, 32), False),
        "mlp.input_linear": ((4, 128, 32), False),
        "mlp.output_linear": ((4, 32, 64), False),
    },
    "Llama4TextConfig": {
        "feed_forward.experts.gate_up_proj": ((4, 32, 128), True),
        "feed_forward.experts.down_proj": ((4, 64, 32), True),
    },
    "MixtralConfig": {
        "mlp.experts.gate_up_proj": ((4, 128, 32), False),
        "mlp.experts.down_proj": ((4, 32, 64), False),
    },
}


@pytest.mark.parametrize("family", STACKED)
def test_stacked_experts_are_found_in_the_form_of_their_products(load: Load, family: str) -> None:
    loaded = load(family)
    found = {
        layer.projection: (layer.form, layer.transposed)
        for layer in loaded.layers.values()
        if layer.block == 1 and len(layer.form) == 3
    }
    assert found == STACKED[family]
    for layer in loaded.layers.values():
        weight = loaded.weight(layer)
        matrix = layer.matrix(weight)
        assert matrix.shape[-2:] == (layer.outputs, layer.inputs)
        assert torch.equal(layer.stored(matrix), weight)
    [note] = loaded.notes
    assert note.startswith("left dense: 0.")
    assert "(routes tokens)" in note


def test_what_no_gradient_reaches_is_left_dense(load: Load) -> None:
    loaded = load("DeepseekV32Config")
    assert not any("indexer" in name for name in loaded.layers)
    [note] = loaded.notes
    for name in ("wq_b", "wk"):
        assert f"self_attn.indexer.{name} (no gradient reaches it)" in note
    assert "self_attn.indexer.weights_proj (fewer than 256 weights)" in note


def test_matrices_that_mix_a_few_streams_stay_dense_and_keep_nothing_from_a_pattern(
    load: Load,
) -> None:
    loaded = load("Gemma3nTextConfig")
    assert all(layer.inputs % 4 == 0 for layer in loaded.layers.values())
    [note] = loaded.notes
    for name in ("prediction_coefs", "correction_coefs"):
        assert f"altup.{name} (fewer than 256 weights)" in note


def test_a_parameter_that_blocks_share_is_counted_once(load: Load) -> None:
    loaded = load("Zamba2Config")
    parameters = [loaded.model.get_parameter(ly.parameter) for ly in loaded.layers.values()]
    assert len({id(p) for p in parameters}) == len(parameters)
    shared = [n for n in loaded.layers if "shared_transformer.self_attn.q_proj" in n]
    assert len(shared) == 1
    matrices = {id(p): p for p in loaded.model.model.layers.parameters() if p.ndim == 2}
    assert loaded.prunable == sum(p.numel() for p in matrices.values())


def test_both_stacks_of_a_model_are_pruned(load: Load) -> None:
    loaded = load("HrmTextConfig")
    assert {name.split(".")[1] for name in loaded.layers} == {"L_module", "H_module"}
    assert {layer.block for layer in loaded.layers.values()} == {0, 1, 2, 3}
    assert len({(layer.block, layer.projection) for layer in loaded.layers.values()}) == len(
        loaded.layers
    )


class Mlp(nn.Module):
    """An MLP with a product that nobody can observe, one that is never made, and experts."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.unused = nn.Linear(32, 8)
        self.parts = nn.Linear(32, 16)
        self.hidden = nn.Parameter(torch.ones(2, hidden, 32))
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.parts.weight.split([5, 11])
        part = nn.functional.linear(x, first).sum(-1) + nn.functional.linear(x, second).sum(-1)
        scale = (self.hidden * 2.0).sum() + part.unsqueeze(-1)
        return self.down(self.up(x)) * scale + self.experts[0](x) + self.experts[2](x)  # type: ignore[no-any-return]


def with_mlp(load: Load, hidden: int) -> Any:
    model = load().model
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mlp(hidden)
    return model.requires_grad_(False)


def test_what_cannot_be_observed_is_left_dense_and_told(load: Load) -> None:
    model = with_mlp(load, 8)
    layers, words = used_layers(model)
    found = [layer.projection for layer in layers.values() if layer.block == 0]
    experts = [f"mlp.experts.{i}" for i in range(3)]  # one of them without a token, like the others
    assert found == [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.up", "mlp.down", *experts]
    kept = sum(layer.numel for layer in layers.values()) // 2
    left = 512 + 256 + 512
    assert words == (
        f"{left / (left + kept):.2%} of the blocks' weights: "
        "mlp.hidden (in no product of a pass), mlp.parts (its products cannot be told apart), "
        "mlp.unused (in no product of a pass)"
    )
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert set(layers) < set(find_layers(model))


def test_a_model_of_which_most_cannot_be_observed_is_refused(load: Load) -> None:
    with pytest.raises(
        InputError, match=r"most of this model cannot be pruned.* mlp\.hidden \(in no"
    ):
        used_layers(with_mlp(load, 250))


def test_a_model_that_cannot_run_in_half_precision_is_computed_in_float32(
    pico_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(pico_models("xLSTMConfig"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    loaded = load_model(name, device="cpu")
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert loaded.notes[-1].startswith(
        "computed in float32, as it cannot be run in torch.bfloat16: expected m1 and m2 to have"
    )
    with pytest.raises(InputError, match=r"on text alone in torch\.bfloat16.*Try dtype=float32"):
        load_model(name, device="cpu", dtype="bfloat16")


def test_a_family_that_carries_float32_in_half_precision_is_scored_as_by_itself(
    pico_models: Callable[..., Path], windows: Tensor
) -> None:
    model = load_model(str(pico_models("MambaConfig")), device="cpu", dtype="bfloat16").model
    losses = token_losses(model, Head(model), windows[0])
    logits = model(input_ids=windows[:1], use_cache=False).logits[0, :-1].float()
    expected = nn.functional.cross_entropy(logits, windows[0, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)


def test_a_model_whose_code_fails_is_refused_with_its_words(
    pico_models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("rope")

    monkeypatch.setattr(transformers.LlamaModel, "forward", fail)
    with pytest.raises(InputError, match=r"cannot be run on text alone: 'rope'"):
        load_model(str(pico_models()), device="cpu", dtype="float32")
