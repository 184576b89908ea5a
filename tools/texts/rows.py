"""What a file holds, by its content: rows with fields (JSON, CSV, Parquet), or plain text.

A suffix says what a file should be; where it says nothing, or plain text, its content decides. What
is neither text nor rows is refused, never read as if it were.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from prunewright.state import InputError

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_BLOCK = 2**20
_HEAD = 2**16
_LONGEST = 2**28
"""Characters of one JSON value or CSV field, so that a broken file does not fill the memory."""
_BATCH = 1024
"""Rows of a Parquet file that are held at once."""
_SAID = 40
"""Characters of a field's name that a message shows."""

_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as that of UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_OTHERS = {
    b"PK\x03\x04": "a zip archive (or an office document)",
    b"%PDF": "a PDF document",
    b"ARROW1": "an Arrow file: save it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: save it as Parquet",
    b"SQLite format 3": "an SQLite database",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "compressed by lz4: decompress it",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"<?xml": "XML",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
}
_BLANK = " \t\n\ufeff"
_BLANKS = re.compile(f"[{_BLANK}]*")
_DECODER = json.JSONDecoder()
# An object with a field begins so, alone or in a list; with ' it is what Python prints, which JSON
# refuses. A list of strings is no row either.
_JSON = re.compile(r"""\s*(?:\[\s*)?\{\s*["'][^\n]*?["']\s*:|\s*\[\s*"[^"\n]*"\s*[],]""")


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        place: where it begins, ``line 3`` of the file or ``row 3``.
        value: an object with fields, if the file is as it should be.
    """

    place: str
    value: Any


class Content(NamedTuple):
    """What a file holds; one of the two is None.

    Attributes:
        rows: its rows.
        text: its text, in parts.
    """

    rows: Iterator[Row] | None
    text: Iterator[str] | None


def is_file_name(name: str) -> bool:
    """Whether a name ends as that of a local file does."""
    return name.lower().endswith((".txt", ".md", *ROW_SUFFIXES, *COMPRESSED_SUFFIXES))


def fields_of(row: dict[Any, Any]) -> str:
    """The names of a row's fields for a message."""
    names = [str(name)[:_SAID] for name in row]
    shown = ", ".join(n if n == n.strip() and n.isprintable() else repr(n) for n in names[:12])
    return shown + ", ..." * (len(names) > 12) or "none"


def read_file(
    path: Path, what: str, marks: Collection[str], columns: list[str] | None = None
) -> Content:
    """What a local file holds.

    Args:
        path: a file; compressed by gzip, bzip2, xz or zst, or not.
        what: what it is called in messages, such as ``questions``.
        marks: fields that a row has, one or the other. A JSON file that is one object without
            any of them is taken for an object of rows.
        columns: those that are wanted of a Parquet file; None, or where one is missing, takes all.

    Raises:
        InputError: it is unreadable, or neither text nor rows. The rows and the text raise it,
            too, naming the line: what is broken, not UTF-8, or no row.
    """
    with _readable(path, what), ExitStack() as stack:
        stream = stack.enter_context(_open(path, what))
        head = _read(stream, _HEAD)
        _refuse_others(path, what, head)
        kind = _suffix(path)
        if head.startswith(b"PAR1"):
            return Content(_parquet_rows(path, what, marks, columns), None)
        if kind == ".parquet":
            raise InputError(f"cannot read the {what} {path}: it is no Parquet file")
        encoding, mark = next(
            ((name, bom) for bom, name in _BOMS.items() if head.startswith(bom)), ("utf-8", b"")
        )
        head = head.removeprefix(mark)
        sample = re.sub("\r\n?", "\n", head.decode(encoding, "replace")).lstrip(_BLANK)
        stack.pop_all()  # from here on the text owns the file
        text = _characters(path, what, stream, head, encoding)
        delimiter = _delimiter(sample, marks)
        if kind in (".csv", ".tsv") or (kind not in ROW_SUFFIXES and delimiter):
            usual = "\t" if kind == ".tsv" else ","
            return Content(_csv_rows(path, text, delimiter or usual, marks), None)
        if kind in ROW_SUFFIXES or _is_json(sample):
            return Content(_json_rows(path, text, marks), None)
        return Content(None, text)


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Words for whatever the readers raise."""
    try:
        yield
    # ArrowInvalid is a ValueError; a compressed file that is cut ends in EOFError; what a Parquet
    # reader does not know is NotImplementedError.
    except (
        OSError,
        ValueError,
        EOFError,
        RecursionError,
        NotImplementedError,
        zlib.error,
        lzma.LZMAError,
        csv.Error,
    ) as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot read the {what} {path}: {words}") from error


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of the compression."""
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _open(path: Path, what: str) -> IO[bytes]:
    """The file's bytes, decompressed by what it begins with."""
    with path.open("rb") as file:
        kind = _compression(file.read(16))
    if kind is None and path.name.lower().endswith(COMPRESSED_SUFFIXES):
        raise InputError(
            f"cannot read the {what} {path}: it is not compressed as its name says, or damaged"
        )
    if kind == "zst":
        import pyarrow

        opened: IO[bytes] = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return opened
    opener: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}.get(kind or "", open)
    return opener(path, "rb")  # type: ignore[no-any-return]


