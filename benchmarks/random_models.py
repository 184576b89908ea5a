"""Random models of real shapes, written file by file: making one takes little memory.

python benchmarks/random_models.py qwen3-0.6b models/qwen3-0.6b
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

FILE = 2**29
"""Bytes of one weight file; one tensor may have more."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def _qwen3(width: int, inner: int, blocks: int, heads: int, **more: Any) -> PreTrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": 151_936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        **(values | more),
    )


def _llama(width: int, inner: int, blocks: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "qwen3-tiny": _qwen3(64, 128, 2, 4, vocab_size=512, num_key_value_heads=2, head_dim=16),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tie_word_embeddings=False),
    "llama-tiny": _llama(64, 128, 2),
    "llama-30m": _llama(512, 1408, 8),
    "llama-100m": _llama(768, 2048, 13),
    "llama-300m": _llama(1024, 2816, 23),
    "llama-600m": _llama(1536, 4096, 21),
    "llama-1b": _llama(2048, 5632, 19),
}
"""Configurations by name: those of the published Qwen3, and Llamas from 30M to 1B parameters."""


def make_model(shape: str, directory: Path, device: torch.device | str = "cpu") -> Path:
    """Write a random bf16 model of a shape of `SHAPES`, the same one each time.

    Args:
        shape: its name.
        directory: where to.
        device: where the random numbers are drawn.

    Returns:
        The directory.
    """
    config = SHAPES[shape]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(structure).__name__]
    # Tied weights are named once.
    tensors = dict(structure.named_parameters())
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=FILE)
    directory.mkdir(parents=True, exist_ok=True)
    dice = torch.Generator(device).manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        drawn = {name: _draw(tensors[name].shape, dice) for name in names}
        save_file(drawn, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def _draw(shape: torch.Size, dice: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=torch.bfloat16, device=dice.device)
    empty = torch.empty(shape, dtype=torch.bfloat16, device=dice.device)
    return empty.normal_(0, SPREAD, generator=dice)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes, so that little text gives many windows."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Make one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    print(make_model(options.shape, options.directory))


if __name__ == "__main__":
    main()
