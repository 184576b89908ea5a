"""Calibration, guard and test windows from the embedded corpus, local files or the hub."""

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import permutations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.state.config import TextOptions

Role = Literal["calibration", "guard", "test"]
ROLES: tuple[Role, ...] = ("calibration", "guard", "test")

EMBEDDED = "embedded"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# A role reads the first of these splits that a data set has.
_SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "guard": ("validation", "train", "test"),
    "test": ("test", "validation", "train"),
}
_POOL_CHARACTERS = 20_000_000
"""A source is read up to here: some 4 million tokens, thousands of windows to draw from."""


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


def load_windows(options: TextOptions, tokenizer: PreTrainedTokenizerBase, seed: int) -> Windows:
    """Read, pack and draw the windows of all three roles.

    Calibration and guard windows are drawn by ``seed``; test windows are the first of their
    text, as the literature takes them. Roles that read the same text get disjoint windows.

    Raises:
        InputError: a source is missing or unreadable, too short, or shared under two names.
    """
    wanted = {
        "calibration": options.windows.calibration,
        "guard": options.windows.guard,
        "test": options.windows.test,
    }
    pools: dict[str, list[list[int]]] = {}
    sources: dict[str, str] = {}
    drawn: dict[str, list[list[int]]] = {}
    for role in ROLES:
        source = _source(options, role)
        label, documents = _open(source, role)
        sources[role] = label
        if label not in pools:
            pool = pack(documents, tokenizer, options.windows.length)
            if not pool:
                raise InputError(
                    f"{label}, the {role} text, is too short for one window of "
                    f"{options.windows.length} tokens: give more text, or a smaller "
                    "texts.windows.length"
                )
            pools[label] = pool
        drawn[role] = []
    whole = {label: set(map(tuple, pool)) for label, pool in pools.items()}
    # The test text keeps its order and its beginning; the others draw from what is left.
    for role in ("test", "calibration", "guard"):
        pool, count = pools[sources[role]], wanted[role]
        if len(pool) < count:
            raise InputError(
                f"{sources[role]} has {len(pool)} windows of {options.windows.length} tokens left "
                f"for the {role} text, {count} are asked for: lower texts.windows.{role} or "
                "texts.windows.length, or give more text"
            )
        if role != "test":
            random.Random(f"{seed}/{role}").shuffle(pool)
        drawn[role] = pool[:count]
        # A text that repeats itself must not give one role what another has.
        taken = set(map(tuple, drawn[role]))
        pools[sources[role]] = [w for w in pool[count:] if tuple(w) not in taken]
    _refuse_shared(drawn, whole, sources)
    tensors = {role: torch.tensor(drawn[role], dtype=torch.int64) for role in drawn}
    return Windows(
        calibration=tensors["calibration"],
        guard=tensors["guard"],
        test=tensors["test"],
        hashes={role: hash_windows(t) for role, t in sorted(tensors.items())},
        sources=sources,
    )


def load_test_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int
) -> Tensor:
    """The first windows [count, length] of a source's test text.

    Args:
        source: as in ``texts.test``.
        tokenizer: the model's.
        count: how many; None takes all, cut as the literature cuts them: the text is tokenized
            once with what the tokenizer begins a text with, which so stands in the first window
            alone.
        length: tokens in one.

    Raises:
        InputError: missing, unreadable or too short.
    """
    label, documents = _open(source, "test")
    pool = pack(documents, tokenizer, length, each=count is not None)
    if len(pool) < (count or 1):
        raise InputError(
            f"{label} has {len(pool)} windows of {length} tokens, {count or 1} are asked for"
        )
    return torch.tensor(pool[:count], dtype=torch.int64)


