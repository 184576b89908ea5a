"""Which files of a model's directory belong to the model beside its weights, and their copies."""

import fnmatch
import shutil
from pathlib import Path

_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth",
    "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.npz",
    "*.pkl", "*.pickle", "*.tflite", "*.mlmodel", "*.nemo", "*.distcp", "*.engine",
    "consolidated*",
)  # fmt: skip
"""The weights, in any form."""

_READ = (
    "config.json", "configuration.json", "generation_config.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "*processor_config.json", "*.model", "*.tiktoken", "tekken.json", "*.py",
)  # fmt: skip
"""What transformers reads of a directory; it has followed these where they are links."""


def files_to_copy(directory: Path, without: Path) -> list[Path]:
    """The files that a saved model shares with the one that it was made of.

    All but: weights in any form (and folders that hold some: another model's), hidden files,
    README.md (a saved model has its own), and links that lead elsewhere, unless they are files
    that transformers reads.

    Args:
        directory: of the model.
        without: a directory that may lie in it and is left out, the run's own.

    Raises:
        OSError: a folder cannot be read.
    """
    return sorted(_files(directory, directory, without.resolve()) or [])


def _files(folder: Path, top: Path, without: Path) -> list[Path] | None:
    """The files of a folder; None if it is not the model's."""
    found: list[Path] = []
    for path in folder.iterdir():
        name = path.name
        if name.startswith(".") or name == "__pycache__":
            continue
        if path.is_dir():
            if not path.is_symlink() and not without.is_relative_to(path.resolve()):
                found += _files(path, top, without) or []
        elif any(fnmatch.fnmatchcase(name.lower(), form) for form in _WEIGHTS):
            if folder != top:
                return None
        elif (
            path.is_file()
            and (folder != top or name.lower() != "readme.md")
            and (_within(path, top) or any(fnmatch.fnmatchcase(name, form) for form in _READ))
        ):
            found.append(path)
    return found


def _within(path: Path, top: Path) -> bool:
    """Whether a file, once links are followed, lies in the model's directory.

    Or in the hub's cache of the model, where each file of a snapshot is a link to a blob.
    """
    roots = [top.resolve()]
    if top.parent.name == "snapshots":
        roots.append((top.parent.parent / "blobs").resolve())
    return any(path.resolve().is_relative_to(root) for root in roots)


def copy_files(files: list[Path], directory: Path, target: Path) -> None:
    """Copy files of a directory to the same places of another one.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in files:
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
