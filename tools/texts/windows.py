"""Calibration, guard and test windows from the embedded corpus, local files or the hub."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import chain, islice, permutations
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.state.config import EMBEDDED, SELF, TextOptions
from prunewright.tools.model.tokens import check_ids, start_tokens, token_ids
from prunewright.tools.sources import choose_split, find_local, first_line, loading_data_set
from prunewright.tools.texts.answered import pack_answered
from prunewright.tools.texts.questions import MARKS, QUESTION, Answered, row_as_text
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


Writer = Callable[[int], Path]
"""Gives the file with what the dense model writes by itself: text for a number of windows."""


@dataclass(frozen=True)
class Windows:
    """Token windows of the three roles; no two roles share one.

    Attributes:
        calibration: ids [windows, length]; the first ``gradient`` of them give gradients.
        guard: ids [windows, length].
        test: ids [windows, length].
        hashes: sha256 of each role's ids, and of its ``scored``.
        sources: what each role was read from, ``source[split]``; of a mix each with its windows.
        domains: the domain of each window, by role; only of roles that have domains.
        scored: which tokens after the first one losses are taken of, bool [windows, length - 1], by
            role: those of answers, and all of plain text. Only of roles with a domain of questions.
    """

    calibration: Tensor
    guard: Tensor
    test: Tensor
    hashes: dict[str, str]
    sources: dict[str, str]
    domains: dict[Role, tuple[str, ...]] = field(default_factory=dict)
    scored: dict[Role, Tensor] = field(default_factory=dict)


def load_windows(
    options: TextOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    rows: int,
    weights: Mapping[str, float] = MappingProxyType({}),
    write: Writer | None = None,
) -> Windows:
    """Read, pack and draw the windows of all three roles.

    Calibration and guard windows are drawn by ``seed``; test windows are the first of their
    text, as the literature takes them. Roles that read the same text get disjoint windows. They
    are drawn from the first `_WHOLE_CHARACTERS` of a text, or further on where these are less than
    `_POOL_TIMES` the windows that are wanted, but never beyond `_POOL_CHARACTERS`. The windows of
    a mix are shared out over its sources by weight, and so are those of calibration's domains, of
    which each has one at least. The guard's domains have equal shares. All take turns. A domain
    whose documents are questions is packed by `pack_answered`.

    Args:
        options: what is read, and how much.
        tokenizer: the model's.
        seed: of the draws.
        rows: `embedding_rows` of the model.
        weights: how much each domain counts; one without a weight has 1.
        write: gives what the model writes by itself, where a source is `SELF`.

    Raises:
        InputError: a source is missing or unreadable, too short, shared under two names, or gets
            no window of calibration; or a window holds a token that the model does not know.
    """
    length = options.windows.length
    parts, texts = _parts(options, weights, write)
    pools: dict[str, _Pool] = {}
    for part in parts:
        if part.label not in pools:
            sharing = sum(other.count for other in parts if other.label == part.label)
            text = texts[part.label]
            by_domain = any(other.domain for other in parts if other.label == part.label)
            pools[part.label] = _Pool.of(
                text, tokenizer, length, _POOL_TIMES * sharing, by_domain=by_domain
            )
            if not len(pools[part.label].windows):
                raise InputError(
                    f"{part.label}, the {part.role} text, is too short for one window of "
                    f"{length} tokens: give more text, or a smaller texts.windows.length"
                )
    # The test text keeps its order and its beginning; the others draw from what is left.
    for part in sorted(parts, key=lambda part: part.role != "test"):
        _draw(part, pools[part.label], seed, options)
    _refuse_shared(parts, pools)
    tensors: dict[Role, Tensor] = {}
    sources: dict[str, str] = {}
    domains: dict[Role, tuple[str, ...]] = {}
    scored: dict[Role, Tensor] = {}
    for role in ROLES:
        own = [part for part in parts if part.role == role]
        rows_of = [iter(pools[part.label].windows[part.drawn]) for part in own]
        turns = _turns([part.count for part in own], each_first=bool(own[0].domain))
        tensors[role] = _tensor(np.stack([next(rows_of[turn]) for turn in turns]))
        sources[role] = own[0].label
        if len(own) > 1:
            sources[role] = " + ".join(part.words for part in own)
        if own[0].domain:
            domains[role] = tuple(own[turn].domain for turn in turns)
            if any(pools[part.label].scored is not None for part in own):
                marks = [iter(pools[part.label].marks(part.drawn)) for part in own]
                scored[role] = torch.from_numpy(np.stack([next(marks[turn]) for turn in turns]))
        check_ids(tensors[role], tokenizer, rows, f"{sources[role]}, the {role} text,")
    return Windows(
        calibration=tensors["calibration"],
        guard=tensors["guard"],
        test=tensors["test"],
        hashes={role: hash_windows(t, scored.get(role)) for role, t in sorted(tensors.items())},
        sources=sources,
        domains=domains,
        scored=scored,
    )


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """A number of windows by weight: whole ones, the largest remainders rounded up."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in order[: count - sum(shares)]:
        shares[i] += 1
    return shares


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


