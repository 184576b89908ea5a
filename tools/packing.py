"""Lossless archives of pruned models: a bit for each weight, and the weights that are not zero.

An archive is a directory. Each safetensors file of the model becomes ``NAME.packed.safetensors``,
which holds for each tensor T either ``whole/T``, its bytes, or ``mask/T`` (one bit a value, the
first value highest, set where its bits are not all zero) and ``kept/T`` (those values, in order);
and ``header``, the original file's own header, so that the file itself comes back byte for byte.
All other files stand beside them as they are; ``prunewright-archive.json`` has the hash of each.
-0.0 has a bit set, so it is kept. Files are read and written a piece at a time.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from prunewright.state import InputError, StoreError
from prunewright.state.config import problem_words
from prunewright.tools.storage import canonical_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from prunewright.tools.perplexity import Progress  # which would bring torch

MANIFEST = "prunewright-archive.json"
PIECE = 2**20
"""Values handled at a time; whole bytes of a mask."""

# Bytes of one value; what is not here, such as four-bit floats, is stored whole.
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_Values = NDArray[Any]
_SHA256 = Field(pattern=r"^[0-9a-f]{64}$")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredFile(_Model):
    """One file of the model and what stands for it in the archive.

    Attributes:
        path: in the model's directory, with slashes.
        bytes: its size.
        sha256: its hash.
        packed_bytes: the size of the packed file; None: it is stored as it is.
        packed_sha256: the hash of the packed file.
    """

    path: str
    bytes: int = Field(ge=0)
    sha256: str = _SHA256
    packed_bytes: int | None = Field(None, ge=0)
    packed_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @property
    def stored(self) -> str:
        """The path in the archive."""
        return self.path if self.packed_sha256 is None else _packed_name(self.path)


class ArchiveManifest(_Model):
    """What an archive holds."""

    format: int = Field(1, ge=1, le=1)
    files: list[StoredFile]


@dataclass(frozen=True)
class Sizes:
    """Bytes before and after.

    Attributes:
        model: of all files of the model.
        archive: of all files of the archive, but for its manifest.
        pruned: of the tensors that masks were made of.
        packed: of their masks and kept values.
    """

    model: int
    archive: int
    pruned: int = 0
    packed: int = 0


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int

    @property
    def width(self) -> int:
        """Bytes of one value; 0: not a whole number of bytes."""
        return _WIDTHS.get(self.dtype, 0)


def pack_model(model: str | Path, archive: str | Path, progress: "Progress | None" = None) -> Sizes:
    """Pack a model's directory.

    Args:
        model: directory with safetensors weights.
        archive: the archive's directory, new or empty. It appears whole or not at all.
        progress: told after each tensor.

    Raises:
        InputError: no such model, an archive already, or the archive's place is taken.
        StoreError: a weight file is damaged, or the archive cannot be written.
    """
    source = Path(model)
    if not source.is_dir():
        raise InputError(f"{source} is not a directory: give a model's or a run's")
    if (source / MANIFEST).exists():
        raise InputError(f"{source} is an archive already: unpack it with prunewright unpack")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError(f"{source} holds no *.safetensors weights: is it a model directory?")
    pruned = packed = 0
    files = []
    with _new_directory(Path(archive)) as target:
        for path in paths:
            name = path.relative_to(source).as_posix()
            entry = StoredFile(path=name, bytes=path.stat().st_size, sha256=sha256_file(path))
            if path.suffix == ".safetensors":
                written = target / _packed_name(name)
                written.parent.mkdir(parents=True, exist_ok=True)
                before, after = _pack_file(path, written, progress)
                pruned, packed = pruned + before, packed + after
                entry = entry.model_copy(
                    update={
                        "packed_bytes": written.stat().st_size,
                        "packed_sha256": sha256_file(written),
                    }
                )
            else:
                _copy(path, target / name)
            files.append(entry)
        manifest = ArchiveManifest(files=files).model_dump(mode="json")
        content = manifest | {"sha256": sha256_bytes(canonical_json(manifest))}
        (target / MANIFEST).write_bytes(canonical_json(content))
    return Sizes(*_totals(files), pruned, packed)


def unpack_model(
    archive: str | Path, model: str | Path, progress: "Progress | None" = None
) -> Sizes:
    """Bring back the model's directory, every file byte for byte, and check each against its hash.

    Args:
        archive: directory that `pack_model` wrote; not trusted.
        model: the model's directory, new or empty. It appears whole or not at all.
        progress: told after each tensor.

    Raises:
        InputError: no archive there, or the model's place is taken.
        StoreError: the archive is damaged, or the model cannot be written.
    """
    source = Path(archive)
    manifest = _read_manifest(source)
    with _new_directory(Path(model)) as target:
        for entry in manifest.files:
            stored, written = source / entry.stored, target / entry.path
            size = entry.bytes if entry.packed_bytes is None else entry.packed_bytes
            if not stored.is_file():
                raise StoreError(f"{source} is damaged: {entry.stored} is missing")
            if stored.stat().st_size != size:
                raise StoreError(
                    f"{stored} is damaged: it has {stored.stat().st_size:,} bytes, not {size:,}"
                )
            if sha256_file(stored) != (entry.packed_sha256 or entry.sha256):
                raise StoreError(f"{stored} is damaged: its content does not match its hash")
            if entry.packed_sha256 is None:
                _copy(stored, written)
            else:
                written.parent.mkdir(parents=True, exist_ok=True)
                _unpack_file(stored, written, entry, progress)
            if sha256_file(written) != entry.sha256:
                raise StoreError(f"{stored} is damaged: it does not give back {entry.path}")
    return Sizes(*_totals(manifest.files))


def _packed_name(path: str) -> str:
    """Another name than the original's, so that no loader takes the one for the other."""
    return path.removesuffix(".safetensors") + ".packed.safetensors"