def _compression(head: bytes) -> str | None:
    return next((kind for kind, magic in _COMPRESSED.items() if magic.match(head)), None)


def _read(stream: IO[bytes], size: int) -> bytes:
    """Some bytes; fewer only at the end, whatever one call gives."""
    found = b""
    while len(found) < size and (block := stream.read(size - len(found))):
        found += block
    return found


def _refuse_others(path: Path, what: str, head: bytes) -> None:
    """Refuse what is neither text nor Parquet."""
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    found = next((name for magic, name in _OTHERS.items() if begins.startswith(magic.lower())), "")
    if kind := _compression(head):
        found = f"compressed twice ({kind})"
    elif head[257:262] == b"ustar":
        found = "a tar archive"
    if found:
        raise InputError(f"cannot read the {what} {path}: it is {found}, not text or rows")


def _characters(
    path: Path, what: str, stream: IO[bytes], head: bytes, encoding: str
) -> Iterator[str]:
    """The decoded text in parts; all line ends are ``\\n``.

    Raises:
        InputError: a byte is of another encoding, or the text holds NUL; names the line.
    """
    plain = codecs.getincrementaldecoder(encoding)()
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)
    line, block = 1, head
    with _readable(path, what), stream:
        while True:
            try:
                part = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, "replace")
                line += len(re.findall("\r\n?|\n", before))
                raise InputError(
                    f"cannot read the {what} {path}: line {line} is not {encoding.upper()} "
                    f"({error.reason}): save the file as UTF-8"
                ) from error
            if "\0" in part:
                line += part[: part.index("\0")].count("\n")
                raise InputError(
                    f"cannot read the {what} {path}: line {line} holds a NUL character: it is "
                    "binary, or UTF-16 without a byte order mark"
                )
            line += part.count("\n")
            yield part
            if not block:
                return
            block = stream.read(_BLOCK)


def _is_json(sample: str) -> bool:
    """Whether a text begins with an object that has fields, or most of its lines do."""
    if _JSON.match(sample):
        return True
    lines = [line for line in sample.split("\n") if line.strip()]
    return 2 * sum(bool(_JSON.match(line)) for line in lines) > len(lines)


def _delimiter(sample: str, marks: Collection[str]) -> str | None:
    """What parts the fields of a table whose first line names a column that is wanted."""
    first = sample.partition("\n")[0]
    for delimiter in ",\t;|":
        names = next(csv.reader([first], delimiter=delimiter), [])
        if len(names) > 1 and any(mark in names for mark in marks):
            return delimiter
    return None


def _csv_rows(
    path: Path, text: Iterator[str], delimiter: str, marks: Collection[str]
) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    names: list[str] = []
    begin = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}, line {begin}: no row of a table: {error}") from error
        place, begin = f"line {begin}", reader.line_num + 1
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = cells
            _check_columns(path, names, marks)
        elif len(cells) != len(names):
            raise InputError(
                f"{path}, {place}: {len(cells)} fields, where the first line names {len(names)}"
            )
        else:
            yield Row(place, dict(zip(names, cells, strict=True)))


def _lines(text: Iterator[str]) -> Iterator[str]:
    """Lines with their ends, which are ``\\n`` alone."""
    rest = ""
    for part in text:
        *whole, rest = (rest + part).split("\n")
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest


def _check_columns(path: Path, names: list[str], marks: Collection[str]) -> None:
    found = [name for name in names if name in marks]
    if not found:
        wanted = " or ".join(map(repr, marks))
        raise InputError(f"{path} has no column {wanted}, only {fields_of(dict.fromkeys(names))}")
    if len(found) > len(set(found)):
        raise InputError(f"{path} has two columns {found[0]!r}")


def _parquet_rows(
    path: Path, what: str, marks: Collection[str], columns: list[str] | None
) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    with _readable(path, what), ExitStack() as stack:
        stream = stack.enter_context(_open(path, what))
        if not isinstance(stream, io.BufferedReader):  # a Parquet file is read from its end
            whole = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, whole)
            stream = whole
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        _check_columns(path, names, marks)
        if not {*(columns or ())} <= {*names}:
            columns = None
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value)


def _json_rows(path: Path, text: Iterator[str], marks: Collection[str]) -> Iterator[Row]:
    """Objects one after the other, or in one list; or one object that holds them."""
    values = _Values(path, text)
    if values.next_character() == "[":
        yield from _list_rows(values)
        return
    alone = True
    while values.next_character():
        row = Row(f"line {values.line}", values.value())
        alone = alone and isinstance(row.value, dict) and not any(m in row.value for m in marks)
        if alone and not values.next_character() and (held := _held_rows(row.value)) is not None:
            yield from held
        else:
            yield row
        alone = False


def _list_rows(values: "_Values") -> Iterator[Row]:
    values.skip()
    while (following := values.next_character()) != "]":
        yield Row(f"line {values.line}", values.value())
        following = values.next_character()
        if following == ",":
            values.skip()
        elif following != "]":
            raise values.refused("expecting ',' or ']' after a row", values.line)
    values.skip()
    if values.next_character():
        raise values.refused("something follows the list of rows", values.line)


def _held_rows(value: dict[str, Any]) -> list[Row] | None:
    """The rows in an object: those of the one list of objects that it has, or its own values."""
    lists = {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    }
    if len(lists) == 1:
        ((name, rows),) = lists.items()
        return [Row(f"{name[:_SAID]}, row {number}", row) for number, row in enumerate(rows, 1)]
    if value and all(isinstance(row, dict) for row in value.values()):
        return [Row(f"field {name[:_SAID]}", row) for name, row in value.items()]
    return None


class _Values:
    """The JSON values of a text that comes in parts.

    Attributes:
        line: where what comes next begins.
    """

    def __init__(self, path: Path, text: Iterator[str]) -> None:
        self.line = 1
        self._path = path
        self._text = text
        self._buffer = ""
        self._at = 0

    def next_character(self) -> str:
        """The next that is not blank; empty at the end."""
        while True:
            blank = _BLANKS.match(self._buffer, self._at)
            assert blank is not None
            self._go_to(blank.end())
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Go on by a character that is no line end."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            InputError: there is none.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - 16
                if not (cut and len(self._buffer) - self._at < _LONGEST and self._more()):
                    line = self.line + self._buffer.count("\n", self._at, error.pos)
                    raise self.refused(error.msg, line) from error
            except (ValueError, RecursionError) as error:  # a number, or a nesting, without end
                raise self.refused(str(error), self.line) from error
            else:
                # A number that ends with the part may go on in the next.
                closed = end < len(self._buffer) or isinstance(value, str | list | dict)
                if closed or not self._more():
                    self._go_to(end)
                    return value

    def refused(self, words: str, line: int) -> InputError:
        """What is wrong with what begins here, and in which line it shows."""
        shown = f" (in line {line})" * (line > self.line)
        return InputError(
            f"{self._path}, line {self.line}: no JSON, though the file begins as JSON or is named "
            f"so: {words}{shown}"
        )

    def _go_to(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._at, position)
        self._at = position

    def _more(self) -> bool:
        """Take in as much again as is left, so that a long value is not parsed too often."""
        parts = [self._buffer[self._at :]]
        wanted, found = len(parts[0]), 0
        while found <= wanted and (part := next(self._text, None)) is not None:
            parts.append(part)
            found += len(part)
        self._buffer, self._at = "".join(parts), 0
        return found > 0