def source_digest(source: str, role: Role) -> str:
    """sha256 of a source's documents, as far as a role reads them.

    Raises:
        InputError: missing or unreadable.
    """
    digest = hashlib.sha256()
    for document in _open(source, role)[1]:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, each: bool = True
) -> list[list[int]]:
    """Join documents with blank lines, tokenize once, cut into windows; the tail is dropped.

    A tokenizer that begins a text with a token of its own (Llama's BOS) gets it at the start
    of every window, inside ``length``: such models expect it. One at the end is left out.

    Args:
        documents: texts.
        tokenizer: the model's.
        length: tokens in a window.
        each: begin every window so; else only the text.
    """
    text = "\n\n".join(documents)
    start = start_tokens(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not each:
        start, ids = [], start + ids
    body = length - len(start)
    return [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer begins every text with, such as Llama's BOS; often nothing."""
    probe: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    dressed: list[int] = tokenizer("a").input_ids
    return next(
        (dressed[:i] for i in range(len(dressed)) if dressed[i : i + len(probe)] == probe), []
    )


def hash_windows(windows: Tensor) -> str:
    """sha256 of the token ids."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _source(options: TextOptions, role: Role) -> str:
    if role == "guard":
        return options.guard or options.calibration
    return options.calibration if role == "calibration" else options.test


def _refuse_shared(
    drawn: dict[str, list[list[int]]],
    whole: dict[str, set[tuple[int, ...]]],
    sources: dict[str, str],
) -> None:
    """Refuse a window that another role's source holds anywhere, drawn from there or not."""
    for role, other in permutations(drawn, 2):
        if sources[role] != sources[other] and not whole[sources[other]].isdisjoint(
            map(tuple, drawn[role])
        ):
            raise InputError(
                f"the {role} text ({sources[role]}) holds a window that the {other} text "
                f"({sources[other]}) holds too: name the same source for both, so that they "
                "are kept apart, or give different texts"
            )


def _open(source: str, role: Role) -> tuple[str, Iterator[str]]:
    """A label that is equal for equal texts, and the documents."""
    if source == EMBEDDED:
        return f"embedded[{role}]", _limited(_embedded_documents(role))
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _data_set(str(path.resolve()), None, role)
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # too long for a path; no such user's home
        raise InputError(f"the {role} text {source} cannot be read: {error}") from error
    if exists:
        if not path.is_file():
            raise InputError(f"the {role} text {source} is neither a file nor a directory")
        return str(path.resolve()), _limited(_file_documents(path))
    if source.startswith((".", "/", "~")) or path.name.endswith(_SUFFIXES):
        raise InputError(f"the {role} text {source} does not exist")
    name, _, config = source.partition(":")
    return _data_set(name, config or None, role)


def _limited(documents: Iterable[str]) -> Iterator[str]:
    left = _POOL_CHARACTERS
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def _embedded_documents(role: Role) -> Iterator[str]:
    """Pieces of the role's split in a mixed but fixed order, so that any run of them is varied."""
    folder = resources.files("prunewright.tools") / "data" / "corpus" / role
    pieces = sorted((p for p in folder.iterdir() if p.name.endswith(".txt")), key=lambda p: p.name)
    random.Random(role).shuffle(pieces)
    for piece in pieces:
        yield piece.read_text(encoding="utf-8").strip()


def _file_documents(path: Path) -> Iterator[str]:
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet as parquet

            file = parquet.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                raise InputError(
                    f"{path} has no column 'text', only {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(columns=["text"]):
                yield from (_text(value, path) for value in batch.column(0).to_pylist())
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            opener = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    row = json.loads(line) if line.strip() else {"text": ""}
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise InputError(f"{path}, line {number}: no field 'text' that is a string")
                    yield row["text"]
        else:
            with path.open(encoding="utf-8") as file:
                yield file.read(_POOL_CHARACTERS)
    except (OSError, ValueError, EOFError, zlib.error, NotImplementedError) as error:
        # ArrowInvalid, JSONDecodeError and UnicodeDecodeError are ValueErrors; a gzip file that
        # is cut ends in EOFError; what a Parquet reader does not know is NotImplementedError.
        raise InputError(f"cannot read the text {path}: {error}") from error


def _data_set(name: str, config: str | None, role: Role) -> tuple[str, Iterator[str]]:
    """A data set of the hub, or a directory laid out as one (train.jsonl, test.parquet ...)."""
    import datasets

    source = f"{name}:{config}" if config else name
    wanted = _SPLITS[role]
    try:
        splits = datasets.get_dataset_split_names(name, config)
        split = next((s for s in wanted if s in splits), None)
        if split is None:
            raise InputError(
                f"the data set {source} has none of the splits {', '.join(wanted)}, "
                f"only {', '.join(splits)}"
            )
        data = datasets.load_dataset(name, config, split=split, streaming=True)
    except InputError:
        raise
    except Exception as error:  # foreign input once more, and datasets raises many kinds
        raise InputError(
            f"the {role} text {source} is neither a local file nor could be loaded as a data "
            f"set: {_first_line(error)}"
        ) from error
    features = list(data.features or {})
    if features and "text" not in features:
        raise InputError(f"the data set {source} has no field 'text', only {', '.join(features)}")

    def documents() -> Iterator[str]:
        try:
            yield from (_text(row["text"], source) for row in data)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"cannot read the data set {source}: {_first_line(error)}") from error

    return f"{source}[{split}]", _limited(documents())


def _text(value: object, source: object) -> str:
    """A row's text; a row without one is empty."""
    if value is not None and not isinstance(value, str):
        raise InputError(f"the field 'text' of {source} holds {type(value).__name__}, not strings")
    return value or ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
