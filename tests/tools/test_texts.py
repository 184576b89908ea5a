"""Windows from the embedded corpus, local files and data sets, kept apart by role."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.state.config import TextOptions, WindowOptions
from prunewright.tools.model import tokens
from prunewright.tools.model.tokens import token_ids
from prunewright.tools.texts import rows as rows_module
from prunewright.tools.texts import windows as texts
from prunewright.tools.texts.questions import shown_form
from prunewright.tools.texts.windows import Windows, hash_windows

load_windows = partial(texts.load_windows, rows=512)
load_test_windows = partial(texts.load_test_windows, rows=512)

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


def pack(rows: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """The windows of documents."""
    found: list[list[int]] = texts.pack(["\n\n".join(rows)], tokenizer, length)[0].tolist()
    return found


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


def lines(rows: list[str]) -> bytes:
    """As C4's shards are: JSON lines, with other fields, and letters as they are."""
    rows = [json.dumps({"url": "x", "text": row}, ensure_ascii=False) for row in rows]
    return "\n".join(rows).encode()


def listed(rows: list[str]) -> bytes:
    return json.dumps([{"text": row} for row in rows], indent=2).encode()


def table(rows: list[str], delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([["id", "text"], *enumerate(rows)])
    return stream.getvalue().encode()


def columns(rows: list[str]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({"id": range(len(rows)), "text": rows}), stream)
    return stream.getvalue()


def plain(rows: list[str]) -> bytes:
    return "\n\n".join(rows).encode()


def held(rows: list[str]) -> bytes:
    return json.dumps({"version": 1, "data": [{"text": row} for row in rows]}).encode()


def indexed(rows: list[str]) -> bytes:
    return json.dumps({str(i): {"text": row} for i, row in enumerate(rows)}).encode()


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "t.txt": plain,
    "t.md": plain,
    "t": plain,
    "t.log": plain,
    "t.txt.gz": lambda rows: gzip.compress(plain(rows)),
    "t.jsonl": lines,
    "DATA.JSONL": lines,
    "t.ndjson": lines,
    "c4.00000-of-00512.json": lines,
    "lines.txt": lines,
    "lines": lines,
    "t.json": listed,
    "list.txt": listed,
    "held.json": held,
    "indexed.json": indexed,
    "t.csv": table,
    "T.CSV": table,
    "european.csv": partial(table, delimiter=";"),
    "t.tsv": partial(table, delimiter="\t"),
    "table.txt": partial(table, delimiter="\t"),
    "t.parquet": columns,
    "columns.bin": columns,
    "t.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "T.JSON.GZ": lambda rows: gzip.compress(lines(rows)),
    "no-suffix-gzip": lambda rows: gzip.compress(lines(rows)),
    "t.csv.bz2": lambda rows: bz2.compress(table(rows)),
    "t.jsonl.xz": lambda rows: lzma.compress(lines(rows)),
    "t.jsonl.zst": lambda rows: zst(lines(rows)),
    "t.parquet.gz": lambda rows: gzip.compress(columns(rows)),
    "bom.txt": lambda rows: codecs.BOM_UTF8 + plain(rows),
    "bom.jsonl": lambda rows: codecs.BOM_UTF8 + lines(rows),
    "bom.json": lambda rows: codecs.BOM_UTF8 + listed(rows),
    "bom.csv": lambda rows: codecs.BOM_UTF8 + table(rows),
    "bom.txt.gz": lambda rows: gzip.compress(codecs.BOM_UTF8 + plain(rows)),
    "windows.txt": lambda rows: plain(rows).decode().encode("utf-16"),
    "windows.csv": lambda rows: codecs.BOM_UTF16_BE + table(rows).decode().encode("utf-16-be"),
    "crlf.txt": lambda rows: plain(rows).replace(b"\n", b"\r\n"),
    "mac.jsonl": lambda rows: lines(rows).replace(b"\n", b"\r"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_text(name: str, tmp_path: Path) -> None:
    rows = [prose(1), 'With "quotes", commas;\ta tab,\n\nand \u2028 \x85 \x0b lines.', prose(2)]
    path = tmp_path / name
    path.write_bytes(FORMS[name](rows))
    assert "".join(texts._open(str(path), "test").characters()) == "\n\n".join(rows)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_gives_its_roles_different_windows(
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
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("".join(16 * f"{letter}\n" for letter in "abcdefgh") * 6)
    pool = pack([path.read_text()], tokenizer, 32)
    assert len(pool) == 48
    assert len(set(map(tuple, pool))) == 8
    few = options(
        windows={"calibration": 2, "guard": 2, "test": 2}, calibration=str(path), test=str(path)
    )
    for seed in range(5):
        assert_disjoint(load_windows(few, tokenizer, seed))


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
def test_a_source_is_read_up_to_a_bound_that_is_told(
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
    assert "in its first 3,000 characters, and no more is read" in str(error.value)
    # The literature's protocol scores all of it.
    ids = tokenizer(joined, add_special_tokens=False).input_ids
    assert len(load_test_windows(str(path), tokenizer, None, 32)) == len(ids) // 32


TEXTS = {
    "prose": lambda: "\n\n".join(documents(60, 40)),
    "lines of spaces": lambda: "".join(
        random.Random(1).choices(["\n", " ", "  ", "ab", ".", "é"], k=40_000)
    ),
    "no blank": lambda: "".join(random.Random(2).choices("abc", k=60_000)),
    "one word": lambda: "a" * 50_000,
    "other scripts": lambda: "".join(random.Random(3).choices("漢字かな 🙂🇩🇪é́\u200d", k=40_000)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXTS[name]()
    monkeypatch.setattr(tokens, "_PIECE", 6_000)
    parts = [text[i : i + 1_234] for i in range(0, len(text), 1_234)]
    pieces = list(token_ids(parts, tokenizer))
    assert len(pieces) > 5
    assert [p.characters for p in pieces] == sorted({p.characters for p in pieces})
    assert pieces[-1].characters == len(text)
    found = [int(i) for piece in pieces for i in piece.ids]
    if name == "one word":  # without a place to part it
        assert tokenizer.decode(found) == text
    else:
        assert found == tokenizer(text, add_special_tokens=False).input_ids


def test_of_a_long_text_no_more_is_read_than_is_drawn_from(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.txt", documents(9, 40))
    sources = {"calibration": str(path), "test": str(path)}
    small = {"calibration": 4, "guard": 3, "test": 5}
    before = load_windows(options(windows=small, **sources), tokenizer, seed=0)
    with path.open("ab") as file:
        file.write(b"\xff")  # no text: an error, if it were read
    monkeypatch.setattr(tokens, "_PIECE", 6_000)
    monkeypatch.setattr(texts, "_WHOLE_CHARACTERS", 10_000)
    monkeypatch.setattr(rows_module, "_BLOCK", 1_000)
    monkeypatch.setattr(rows_module, "_HEAD", 1_000)
    windows = load_windows(options(windows=small, **sources), tokenizer, seed=0)
    assert_disjoint(windows)
    assert windows.hashes["test"] == before.hashes["test"]
    assert load_test_windows(str(path), tokenizer, 5, 32).tolist() == windows.test.tolist()
    more = {"calibration": 300, "guard": 300, "test": 300}
    with pytest.raises(InputError, match="is not UTF-8"):
        load_windows(options(windows=more, **sources), tokenizer, seed=0)
    with pytest.raises(InputError, match="is not UTF-8"):
        load_test_windows(str(path), tokenizer, None, 32)


def test_a_token_that_does_not_occur_does_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    other: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["<odd>"])
    fits = load_windows(options(), other, seed=0)
    assert fits.hashes == load_windows(options(), tokenizer, seed=0).hashes


@pytest.mark.parametrize("role", ROLES)
def test_a_token_that_the_model_does_not_know_is_refused(
    role: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["<odd>"])
    path = write(tmp_path / f"{role}.txt", [f"{prose(1, 9)} <odd> " * 40 for _ in range(9)])
    with pytest.raises(InputError) as error:
        load_windows(options(**{role: str(path)}), other, seed=0)
    for words in (str(path), f"the {role} text", "'<odd>'", "id 512", "512 rows", "513 tokens"):
        assert words in str(error.value)
    with pytest.raises(InputError, match="'<odd>' with the id 512"):
        load_test_windows(str(path), other, 5, 32)


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
    "no text": (
        "a.jsonl",
        b'{"text": "a"}\n{"content": "b", "Text": "c"}\n',
        "line 2: no field 'text', only content, Text",
    ),
    "one row, no text": ("a.json", b'{"content": "b"}', "line 1: no field 'text', only content"),
    "no string": ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' holds int, not a string"),
    "no object": ("a.jsonl", b'["text"]\n', "line 1: no field 'text': the row is str"),
    "strings": ("a.txt", b'["one text", "and another"]', "line 1: no field 'text'"),
    "columns": ("a.json", b'{"text": {"0": "a", "1": "b"}}', "the field 'text' holds dict"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: no JSON.*in line 4"),
    "one line broken": (
        "a.json",
        b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n',
        "line 2: no JSON",
    ),
    "cut line": ("a.txt", b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "line 2: no JSON"),
    "prose after rows": ("a", b'{"text": "a"}\nThe end.', "line 2: no JSON"),
    "rows after prose": ("a.txt", b'Rows:\n{"text": "a"}\n{"text": "b"}\n', "line 1: no JSON"),
    "list and more": ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "line 2: no JSON.*something"),
    "list without commas": (
        "a.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        "line 2: no JSON.*expecting",
    ),
    "list cut": ("a.json", b'[{"text": "a"},\n{"text": "b"}', "line 2: no JSON"),
    "what Python prints": (
        "a.txt",
        b"{'text': 'a'}\n{'text': 'b'}",
        "line 1: no JSON.*double quotes",
    ),
    "prose named json": ("a.json", b"Some prose.", "line 1: no JSON"),
    "depth": ("a.json", b"[" * 100_000, "line 1: no JSON.*recursion"),
    "surrogate": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: .*surrogate"),
    "csv without text": (
        "a.csv",
        b"id,Text\n1,a\n",
        "no column 'text' or 'question', only id, Text",
    ),
    "csv without header": ("a.csv", b"1,a\n2,b\n", "no column 'text' or 'question', only 1, a"),
    "csv, two texts": ("a.csv", b"text,text\n1,a\n", "two columns 'text'"),
    "csv, a comma": (
        "a.csv",
        b'id,text\n1,"a\nb"\n\n2,a, b\n',
        "line 5: 3 fields, where .* names 2",
    ),
    "csv, a field less": ("a.csv", b"id,text\n1\n", "line 2: 1 fields, where .* names 2"),
    "csv, open quote": ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', "line 3: no row of a table"),
    "not UTF-8": ("a.txt", b"one\ncaf\xe9 \xff\xfe" * 30, "line 2 is not UTF-8"),
    "not UTF-8 rows": ("a.jsonl", b'{"text": "a"}\r\n{"text": "\xe9"}', "line 2 is not UTF-8"),
    "NUL": ("a.txt", b"one\ntwo\0", "line 2 holds a NUL"),
    "UTF-16, no mark": ("a.txt", "some text".encode("utf-16-le"), "line 1 holds a NUL"),
    "zip": ("a.txt", b"PK\x03\x04rest", "zip archive"),
    "pdf": ("a", b"%PDF-1.7 rest", "a PDF document"),
    "arrow": ("a.arrow", b"ARROW1\0\0rest", "an Arrow file: save it as Parquet"),
    "sqlite": ("a.db", b"SQLite format 3\0rest", "an SQLite database"),
    "html": ("a.html", b"\n<!DOCTYPE html><p>a</p>", "an HTML page"),
    "tar": ("a.tar", b"name".ljust(257, b"\0") + b"ustar\0", "a tar archive"),
    "gzip twice": ("a.gz", gzip.compress(gzip.compress(b"a")), "compressed twice"),
    "empty gzip": ("a.gz", b"", "not compressed as its name says"),
    "no zst": ("a.txt.zst", b"neither", "not compressed as its name says"),
    "cut zst": ("a.txt.zst", zst(b"a text" * 99)[:-9], "cannot read the text"),
    "cut bz2": ("a.txt.bz2", bz2.compress(b"a text" * 99)[:-9], "cannot read the text"),
    "damaged xz": ("a.txt.xz", lzma.compress(b"a text")[:20] + b"12345", "cannot read the text"),
    "empty list": ("a.json", b"[]", "too short for one window"),
    "null": ("a.json", b'[{"text": null}]', "too short for one window"),
    "null in csv": ("a.csv", b"id,text\n1,\n", "too short for one window"),
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
        ({"content": ["a"], "id": [1]}, "has no column 'text' or 'question', only content, id"),
        ({"text": [1, 2]}, "row 1: the field 'text' holds int, not a string"),
        ({"text": [b"a"]}, "row 1: the field 'text' holds bytes"),
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


def test_the_files_of_a_directory_are_read_as_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "train-1.txt", ["One.", "Two\nlines."])
    (folder / "train-2.txt").write_text('{"text": "Three."}\n{"text": null}\n')
    text = texts._open(str(folder), "calibration")
    assert "".join(text.characters()) == "One.\n\nTwo\nlines.\n\nThree.\n\n"


def test_a_data_set_in_an_archive_is_read_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split, rows in {
        "train": '{"text": "One."}\n{"text": null}\n',
        "test": '{"text": [2]}',
    }.items():
        with zipfile.ZipFile(tmp_path / "set" / f"{split}.zip", "w") as archive:
            archive.writestr(f"{split}.jsonl", rows)
    text = texts._open(str(tmp_path / "set"), "calibration")
    assert "".join(text.characters()) == "One.\n\n"
    with pytest.raises(InputError, match="cannot read the data set"):
        list(texts._open(str(tmp_path / "set"), "test").characters())


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
        ({"train.jsonl": '{"content": "a"}\n'}, "line 1: no field 'text', only content"),
        ({"train.jsonl": '{"text": "a"}\n{"text": oh\n'}, "line 2: no JSON"),
        ({"train.jsonl": '{"text": [1]}\n'}, "line 1: the field 'text' holds list"),
        ({"set.py": "import datasets\n"}, "scripts are no longer supported"),
        ({"train.parquet": "PAR1"}, "cannot read the text"),
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


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """Three files, each of documents of its own."""
    names = ("a", "b", "c")
    return {n: write(tmp_path / f"{n}.jsonl", documents(70 + i)) for i, n in enumerate(names)}


def owners(
    drawn: list[tuple[int, ...]], files: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Which of the files each window is of."""
    pools = {
        name: set(map(tuple, load_test_windows(str(path), tokenizer, None, 32).tolist()))
        for name, path in files.items()
    }
    return "".join(next(n for n, pool in pools.items() if row in pool) for row in drawn)


def test_a_mix_is_shared_out_by_weight_and_takes_turns(
    three: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    weights = {"a": 5, "b": 2, "c": 1}
    mix = [{"source": str(three[n]), "weight": w} for n, w in weights.items()]
    counts = {"calibration": 16, "gradient": 8, "guard": 8, "test": 4}
    windows = load_windows(
        options(calibration=mix, test=str(three["c"]), windows=counts), tokenizer, seed=0
    )
    whole = owners(rows(windows, "calibration"), three, tokenizer)
    assert {n: whole.count(n) for n in weights} == {"a": 10, "b": 4, "c": 2}
    for end in range(1, 17):  # any first part has the mix, to a window
        for name, weight in weights.items():
            assert abs(whole[:end].count(name) - weight / 8 * end) <= 1
    guard = owners(rows(windows, "guard"), three, tokenizer)
    assert {n: guard.count(n) for n in weights} == weights
    assert_disjoint(windows)
    assert windows.sources["guard"] == " + ".join(
        f"{three[n]} ({w} windows)" for n, w in weights.items()
    )
    again = load_windows(
        options(calibration=mix, test=str(three["c"]), windows=counts), tokenizer, seed=1
    )
    assert set(rows(windows, "calibration")) != set(rows(again, "calibration"))
    assert torch.equal(windows.test, again.test)


@given(
    count=st.integers(1, 100),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
)
def test_windows_are_shared_out_to_less_than_one(count: int, weights: list[float]) -> None:
    shares = texts.share_out(count, weights)
    assert sum(shares) == count
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - count * weight / sum(weights)) < 1


def test_a_mix_of_one_source_draws_what_the_source_alone_does(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    alone = load_windows(options(), tokenizer, seed=3)
    mixed = load_windows(options(calibration=[{"source": "embedded"}]), tokenizer, seed=3)
    assert alone.hashes == mixed.hashes


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (["a", {"source": "b", "weight": 0.01}], "b.jsonl gets none of the 4 calibration windows"),
        (["a", "./x/../a"], "a.jsonl is twice among the sources of the calibration text"),
        (["a", "short"], "short.jsonl, the calibration text, is too short for one window"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(
    mix: list[Any],
    words: str,
    three: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    write(tmp_path / "short.jsonl", ["a"])
    named = [
        item | {"source": f"{item['source']}.jsonl"} if isinstance(item, dict) else f"{item}.jsonl"
        for item in mix
    ]
    with pytest.raises(InputError) as error:
        load_windows(options(calibration=named), tokenizer, seed=0)
    assert words in str(error.value)


def test_a_guard_for_which_a_mix_has_too_little_is_told_of_one_of_its_own(
    three: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    total = len(load_test_windows(str(three["a"]), tokenizer, None, 32))
    counts = {"calibration": 2 * total - 2, "guard": 10}
    mix = [str(three["a"]), str(three["b"])]
    with pytest.raises(InputError, match=r"or texts\.guard a source of its own"):
        load_windows(options(calibration=mix, windows=counts), tokenizer, seed=0)
    own = load_windows(
        options(calibration=mix, windows=counts, guard=str(three["c"])), tokenizer, 0
    )
    assert owners(rows(own, "guard"), three, tokenizer) == 10 * "c"


FACT = {"question": "Who wrote Dracula? ", "answers": ["bram stoker", "abraham stoker"]}
CHOICE = {"subject": "law", "question": "Which?", "choices": ["one", "two "], "answer": 1}
OFFICIAL = {
    "Version": "1.0",
    "Questions": [
        {
            "Question-ID": "1",
            "RawQuestion": "Who wrote Dracula?",
            "Parses": [{"Answers": [{"AnswersName": ["bram stoker"]}]}],
        }
    ],
}
AS_TEXT = "Question: Who wrote Dracula?\nAnswer: Bram Stoker"


def test_questions_are_read_as_text_with_their_right_answers(tmp_path: Path) -> None:
    def text(path: Path) -> str:
        return "".join(texts._open(str(path), "calibration").characters())

    (tmp_path / "dev.json").write_text(json.dumps(OFFICIAL))
    assert text(tmp_path / "dev.json") == AS_TEXT
    rows = [FACT, CHOICE, {"text": "Prose."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = f"{AS_TEXT}\n\nQuestion: Which?\nAnswer: two\n\nProse."
    assert text(tmp_path / "rows.jsonl") == expected
    parquet.write_table(pa.Table.from_pylist([FACT, FACT]), tmp_path / "facts.parquet")
    assert text(tmp_path / "facts.parquet") == f"{AS_TEXT}\n\n{AS_TEXT}"


def test_a_question_without_an_answer_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FACT) + "\n" + json.dumps({"question": "Why?"}) + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: answers: "):
        list(texts._open(str(path), "calibration").characters())


def test_what_the_model_wrote_is_asked_for_once_and_drawn_from(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    asked = []

    def write_own(count: int) -> Path:
        asked.append(count)
        return write(tmp_path / "self.jsonl", documents(80))

    mix = options(calibration=["embedded", "self"])
    windows = texts.load_windows(mix, tokenizer, 0, rows=512, write=write_own)
    assert asked == [3]  # of 4 and of 3 windows, the odd one goes to the first
    assert_disjoint(windows)
    files = {"s": tmp_path / "self.jsonl"}
    own = rows(windows, "calibration")[1::2] + rows(windows, "guard")[1:2]
    assert owners(own, files, tokenizer) == "sss"


ASKED = [
    {"question": f"What is {prose(i, 3)}?", "answers": [f"{prose(i, 1)} {i}"]} for i in range(90)
]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, ASKED)))
    return path


def test_domains_take_turns_and_are_shared_out_equally(
    three: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    named = {"b": str(three["a"]), "c": str(three["b"]), "a": str(three["c"])}
    counts = COUNTS | {"calibration": 7, "gradient": 3, "guard": 6}
    windows = load_windows(options(calibration=named, windows=counts), tokenizer, seed=0)
    assert windows.domains == {"calibration": tuple("abcabca"), "guard": tuple("abcabc")}
    files = {name: Path(source) for name, source in named.items()}
    for role in ("calibration", "guard"):
        drawn = owners(rows(windows, role), files, tokenizer)
        assert drawn == "".join(windows.domains[role])  # type: ignore[index]
    assert_disjoint(windows)
    assert windows.scored == {}
    assert windows.sources["guard"] == " + ".join(
        f"{name}: {files[name]} (2 windows)" for name in "abc"
    )
    # Hashes are those of the ids alone, as ever.
    assert windows.hashes["guard"] == hash_windows(windows.guard)


def test_domains_have_windows_by_weight_and_each_has_one(
    three: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    named = {name: str(path) for name, path in three.items()}
    counts = COUNTS | {"calibration": 12, "gradient": 3, "guard": 6}

    def drawn(weights: dict[str, float]) -> str:
        windows = texts.load_windows(
            options(calibration=named, windows=counts), tokenizer, 0, rows=512, weights=weights
        )
        whole = "".join(windows.domains["calibration"])
        assert owners(rows(windows, "calibration"), three, tokenizer) == whole
        assert set(whole[:3]) == set("abc")  # those that give gradients
        assert windows.domains["guard"] == tuple("abcabc")
        assert_disjoint(windows)
        return whole

    found = drawn({"a": 4, "b": 1, "c": 1})
    assert [found.count(name) for name in "abc"] == [8, 2, 2]
    assert found[:6].count("a") == 4
    assert [drawn({"a": 1, "b": 0, "c": 0}).count(name) for name in "abc"] == [10, 1, 1]
    assert drawn({"a": 2, "b": 2, "c": 2}) == "abc" * 4


def test_of_questions_only_answers_are_scored(
    asked: Path, three: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    named = {"facts": str(asked), "general": str(three["a"])}
    counts = COUNTS | {"calibration": 6, "guard": 4, "length": 64}
    windows = load_windows(options(calibration=named, windows=counts), tokenizer, seed=0)
    right = {f"Question: {q['question']}\nAnswer:": shown_form(q["answers"]) for q in ASKED}
    whole = []
    for role in ("calibration", "guard"):
        for window, marks, domain in zip(
            getattr(windows, role), windows.scored[role], windows.domains[role], strict=True
        ):
            if domain == "general":
                assert bool(marks.all())
                continue
            answers = ""
            text = tokenizer.decode(window)
            for question, answer in right.items():
                if f"{question} {answer}\n" in f"{text}\n":
                    answers += f" {answer}"
                    whole.append(question)
            found = tokenizer.decode(window[1:][marks])
            assert sorted(found.split()) == sorted(answers.split()) != []
            assert text.startswith("Question: ")
    # No answer is in two windows, nor in two roles.
    assert len(set(whole)) == len(whole)
    marks = windows.scored["guard"]
    assert windows.hashes["guard"] == hash_windows(windows.guard, marks)
    assert windows.hashes["guard"] != hash_windows(windows.guard)
    # Where the file is no domain its questions are text like any other.
    plain = load_windows(options(calibration=str(asked)), tokenizer, seed=0)
    assert plain.scored == {}


def test_a_domain_of_questions_that_cannot_be_scored_is_refused(
    asked: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    named = {"facts": str(asked), "general": "embedded"}
    counts = COUNTS | {"guard": 2, "length": 8}
    with pytest.raises(InputError, match="too short for one window of 8 tokens"):
        load_windows(options(calibration=named, windows=counts), tokenizer, seed=0)
    asked.write_text(f"{json.dumps(ASKED[0])}\n{json.dumps({'text': 'words'})}")
    with pytest.raises(InputError, match="holds questions, and rows that are none"):
        load_windows(options(calibration=named, windows={"guard": 2}), tokenizer, seed=0)
