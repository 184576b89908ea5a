"""Calibration, guard and test windows from the embedded corpus, local files or the hub."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import chain, permutations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.state.config import EMBEDDED, TextOptions
from prunewright.tools.model.tokens import check_ids, start_tokens, token_ids
from prunewright.tools.sources import choose_split, find_local, first_line, loading_data_set
from prunewright.tools.texts.questions import MARKS, question_text
from prunewright.tools.texts.rows import Row, fields_of, is_file_name, read_file

Role = Literal["calibration", "guard", "test"]
ROLES: tuple[Role, ...] = ("calibration", "guard", "test")

# A role reads the first of these splits that a data set has.
_SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "guard": ("validation", "train", "test"),
    "test": ("test", "validation", "train"),
}
_MARKS = ("text", "question")
"""A row has one of these fields; or it is FreebaseQA's."""
_POOL_CHARACTERS = 20_000_000
"""A source is read up to here for a run: some 4 million tokens."""
_WHOLE_CHARACTERS = 4_000_000
_POOL_TIMES = 4
"""A source is read no further once it has this many characters, and this many times the windows
that are wanted of it."""


@dataclass(frozen=True)
class Windows:
    """Token windows of the three roles; no two roles share one.

    Attributes:
        calibration: ids [windows, length]; the first ``gradient`` of them give gradients.
        guard: ids [windows, length].
        test: ids [windows, length].
        hashes: sha256 of each role's ids.
        sources: what each role was read from, ``source[split]``.
    """

    calibration: Tensor
    guard: Tensor
    test: Tensor
    hashes: dict[str, str]
    sources: dict[str, str]


def load_windows(
    options: TextOptions, tokenizer: PreTrainedTokenizerBase, seed: int, *, rows: int
) -> Windows:
    """Read, pack and draw the windows of all three roles.

    Calibration and guard windows are drawn by ``seed``; test windows are the first of their
    text, as the literature takes them. Roles that read the same text get disjoint windows. They
    are drawn from the first `_WHOLE_CHARACTERS` of a text, or further on where these are less than
    `_POOL_TIMES` the windows that are wanted, but never beyond `_POOL_CHARACTERS`.

    Args:
        options: what is read, and how much.
        tokenizer: the model's.
        seed: of the draws.
        rows: `embedding_rows` of the model.

    Raises:
        InputError: a source is missing or unreadable, too short, or shared under two names, or a
            window holds a token that the model does not know.
    """
    wanted = {
        "calibration": options.windows.calibration,
        "guard": options.windows.guard,
        "test": options.windows.test,
    }
    length = options.windows.length
    opened = {role: _open(_source(options, role), role) for role in ROLES}
    sources: dict[str, str] = {role: text.label for role, text in opened.items()}
    pools: dict[str, _Pool] = {}
    for role, text in opened.items():
        if text.label not in pools:
            sharing = sum(wanted[r] for r in ROLES if sources[r] == text.label)
            pools[text.label] = _Pool.of(text, tokenizer, length, _POOL_TIMES * sharing)
            if not len(pools[text.label].windows):
                raise InputError(
                    f"{text.label}, the {role} text, is too short for one window of "
                    f"{length} tokens: give more text, or a smaller texts.windows.length"
                )
    drawn: dict[str, list[int]] = {}
    # The test text keeps its order and its beginning; the others draw from what is left.
    for role in ("test", "calibration", "guard"):
        pool, count = pools[sources[role]], wanted[role]
        if len(pool.left) < count:
            raise InputError(
                f"{sources[role]} has {len(pool.left)} windows of {length} tokens left "
                f"for the {role} text{_bound(pool.characters)}, {count} are asked for: lower "
                f"texts.windows.{role} or texts.windows.length, or give more text"
            )
        if role != "test":
            random.Random(f"{seed}/{role}").shuffle(pool.left)
        drawn[role], rest = pool.left[:count], pool.left[count:]
        # A text that repeats itself must not give one role what another has.
        taken = {pool.digests[index] for index in drawn[role]}
        pool.left = [index for index in rest if pool.digests[index] not in taken]
    _refuse_shared(drawn, pools, sources)
    tensors = {role: _tensor(pools[sources[role]].windows[drawn[role]]) for role in ROLES}
    for role, windows in tensors.items():
        check_ids(windows, tokenizer, rows, f"{sources[role]}, the {role} text,")
    return Windows(
        calibration=tensors["calibration"],
        guard=tensors["guard"],
        test=tensors["test"],
        hashes={role: hash_windows(t) for role, t in sorted(tensors.items())},
        sources=sources,
    )


