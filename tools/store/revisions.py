"""The store of revisions: immutable, content-addressed masks of a pruned model.

A revision is a manifest ``{layer: digest}``; a digest names one file, the layer's mask with one
bit a weight and, where the kept weights are no longer the dense ones (SparseGPT, reconstruction),
their values. The manifest's own hash is the revision's name, so equal masks have equal names
wherever they were made, equal layers are stored once, and nothing is ever altered.
"""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from prunewright.state import StoreError
from prunewright.state.run import DENSE
from prunewright.tools.fast import count_bits, pack_bits, unpack_bits
from prunewright.tools.store.storage import (
    canonical_json,
    put_into_words,
    read_json,
    sha256_bytes,
    sha256_file,
    share,
    stamp,
    write_atomic,
)

_log = logging.getLogger("prunewright")

WRITERS = 4
"""Files of a revision that are written at once: each is forced to the disk, and side by side they
wait for it together."""

Manifest = dict[str, str]
"""Digest of the mask of each layer that has one."""


@dataclass(frozen=True)
class StoredLayer:
    """What a revision holds of a layer.

    Attributes:
        bits: its mask, packed by `pack_bits`.
        kept: values of the weights that are left, in the parameter's order; None: the dense ones.
    """

    bits: Tensor
    kept: Tensor | None = None


class RevisionWriter:
    """Makes a revision layer by layer: a layer is hashed and written beside the next one's work.

    The block in which it is used ends with the revision, or leaves none: masks that were written
    before an error belong to no revision, and `RevisionStore.collect` deletes them.

    Attributes:
        about: what else to note in the revision's file; may be added to until the block ends.
        revision: its name, once the block has ended.
    """

    def __init__(self, store: "RevisionStore", parent: Manifest, about: dict[str, Any]) -> None:
        self.about, self.revision = about, ""
        self._store, self._layers = store, dict(parent)
        self._pool = ThreadPoolExecutor(WRITERS)
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> "RevisionWriter":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                self.settle()
        finally:
            self._pool.shutdown(cancel_futures=True)
        if failed is None:
            self.revision = self._store._write_manifest(self._layers, self.about)

    def add(self, name: str, mask: Tensor, weight: Tensor | None = None, own: int = 0) -> None:
        """Store a layer's mask in place of its parent's, or take that away if it prunes nothing.

        Waits as long as `WRITERS` layers are being written, so that no more are held.

        Args:
            name: the layer's.
            mask: bool, True where pruned, in the parameter's order, on any device.
            weight: of its shape, where the kept weights are no longer the dense ones.
            own: weights that are zero in the dense model. A layer with no more zeros than these
                has no mask, so that equal models have equal names.

        Raises:
            StoreError: this layer or one before it cannot be written (disk full, no permission).
        """
        while self._writing and (len(self._writing) >= WRITERS or self._writing[0].done()):
            self._writing.popleft().result()
        self._layers.pop(name, None)
        bits = pack_bits(mask)
        kept = None if weight is None else weight.masked_select(~mask)
        self._writing.append(self._pool.submit(self._write, name, bits, kept, own))

    def settle(self) -> Manifest:
        """Wait until all that was added is written, and tell the digests of all layers.

        Raises:
            StoreError: as `add`.
        """
        while self._writing:
            self._writing.popleft().result()
        return dict(self._layers)

    def _write(self, name: str, bits: Tensor, kept: Tensor | None, own: int) -> None:
        tensors = {"mask": bits.cpu()}
        if count_bits(tensors["mask"]) <= own:
            return
        if kept is not None:
            tensors["kept"] = kept.cpu()
        self._layers[name] = self._store._write_mask(save_tensors(tensors))


