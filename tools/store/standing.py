"""What a model's outputs follow from, by content: neither where it lies nor how it is written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunewright.tools.store.storage import sha256_bytes, sha256_file

_SUFFIXES = {".json", ".model", ".py", ".tiktoken"}
_NAMES = {"merges.txt", "vocab.txt"}
_WITHOUT_EFFECT = {
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
}
"""Files that no perplexity and no mask depends on."""
_KEYS_WITHOUT_EFFECT = {"transformers_version", "_name_or_path", "name_or_path", "chat_template"}


def weights_digest(files: Iterable[Path]) -> str:
    """sha256 over the hashes of a model's weight files."""
    return sha256_bytes("".join(map(sha256_file, files)).encode())


def settings_of(directory: Path) -> dict[str, Any]:
    """What lies beside a model's weights and can change what it computes, by the file's name.

    ``config.json`` as its values, so that a difference can be told; hashes of all else.
    """
    return {path.name: _content(path) for path in setting_files(directory)}


def setting_files(directory: Path) -> list[Path]:
    """The files that `settings_of` reads."""
    return [
        path
        for path in sorted(directory.glob("*"))  # none where it has gone
        if (path.suffix in _SUFFIXES or path.name in _NAMES)
        and path.name not in _WITHOUT_EFFECT
        and not path.name.endswith(".index.json")
        and path.is_file()
    ]


def _content(path: Path) -> Any:
    if path.name not in ("config.json", "tokenizer_config.json"):
        return sha256_file(path)
    try:
        # Mamba's hold Infinity, which no JSON of ours may.
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
        kept = {k: v for k, v in values.items() if k not in _KEYS_WITHOUT_EFFECT}
    except (ValueError, AttributeError, RecursionError):
        return sha256_file(path)
    if path.name == "config.json":
        return kept
    return sha256_bytes(json.dumps(kept, sort_keys=True).encode())


def difference(before: Any, now: Any) -> str:
    """What is not the same in two values, in words, by dotted names; "" if nothing is."""
    return ", ".join(_differences(before, now, ""))


def _differences(before: Any, now: Any, name: str) -> list[str]:
    if before == now:
        return []
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{name} was {before}, is {now}".strip()]
    found = []
    for key in sorted(before.keys() | now.keys()):
        inner = f"{name}.{key}" if name else str(key)
        found += _differences(before.get(key), now.get(key), inner)
    return found
