"""Models of text and images or sound: the text decoder is pruned, all else stays as it is."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.nn import functional
from typer.testing import CliRunner, Result

from prunewright.graph.cli import app
from prunewright.state import load_config
from prunewright.tools.texts.windows import load_windows
from tests.conftest import VOCABULARY, pico_tokenizer

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LARGE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip


def gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 32, "final_logit_softcapping": 5.0},
        vision_config=LARGE,
        mm_tokens_per_image=4,
        image_token_index=511,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=LARGE | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=511,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_audio() -> transformers.PreTrainedModel:
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 3,
             "encoder_attention_heads": 4, "encoder_ffn_dim": 256, "num_mel_bins": 16,
             "max_source_positions": 16}  # fmt: skip
    config = transformers.Qwen2AudioConfig(
        text_config=TEXT | {"model_type": "qwen2"}, audio_config=audio, audio_token_index=511
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "Gemma 3": gemma3,
    "LLaVA": llava,
    "Qwen2-Audio": qwen2_audio,
}


def make(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(directory)
    pico_tokenizer().save_pretrained(directory)
    return directory


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def settings(model: Path, directory: Path) -> Path:
    windows = {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
    content = {
        "model": str(model), "dtype": "float32", "device": "cpu", "agent": "greedy",
        "target": 0.3, "step": 0.3, "max_delta": 0.9, "texts": {"windows": windows},
    }  # fmt: skip
    path = directory / "settings.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in directory.glob("*.safetensors") for k, t in load_file(path).items()}


def text_blocks(model: Any) -> Any:
    return model.get_decoder().layers


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("Gemma 3", "sparsegpt"), ("LLaVA", "wanda"), ("Qwen2-Audio", "fisher")],
)
def test_the_text_decoder_is_pruned_and_all_else_kept(
    name: str, criterion: str, tmp_path: Path
) -> None:
    source, out = make(name, tmp_path / "source"), tmp_path / "run"
    path = settings(source, tmp_path)
    found = command("run", "-c", path, "--out", out, "--set", f"criterion={criterion}")
    assert found.exit_code == 0, found.output
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = stored(source), stored(out / "model")
    kept = {key: tensor for key, tensor in before.items() if torch.equal(after[key], tensor)}
    changed = before.keys() - kept.keys()
    assert before.keys() == after.keys()
    assert changed
    assert all(re.match(r"language_model\.(model\.)+layers\.", key) for key in changed)
    whole = type(MODELS[name]()).from_pretrained(out / "model").eval()
    linear = [m for b in text_blocks(whole) for m in b.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((m.weight == 0).sum()) for m in linear)
    assert zeros / sum(m.weight.numel() for m in linear) == metrics["sparsity"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    config = load_config(path)
    ids = load_windows(config.texts, tokenizer, config.seed, rows=VOCABULARY).test
    with torch.no_grad():
        logits = whole(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(metrics["perplexity"]["test"]["final"], rel=1e-4)


def test_plan_baseline_and_evaluate_see_the_same_layers(tmp_path: Path) -> None:
    source = make("Gemma 3", tmp_path / "source")
    path = settings(source, tmp_path)
    found = command("plan", "-c", path, "--json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    blocks = text_blocks(gemma3())
    linear = [m for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    assert plan["blocks"] == 2
    assert plan["prunable"] == sum(m.weight.numel() for m in linear)
    assert command("baseline", "-c", path, "--out", tmp_path / "base").exit_code == 0
    found = command(
        "evaluate", tmp_path / "base" / "model", "--text", "embedded", "--windows", 3,
        "--length", 48, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    metrics = json.loads((tmp_path / "base" / "metrics.json").read_text())
    assert str(metrics["perplexity"]["test"]["final"])[:6] in found.stdout


def test_a_tower_that_would_be_dropped_is_named_with_its_share(tmp_path: Path) -> None:
    """As a causal LM transformers takes the text decoder alone of Qwen 3.5, and hides the rest."""
    text = TEXT | {"layer_types": ["full_attention"] * 2}
    vision = {"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision | {"out_hidden_size": 32, "patch_size": 8}
    )
    source = tmp_path / "source"
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    path = settings(source, tmp_path)
    assert command("plan", "-c", path).exit_code == 0
    content = json.loads((source / "config.json").read_text())
    content["architectures"] = ["Qwen3_5ForCausalLM"]
    (source / "config.json").write_text(json.dumps(content))
    found = command("plan", "-c", path)
    assert found.exit_code == 2
    words = " ".join(found.output.split())
    assert "model.visual." in words
    assert "% of all values, would be dropped" in words


def test_every_command_refuses_a_quantised_model(
    pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(pico_models(), tmp_path / "source"))
    (source / "hf_quant_config.json").write_text("{}")
    path, out = settings(source, tmp_path), tmp_path / "out"
    for words in (
        ("run", "-c", path, "--out", out),
        ("baseline", "-c", path, "--out", out),
        ("plan", "-c", path),
        ("evaluate", source, "--text", "embedded"),
    ):
        found = command(*words)
        assert found.exit_code == 2, words
        assert "dequantise it first" in " ".join(found.output.split())
    assert not out.exists()
