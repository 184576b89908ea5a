"""The store of revisions: immutable, content-addressed masks of a pruned model.

A revision is a manifest ``{layer: digest}``; a digest names one file, the layer's mask with one
bit a weight and, where the kept weights are no longer the dense ones (SparseGPT, reconstruction),
their values. The manifest's own hash is the revision's name, so equal masks have equal names
wherever they were made, equal layers are stored once, and nothing is ever altered.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from prunewright.state import StoreError
from prunewright.state.run import DENSE
from prunewright.tools.store.storage import (
    canonical_json,
    put_into_words,
    read_json,
    sha256_bytes,
    share,
    write_atomic,
)

_log = logging.getLogger("prunewright")

WRITERS = 4
"""Files of a revision that are written at once."""

Manifest = dict[str, str]
"""Digest of the mask of each layer that has one."""


@dataclass(frozen=True)
class StoredLayer:
    """What a revision holds of a layer.

    Attributes:
        bits: its mask, eight weights a byte.
        kept: values of the weights that are left, in the parameter's order; None: the dense ones.
    """

    bits: Tensor
    kept: Tensor | None = None


class RevisionStore:
    """Revisions in a directory: ``masks/<digest>`` and ``manifests/<revision>.json``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(
        self,
        parent: Manifest,
        masks: dict[str, Tensor],
        about: dict[str, Any] | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> str:
        """Store ``parent`` with some layers' masks replaced, and return the revision's name.

        Args:
            parent: manifest of the revision that is changed.
            masks: bool masks by layer, True where pruned.
            about: what else to note in the file (criterion, parent); not part of the name.
            weights: the weights of those layers whose kept ones are no longer the dense ones.

        Raises:
            StoreError: cannot write (disk full, no permission).
        """
        layers = dict(parent)
        # Each file is forced to the disk: side by side they wait for it together.
        with ThreadPoolExecutor(WRITERS) as pool:
            writing = []
            for name, mask in masks.items():
                # A dense layer has no mask, so that equal models have equal names.
                if not mask.cpu().numpy().any():
                    layers.pop(name, None)
                    continue
                data = pack_layer(mask, (weights or {}).get(name))
                layers[name] = sha256_bytes(data)
                path = self._mask(layers[name])
                if not path.exists():
                    writing.append(pool.submit(write_atomic, path, data))
            for written in writing:
                written.result()
        revision = sha256_bytes(canonical_json(layers))
        path = self._manifest(revision)
        if not path.exists():
            write_atomic(path, canonical_json({"layers": layers, "about": about or {}}))
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

        Raises:
            StoreError: missing, or its content does not match its name or the shape.
        """
        path = self._mask(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read the mask {path}: {error.strerror}") from error
        if sha256_bytes(data) != digest:
            raise StoreError(f"{path} is damaged: its content does not match its name")
        try:
            tensors = load_tensors(data)
            bits, kept = tensors["mask"], tensors.get("kept")
        except (SafetensorError, KeyError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        numel = torch.Size(shape).numel()
        fits = bits.dtype == torch.uint8 and bits.shape == ((numel + 7) // 8,)
        if fits and kept is not None:
            fits = kept.shape == (int(unpack_kept(bits, numel).count_nonzero()),)
        if not fits:
            raise StoreError(f"{path} is not the mask of a layer of shape {list(shape)}")
        return StoredLayer(bits, kept)

    def collect(self, keep: set[str]) -> tuple[int, int]:
        """Delete every file that none of the given revisions needs.

        Raises:
            StoreError: a revision to keep is missing or damaged; nothing is deleted.
        """
        needed = {self._manifest(revision) for revision in keep if revision != DENSE}
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


def pack_layer(mask: Tensor, weight: Tensor | None = None) -> bytes:
    """A bool mask as safetensors bytes, one bit a weight, and the weights it keeps, if given."""
    tensors = {"mask": torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy()))}
    if weight is not None:
        tensors["kept"] = weight.cpu().masked_select(~mask.cpu())
    return save_tensors(tensors)


def unpack_kept(bits: Tensor, numel: int) -> Tensor:
    """Packed bits as one byte a weight: 0 where it is pruned, 1 where it is kept."""
    return torch.from_numpy(np.unpackbits(~bits.numpy(), count=numel))
