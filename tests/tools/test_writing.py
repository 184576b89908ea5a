"""Text that a model writes by itself: enough of it, the same for a seed, in its chats' form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from prunewright.state import InputError
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.writing import LENGTH, write_documents

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] | trim }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = 512


@pytest.fixture
def writer(load: Callable[[str], LoadedModel]) -> LoadedModel:
    """A pico model that knows a chat, and fewer positions than a document has tokens."""
    loaded = load("LlamaConfig")
    tokenizer: Any = loaded.tokenizer
    tokenizer.chat_template = TEMPLATE
    loaded.model.config.max_position_embeddings = 64
    return loaded


def write(loaded: LoadedModel, tokens: int = 150, seed: int = 0, **more: Any) -> list[str]:
    return write_documents(loaded.model, loaded.tokenizer, tokens, seed, rows=ROWS, **more)


def test_it_is_enough_the_same_for_a_seed_and_half_of_it_chats(writer: LoadedModel) -> None:
    tokenizer: Any = writer.tokenizer
    limit = writer.model.config.max_position_embeddings
    assert limit < LENGTH
    torch.manual_seed(7)
    one = write(writer)
    after = torch.rand(1)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in one]
    assert sum(lengths) >= 150
    assert len(one) == 4  # of at most 64 tokens, and one to spare
    assert [text.startswith("<s><u>") for text in one] == [False, False, True, True]
    assert len(set(one)) == 4
    torch.manual_seed(11)
    assert write(writer) == one
    assert write(writer, seed=1) != one
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)  # whoever draws beside it draws as before


def test_what_begins_every_window_is_no_part_of_it(writer: LoadedModel) -> None:
    tokenizer: Any = writer.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    texts = write(writer, 75)
    assert [text.startswith("<u>") for text in texts] == [False] * 2 + [True]
    assert not any(text.startswith("<s>") for text in texts)


def test_without_a_template_it_is_prose(writer: LoadedModel) -> None:
    tokenizer: Any = writer.tokenizer
    for template in (None, "{{ raise_exception('no such turns') }}", "nothing of the message"):
        tokenizer.chat_template = template
        assert not any("<u>" in text for text in write(writer, 75))


def test_of_special_tokens_only_those_of_its_texts_are_written(writer: LoadedModel) -> None:
    tokenizer: Any = writer.tokenizer
    tokenizer.chat_template = None
    image = tokenizer.convert_ids_to_tokens(300)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    head = writer.model.get_output_embeddings()
    with torch.no_grad():  # a model that would write nothing but these two
        head.weight[[300, tokenizer.bos_token_id]] = 0
        head.weight[tokenizer.eos_token_id] = 0
        writer.model.model.norm.weight.zero_()
    text = "".join(write(writer, 500))
    assert image not in text
    assert tokenizer.bos_token not in text
    assert tokenizer.eos_token in text


def test_the_models_own_settings_are_neither_used_nor_changed(writer: LoadedModel) -> None:
    plain = write(writer)
    settings = writer.model.generation_config
    settings.eos_token_id, settings.max_length, settings.top_k = list(range(400)), 20, 1
    before = settings.to_dict()
    assert write(writer) == plain
    assert writer.model.generation_config is settings
    assert settings.to_dict() == before


def test_progress_goes_to_its_end(writer: LoadedModel) -> None:
    told: list[tuple[str, int, int]] = []
    write(writer, progress=lambda *what: told.append(what))
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, _, total in told} == {len(told)}


def test_a_model_that_cannot_write_says_so(writer: LoadedModel) -> None:
    with torch.no_grad():
        writer.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(InputError, match="name another source than self"):
        write(writer)
