"""Windows from the embedded corpus, local files and data sets, kept apart by role."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.state.config import TextOptions, WindowOptions
from prunewright.tools import texts
from prunewright.tools.texts import Windows, hash_windows, load_test_windows, load_windows, pack

ROLES = ("calibration", "guard", "test")
COUNTS = {"calibration": 4, "gradient": 2, "guard": 3, "test": 5, "length": 32}


@pytest.fixture(scope="module")
def tokenizer(pico_models: Callable[..., Path]) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(pico_models())
    return found


@pytest.fixture(autouse=True)
def _own_data_set_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", tmp_path / "modules")


def prose(seed: int, words: int = 400) -> str:
    draw = random.Random(seed)
    return " ".join(
        "".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(words)
    )


def documents(seed: int, count: int = 6) -> list[str]:
    return [prose(100 * seed + i) for i in range(count)]


def write(path: Path, rows: list[str]) -> Path:
    """A file of documents, in the form that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows))
    if path.name.endswith(".parquet"):
        parquet.write_table(pa.table({"id": range(len(rows)), "text": rows}), path)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".jsonl"):
        path.write_text(lines)
    else:
        path.write_text("\n\n".join(rows))
    return path


def options(**sources: Any) -> TextOptions:
    counts = COUNTS | sources.pop("windows", {})
    return TextOptions(windows=WindowOptions(**counts), **sources)


def rows(windows: Windows, role: str) -> list[tuple[int, ...]]:
    return [tuple(row) for row in getattr(windows, role).tolist()]


def assert_disjoint(windows: Windows) -> None:
    drawn = [row for role in ROLES for row in set(rows(windows, role))]
    assert len(drawn) == len(set(drawn))