def load_test_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int, *, rows: int
) -> Tensor:
    """The first windows [count, length] of a source's test text.

    Args:
        source: as in ``texts.test``.
        tokenizer: the model's.
        count: how many; None takes all, cut as the literature cuts them: the text is tokenized
            once with what the tokenizer begins a text with, which so is in the first window
            alone. The whole text is read then, however long it is.
        length: tokens in one.
        rows: `embedding_rows` of the model.

    Raises:
        InputError: missing, unreadable or too short, or with a token that the model does not know.
    """
    text = _open(source, "test")
    if count is None:
        windows, characters = pack(text.characters(), tokenizer, length, each=False)
    else:
        limited = text.characters(_POOL_CHARACTERS)
        windows, characters = pack(limited, tokenizer, length, most=count)
    if len(windows) < (count or 1):
        raise InputError(
            f"{text.label} has {len(windows)} windows of {length} tokens"
            f"{_bound(characters) if count else ''}, {count or 1} are asked for"
        )
    found = _tensor(windows[:count])
    check_ids(found, tokenizer, rows, f"{text.label}")
    return found


def source_digest(source: str, role: Role) -> str:
    """sha256 of a source's documents, as far as a role reads them.

    Raises:
        InputError: missing or unreadable.
    """
    digest = hashlib.sha256()
    for document in _open(source, role).documents(_POOL_CHARACTERS):
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def pack(
    text: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    each: bool = True,
    most: int | None = None,
    least: int = 0,
) -> tuple[NDArray[np.int32], int]:
    """Tokenize a text once and cut it into windows; the tail is dropped.

    A tokenizer that begins a text with a token of its own (Llama's BOS) gets it at the start
    of every window, inside ``length``: such models expect it. One at the end is left out.

    Args:
        text: in parts.
        tokenizer: the model's.
        length: tokens in a window.
        each: begin every window so; else only the text.
        most: windows after which no more need be read; None reads all.
        least: characters before which reading does not end.

    Returns:
        Windows [windows, length], and how many characters of the text they were made of.
    """
    start = np.array(start_tokens(tokenizer), dtype=np.int32)
    found: list[NDArray[np.int32]] = [] if each else [start]
    if not each:
        start = start[:0]
    body = length - len(start)
    tokens = characters = 0
    for ids, characters in token_ids(text, tokenizer):
        found.append(ids)
        tokens += len(ids)
        if most is not None and tokens >= most * body and characters >= least:
            break
    ids = np.concatenate(found)
    ids = ids[: len(ids) // body * body].reshape(-1, body)
    windows = np.concatenate([np.broadcast_to(start, (len(ids), len(start))), ids], axis=1)
    return windows, characters


def hash_windows(windows: Tensor) -> str:
    """sha256 of the token ids."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


@dataclass
class _Text:
    """What a source holds.

    Attributes:
        label: equal for equal texts.
        parts: documents or, of a file of plain text, parts of its one.
        whole: whether they are parts of one.
    """

    label: str
    parts: Iterator[str]
    whole: bool = False

    def characters(self, most: int | None = None) -> Iterator[str]:
        """The text in parts, its documents joined with blank lines.

        Args:
            most: characters of documents, from the first on; None takes all.
        """
        between = ""
        for part in _limited(self.parts, most):
            yield between + part
            between = "" if self.whole else "\n\n"

    def documents(self, most: int | None) -> Iterator[str]:
        """The documents up to a number of characters; None takes all."""
        parts = _limited(self.parts, most)
        return iter(["".join(parts)]) if self.whole else parts


@dataclass
class _Pool:
    """The windows of a text that roles draw from.

    Attributes:
        windows: token ids [windows, length].
        digests: a hash of each.
        left: those that no role has, by index.
        characters: of the text that they were made of.
    """

    windows: NDArray[np.int32]
    digests: list[bytes]
    left: list[int]
    characters: int

    @classmethod
    def of(cls, text: _Text, tokenizer: PreTrainedTokenizerBase, length: int, most: int) -> "_Pool":
        """Make it.

        Args:
            text: where from.
            tokenizer: the model's.
            length: tokens in a window.
            most: windows after which no more need be read.
        """
        windows, characters = pack(
            text.characters(_POOL_CHARACTERS),
            tokenizer,
            length,
            most=most,
            least=_WHOLE_CHARACTERS,
        )
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in windows]
        return cls(windows, digests, list(range(len(windows))), characters)


def _bound(characters: int) -> str:
    """Words for a text of which only the beginning was read."""
    if characters < _POOL_CHARACTERS:
        return ""
    return f" in its first {_POOL_CHARACTERS:,} characters, and no more is read"


def _tensor(windows: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def _source(options: TextOptions, role: Role) -> str:
    if role == "guard":
        return options.guard or options.calibration
    return options.calibration if role == "calibration" else options.test


def _refuse_shared(
    drawn: dict[str, list[int]], pools: dict[str, _Pool], sources: dict[str, str]
) -> None:
    """Refuse a window that another role's source holds anywhere, drawn from there or not."""
    whole = {label: set(pool.digests) for label, pool in pools.items()}
    for role, other in permutations(ROLES, 2):
        if sources[role] != sources[other] and not whole[sources[other]].isdisjoint(
            pools[sources[role]].digests[index] for index in drawn[role]
        ):
            raise InputError(
                f"the {role} text ({sources[role]}) holds a window that the {other} text "
                f"({sources[other]}) holds too: name the same source for both, so that they "
                "are kept apart, or give different texts"
            )


def _open(source: str, role: Role) -> _Text:
    """What a source gives to a role."""
    if source == EMBEDDED:
        return _Text(f"embedded[{role}]", _embedded_documents(role))
    path = find_local(source, f"the {role} text")
    if path is not None:
        if path.is_dir():
            return _data_set(str(path.resolve()), None, role)
        if not path.is_file():
            raise InputError(f"the {role} text {source} is neither a file nor a directory")
        return _file(path)
    name, _, config = source.partition(":")
    return _data_set(name, config or None, role)


def _limited(parts: Iterable[str], most: int | None) -> Iterator[str]:
    if most is None:
        yield from parts
        return
    left = most
    for part in parts:
        yield part[:left]
        left -= len(part)
        if left <= 0:
            return


def _embedded_documents(role: Role) -> Iterator[str]:
    """Pieces of the role's split in a mixed but fixed order, so that any run of them is varied."""
    folder = resources.files("prunewright.tools") / "data" / "corpus" / role
    pieces = sorted((p for p in folder.iterdir() if p.name.endswith(".txt")), key=lambda p: p.name)
    random.Random(role).shuffle(pieces)
    for piece in pieces:
        yield piece.read_text(encoding="utf-8").strip()


def _file(path: Path) -> _Text:
    content = read_file(path, "text", _MARKS, columns=["text"])
    label = str(path.resolve())
    if content.text is not None:
        return _Text(label, content.text, whole=True)
    return _Text(label, (_row_text(row, str(path)) for row in content.rows or ()))


def _documents(path: Path) -> Iterator[str]:
    """The documents of one of several files; plain text is one."""
    yield from _file(path).documents(None)


def _data_set(name: str, config: str | None, role: Role) -> _Text:
    """A data set of the hub, or a directory laid out as one (train.jsonl, test.parquet ...)."""
    import datasets

    source = f"{name}:{config}" if config else name
    with loading_data_set(source, f"the {role} text"):
        files = datasets.load_dataset_builder(name, config).config.data_files or {}
        local = {split: [Path(file) for file in found] for split, found in files.items()}
        ours = all(
            p.is_file() and is_file_name(p.name) for p in chain.from_iterable(local.values())
        )
        splits = list(local) if local and ours else datasets.get_dataset_split_names(name, config)
        split = choose_split(source, _SPLITS[role], splits)
        if local and ours:
            # `datasets` says which file belongs to which split; what they hold we read ourselves.
            return _Text(f"{source}[{split}]", chain.from_iterable(map(_documents, local[split])))
        data = datasets.load_dataset(name, config, split=split, streaming=True)
    features = list(data.features or {})
    if features and not any(mark in features for mark in _MARKS):
        raise InputError(
            f"the data set {source} has no field 'text' or 'question', only {', '.join(features)}"
        )

    def documents() -> Iterator[str]:
        try:
            for number, row in enumerate(data, 1):
                yield _row_text(Row(f"row {number}", row), source)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cannot read the data set {source}: {first_line(error)}") from error

    return _Text(f"{source}[{split}]", documents())


def _row_text(row: Row, source: str) -> str:
    """The text of a row, or of the question that it is; null is an empty one.

    Raises:
        InputError: it has none, or one that is no string of characters.
    """
    where, value = f"{source}, {row.place}", row.value
    if not isinstance(value, dict):
        raise InputError(f"{where}: no field 'text': the row is {type(value).__name__}, no object")
    if "text" not in value:
        if any(mark in value for mark in MARKS):
            return question_text(value, where)
        raise InputError(f"{where}: no field 'text', only {fields_of(value)}")
    text = value["text"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where}: the field 'text' holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the field 'text' holds half of a surrogate pair, which is no character"
        ) from error
    return text
