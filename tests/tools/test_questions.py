"""Questions from every kind of file, and what is wrong with others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from prunewright.state import InputError
from prunewright.tools.texts.questions import hash_questions, load_choices, load_facts, shown_form

OFFICIAL = {
    "Dataset": "FreebaseQA-dev",
    "Version": "1.0",
    "Questions": [
        {
            "Question-ID": "FreebaseQA-dev-0",
            "RawQuestion": "Who wrote Dracula?",
            "ProcessedQuestion": "who wrote dracula",
            "Parses": [
                {
                    "Parse-Id": "FreebaseQA-dev-0.P0",
                    "InferentialChain": "book.written_work.author",
                    "Answers": [{"AnswersMid": "m.0b", "AnswersName": ["bram stoker"]}],
                },
                {
                    "Parse-Id": "FreebaseQA-dev-0.P1",
                    "Answers": [
                        {"AnswersMid": "m.0b", "AnswersName": ["bram stoker"]},
                        {"AnswersMid": "m.0c", "AnswersName": ["abraham stoker"]},
                    ],
                },
            ],
        }
    ],
}
CHOICE: dict[str, Any] = {"subject": "law", "question": "Which?", "choices": ["a", "b"]}


def test_freebaseqa_in_its_own_form_and_in_ours(tmp_path: Path) -> None:
    official = tmp_path / "dev.json"
    official.write_text(json.dumps(OFFICIAL))
    (fact,) = load_facts(str(official))
    assert (fact.id, fact.question) == ("FreebaseQA-dev-0", "Who wrote Dracula?")
    assert fact.answers == ("bram stoker", "abraham stoker")
    own = tmp_path / "own.jsonl.gz"
    row = {"id": fact.id, "question": fact.question, "answers": fact.answers, "topic": "books"}
    own.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert load_facts(str(own)) == [fact]


def test_mmlu_from_lines_a_list_and_parquet(tmp_path: Path) -> None:
    rows = [CHOICE | {"answer": 1}, CHOICE | {"answer": 0}]
    lines, listed, table = (tmp_path / name for name in ("q.JSONL", "q.json", "q.parquet"))
    lines.write_text("\n".join(map(json.dumps, rows)))
    listed.write_text(json.dumps(rows), encoding="utf-8-sig")
    parquet.write_table(pa.Table.from_pylist(rows), table)
    shard = tmp_path / "shard.json.gz"
    shard.write_bytes(gzip.compress(lines.read_bytes()))
    found = [load_choices(str(path)) for path in (lines, listed, table, shard)]
    assert found == [found[0]] * 4
    assert [(q.id, q.answer) for q in found[0]] == [("1", 1), ("2", 0)]
    assert hash_questions(found[0]) != hash_questions(found[0][::-1])


def test_forms_without_capitals_are_shown_with_them() -> None:
    assert shown_form(["smiles of a summer night ", "x"]) == "Smiles Of A Summer Night"
    assert shown_form(["the Who"]) == "the Who"
    assert shown_form(["1984"]) == "1984"


def test_the_embedded_ones() -> None:
    assert len(load_choices("embedded")) == 280
    assert len(load_facts("embedded")) == 533


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([CHOICE], "question 1: answer"),
        ([CHOICE | {"answer": 2}], "answer 2 names none of 2 choices"),
        ([CHOICE | {"answer": -1}], "answer"),
        ([CHOICE | {"answer": 0, "choices": ["a", " "]}], "a choice is empty"),
        ([CHOICE | {"answer": 0, "choices": "ab"}], "choices"),
        ([CHOICE | {"answer": 0, "id": "x"}] * 2, "question 2: the id 'x' is there twice"),
        ([CHOICE | {"answer": 0, "choices": ["a", "\ud800"]}], "half of a surrogate pair"),
        (["no object"], "not an object"),
        ([], "holds no questions"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="(?s)" + words):
        load_choices(str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"question": "x"}' * 999, mtime=0)[:40], "cannot read"),
        ("no.jsonl", b"{", "line 1: no JSON"),
        ("no.json", b'{"Rows": []}', "holds no questions"),
        ("no.json", b'{"Rows": 3}', "line 1, question 1: question"),
        ("no.jsonl", b'\n{"question": "Who?"}', "line 2, question 1: answers"),
        ("no.csv", b"id,answers\n1,a", "no column 'question' or "),
        ("no.txt", b"Who?", "are plain text"),
        ("no.zip", b"PK\x03\x04", "a zip archive"),
        ("no.parquet", b"PAR1", "cannot read"),
        ("fact.json", b'[{"question": "Who?", "answers": []}]', "answers"),
        ("fact.json", b'[{"question": "Who?", "answers": [" "]}]', "an answer is empty"),
        ("fact.json", b'[{"RawQuestion": "Who?", "Parses": [{"AnswersName": [3]}]}]', "answers"),
    ],
)
def test_files_that_are_damaged(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_facts(str(tmp_path / name))


def test_what_is_not_there() -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_facts("/no/such.jsonl")
    with pytest.raises(InputError, match="neither a local file nor"):
        load_facts("no-one/no-such-data-set")
