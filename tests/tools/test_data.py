"""What the package's own texts and questions promise: size, variety, form, disjoint splits."""

import json
import re
import unicodedata
from collections import Counter
from importlib import resources
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

DATA = Path(str(resources.files("prunewright.tools") / "data"))
SPLITS = ("calibration", "guard", "test")
REGISTERS = {
    "dialogue",
    "encyclopedia",
    "essay",
    "forum",
    "howto",
    "letter",
    "manual",
    "narrative",
    "news",
    "review",
    "speech",
    "web",
}
SHARED_WORDS = 12
"""No run of so many words may occur in two pieces."""


def read_pieces() -> dict[str, dict[str, str]]:
    return {
        split: {
            path.name: path.read_bytes().decode("utf-8")
            for path in sorted((DATA / "corpus" / split).iterdir())
        }
        for split in SPLITS
    }


def read_lines(name: str) -> list[dict[str, Any]]:
    text = (DATA / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def contains(text: str, phrase: str) -> bool:
    wanted, given = words(phrase), words(text)
    return bool(wanted) and any(
        given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1)
    )


@pytest.fixture(scope="module")
def pieces() -> dict[str, dict[str, str]]:
    return read_pieces()


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return read_lines("facts.jsonl")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return read_lines("questions.jsonl")


def test_corpus_is_large_and_each_split_has_every_register(
    pieces: dict[str, dict[str, str]],
) -> None:
    texts = [text for split in pieces.values() for text in split.values()]
    assert len(texts) >= 80
    assert sum(map(len, texts)) >= 130_000
    for split, named in pieces.items():
        assert {name.partition("-")[0] for name in named} == REGISTERS, split
        lengths = Counter[str]()
        for name, text in named.items():
            lengths[name.partition("-")[0]] += len(text)
        # No register is a token presence, none is most of the split.
        assert min(lengths.values()) > 0.03 * sum(lengths.values()), split
        assert max(lengths.values()) < 0.25 * sum(lengths.values()), split


def test_each_piece_is_a_title_a_blank_line_and_paragraphs(
    pieces: dict[str, dict[str, str]],
) -> None:
    for split, named in pieces.items():
        for name, text in named.items():
            where = f"{split}/{name}"
            assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)+\.txt", name), where
            lines = text.split("\n")
            assert lines[-1] == "", where
            assert lines[0].strip(), where
            assert len(lines[0]) <= 120, where
            assert lines[1] == "", where
            assert lines[2].strip(), where
            assert len(words(text)) >= 100, where
            assert not any(a == b == "" for a, b in pairwise(lines[:-1])), where
            assert all(line == line.rstrip() for line in lines), where


def test_texts_are_plain_normalized_utf8(pieces: dict[str, dict[str, str]]) -> None:
    files = {f"{s}/{n}": text for s, named in pieces.items() for n, text in named.items()}
    for name in ("facts.jsonl", "questions.jsonl"):
        files[name] = (DATA / name).read_bytes().decode("utf-8")
    for where, text in files.items():
        assert unicodedata.is_normalized("NFC", text), where
        # No byte order mark, carriage return, tab, zero-width, private or replaced character.
        odd = {c for c in text if c != "\n" and unicodedata.category(c)[0] == "C"}
        assert not odd, (where, odd)
        assert "\ufffd" not in text, where


def test_no_piece_or_title_occurs_twice(pieces: dict[str, dict[str, str]]) -> None:
    texts = [text for named in pieces.values() for text in named.values()]
    titles = [" ".join(words(text.partition("\n")[0])) for text in texts]
    names = [name for named in pieces.values() for name in named]
    for values in (texts, titles, names):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        assert repeated == []


def test_no_two_pieces_share_a_long_passage(pieces: dict[str, dict[str, str]]) -> None:
    runs = {}
    for split, named in pieces.items():
        for name, text in named.items():
            w = words(text)
            runs[f"{split}/{name}"] = {
                tuple(w[i : i + SHARED_WORDS]) for i in range(len(w) - SHARED_WORDS + 1)
            }
    shared = [
        (a, b, " ".join(min(runs[a] & runs[b])))
        for a, b in combinations(runs, 2)
        if runs[a] & runs[b]
    ]
    assert shared == []


