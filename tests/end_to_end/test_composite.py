"""What is refused of a directory's files, and what is planned of a model of text and images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import yaml
from composite import TEXT, gemma3
from typer.testing import CliRunner, Result

from prunewright.graph.cli import app
from tests.conftest import pico_tokenizer


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


def test_plan_counts_the_linear_layers_of_the_text_decoder(tmp_path: Path) -> None:
    source, model = tmp_path / "source", gemma3()
    model.save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    path = settings(source, tmp_path)
    found = command("plan", "-c", path, "--json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    blocks = model.get_decoder().layers
    linear = [m for b in blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    assert plan["blocks"] == 2
    assert plan["prunable"] == sum(m.weight.numel() for m in linear)


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