def _totals(files: list[StoredFile]) -> tuple[int, int]:
    after = (file.bytes if file.packed_bytes is None else file.packed_bytes for file in files)
    return sum(file.bytes for file in files), sum(after)


def _read_manifest(source: Path) -> ArchiveManifest:
    """An archive's manifest, its paths checked.

    Raises:
        InputError: there is none.
        StoreError: damaged, or a path leads out of the directory.
    """
    path = source / MANIFEST
    if not path.is_file():
        raise InputError(f"{source} is no archive: it has no {MANIFEST}")
    try:
        data = path.read_bytes()
        content = json.loads(data)
        digest = content.pop("sha256")
        whole = canonical_json(content | {"sha256": digest}) == data
        if not whole or sha256_bytes(canonical_json(content)) != digest:
            raise StoreError(f"{path} is damaged: its content does not match its hash")
        manifest = ArchiveManifest.model_validate(content)
    except ValidationError as error:
        raise StoreError(f"{path} is damaged: {problem_words(error, 'it', 3)}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    seen = {MANIFEST}
    for entry in manifest.files:
        for name in {entry.path, entry.stored}:
            parts = PurePosixPath(name).parts
            if (
                not parts
                or name != "/".join(parts)
                or any(part in ("..", "/") or set(part) & set("\\:\0") for part in parts)
            ):
                raise StoreError(f"{path} names {name[:80]!r}, which no file of a model is called")
        if entry.path in seen:
            raise StoreError(f"{path} names {entry.path[:80]!r} twice")
        seen.add(entry.path)
    return manifest


def _pack_file(source: Path, target: Path, progress: "Progress | None") -> tuple[int, int]:
    """Pack one safetensors file; bytes of the tensors with masks, before and after."""
    header, tensors = _read_header(source)
    before = after = 0
    # What stands in the packed file: key, dtype, shape, bytes; and which of it is whose.
    parts: list[tuple[str, str, list[int], int]] = [("header", "U8", [len(header)], len(header))]
    masked: set[str] = set()
    with source.open("rb") as file:
        for tensor in tensors:
            size = tensor.end - tensor.start
            count = size // tensor.width if tensor.width else 0
            file.seek(tensor.start)
            kept = sum(int(np.count_nonzero(v)) for v in _pieces(file, count, tensor.width))
            mask = (count + 7) // 8
            if mask + kept * tensor.width < size:
                masked.add(tensor.name)
                before, after = before + size, after + mask + kept * tensor.width
                parts.append((f"mask/{tensor.name}", "U8", [mask], mask))
                parts.append((f"kept/{tensor.name}", tensor.dtype, [kept], kept * tensor.width))
            else:
                parts.append((f"whole/{tensor.name}", tensor.dtype, tensor.shape, size))
        # Wide values first, so that each begins at a multiple of its width.
        parts.sort(key=lambda part: -_WIDTHS.get(part[1], 0))
        places: dict[str, int] = {}
        table: dict[str, Any] = {"__metadata__": {"format": "prunewright-packed-1"}}
        place = 0
        for key, dtype, shape, size in parts:
            table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
            places[key] = place
            place += size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        with target.open("xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.seek(base + places["header"])
            out.write(header)
            for index, tensor in enumerate(tensors):
                file.seek(tensor.start)
                if tensor.name in masked:
                    bits_at = base + places[f"mask/{tensor.name}"]
                    kept_at = base + places[f"kept/{tensor.name}"]
                    count = (tensor.end - tensor.start) // tensor.width
                    for values in _pieces(file, count, tensor.width):
                        bits = np.packbits(values != 0)
                        chosen = values[values != 0]
                        out.seek(bits_at)
                        out.write(bits.tobytes())
                        out.seek(kept_at)
                        out.write(chosen.tobytes())
                        bits_at, kept_at = bits_at + bits.nbytes, kept_at + chosen.nbytes
                else:
                    out.seek(base + places[f"whole/{tensor.name}"])
                    _transfer(file, out.write, tensor.end - tensor.start)
                if progress is not None:
                    progress(f"packing {source.name}", index + 1, len(tensors))
            out.truncate(base + place)
    return before, after


def _unpack_file(
    source: Path, target: Path, entry: StoredFile, progress: "Progress | None"
) -> None:
    """Write the original file of a packed one.

    Raises:
        StoreError: what it holds does not fit together.
    """
    _, found = _read_header(source)
    parts = {part.name: part for part in found}

    def part(key: str, dtype: str, size: int) -> _Tensor:
        if key not in parts or (parts[key].dtype, parts[key].end - parts[key].start) != (
            dtype,
            size,
        ):
            raise StoreError(f"{source} is damaged: {key[:80]!r} is missing or of another size")
        return parts[key]

    if "header" not in parts or parts["header"].end - parts["header"].start > entry.bytes:
        raise StoreError(f"{source} is damaged: it has no original header")
    with source.open("rb") as file, source.open("rb") as other, target.open("xb") as out:
        file.seek(parts["header"].start)
        header = file.read(parts["header"].end - parts["header"].start)
        out.write(header)
        tensors = _parse_header(header, source)
        if max((tensor.end for tensor in tensors), default=len(header)) != entry.bytes:
            raise StoreError(f"{source} is damaged: its original header names other sizes")
        for index, tensor in enumerate(tensors):
            size = tensor.end - tensor.start
            if f"whole/{tensor.name}" in parts:
                file.seek(part(f"whole/{tensor.name}", tensor.dtype, size).start)
                _transfer(file, out.write, size)
            else:
                count = size // tensor.width if tensor.width else 0
                mask = part(f"mask/{tensor.name}", "U8", (count + 7) // 8)
                kept = parts.get(f"kept/{tensor.name}")
                file.seek(mask.start)
                other.seek(kept.start if kept is not None else 0)
                left = kept.end - kept.start if kept is not None else -1
                for start in range(0, count, PIECE):
                    bits = np.frombuffer(
                        file.read((min(PIECE, count - start) + 7) // 8), dtype=np.uint8
                    )
                    chosen = np.unpackbits(bits, count=min(PIECE, count - start)).astype(bool)
                    values = np.zeros(len(chosen), dtype=_INTEGERS[tensor.width])
                    wanted = int(chosen.sum()) * tensor.width
                    left -= wanted
                    if left < 0:
                        break
                    values[chosen] = np.frombuffer(other.read(wanted), dtype=values.dtype)
                    out.write(values.tobytes())
                if left != 0:
                    raise StoreError(
                        f"{source} is damaged: the mask and the kept values of "
                        f"{tensor.name[:80]!r} do not fit"
                    )
            if progress is not None:
                progress(f"unpacking {target.name}", index + 1, len(tensors))


def _pieces(file: IO[bytes], count: int, width: int) -> Iterator[_Values]:
    """Some values from where a file stands, as integers of their width, `PIECE` at a time."""
    for start in range(0, count, PIECE):
        data = file.read(min(PIECE, count - start) * width)
        yield np.frombuffer(data, dtype=_INTEGERS[width])


def _transfer(file: IO[bytes], write: Callable[[bytes], int], size: int) -> None:
    while size > 0:
        data = file.read(min(size, PIECE))
        if not data:
            raise StoreError(f"{file.name} ends too early: it has changed while it was read")
        write(data)
        size -= len(data)


def _read_header(path: Path) -> tuple[bytes, list[_Tensor]]:
    """The header of a safetensors file, its length included, and its tensors in their order.

    Raises:
        StoreError: not a whole safetensors file.
    """
    try:
        # The library checks the whole: JSON, dtypes, shapes, and that the data has no hole.
        with safe_open(path, framework="np"), path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is not a whole safetensors file: {error}") from error
    return header, _parse_header(header, path)


def _parse_header(header: bytes, path: Path) -> list[_Tensor]:
    """The tensors that a header names, in the order of their data.

    Raises:
        StoreError: it is not the header of a safetensors file.
    """
    try:
        if int.from_bytes(header[:8], "little") != len(header) - 8:
            raise ValueError("its length is another")
        table = json.loads(header[8:])
        table.pop("__metadata__", None)
        tensors = [
            _Tensor(
                str(name),
                str(item["dtype"]),
                [int(n) for n in item["shape"]],
                *(len(header) + int(offset) for offset in item["data_offsets"]),
            )
            for name, item in table.items()
        ]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        place = len(header)
        for tensor in tensors:
            size = tensor.end - tensor.start
            if tensor.start != place or size < 0 or (tensor.width and size % tensor.width):
                raise ValueError(f"the data of {tensor.name[:80]!r} is out of place")
            place = tensor.end
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: its header cannot be read: {error}") from error
    return tensors


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """A directory that appears under its name only once the block has ended well.

    Raises:
        InputError: something is there.
        StoreError: it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not empty: give another place")
    scratch = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for written in scratch.rglob("*"):
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        if path.exists():
            path.rmdir()
        scratch.rename(path)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left there: free some "
            "space or mend the permissions, then try again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