def test_facts_are_many_distinct_and_well_formed(facts: list[dict[str, Any]]) -> None:
    assert len(facts) >= 300
    for fact in facts:
        assert set(fact) == {"id", "question", "answers", "topic"}
        assert re.fullmatch(r"facts-\d{4}", fact["id"])
        assert fact["question"].endswith("?")
        assert fact["answers"], fact["id"]
        assert all(isinstance(a, str) and a == a.strip() and a for a in fact["answers"]), fact
        assert len(set(fact["answers"])) == len(fact["answers"]), fact
    assert len({fact["id"] for fact in facts}) == len(facts)
    assert len({tuple(words(fact["question"])) for fact in facts}) == len(facts)
    topics = Counter(fact["topic"] for fact in facts)
    assert len(topics) >= 20
    assert max(topics.values()) <= 2 * min(topics.values())


def test_no_fact_gives_its_answer_away(facts: list[dict[str, Any]]) -> None:
    given = [
        (fact["id"], answer)
        for fact in facts
        for answer in fact["answers"]
        if contains(fact["question"], answer)
    ]
    assert given == []


def test_questions_are_many_distinct_and_well_formed(questions: list[dict[str, Any]]) -> None:
    assert len(questions) >= 200
    for question in questions:
        assert set(question) == {"id", "subject", "question", "choices", "answer"}
        assert re.fullmatch(r"mcq-\d{4}", question["id"])
        assert question["question"].endswith("?")
        assert len(question["choices"]) == 4, question["id"]
        assert len({c.strip().casefold() for c in question["choices"]}) == 4, question["id"]
        assert all(question["choices"]), question["id"]
        assert type(question["answer"]) is int
        assert 0 <= question["answer"] < 4
    assert len({q["id"] for q in questions}) == len(questions)
    assert len({tuple(words(q["question"])) for q in questions}) == len(questions)
    subjects = Counter(q["subject"] for q in questions)
    assert len(subjects) >= 20
    assert max(subjects.values()) <= 2 * min(subjects.values())


def test_neither_letter_nor_length_gives_the_right_choice_away(
    questions: list[dict[str, Any]],
) -> None:
    letters = Counter(q["answer"] for q in questions)
    assert set(letters) == {0, 1, 2, 3}
    assert max(letters.values()) - min(letters.values()) <= 0.1 * len(questions)
    longest = sum(
        len(q["choices"][q["answer"]])
        > max(len(c) for i, c in enumerate(q["choices"]) if i != q["answer"])
        for q in questions
    )
    shortest = sum(
        len(q["choices"][q["answer"]])
        < min(len(c) for i, c in enumerate(q["choices"]) if i != q["answer"])
        for q in questions
    )
    # Always naming the longest, or the shortest, choice must not be much better than guessing.
    assert longest <= 0.35 * len(questions)
    assert shortest <= 0.35 * len(questions)


def test_the_corpus_quotes_no_question(
    pieces: dict[str, dict[str, str]], questions: list[dict[str, Any]], facts: list[dict[str, Any]]
) -> None:
    """So that neither calibration nor guard sees the probes."""
    asked = {" ".join(words(item["question"])) for item in [*facts, *questions]}
    corpus = " ".join(" ".join(words(text)) for named in pieces.values() for text in named.values())
    assert [question for question in asked if question in corpus] == []


def test_the_card_counts_what_is_there(
    pieces: dict[str, dict[str, str]], facts: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> None:
    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert "CC0-1.0" in card
    assert set(re.findall(r"^- `([a-z]+)`:", card, re.MULTILINE)) == REGISTERS
    for split, named in pieces.items():
        characters = sum(map(len, named.values()))
        assert f"| `{split}` | {len(named)} | {characters:,} |" in card
    assert f"{len(facts)} questions on {len({f['topic'] for f in facts})} topics" in card
    subjects = len({q["subject"] for q in questions})
    assert f"{len(questions)} questions on {subjects} subjects" in card
