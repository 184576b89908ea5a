"""Calibration, guard and test windows from the embedded corpus, local files or the hub."""

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
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
# A role reads the first of these splits that a hub data set has.
_HUB_SPLITS: dict[Role, tuple[str, ...]] = {
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
    # The test text keeps its order and its beginning; the others draw from what is left.
    for role in ("test", "calibration", "guard"):
        pool, count = pools[sources[role]], wanted[role]
        if len(pool) < count:
            raise InputError(
                f"{sources[role]} has {len(pool)} windows of {options.windows.length} tokens left "
                f"for the {role} text, {count} are asked for: lower texts.windows.{role} or "
                "texts.windows.length, or give more text"
            )
        if role == "test":
            drawn[role], pools[sources[role]] = pool[:count], pool[count:]
        else:
            random.Random(f"{seed}/{role}").shuffle(pool)
            drawn[role], pools[sources[role]] = pool[:count], pool[count:]
    _refuse_shared(drawn, sources)
    tensors = {role: torch.tensor(drawn[role], dtype=torch.int64) for role in drawn}
    return Windows(
        calibration=tensors["calibration"],
        guard=tensors["guard"],
        test=tensors["test"],
        hashes={role: hash_windows(t) for role, t in sorted(tensors.items())},
        sources=sources,
    )


def load_test_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> Tensor:
    """The first ``count`` windows [count, length] of a source's test text.

    Raises:
        InputError: missing, unreadable or too short.
    """
    label, documents = _open(source, "test")
    pool = pack(documents, tokenizer, length)
    if len(pool) < count:
        raise InputError(
            f"{label} has {len(pool)} windows of {length} tokens, {count} are asked for"
        )
    return torch.tensor(pool[:count], dtype=torch.int64)


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[list[int]]:
    """Join documents with blank lines, tokenize once, cut into windows; the tail is dropped.

    A tokenizer that begins a text with a token of its own (Llama's BOS) gets it at the start
    of every window, inside ``length``: such models expect it.
    """
    text = "\n\n".join(documents)
    start: list[int] = list(tokenizer("").input_ids)
    end = getattr(tokenizer, "eos_token_id", None)
    if start and start[-1] == end and len(start) > 1:
        start = start[:-1]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    body = length - len(start)
    return [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


def hash_windows(windows: Tensor) -> str:
    """sha256 of the token ids."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _source(options: TextOptions, role: Role) -> str:
    if role == "guard":
        return options.guard or options.calibration
    return options.calibration if role == "calibration" else options.test


def _refuse_shared(drawn: dict[str, list[list[int]]], sources: dict[str, str]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for role, windows in drawn.items():
        for window in windows:
            other = seen.setdefault(tuple(window), role)
            if other != role:
                raise InputError(
                    f"the {role} text ({sources[role]}) holds a window that the {other} text "
                    f"({sources[other]}) holds too: name the same source for both, so that they "
                    "are kept apart, or give different texts"
                )


def _open(source: str, role: Role) -> tuple[str, Iterator[str]]:
    """A label that is equal for equal texts, and the documents."""
    if source == EMBEDDED:
        return f"embedded[{role}]", _limited(_embedded_documents(role))
    path = Path(source).expanduser()
    if path.name.endswith(_SUFFIXES) or path.exists():
        if not path.is_file():
            raise InputError(f"the {role} text {source} is not a file")
        return str(path.resolve()), _limited(_file_documents(path))
    if source.startswith((".", "/", "~")):
        raise InputError(f"the {role} text {source} does not exist")
    return _hub_documents(source, role)


def _limited(documents: Iterable[str]) -> Iterator[str]:
    size = 0
    for document in documents:
        yield document
        size += len(document)
        if size > _POOL_CHARACTERS:
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
                yield from (
                    str(value) for value in batch.column(0).to_pylist() if value is not None
                )
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            opener = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    row = json.loads(line) if line.strip() else {"text": ""}
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise InputError(f"{path}, line {number}: no field 'text' that is a string")
                    yield row["text"]
        else:
            yield path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        # ArrowInvalid, JSONDecodeError and UnicodeDecodeError are ValueErrors.
        raise InputError(f"cannot read the text {path}: {error}") from error


def _hub_documents(source: str, role: Role) -> tuple[str, Iterator[str]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
        split = next((s for s in _HUB_SPLITS[role] if s in splits), None)
        if split is None:
            raise InputError(
                f"the data set {source} has none of the splits {', '.join(_HUB_SPLITS[role])}, "
                f"only {', '.join(splits)}"
            )
        data = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"the {role} text {source} is neither a local file nor could be loaded as a hub data "
            f"set: {str(error).splitlines()[0]}"
        ) from error
    features = list(data.features or {})
    if features and "text" not in features:
        raise InputError(f"the data set {source} has no field 'text', only {', '.join(features)}")
    return f"{source}[{split}]", _limited(str(row["text"]) for row in data)
