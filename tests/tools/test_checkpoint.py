"""What a model's directory holds is what is loaded and pruned, or it is refused with words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from directories import Change, configure, put, store, weights
from torch import Tensor

from prunewright.state import InputError
from prunewright.tools.model.layers import find_blocks
from prunewright.tools.model.loading import load_model, model_skeleton
from tests.conftest import VOCABULARY, make_pico, pico_tokenizer

Q = "model.layers.0.self_attn.q_proj"


def add(**tensors: Tensor) -> Change:
    """Put tensors beside those of the model; ``__`` stands for a dot, Q for a layer."""
    named = {k.replace("__", ".").replace("Q.", f"{Q}."): t for k, t in tensors.items()}
    return lambda directory: store(directory, weights(directory) | named)


def cast(dtype: torch.dtype, name: str = f"{Q}.weight") -> Change:
    def change(directory: Path) -> None:
        tensors = weights(directory)
        tensors[name] = tensors[name].to(dtype)
        store(directory, tensors)

    return change


def rename(old: str, new: str) -> Change:
    def change(directory: Path) -> None:
        tensors = weights(directory)
        tensors[new] = tensors.pop(old)
        store(directory, tensors)

    return change


def shard(*left_out: str, **index: Any) -> Change:
    """Two shards with an index, which names those left out, too, and has other entries."""

    def change(directory: Path) -> None:
        tensors = weights(directory)
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in set(files.values()):
            part = {n: tensors[n] for n in names if files[n] == file and n not in left_out}
            store(directory, part, file)
        content = {"metadata": {}, "weight_map": files} | index
        (directory / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def both(*changes: Change) -> Change:
    return lambda directory: [change(directory) for change in changes]


ONE = torch.ones(1)
CODES = torch.zeros(4, 4, dtype=torch.int32)
QUANTISED: dict[str, Change] = {
    "bitsandbytes": configure(quantization_config={"quant_method": "bitsandbytes"}),
    "compressed-tensors": configure(compression_config={"format": "pack-quantized"}),
    "fbgemm inside text_config": configure(
        text_config={"quantization_config": {"quant_method": "fbgemm_fp8"}}
    ),
    "MLX": configure(quantization={"group_size": 64, "bits": 4}),
    "ModelOpt": put("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
    "AutoGPTQ": put("quantize_config.json", {"bits": 4}),
    "AWQ": put("quant_config.json", {"w_bit": 4}),
    "FP8 alone": cast(torch.float8_e4m3fn),
    "FP8 of the other kind": cast(torch.float8_e5m2),
    "int8 alone": cast(torch.int8),
    "uint8 alone": cast(torch.uint8),
    "an embedding in int8": cast(torch.int8, "model.embed_tokens.weight"),
    "a norm in int64": cast(torch.int64, "model.norm.weight"),
    "FP8 with scales": both(cast(torch.float8_e4m3fn), add(Q__weight_scale=ONE)),
    "scales beside bf16": both(cast(torch.bfloat16), add(Q__weight_scale=ONE)),
    "DeepSeek's scales": add(Q__weight_scale_inv=ONE),
    "a second scale": add(Q__weight_scale_2=ONE),
    "activations' scales": add(Q__input_scale=ONE),
    "scales of keys": add(Q__k_scale=ONE),
    "GPTQ": both(rename(f"{Q}.weight", f"{Q}.qweight"), add(Q__scales=ONE)),
    "GPTQ's zeros": add(Q__qzeros=CODES),
    "packed": rename(f"{Q}.weight", f"{Q}.weight_packed"),
    "NF4": add(**{"Q__weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
    "absmax": add(**{"Q__weight.absmax": ONE}),
    "LLM.int8": add(Q__SCB=ONE),
    "HQQ": rename(f"{Q}.weight", f"{Q}.W_q"),
    "torchao": rename(f"{Q}.weight", f"{Q}.weight:qdata"),
    "MXFP4": add(model__layers__0__mlp__experts__gate_up_proj_blocks=torch.zeros(4, 4).byte()),
    "AQLM": add(Q__codebooks=ONE),
    "codes of another maker": add(Q__tiles=CODES),
}
ADAPTERS: dict[str, Change] = {
    "LoRA": put("adapter_config.json", {"peft_type": "LORA"}),
    "weights of an adapter alone": both(
        put("adapter_model.safetensors", b"weights"),
        lambda d: [(d / n).unlink() for n in ("model.safetensors", "config.json")],
    ),
    "a pickled adapter": put("adapter_model.bin", b"pickle"),
    "LoRA inside the weights": add(Q__lora_A__weight=torch.ones(4, 32)),
    "a layer under an adapter": rename(f"{Q}.weight", f"{Q}.base_layer.weight"),
    "IA3": add(Q__ia3_l=torch.ones(32, 1)),
    "prompts": add(prompt_embeddings=torch.ones(4, 32)),
    "a prompt encoder": add(prompt_encoder__default__embedding__weight=torch.ones(4, 32)),
    "Houlsby's": add(model__layers__0__adapters__down__weight=torch.ones(4, 32)),
    "DoRA": add(Q__lora_magnitude_vector=ONE),
    "under peft's prefix": add(**{f"base_model.model.{Q}.lora_B.default.weight": ONE}),
}
NO_CAUSAL_LM: dict[str, Change] = {
    "a classifier": configure(architectures=["LlamaForSequenceClassification"]),
    "a classifier of tokens": configure(architectures=["LlamaForTokenClassification"]),
    "a reward model": configure(architectures=["LlamaForRewardModel"]),
    "a body": configure(architectures=["LlamaModel"]),
    "a masked LM": configure(architectures=["LlamaForMaskedLM"]),
    "a reader": configure(architectures=["LlamaForQuestionAnswering"]),
    "a classifier without architectures": both(
        configure(architectures=None, tie_word_embeddings=True),
        rename("lm_head.weight", "score.weight"),
    ),
    "an embedding model": put("modules.json", []),
    "an encoder-decoder": configure(is_encoder_decoder=True),
    "T5": put("config.json", {"model_type": "t5", "architectures": ["T5ForCausalLM"]}),
    "XLM-R": put("config.json", {"model_type": "xlm-roberta"}),
    "BERT": put("config.json", {"model_type": "bert", "architectures": ["BertLMHeadModel"]}),
    "RoBERTa": put(
        "config.json", {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
    ),
    "vision": put("config.json", {"model_type": "vit", "architectures": ["ViTForCausalLM"]}),
}
OTHERS: dict[str, tuple[Change, str]] = {
    "a vision tower": (
        add(model__vision_tower__layer__weight=torch.ones(8, 8)),
        r"more than the causal LM .* 1 tensors, model\.vision_tower\.layer\.weight among them, 0\.",
    ),
    "a projector": (add(mm_projector__0__weight=ONE), "would be dropped"),
    "an audio tower": (add(audio_tower__conv__weight=ONE), "would be dropped"),
    "an encoder": (add(encoder__block__0__weight=ONE), "would be dropped"),
    "more than half": (add(second__weight=torch.ones(600, 600)), r"8\d\.\d% of all values"),
    "fewer layers in the configuration": (
        configure(num_hidden_layers=1),
        r"model\.layers\.1\.\S+, but config\.json describes 1 layers",
    ),
    "a name in another case": (
        add(model__Norm__weight=torch.ones(32)),
        r"model\.Norm\.weight, and the model's own name is model\.norm\.weight",
    ),
    "a shape": (
        lambda d: store(d, weights(d) | {f"{Q}.weight": torch.ones(16, 32)}),
        r"1 tensors have another shape: \S+q_proj\.weight is stored as \[16, 32\] and should be "
        r"\[32, 32\]",
    ),
    "a bias": (add(Q__bias=torch.ones(32)), r"no place .*q_proj\.bias among them"),
    "a bias of the head": (add(lm_head__bias=torch.ones(512)), "no place"),
    "norms of another family": (
        add(model__layers__0__self_attn__q_norm__weight=torch.ones(8)),
        r"no place in the model that it describes, \S+q_norm\.weight among them",
    ),
    "a tensor in two shards": (
        both(shard(), lambda d: store(d, {f"{Q}.weight": ONE}, "model-00003-of-00003.safetensors")),
        r"q_proj\.weight is stored twice, in model-00001-of-00002\.safetensors and in",
    ),
    "a second set of weights": (
        lambda d: store(d, weights(d), "model-00001-of-00001.safetensors"),
        "stored twice",
    ),
    "a shard that is missing": (
        both(shard(), lambda d: (d / "model-00001-of-00002.safetensors").unlink()),
        r"names 2 shards and 1 of them are missing, model-00001-of-00002\.safetensors",
    ),
    "a tensor that no shard holds": (
        shard("model.norm.weight", "lm_head.weight"),
        r"names 2 tensors that no shard holds, lm_head\.weight",
    ),
    "an index without metadata": (shard(metadata=None), r'has no "metadata"'),
    "an index of no files": (shard(weight_map=["model"]), "weight_map must name a file"),
    "an index that leads out": (
        shard(weight_map={"a": "../model.safetensors"}),
        "weight_map must name a file",
    ),
    "shards without an index": (
        both(shard(), lambda d: (d / "model.safetensors.index.json").unlink()),
        r"no model\.safetensors\.index\.json",
    ),
    "an empty file": (put("model.safetensors", b""), r"model\.safetensors is empty"),
    "a pointer": (
        put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "pointer of Git LFS",
    ),
    "a configuration that is a pointer": (
        put("config.json", b"version https://git-lfs.github.com/spec/v1\n"),
        "pointer of Git LFS",
    ),
    "a file cut short": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
        r"model\.safetensors is no whole safetensors file",
    ),
    "a header cut short": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:50]
        ),
        r"no whole safetensors file",
    ),
    "a web page": (put("model.safetensors", b"<html>not found</html>"), "no whole safetensors"),
    "a configuration in a list": (put("config.json", []), "must hold one JSON object"),
    "a configuration without end": (put("config.json", b"[" * 100_000), "not valid JSON"),
    "a byte order mark": (
        lambda d: (d / "config.json").write_bytes(b"\xef\xbb\xbf{}"),
        "not valid JSON in UTF-8",
    ),
    "a quantisation without words": (configure(quantization_config={}), "remove quantization_con"),
    "weights by another name": (configure(transformers_weights="w.safetensors"), "rename them"),
    "another form of weights": (
        lambda d: (d / "model.safetensors").rename(d / "model.gguf"),
        r"holds model\.gguf but no \*\.safetensors",
    ),
    "another prefix": (
        lambda d: store(d, {f"module.{k}": t for k, t in weights(d).items()}),
        r"21 tensors are missing, lm_head\.weight .* without a place in the model, is module\.",
    ),
    "a copy of all": (
        lambda d: store(d, weights(d) | {f"ema.{k}": t for k, t in weights(d).items()}),
        "50.0% of all values",
    ),
    "a new family": (configure(model_type="llama9"), r"does not know its model_type 'llama9'"),
    "a family of its own code": (
        configure(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        r"only if you trust it: --set trust_remote_code=true",
    ),
    "no dtype": (configure(dtype="torch.float16"), r"dtype in .* is 'torch\.float16', which is no"),
    "a dtype inside": (configure(text_config={"torch_dtype": "half16"}), "torch_dtype in .* is 'h"),
}  # fmt: skip
REFUSED: dict[str, tuple[Change, str]] = (
    {name: (change, "quantised model .* dequantise it first") for name, change in QUANTISED.items()}
    | {name: (change, "an adapter .* merge_and_unload") for name, change in ADAPTERS.items()}
    | {name: (change, "not a causal LM") for name, change in NO_CAUSAL_LM.items()}
    | OTHERS
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_causal_lm_is_refused_by_run_and_plan_alike(
    case: str, copy: Callable[..., Path]
) -> None:
    change, message = REFUSED[case]
    directory = copy()
    change(directory)
    for look in (load_cpu, lambda path: model_skeleton(str(path))):
        with pytest.raises(InputError, match=f"(?s){message}") as error:
            look(directory)
        assert str(directory) in str(error.value)


W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
EXPERTS: dict[str, tuple[Change, str]] = {
    "one is missing": (
        lambda d: store(d, {k: t for k, t in weights(d).items() if k != W1}),
        r"made of 4 tensors such as .*w3\.weight, and only 3 such as .*w1\.weight",
    ),
    "one is smaller": (
        lambda d: store(d, weights(d) | {W1: torch.ones(8, 32)}),
        rf"{W1} is stored as \[8, 32\], and .*experts\.0\.w1\.weight as \[64, 32\]",
    ),
    "fewer than stored": (
        configure(num_local_experts=2),
        r"down_proj is stored as \[4, 32, 64\] and should be \[2, 32, 64\]",
    ),
    "one in int8": (cast(torch.int8, W1), "quantised"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_that_do_not_go_together_are_named(case: str, copy: Callable[..., Path]) -> None:
    change, message = EXPERTS[case]
    directory = copy("MixtralConfig")
    change(directory)
    with pytest.raises(InputError, match=message):
        load_cpu(directory)


def load_cpu(directory: Path, **options: Any) -> Any:
    return load_model(str(directory), dtype="float32", device="cpu", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: store(d, weights(d) | {f"{Q}.weight": torch.full((32, 32), torch.nan)}),
            rf"{Q}\.weight holds NaN or infinite",
        ),
        (
            lambda d: store(d, weights(d) | {"model.norm.weight": torch.full((32,), torch.inf)}),
            r"model\.norm\.weight holds NaN or infinite",
        ),
        (
            put(
                "tokenizer.json",
                {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}},
            ),
            "no tokens for plain words",
        ),
        (put("tokenizer.json", {}), r"cannot load the tokenizer .* KeyError 'added_tokens'"),
        (put("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"), "tokenizer"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    ],
)  # fmt: skip
def test_what_shows_only_when_it_is_read_is_refused_with_words(
    change: Change, message: str, copy: Callable[..., Path]
) -> None:
    directory = copy()
    change(directory)
    with pytest.raises(InputError, match=message) as error:
        load_cpu(directory)
    assert str(directory) in str(error.value)


def test_weights_that_overflow_the_dtype_are_named(copy: Callable[..., Path]) -> None:
    directory = copy()
    store(directory, weights(directory) | {"model.norm.weight": torch.full((32,), 1e5)})
    load_cpu(directory)
    with pytest.raises(InputError, match=r"not finite in torch.float16: model\.norm\.weight"):
        load_model(str(directory), dtype="float16", device="cpu")


FINE: dict[str, Change] = {
    "no architectures": configure(architectures=None),
    "an older name": configure(architectures=["LLaMAForCausalLM"]),
    "no quantisation": configure(quantization_config=None),
    "pickles beside": put("pytorch_model.bin", b"not read"),
    "the makers' own file": lambda d: store(d, weights(d), "consolidated.safetensors"),
    "a variant": lambda d: store(d, weights(d), "model.fp16.safetensors"),
    "a variant in shards": lambda d: store(d, weights(d), "model.fp16-00001-of-00001.safetensors"),
    "buffers of old": add(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__self_attn__masked_bias=torch.ones(1),
        model__embeddings__position_ids=torch.arange(8),
        model__layers__0__attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    ),
    "shards": shard(),
    "a wrong place in the index": shard(
        weight_map={"lm_head.weight": "model-00001-of-00002.safetensors",
                    f"{Q}.weight": "model-00001-of-00002.safetensors",
                    "model.norm.weight": "model-00002-of-00002.safetensors"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_what_does_no_harm_is_accepted(case: str, copy: Callable[..., Path]) -> None:
    directory = copy()
    expected = {k: t.clone() for k, t in weights(directory).items()}
    FINE[case](directory)
    loaded = load_cpu(directory)
    assert loaded.extra_tensors == {}
    assert all(torch.equal(loaded.model.get_parameter(k), t) for k, t in expected.items())
    model_skeleton(str(directory))


def test_tensors_that_the_model_has_no_place_for_are_told_with_their_file(
    copy: Callable[..., Path],
) -> None:
    directory = copy()
    add(mtp__layers__0__proj__weight=torch.ones(8, 8), v_head__summary__weight=ONE)(directory)
    store(directory, {"mtp.norm.weight": ONE}, "model-mtp.safetensors")
    assert load_cpu(directory).extra_tensors == {
        "mtp.layers.0.proj.weight": directory / "model.safetensors",
        "v_head.summary.weight": directory / "model.safetensors",
        "mtp.norm.weight": directory / "model-mtp.safetensors",
    }


def test_extra_tensors_are_told_though_their_family_hides_them(tmp_path: Path) -> None:
    """Qwen3-Next's class ignores ``mtp.*``, and its experts there would be renamed on loading."""
    make_pico(tmp_path, "Qwen3MoeConfig")
    names = [f"mtp.layers.0.mlp.experts.{i}.gate_proj.weight" for i in range(2)]
    store(tmp_path, weights(tmp_path) | {name: torch.ones(16, 32) for name in names})
    transformers.Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected = {r"^mtp.*"}
    try:
        assert set(load_cpu(tmp_path).extra_tensors) == set(names)
    finally:
        transformers.Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected = None


def test_layers_that_predict_further_tokens_are_extra_tensors(copy: Callable[..., Path]) -> None:
    directory = copy()
    configure(num_nextn_predict_layers=1)(directory)
    add(model__layers__2__eh_proj__weight=torch.ones(8, 8))(directory)
    assert list(load_cpu(directory).extra_tensors) == ["model.layers.2.eh_proj.weight"]


def test_a_decoder_whose_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    config = transformers.BertGenerationConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertGenerationDecoder(config).save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="predictions change with tokens that come after them"):
        load_cpu(tmp_path)


def test_bert_as_a_decoder_is_accepted(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, is_decoder=True,
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    assert find_blocks(load_cpu(tmp_path).model)[0] == "bert.encoder.layer"
