"""The store: content-addressed, never altered, and nothing in it is believed unchecked."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from prunewright.state import StoreError
from prunewright.state.run import DENSE
from prunewright.tools.store.revisions import RevisionStore, pack_layer, unpack_kept


def unpacked(bits: Tensor, *shape: int) -> Tensor:
    kept = unpack_kept(bits, torch.Size(shape).numel())
    assert kept.dtype == torch.uint8
    assert set(kept.tolist()) <= {0, 1}
    return kept.reshape(shape) == 0


def mask(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.fixture
def store(tmp_path: Path) -> RevisionStore:
    return RevisionStore(tmp_path / "revisions")


def files(store: RevisionStore) -> dict[str, bytes]:
    root = store.directory
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 999))
def test_a_mask_survives_packing(shape: list[int], seed: int) -> None:
    original = mask(seed, *shape)
    assert torch.equal(unpacked(load(pack_layer(original))["mask"], *shape), original)


def test_a_mask_takes_one_bit_a_weight() -> None:
    small, large = (len(pack_layer(mask(0, 64, n))) for n in (64, 128))
    assert large - small == pytest.approx(64 * 64 / 8, abs=8)


def test_a_view_is_packed_in_its_own_order() -> None:
    original = mask(1, 5, 7)
    assert torch.equal(unpacked(load(pack_layer(original.T))["mask"], 7, 5), original.T)


def test_masks_come_back_from_a_revision(store: RevisionStore) -> None:
    masks = {"a": mask(1, 5, 7), "b": mask(2, 3, 4, 5)}
    revision = store.put({}, masks, {"criterion": "wanda"})
    manifest = RevisionStore(store.directory).manifest(revision)
    assert set(manifest) == {"a", "b"}
    for name, original in masks.items():
        bits = store.read(manifest[name], tuple(original.shape)).bits
        assert torch.equal(unpacked(bits, *original.shape), original)


def test_names_are_hashes_of_the_content(store: RevisionStore) -> None:
    revision = store.put({}, {"a": mask(1, 5, 7)})
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
    at_once = store.put({}, {"a": a, "b": b}, {"criterion": "wanda"})
    other = RevisionStore(tmp_path / "other")
    first = other.put({}, {"b": b})
    by_steps = other.put(other.manifest(first), {"a": a}, {"criterion": "magnitude"})
    assert at_once == by_steps
    assert first != by_steps
    assert store.put({}, {"a": b, "b": b}) != at_once


def test_layers_that_stay_are_stored_once_and_nothing_is_altered(store: RevisionStore) -> None:
    first = store.put({}, {"a": mask(1, 5, 7), "b": mask(2, 5, 7), "c": mask(2, 5, 7)})
    before = files(store)
    second = store.put(store.manifest(first), {"a": mask(3, 5, 7)})
    after = files(store)
    assert {k: after[k] for k in before} == before
    new = set(after) - set(before)
    assert sorted(k.split("/")[0] for k in new) == ["manifests", "masks"]
    assert len([k for k in after if k.startswith("masks")]) == 3
    one, two = store.manifest(first), store.manifest(second)
    assert {k for k in one if one[k] != two[k]} == {"a"}
    store.put(one, {"a": mask(3, 5, 7)}, {"about": "something else"})
    assert files(store) == after


def test_the_dense_revision_needs_no_file(store: RevisionStore) -> None:
    assert store.manifest(DENSE) == {}
    assert not store.directory.exists()
    assert store.put({}, {}) == DENSE


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_mask_is_named(damage: str, store: RevisionStore) -> None:
    revision = store.put({}, {"a": mask(1, 50, 70)})
    digest = store.manifest(revision)["a"]
    path = store.directory / "masks" / digest
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    with pytest.raises(StoreError, match=rf"{digest} is damaged"):
        store.read(digest, (50, 70))


def test_a_missing_mask_or_revision_is_named(store: RevisionStore) -> None:
    revision = store.put({}, {"a": mask(1, 5, 7)})
    digest = store.manifest(revision)["a"]
    (store.directory / "masks" / digest).unlink()
    with pytest.raises(StoreError, match=rf"cannot read the mask .*{digest}: No such file"):
        store.read(digest, (5, 7))
    with pytest.raises(StoreError, match=rf"cannot read .*{'0' * 64}\.json"):
        store.manifest("0" * 64)


def test_a_mask_of_another_shape_is_refused(store: RevisionStore) -> None:
    digest = store.manifest(store.put({}, {"a": mask(1, 5, 7)}))["a"]
    with pytest.raises(StoreError, match=r"not the mask of a layer of shape \[50, 70\]"):
        store.read(digest, (50, 70))


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
    revision = store.put({}, {"a": mask(1, 5, 7), "b": mask(2, 5, 7)})
    path = store.directory / "manifests" / f"{revision}.json"
    content = json.loads(path.read_text())
    TAMPERED[how](content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"{revision}\.json is damaged"):
        store.manifest(revision)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_a_manifest_of_another_form_is_named(content: str, store: RevisionStore) -> None:
    revision = store.put({}, {"a": mask(1, 5, 7)})
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
    first = store.put({}, {"a": mask(1, 5, 7)})
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
            store.put(store.manifest(first), {"a": mask(2, 5, 7), "b": mask(3, 5, 7)})
    after = files(store)
    assert {k: after[k] for k in before} == before
    assert all(name.startswith("masks/") for name in set(after) - set(before))
    for name in set(after) - set(before):
        assert hashlib.sha256(after[name]).hexdigest() == name.removeprefix("masks/")
    second = store.put(store.manifest(first), {"a": mask(2, 5, 7), "b": mask(3, 5, 7)})
    assert set(store.manifest(second)) == {"a", "b"}