def read_documents(source: str, role: Role) -> Iterator[str]:
    """A source's documents, as far as a role reads them.

    Raises:
        InputError: missing or unreadable.
    """
    yield from _open(source, role).documents(_POOL_CHARACTERS)


def read_questions(source: str, role: Role) -> set[str]:
    """The questions of a source with their answers, as `as_text` writes them.

    Raises:
        InputError: missing or unreadable.
    """
    if source in (EMBEDDED, SELF):  # which hold none
        return set()
    return {text for text in read_documents(source, role) if text.startswith(QUESTION)}


def source_digest(source: str, role: Role) -> str:
    """sha256 of a source's documents, as far as a role reads them.

    Raises:
        InputError: missing or unreadable.
    """
    digest = hashlib.sha256()
    for document in read_documents(source, role):
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


def hash_windows(windows: Tensor, scored: Tensor | None = None) -> str:
    """sha256 of the token ids, and of which of them are scored, where that is not all."""
    found = hashlib.sha256(windows.numpy().tobytes())
    if scored is not None:
        found.update(scored.numpy().tobytes())
    return found.hexdigest()


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

    def asks(self) -> bool:
        """Whether its first document is a question."""
        first = list(islice(self.parts, 1))
        self.parts = chain(first, self.parts)
        return isinstance(next(iter(first), ""), Answered)


@dataclass
class _Pool:
    """The windows of a text that roles draw from.

    Attributes:
        windows: token ids [windows, length].
        digests: a hash of each.
        left: those that no role has, by index.
        characters: of the text that they were made of.
        scored: which tokens after the first are answers' [windows, length - 1]; None: no questions.
    """

    windows: NDArray[np.int32]
    digests: list[bytes]
    left: list[int]
    characters: int
    scored: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        text: _Text,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        most: int,
        *,
        by_domain: bool,
    ) -> "_Pool":
        """Make it.

        Args:
            text: where from.
            tokenizer: the model's.
            length: tokens in a window.
            most: windows after which no more need be read.
            by_domain: whether questions are told from other text.
        """
        least, scored = _WHOLE_CHARACTERS, None
        if by_domain and text.asks():
            windows, scored, characters = pack_answered(
                text.parts,
                tokenizer,
                length,
                label=text.label,
                most=most,
                least=least,
                limit=_POOL_CHARACTERS,
            )
        else:
            limited = text.characters(_POOL_CHARACTERS)
            windows, characters = pack(limited, tokenizer, length, most=most, least=least)
        digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in windows]
        return cls(windows, digests, list(range(len(windows))), characters, scored)

    def marks(self, drawn: list[int]) -> NDArray[np.bool_]:
        """Which tokens after the first are scored of some windows, of plain text all."""
        if self.scored is not None:
            return self.scored[drawn]
        return np.ones((len(drawn), self.windows.shape[1] - 1), dtype=np.bool_)


@dataclass
class _Part:
    """What a role takes of one source.

    Attributes:
        role: whose.
        number: of the source in the role's mix.
        source: its name.
        count: windows.
        domain: its name; "" in a mix.
        label: of the source's text.
        drawn: windows of it, by index.
    """

    role: Role
    number: int
    source: str
    count: int
    domain: str = ""
    label: str = ""
    drawn: list[int] = field(default_factory=list)

    @property
    def words(self) -> str:
        """What is taken, for people to read."""
        words = f"{self.label} ({self.count} windows)"
        return f"{self.domain}: {words}" if self.domain else words


