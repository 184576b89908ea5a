"""The store: content-addressed, never altered, and nothing in it is believed unchecked."""

import errno
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from prunewright.state import StoreError
from prunewright.state.run import DENSE
from prunewright.tools.fast import pack_bits
from prunewright.tools.store import revisions
from prunewright.tools.store.revisions import WRITERS, Manifest, RevisionStore


def unpacked(bits: Tensor, *shape: int) -> Tensor:
    flags = np.unpackbits(bits.numpy(), count=torch.Size(shape).numel())
    return torch.from_numpy(flags.astype(bool)).reshape(shape)


def put(
    store: RevisionStore,
    parent: Manifest,
    masks: dict[str, Tensor] | Iterator[tuple[str, Tensor]],
    about: dict[str, Any] | None = None,
) -> str:
    """The name of a revision."""
    with store.writer(parent, about) as writer:
        for name, one in masks.items() if isinstance(masks, dict) else masks:
            writer.add(name, one)
    return writer.revision


def mask(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.fixture
def store(tmp_path: Path) -> RevisionStore:
    return RevisionStore(tmp_path / "revisions")


def files(store: RevisionStore) -> dict[str, bytes]:
    root = store.directory
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_file_holds_the_bits_that_numpy_packs_and_the_kept_values(store: RevisionStore) -> None:
    original, weight = mask(1, 5, 7).T, torch.randn(7, 5, dtype=torch.bfloat16)
    with store.writer({}) as writer:
        writer.add("a", original, weight)
    found = load((store.directory / "masks" / store.manifest(writer.revision)["a"]).read_bytes())
    assert found["mask"].numpy().tobytes() == np.packbits(original.numpy()).tobytes()
    kept = [w for w, gone in zip(weight.flatten(), original.flatten(), strict=True) if not gone]
    assert found["kept"].tolist() == kept
    read = store.read(store.manifest(writer.revision)["a"], (7, 5))
    assert torch.equal(unpacked(read.bits, 7, 5), original)
    assert read.kept is not None
    assert read.kept.tolist() == kept


def test_a_mask_of_no_more_than_the_layers_own_zeros_is_none(store: RevisionStore) -> None:
    one = torch.zeros(5, 7, dtype=torch.bool)
    first = put(store, {}, {"a": mask(1, 5, 7), "b": mask(2, 5, 7), "c": mask(3, 5, 7)})
    with store.writer(store.manifest(first)) as writer:
        writer.add("a", one)
        writer.add("b", mask(4, 5, 7), own=int(mask(4, 5, 7).sum()))
        writer.add("c", mask(4, 5, 7), own=int(mask(4, 5, 7).sum()) - 1)
    assert set(store.manifest(writer.revision)) == {"c"}


def test_masks_come_back_from_a_revision(store: RevisionStore) -> None:
    masks = {"a": mask(1, 5, 7), "b": mask(2, 3, 4, 5)}
    revision = put(store, {}, masks, {"criterion": "wanda"})
    manifest = RevisionStore(store.directory).manifest(revision)
    assert set(manifest) == {"a", "b"}
    for name, original in masks.items():
        bits = store.read(manifest[name], tuple(original.shape)).bits
        assert torch.equal(unpacked(bits, *original.shape), original)


def test_names_are_hashes_of_the_content(store: RevisionStore) -> None:
    revision = put(store, {}, {"a": mask(1, 5, 7)})
    [manifest] = (store.directory / "manifests").iterdir()
    layers = json.loads(manifest.read_bytes())["layers"]
    assert manifest.name == f"{revision}.json"
    canonical = json.dumps(layers, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == revision
    [stored] = (store.directory / "masks").iterdir()
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == stored.name == layers["a"]


def test_equal_masks_have_equal_names_wherever_and_however_they_were_made(
    store: RevisionStore, tmp_path: Path
) -> None:
    a, b = mask(1, 5, 7), mask(2, 6, 6)
    at_once = put(store, {}, {"a": a, "b": b}, {"criterion": "wanda"})
    other = RevisionStore(tmp_path / "other")
    first = put(other, {}, {"b": b})
    by_steps = put(other, other.manifest(first), {"a": a}, {"criterion": "magnitude"})
    assert at_once == by_steps
    assert first != by_steps
    assert put(store, {}, {"a": b, "b": b}) != at_once


def test_layers_that_stay_are_stored_once_and_nothing_is_altered(store: RevisionStore) -> None:
    first = put(store, {}, {"a": mask(1, 5, 7), "b": mask(2, 5, 7), "c": mask(2, 5, 7)})
    before = files(store)
    second = put(store, store.manifest(first), {"a": mask(3, 5, 7)})
    after = files(store)
    assert {k: after[k] for k in before} == before
    new = set(after) - set(before)
    assert sorted(k.split("/")[0] for k in new) == ["manifests", "masks"]
    assert len([k for k in after if k.startswith("masks")]) == 3
    one, two = store.manifest(first), store.manifest(second)
    assert {k for k in one if one[k] != two[k]} == {"a"}
    put(store, one, {"a": mask(3, 5, 7)}, {"about": "something else"})
    assert files(store) == after


def test_the_dense_revision_needs_no_file(store: RevisionStore) -> None:
    assert store.manifest(DENSE) == {}
    assert not store.directory.exists()
    assert put(store, {}, {}) == DENSE


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_mask_is_named(damage: str, store: RevisionStore) -> None:
    revision = put(store, {}, {"a": mask(1, 50, 70)})
    digest = store.manifest(revision)["a"]
    path = store.directory / "masks" / digest
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    for reading in (store, RevisionStore(store.directory)):
        os.utime(path, ns=(0, 0))
        with pytest.raises(StoreError, match=rf"{digest} is damaged"):
            reading.read(digest, (50, 70))


@pytest.mark.parametrize("reading", ["here", "elsewhere"])
def test_a_file_is_hashed_once_by_who_writes_or_reads_it(
    reading: str, store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def counted(path: Path) -> str:
        data = path.read_bytes()
        hashed.append(len(data))
        return hashlib.sha256(data).hexdigest()

    digest = store.manifest(put(store, {}, {"a": mask(1, 50, 70)}))["a"]
    reader = store if reading == "here" else RevisionStore(store.directory)
    monkeypatch.setattr(revisions, "sha256_file", counted)
    path = store.directory / "masks" / digest
    for _ in range(3):
        assert torch.equal(unpacked(reader.read(digest, (50, 70)).bits, 50, 70), mask(1, 50, 70))
    assert hashed == ([] if reading == "here" else [path.stat().st_size])


def test_a_missing_mask_or_revision_is_named(store: RevisionStore) -> None:
    revision = put(store, {}, {"a": mask(1, 5, 7)})
    digest = store.manifest(revision)["a"]
    (store.directory / "masks" / digest).unlink()
    with pytest.raises(StoreError, match=rf"cannot read the mask .*{digest}: No such file"):
        store.read(digest, (5, 7))
    with pytest.raises(StoreError, match=rf"cannot read .*{'0' * 64}\.json"):
        store.manifest("0" * 64)


def test_a_mask_of_another_shape_is_refused(store: RevisionStore) -> None:
    digest = store.manifest(put(store, {}, {"a": mask(1, 5, 7)}))["a"]
    with pytest.raises(StoreError, match=r"not the mask of a layer of shape \[50, 70\]"):
        store.read(digest, (50, 70))


def test_kept_values_must_be_as_many_as_the_mask_leaves(store: RevisionStore) -> None:
    bits = pack_bits(mask(1, 5, 7))
    kept = torch.ones(int((~mask(1, 5, 7)).sum()))
    filled = bits | torch.tensor([0, 0, 0, 0, 1], dtype=torch.uint8)  # beyond the last weight
    (store.directory / "masks").mkdir(parents=True)
    for tensors, good in (
        ({"mask": bits, "kept": kept}, True),
        ({"mask": bits, "kept": kept[1:]}, False),
        ({"mask": filled, "kept": kept}, False),
        ({"mask": filled, "kept": kept[1:]}, False),
        ({"mask": bits.int(), "kept": kept}, False),
    ):
        digest = hashlib.sha256(save(tensors)).hexdigest()
        (store.directory / "masks" / digest).write_bytes(save(tensors))
        with nullcontext() if good else pytest.raises(StoreError, match="not the mask"):
            store.read(digest, (5, 7))


@pytest.mark.parametrize(
    "data", [b"no tensors", save({"other": torch.zeros(5, dtype=torch.uint8)})]
)
def test_a_file_that_is_no_mask_is_refused(data: bytes, store: RevisionStore) -> None:
    digest = hashlib.sha256(data).hexdigest()
    (store.directory / "masks").mkdir(parents=True)
    (store.directory / "masks" / digest).write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        store.read(digest, (5, 7))


TAMPERED: dict[str, Any] = {
    "another digest": lambda c: c["layers"].update(a="f" * 64),
    "one more layer": lambda c: c["layers"].update(z="f" * 64),
    "one layer less": lambda c: c["layers"].pop("b"),
    "no layers": lambda c: c.pop("layers"),
    "a list": lambda c: c.update(layers=["a"]),
    "a number that is none": lambda c: c["layers"].update(a=float("nan")),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_manifest_is_named(how: str, store: RevisionStore) -> None:
    revision = put(store, {}, {"a": mask(1, 5, 7), "b": mask(2, 5, 7)})
    path = store.directory / "manifests" / f"{revision}.json"
    content = json.loads(path.read_text())
    TAMPERED[how](content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"{revision}\.json is damaged"):
        store.manifest(revision)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_a_manifest_of_another_form_is_named(content: str, store: RevisionStore) -> None:
    revision = put(store, {}, {"a": mask(1, 5, 7)})
    (store.directory / "manifests" / f"{revision}.json").write_text(content)
    with pytest.raises(StoreError, match=rf"{revision}\.json is damaged"):
        store.manifest(revision)


NO_DIGEST = ["../../secret", "/etc/passwd", "", "abc", "F" * 64, "0" * 63 + "/", "0" * 65, "é" * 64]


@pytest.mark.parametrize("name", NO_DIGEST)
def test_what_is_no_digest_never_becomes_a_path(name: str, store: RevisionStore) -> None:
    with pytest.raises(StoreError, match="not the name of a revision or mask"):
        store.read(name, (5, 7))
    with pytest.raises(StoreError, match="not the name of a revision or mask"):
        store.manifest(name)


def test_a_failed_write_leaves_no_part_and_can_be_repeated(
    store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(store, {}, {"a": mask(1, 5, 7)})
    before = files(store)
    calls = 0

    def full(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            put(store, store.manifest(first), {"a": mask(2, 5, 7), "b": mask(3, 5, 7)})
    after = files(store)
    assert {k: after[k] for k in before} == before
    assert all(name.startswith("masks/") for name in set(after) - set(before))
    for name in set(after) - set(before):
        assert hashlib.sha256(after[name]).hexdigest() == name.removeprefix("masks/")
    second = put(store, store.manifest(first), {"a": mask(2, 5, 7), "b": mask(3, 5, 7)})
    assert set(store.manifest(second)) == {"a", "b"}


def test_an_error_is_told_by_a_later_layer_and_no_revision_is_left(
    store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    masks = {str(seed): mask(seed, 5, 7) for seed in range(3 * WRITERS)}
    given = iter(masks.items())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            put(store, {}, given)
    assert len(list(given)) >= 2 * WRITERS - 1
    assert files(store) == {}
    assert len(store.manifest(put(store, {}, masks))) == len(masks)


def test_what_is_given_up_in_the_middle_is_no_revision(store: RevisionStore) -> None:
    def stopped() -> Iterator[tuple[str, Tensor]]:
        for seed in range(2 * WRITERS):
            yield str(seed), mask(seed, 5, 7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(store, {}, stopped())
    for name, data in files(store).items():
        assert name == f"masks/{hashlib.sha256(data).hexdigest()}"
    store.collect(set())
    assert files(store) == {}


def test_no_more_layers_are_held_than_are_being_written(
    store: RevisionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, calls = itertools.count(1), itertools.count()
    beyond, done = threading.Event(), threading.Event()
    early: list[bool] = []

    def counted(flags: Tensor) -> Tensor:
        if next(packed) > WRITERS:
            beyond.set()
        return pack_bits(flags)

    def slow(_: int) -> None:
        if next(calls) == 0:
            early.append(beyond.wait(0.2))
            done.set()
        done.wait()

    monkeypatch.setattr(revisions, "pack_bits", counted)
    monkeypatch.setattr(os, "fsync", slow)
    masks = {str(seed): mask(seed, 5, 7) for seed in range(3 * WRITERS)}
    assert len(store.manifest(put(store, {}, masks))) == len(masks)
    assert beyond.is_set()
    assert early == [False]
