"""Random models of text and images or sound; their towers are larger than their text decoders."""

import transformers

from tests.conftest import VOCABULARY

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip


def gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 32, "final_logit_softcapping": 5.0},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=511,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_audio() -> transformers.PreTrainedModel:
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 3,
             "encoder_attention_heads": 4, "encoder_ffn_dim": 256, "num_mel_bins": 16,
             "max_source_positions": 16}  # fmt: skip
    config = transformers.Qwen2AudioConfig(
        text_config=TEXT | {"model_type": "qwen2"}, audio_config=audio, audio_token_index=511
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)