def _turns(counts: Sequence[int], *, each_first: bool = False) -> list[int]:
    """Which source each window is of: any first part of them has about the mix of the whole.

    Args:
        counts: windows of each source, at least one.
        each_first: one of each comes before the second of any.
    """
    turns = list(range(len(counts))) if each_first else []
    taken = [turns.count(number) for number in range(len(counts))]
    for number in range(len(turns) + 1, sum(counts) + 1):
        behind = [c * number / sum(counts) - t for c, t in zip(counts, taken, strict=True)]
        turn = behind.index(max(behind))
        taken[turn] += 1
        turns.append(turn)
    return turns


def own_windows(options: TextOptions, weights: Mapping[str, float]) -> int:
    """How many windows are drawn from what the dense model writes by itself.

    Raises:
        InputError: a source gets no window of calibration.
    """
    return sum(part.count for part in _shares(options, weights) if part.source == SELF)


def _shares(options: TextOptions, weights: Mapping[str, float]) -> list[_Part]:
    """What each role takes of each of its sources, where it takes any."""
    parts: list[_Part] = []
    for role in ROLES:
        mix, count = options.sources(role), getattr(options.windows, role)
        names = options.domains(role) or [""] * len(mix)
        shares = share_out(count, [one.weight for one in mix])
        if role == "calibration" and names[0]:
            shares = share_out(count, [weights.get(name, 1.0) for name in names])
            # Costs are told of each domain, even of one that counts nothing.
            while 0 in shares:
                shares[shares.index(max(shares))] -= 1
                shares[shares.index(0)] += 1
        for number, share in enumerate(shares):
            if share:
                parts.append(_Part(role, number, mix[number].source, share, names[number]))
            elif role == "calibration":
                raise InputError(
                    f"{mix[number].source} gets none of the {count} calibration windows by its "
                    "weight: raise texts.windows.calibration or the weight, or leave it out"
                )
    return parts


def _parts(
    options: TextOptions, weights: Mapping[str, float], write: Writer | None
) -> tuple[list[_Part], dict[str, _Text]]:
    """What each role takes of each of its sources, and their texts by label."""
    parts = _shares(options, weights)
    texts: dict[str, _Text] = {}
    for part in parts:
        if part.source != SELF:
            text = _open(part.source, part.role)
        elif SELF in texts:
            text = texts[SELF]
        elif write is None:
            raise InputError(f"{SELF}, the {part.role} text, is only written in a run")
        else:
            path = write(own_windows(options, weights))
            text = replace(_file(path), label=SELF)
        if any(text.label == p.label for p in parts if p.role == part.role):
            raise InputError(f"{text.label} is twice among the sources of the {part.role} text")
        part.label = text.label
        texts[text.label] = text
    return parts, texts


def _draw(part: _Part, pool: _Pool, seed: int, options: TextOptions) -> None:
    """Take a part's windows from those that its text has left."""
    role, count = part.role, part.count
    if len(pool.left) < count:
        own = options.guard is None and role == "guard"
        raise InputError(
            f"{part.label} has {len(pool.left)} windows of {options.windows.length} tokens left "
            f"for the {role} text{_bound(pool.characters)}, {count} are asked for: lower "
            f"texts.windows.{role} or texts.windows.length, or give more text"
            f"{', or texts.guard a source of its own' if own else ''}"
        )
    if role != "test":
        number = f"/{part.number}" if part.number else ""
        random.Random(f"{seed}/{role}{number}").shuffle(pool.left)
    part.drawn, rest = pool.left[:count], pool.left[count:]
    # A text that repeats itself must not give one role what another has.
    taken = {pool.digests[index] for index in part.drawn}
    pool.left = [index for index in rest if pool.digests[index] not in taken]


def _bound(characters: int) -> str:
    """Words for a text of which only the beginning was read."""
    if characters < _POOL_CHARACTERS:
        return ""
    return f" in its first {_POOL_CHARACTERS:,} characters, and no more is read"


def _tensor(windows: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))


def _refuse_shared(parts: Sequence[_Part], pools: dict[str, _Pool]) -> None:
    """Refuse a window that another role's source holds anywhere, drawn from there or not."""
    whole = {label: set(pool.digests) for label, pool in pools.items()}
    for part, other in permutations(parts, 2):
        drawn = {pools[part.label].digests[index] for index in part.drawn}
        alike = part.role == other.role or part.label == other.label
        if not alike and not whole[other.label].isdisjoint(drawn):
            raise InputError(
                f"the {part.role} text ({part.label}) holds a window that the {other.role} text "
                f"({other.label}) holds too: name the same source for both, so that they "
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
            return row_as_text(value, where)
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