def test_embedded_roles_are_disjoint_windows_of_the_asked_shape(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    windows = load_windows(options(), tokenizer, seed=0)
    for role in ROLES:
        tensor = getattr(windows, role)
        assert tensor.shape == (COUNTS[role], 32)
        assert tensor.dtype == torch.int64
        assert windows.hashes[role] == hash_windows(tensor)
    assert len(set(windows.hashes.values())) == 3
    assert windows.sources == {
        # No guard named: the calibration source, whose guard text is another.
        role: f"embedded[{role}]"
        for role in ROLES
    }
    assert_disjoint(windows)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_of_file_gives_the_same_windows(
    suffix: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / f"text{suffix}", documents(1))
    ids = tokenizer("\n\n".join(documents(1)), add_special_tokens=False).input_ids
    expected = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert load_test_windows(str(path), tokenizer, 7, 32).tolist() == expected[:7]
    windows = load_windows(options(calibration=str(path), test=str(path)), tokenizer, seed=0)
    assert windows.test.tolist() == expected[:5]
    pool = set(map(tuple, expected))
    assert set(rows(windows, "calibration") + rows(windows, "guard")) < pool
    assert set(windows.sources.values()) == {str(path)}
    assert_disjoint(windows)


def test_a_file_for_all_roles_can_be_used_up_to_its_last_window(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.txt", documents(2))
    total = len(pack(documents(2), tokenizer, 32))
    fits = {"calibration": 4, "guard": total - 9, "test": 5}
    source = {"calibration": str(path), "guard": str(path), "test": str(path)}
    windows = load_windows(options(windows=fits, **source), tokenizer, seed=1)
    assert_disjoint(windows)
    assert sum(len(getattr(windows, role)) for role in ROLES) == total
    more = options(windows=fits | {"guard": total - 8}, **source)
    with pytest.raises(InputError, match=rf"has {total - 9} windows of 32 tokens left for the gu"):
        load_windows(more, tokenizer, seed=1)


def test_a_text_that_repeats_itself_does_not_mix_its_roles(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    # Pieces that are equal once tokenized, several times over, in one source.
    pool = pack(documents(3, 2), tokenizer, 32)[:8]
    assert len(pool) == 8
    repeated = pool * 6

    def packed(*_: Any) -> list[list[int]]:
        return [list(w) for w in repeated]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "pack", packed)
        for seed in range(5):
            small = options(windows={"calibration": 2, "guard": 2, "test": 2})
            windows = load_windows(
                small.model_copy(update={"calibration": __file__, "test": __file__}),
                tokenizer,
                seed,
            )
            assert_disjoint(windows)


@pytest.mark.parametrize("pair", [("calibration", "test"), ("calibration", "guard")])
def test_equal_texts_under_two_names_are_refused(
    pair: tuple[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    few = {"calibration": 2, "guard": 2, "test": 2}
    total = len(pack(documents(4, 2), tokenizer, 32))
    sources = {name: str(write(tmp_path / f"{name}.jsonl", documents(4, 2))) for name in pair}
    assert total > 10 * sum(few.values())  # two draws would seldom meet
    with pytest.raises(InputError, match="name the same source for both"):
        load_windows(options(windows=few, **{"guard": "embedded"} | sources), tokenizer, seed=0)


def test_one_file_under_two_spellings_is_one_source(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.txt", documents(5))
    (tmp_path / "link.txt").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    windows = load_windows(
        options(calibration="t.txt", guard="./link.txt", test=str(path)), tokenizer, seed=0
    )
    assert set(windows.sources.values()) == {str(path.resolve())}
    assert_disjoint(windows)


def test_seeds_draw_other_windows_but_the_test_text_stays(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    one, again, other = (load_windows(options(), tokenizer, seed) for seed in (0, 0, 1))
    assert one.hashes == again.hashes
    assert torch.equal(one.calibration, again.calibration)
    assert torch.equal(one.guard, again.guard)
    assert one.hashes["test"] == other.hashes["test"]
    assert one.hashes["calibration"] != other.hashes["calibration"]
    assert one.hashes["guard"] != other.hashes["guard"]


def test_the_test_text_is_what_load_test_windows_gives(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    windows = load_windows(options(), tokenizer, seed=3)
    assert torch.equal(windows.test, load_test_windows("embedded", tokenizer, 5, 32))


def dressed(tokenizer: PreTrainedTokenizerBase, form: str) -> PreTrainedTokenizerBase:
    """The tokenizer with special tokens around a text, as ``<s> $A </s>`` says."""
    copy: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return copy  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("form", "start"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])]
)
def test_what_begins_a_text_begins_every_window(
    form: str, start: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    special = dressed(tokenizer, form)
    assert special("a b").input_ids[: len(start)] == start
    windows = pack(documents(6, 2), special, 16)
    ids = tokenizer("\n\n".join(documents(6, 2)), add_special_tokens=False).input_ids
    body = 16 - len(start)
    assert windows == [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    assert all(len(window) == 16 for window in windows)


def test_a_tokenizer_whose_start_is_also_its_end_keeps_its_start(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    special = dressed(tokenizer, "</s> $A")  # OPT's
    assert all(window[0] == 1 for window in pack(documents(6, 1), special, 16))


def test_the_tail_is_dropped_and_a_text_of_one_window_is_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = documents(7, 1)
    ids = tokenizer(text[0], add_special_tokens=False).input_ids
    assert pack(text, tokenizer, len(ids)) == [ids]
    assert pack(text, tokenizer, len(ids) - 1) == [ids[:-1]]
    assert pack(text, tokenizer, len(ids) + 1) == []


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_large_source_is_read_up_to_a_bound(
    suffix: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / f"t{suffix}", documents(8))
    monkeypatch.setattr(texts, "_POOL_CHARACTERS", 3000)
    joined = "\n\n".join(documents(8))
    few = len(pack([joined[:3100]], tokenizer, 32))
    with pytest.raises(InputError) as error:
        load_test_windows(str(path), tokenizer, 10_000, 32)
    [found] = [int(word) for word in str(error.value).split() if word.isdigit()][:1]
    assert few - 3 <= found <= few


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "damaged":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes(50) + data[middle + 50 :])
    else:
        path.write_bytes(b"neither this nor that")


@pytest.mark.parametrize("how", ["cut", "damaged", "other"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_a_broken_file_is_named(
    suffix: str, how: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / f"broken{suffix}", documents(9))
    if (suffix, how) == (".parquet", "damaged"):
        path.write_bytes(b"PAR1" + bytes(500) + b"PAR1")
    else:
        spoil(path, how)
    with pytest.raises(InputError, match=rf"cannot read the text .*broken{suffix}"):
        load_test_windows(str(path), tokenizer, 1, 32)


WRONG: dict[str, tuple[str, bytes, str]] = {
    "no text": ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "line 2: no field 'text'"),
    "no string": ("a.jsonl", b'{"text": 3}\n', "line 1: no field 'text' that is a string"),
    "no object": ("a.jsonl", b'["text"]\n', "line 1: no field 'text'"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "cannot read the text"),
    "not UTF-8": ("a.txt", b"caf\xe9 \xff\xfe" * 30, "cannot read the text"),
    "empty": ("a.txt", b"", "too short for one window of 32 tokens"),
    "short": ("a.txt", b"Too short.", "too short for one window of 32 tokens"),
    "empty rows": ("a.jsonl", b'{"text": ""}\n\n{"text": ""}\n', "too short for one window"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_explained(
    case: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    name, content, message = WRONG[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_windows(options(calibration=str(path)), tokenizer, seed=0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"content": ["a"], "id": [1]}, "has no column 'text', only content, id"),
        ({"text": [1, 2]}, "holds int, not strings"),
        ({"text": [None, None]}, "too short for one window"),
    ],
)
def test_a_table_without_texts_is_explained(
    table: dict[str, list[Any]],
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=message):
        load_windows(options(test=str(path)), tokenizer, seed=0)


@pytest.mark.parametrize(
    "source", ["./nothing", "nothing.txt", "nothing.jsonl.gz", "/nothing/here", "~nobody-here/x"]
)
def test_a_missing_file_is_named(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="guard text") as error:
        load_windows(options(guard=source), tokenizer, seed=0)
    assert source in str(error.value)


def test_what_is_neither_file_nor_directory_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="neither a file nor a directory"):
        load_windows(options(guard="/dev/null"), tokenizer, seed=0)
    with pytest.raises(InputError, match="cannot be read"):
        load_windows(options(guard="x" * 5000), tokenizer, seed=0)


# Data sets: `datasets` itself loads each of these directories, as it loads those of the hub.


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz"])
def test_each_role_reads_its_own_split(
    suffix: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    for number, split in enumerate(("train", "validation", "test")):
        write(folder / f"{split}{suffix}", documents(20 + number))
    windows = load_windows(options(calibration=str(folder), test=str(folder)), tokenizer, seed=0)
    assert windows.sources == {
        "calibration": f"{folder}[train]",
        "guard": f"{folder}[validation]",
        "test": f"{folder}[test]",
    }
    for number, role in enumerate(ROLES):
        pool = set(map(tuple, pack(documents(20 + number), tokenizer, 32)))
        assert set(rows(windows, role)) <= pool
    assert windows.test.tolist() == pack(documents(22), tokenizer, 32)[:5]


def test_roles_without_a_split_of_their_own_share_one_and_stay_apart(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    write(folder / "train.jsonl", documents(30))
    windows = load_windows(options(calibration=str(folder), test=str(folder)), tokenizer, seed=0)
    assert set(windows.sources.values()) == {f"{folder}[train]"}
    assert_disjoint(windows)


def test_a_name_with_a_configuration_loads_through_datasets(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "corpus"
    for number, language in enumerate(("en", "de")):
        write(folder / f"{language}.jsonl", documents(40 + number))
    configs = [
        {"config_name": c, "data_files": [{"split": "train", "path": f"{c}.jsonl"}]}
        for c in ("en", "de")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    monkeypatch.chdir(tmp_path)
    windows = load_windows(options(calibration="corpus:de"), tokenizer, seed=0)
    assert windows.sources["calibration"] == "corpus:de[train]"
    pool = set(map(tuple, pack(documents(41), tokenizer, 32)))
    assert set(rows(windows, "calibration") + rows(windows, "guard")) <= pool
    for source, message in (
        ("corpus:fr", "'fr' not found"),
        ("corpus", "Config name is missing"),
    ):
        with pytest.raises(InputError, match=message):
            load_windows(options(calibration=source), tokenizer, seed=0)


def set_of(folder: Path, files: dict[str, str]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "data files"),
        ({"train.jsonl": '{"content": "a"}\n'}, "no field 'text', only content"),
        ({"train.jsonl": '{"text": "a"}\n{"text": oh\n'}, "JSON parse error"),
        ({"train.jsonl": '{"text": [1]}\n'}, "holds list, not strings"),
        ({"set.py": "import datasets\n"}, "scripts are no longer supported"),
        ({"train.parquet": "PAR1"}, "could be loaded as a data set"),
    ],
    ids=["nothing", "no text", "broken", "no strings", "script", "broken parquet"],
)
def test_a_data_set_that_cannot_be_used_is_explained(
    files: dict[str, str], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = set_of(tmp_path / "set", files)
    with pytest.raises(InputError, match=message) as error:
        load_windows(options(calibration=source), tokenizer, seed=0)
    assert source in str(error.value)


def test_a_data_set_without_a_usual_split_names_those_it_has(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    write(folder / "odd.jsonl", documents(50))
    configs = [{"config_name": "a", "data_files": [{"split": "odd", "path": "odd.jsonl"}]}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(InputError, match="none of the splits train, validation, test, only odd"):
        load_windows(options(calibration=str(folder)), tokenizer, seed=0)


def test_a_data_set_of_the_hub_without_network_is_explained(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(InputError, match="nobody/no-such-data-set is neither a local file nor"):
        load_windows(options(test="nobody/no-such-data-set"), tokenizer, seed=0)
