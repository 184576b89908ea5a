"""Pico models of many families, made here in a second: no download, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LANGGRAPH_STRICT_MSGPACK"] = "true"

import logging
import signal
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# A shell's background job, and what nohup starts, ignores it; tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 512
_SPARSE_ATTENTION: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}
"""Of DeepSeek-V3.2 and its kin: an indexer chooses what attention sees."""
PICO: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 2},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 8},
    "MistralConfig": {"num_key_value_heads": 2},
    "Gemma2Config": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GPTNeoXConfig": {},
    "PhiConfig": {},
    "MixtralConfig": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    # Keeps a layer of each block in float32, whatever dtype is asked for.
    "DbrxConfig": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "JetMoeConfig": {
        "num_key_value_heads": 4,
        "kv_channels": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Llama4TextConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
    },
    "ZambaConfig": {
        "max_position_embeddings": 64,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "Zamba2Config": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "adapter_rank": 8,
        "chunk_size": 16,
    },
    "MambaConfig": {"state_size": 8, "expand": 2, "time_step_rank": 8},
    "FalconMambaConfig": {"state_size": 8, "expand": 2, "time_step_rank": 8},
    "Mamba2Config": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
    },
    "xLSTMConfig": {"num_blocks": 2, "num_heads": 4, "embedding_dim": 32, "chunk_size": 16},
    "HrmTextConfig": {"num_key_value_heads": 2, "head_dim": 8},
    "OpenAIGPTConfig": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "Lfm2Config": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "DeepseekV32Config": _SPARSE_ATTENTION,
    "GlmMoeDsaConfig": _SPARSE_ATTENTION,
    "DeepseekV4Config": {
        "max_position_embeddings": 64,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
    },
    "LongcatFlashConfig": {
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "Qwen4ExpTextConfig": {
        "max_position_embeddings": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "ZayaConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "router_hidden_size": 16,
    },
    "Gemma3TextConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma3nTextConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Gemma4TextConfig": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}


def make_pico(directory: Path, family: str = "LlamaConfig", **overrides: Any) -> Path:
    """Save a 2-layer, 32-wide random model of a family, with a tokenizer, and return where."""
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, family)(**(values | PICO[family] | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    pico_tokenizer().save_pretrained(directory)
    return directory


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the embedded corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = resources.files("prunewright.tools") / "data" / "corpus" / "calibration"
    texts = [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir(), key=lambda p: p.name)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:12], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def pico_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the directory of a pico model of a family, made once a session."""
    made: dict[str, Path] = {}

    def get(family: str = "LlamaConfig") -> Path:
        if family not in made:
            made[family] = make_pico(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture
def pico_config(pico_models: Callable[..., Path]) -> dict[str, Any]:
    """The configuration of a run on a pico Llama that takes a second or two."""
    return {
        "criterion": "wanda",
        "allocation": "uniform",
        "reconstruct": "none",
        "model": str(pico_models()),
        "dtype": "float32",
        "device": "cpu",
        "agent": "greedy",
        "target": 0.3,
        "step": 0.1,
        "texts": {
            "windows": {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
        },
    }


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test turns the power off. Processes that tests start write through, as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the machine reaches a test, and nothing is cached outside its directory."""
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")


class _Deprecations(logging.Handler):
    """Keeps the records that tell of a deprecation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        if "deprecat" in words.lower():
            self.found.append(f"{record.name}: {words}")


@pytest.fixture(autouse=True)
def _no_logged_deprecation() -> Iterator[None]:
    """What is logged of a deprecated call fails the test, too: transformers warns by its log."""
    # A test of the command line has silenced it for the process; and it says a thing only once.
    transformers_logging.set_verbosity_warning()
    transformers_logging.warning_once.cache_clear()
    handler = _Deprecations()
    # The last two pass nothing on to the root.
    loggers = [logging.getLogger(name) for name in (None, "torch", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert handler.found == []
