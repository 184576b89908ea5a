"""Lossless archives of pruned models: masks apart from values, exponents apart from mantissas.

An archive is one file: `MAGIC`; then for each file of the model its name, its size, its pieces and
its sha256; then an empty name and the sha256 of all that came before. A piece holds some values:
how many of how many bytes; one bit a value, set where it is not zero, if many are zero; and the
values that are left, their bits rotated by one so that the sign comes last, as planes of their
first bytes, second bytes and so on. Exponents are alike and mantissas are noise: apart, zstd finds
what the first plane repeats. -0.0 has a bit set, so it is kept.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zstandard
from safetensors import SafetensorError, safe_open

from prunewright.state import InputError, StoreError
from prunewright.tools.store.storage import appearing

MAGIC = b"PWPACK2\n"
PIECE = 2**20
"""Values handled at a time: what bounds the memory."""
_PART = struct.Struct("<BII")  # bytes of a value, values, bytes of the mask
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# zstd's best parser with its shortest search: planes have symbols to count and little to find. The
# demo's exponents take 22.6 MB so, 26.5 at level 1, in a fortieth of the time of level 19.
_SEARCH = {"search_log": 1, "min_match": 3, "window_log": 17, "target_length": 8}
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    16, strategy=zstandard.STRATEGY_BTULTRA2, **_SEARCH
)
_PLANES = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
_TEXT = zstandard.ZstdCompressor(level=19)


@dataclass(frozen=True)
class Sizes:
    """Bytes of all files of the model, and of the archive."""

    model: int
    archive: int


def pack_model(model: str | Path, archive: str | Path) -> Sizes:
    """Pack a model's directory into one file, which appears whole or not at all.

    Raises:
        InputError: no such model, or the archive's place is taken.
        StoreError: a weight file is damaged, or the archive cannot be written.
    """
    source, total = Path(model), 0
    if not source.is_dir():
        raise InputError(f"{source} is not a directory: give a model's or a run's")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError(f"{source} holds no *.safetensors weights: is it a model directory?")
    with appearing(Path(archive)) as target, target.open("xb") as file:
        out = _Hashed(file.write)
        out.move(MAGIC)
        for path in paths:
            name, size = path.relative_to(source).as_posix().encode(), path.stat().st_size
            out.move(struct.pack("<HQ", len(name), size) + name)
            with path.open("rb") as stream:
                data = _Hashed(stream.read)
                for width, count in _runs(path):
                    for start in range(0, count, PIECE):
                        piece = data.move(min(PIECE, count - start) * width)
                        out.move(_packed(piece, width))
                if data.bytes != size:
                    raise StoreError(f"{path} has changed while it was read")
            out.move(data.hash.digest())
            total += size
        out.move(struct.pack("<HQ", 0, 0))
        file.write(out.hash.digest())
        return Sizes(total, file.tell())


def unpack_model(archive: str | Path, model: str | Path) -> Sizes:
    """Bring back the model's directory, new or empty, every file byte for byte.

    Args:
        archive: file that `pack_model` wrote; not trusted.
        model: the directory, which appears whole or not at all.

    Raises:
        InputError: no archive there, or the model's place is taken.
        StoreError: the archive is damaged, or the model cannot be written.
    """
    source, total = Path(archive), 0
    if not source.is_file():
        raise InputError(f"{source} is not a file: give an archive that prunewright pack wrote")
    with source.open("rb") as file, appearing(Path(model), directory=True) as target:
        data = _Hashed(file.read)
        if data.move(len(MAGIC)) != MAGIC:
            raise InputError(f"{source} is no archive of this version of prunewright pack")
        try:
            while (header := struct.unpack("<HQ", data.move(10))) != (0, 0):
                path = target / _inside(data.move(header[0]).decode())
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as stream:
                    out = _Hashed(stream.write)
                    while out.bytes < header[1]:
                        out.move(_unpacked(data))
                if out.bytes != header[1] or data.move(32) != out.hash.digest():
                    raise ValueError(f"it does not restore {path.name}")
                total += out.bytes
            digest = data.hash.digest()
            if file.read() != digest:
                raise ValueError("its content does not match its hash")
        except (ValueError, struct.error, zstandard.ZstdError, FileExistsError) as error:
            raise StoreError(f"{source} is damaged: {error}") from error
    return Sizes(total, source.stat().st_size)


class _Hashed:
    """Reads or writes, and keeps count and hash of what went through."""

    def __init__(self, act: Callable[[Any], Any]) -> None:
        self._act, self.hash, self.bytes = act, hashlib.sha256(), 0

    def move(self, what: bytes | int) -> bytes:
        """Write some bytes, or read a number of them."""
        found = self._act(what)
        data: bytes = found if isinstance(what, int) else what
        self.hash.update(data)
        self.bytes += len(data)
        return data


def _packed(piece: bytes, width: int) -> bytes:
    """One piece: numbers, mask, planes, each compressed by itself."""
    values, mask = np.frombuffer(piece, _INTEGERS[width]), b""
    count = len(values)
    if width > 1:
        left = values != 0
        if count - np.count_nonzero(left) > count / 8:
            mask, values = _PLANES.compress(np.packbits(left).tobytes()), values[left]
        values = values << 1 | values >> (8 * width - 1)
    planes = values.view(np.uint8).reshape(-1, width).T
    compressor = _PLANES if width > 1 else _TEXT
    parts = [compressor.compress(plane.tobytes()) for plane in planes]
    numbers = _PART.pack(width, count, len(mask)) + struct.pack(f"<{width}I", *map(len, parts))
    return b"".join([numbers, mask, *parts])


def _unpacked(data: _Hashed) -> bytes:
    """The next piece of an archive; its numbers are bounds before they are believed."""
    width, count, mask = _PART.unpack(data.move(_PART.size))
    if width not in _INTEGERS or not 0 < count <= PIECE:
        raise ValueError("a piece has other numbers than were ever written")
    sizes = struct.unpack(f"<{width}I", data.move(4 * width))

    def part(size: int, most: int) -> bytes:
        block = data.move(size) if size <= 2 * PIECE + 64 else b""
        if zstandard.frame_content_size(block) > most:
            raise ValueError("a part is larger than its piece")
        return zstandard.decompress(block, max_output_size=most)

    bits = np.frombuffer(part(mask, (count + 7) // 8), np.uint8) if mask else None
    planes = [np.frombuffer(part(size, count), np.uint8) for size in sizes]
    values = np.stack(planes, axis=1).reshape(-1).view(_INTEGERS[width])
    if width > 1:
        values = values >> 1 | values << (8 * width - 1)
    if bits is not None:
        left = np.unpackbits(bits, count=count).astype(bool)
        spread = np.zeros(count, _INTEGERS[width])
        spread[left] = values
        values = spread
    if len(values) != count:
        raise ValueError("a mask and its values do not fit")
    return values.tobytes()


def _runs(path: Path) -> Iterator[tuple[int, int]]:
    """What a file is made of, in order: bytes of a value, and how many values."""
    if path.suffix != ".safetensors":
        yield 1, path.stat().st_size
        return
    try:
        # The library checks the whole: JSON, dtypes, shapes, and that the data has no hole.
        with safe_open(path, framework="np"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is not a whole safetensors file: {error}") from error
    table.pop("__metadata__", None)
    yield 1, 8 + length
    for start, end, dtype in sorted((*t["data_offsets"], t["dtype"]) for t in table.values()):
        width = _WIDTHS.get(dtype, 1)
        yield width, (end - start) // width


def _inside(name: str) -> PurePosixPath:
    """A path of an archive, which must stay inside the model's directory."""
    path = PurePosixPath(name)
    if str(path) != name or ".." in path.parts or path.is_absolute() or set(name) & set("\\:\0"):
        raise ValueError(f"it names {name[:80]!r}, which no file of a model is called")
    return path