class RevisionStore:
    """Revisions in a directory: ``masks/<digest>`` and ``manifests/<revision>.json``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.solving = directory / "solving.json"
        """Which layers a solve that was stopped had done."""
        self._checked: dict[str, tuple[int, int, int]] = {}

    def writer(self, parent: Manifest, about: dict[str, Any] | None = None) -> RevisionWriter:
        """Make the revision that is ``parent`` with some layers' masks replaced.

        Args:
            parent: manifest of the revision that is changed.
            about: what else to note in the file (criterion, parent); not part of the name.
        """
        return RevisionWriter(self, parent, about or {})

    def _write_mask(self, data: bytes) -> str:
        """Write what a layer has, and return its digest."""
        digest = sha256_bytes(data)
        path = self._mask(digest)
        if not path.exists():
            write_atomic(path, data)
            with put_into_words(path):
                self._checked[digest] = stamp(path)
        return digest

    def _write_manifest(self, layers: Manifest, about: dict[str, Any]) -> str:
        """Write the manifest of a revision whose masks are there, and return its name."""
        revision = sha256_bytes(canonical_json(layers))
        path = self._manifest(revision)
        if not path.exists():
            write_atomic(path, canonical_json({"layers": layers, "about": about}))
            _log.debug("revision %s stored, with masks of %d layers", revision, len(layers))
        return revision

    def manifest(self, revision: str) -> Manifest:
        """The digests of a revision's masks.

        Raises:
            StoreError: no such revision, or its file does not match its name.
        """
        if revision == DENSE:
            return {}
        path = self._manifest(revision)
        content = read_json(path)
        found = content.get("layers") if isinstance(content, dict) else None
        layers = {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else None
        if layers is None or sha256_bytes(canonical_json(layers)) != revision:
            raise StoreError(f"{path} is damaged: its content does not match its name")
        return layers

    def about(self, revision: str) -> dict[str, Any]:
        """What was noted of a revision when it was first stored.

        Raises:
            StoreError: no such revision.
        """
        content = {} if revision == DENSE else read_json(self._manifest(revision))
        about = content.get("about") if isinstance(content, dict) else None
        return about if isinstance(about, dict) else {}

    def read(self, digest: str, shape: tuple[int, ...]) -> StoredLayer:
        """What a digest names, for a layer of a shape.

        A file that this object has written, or found to match its name, is hashed again only when
        it has been replaced or changed since.

        Raises:
            StoreError: missing, or its content does not match its name or the shape.
        """
        path = self._mask(digest)
        try:
            found = stamp(path)
            if self._checked.get(digest) != found:
                if sha256_file(path) != digest:
                    raise StoreError(f"{path} is damaged: its content does not match its name")
                self._checked[digest] = found
            # Mapped: kept values of a whole model that lies in files must not fill the memory.
            with safe_open(path, framework="pt") as file:
                bits = file.get_tensor("mask")
                kept = file.get_tensor("kept") if "kept" in file.keys() else None  # noqa: SIM118
        except OSError as error:
            raise StoreError(f"cannot read the mask {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        numel = torch.Size(shape).numel()
        fits = bits.dtype == torch.uint8 and bits.shape == ((numel + 7) // 8,)
        if fits and kept is not None:  # bits beyond the last weight would be counted, too
            last = unpack_bits(bits[-1:], 8)[8 - len(bits) * 8 + numel :]
            fits = not last.any() and kept.shape == (numel - count_bits(bits),)
        if not fits:
            raise StoreError(f"{path} is not the mask of a layer of shape {list(shape)}")
        return StoredLayer(bits, kept)

    def holds(self, digest: str) -> bool:
        """Whether there is a file of this name; it is checked when it is read."""
        return self._mask(digest).is_file()

    def read_solving(self) -> dict[str, Any]:
        """What a solve that was stopped left; empty where there was none.

        Raises:
            StoreError: it is no JSON.
        """
        content = read_json(self.solving) if self.solving.exists() else {}
        return content if isinstance(content, dict) else {}

    def collect(self, keep: set[str]) -> tuple[int, int]:
        """Delete every file that none of the given revisions needs, nor a solve that was stopped.

        Raises:
            StoreError: a revision to keep is missing or damaged; nothing is deleted.
        """
        needed = {self._manifest(revision) for revision in keep if revision != DENSE}
        needed |= {self._mask(digest) for digest in self.read_solving().get("layers", {}).values()}
        for revision in keep:
            needed |= {self._mask(digest) for digest in self.manifest(revision).values()}
        unused = [
            path
            for folder in ("masks", "manifests")
            for path in (self.directory / folder).glob("*")
            if path not in needed and (path.is_symlink() or path.is_file())
        ]
        size = sum(path.lstat().st_size for path in unused)
        for path in unused:
            with put_into_words(path):
                path.unlink()
        return len(unused), size

    def share(self, other: "RevisionStore", revisions: set[str]) -> None:
        """Let another store hold some revisions of this one, too.

        Raises:
            StoreError: one is missing or damaged, or the other store cannot be written.
        """
        needed = {self._manifest(revision) for revision in revisions if revision != DENSE}
        for revision in revisions:
            needed |= {self._mask(digest) for digest in self.manifest(revision).values()}
        for path in needed:
            share(path, other.directory / path.relative_to(self.directory))

    def _mask(self, digest: str) -> Path:
        return self.directory / "masks" / _hex(digest)

    def _manifest(self, revision: str) -> Path:
        return self.directory / "manifests" / f"{_hex(revision)}.json"


def _hex(digest: str) -> str:
    """A digest that can be part of a path: manifests on disk are untrusted."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise StoreError(f"{digest[:80]!r} is not the name of a revision or mask")
    return digest
