"""A model that its caller has loaded already, written to where any other model is read from.

From there on it is a local model like any other: dense weights are read back layer by layer, a
stopped run goes on in another process, and the result is reloaded and checked.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunewright.state import InputError, StoreError
from prunewright.tools.fast import same_bits
from prunewright.tools.model.checkpoint import error_words
from prunewright.tools.model.loading import load_files


def check_given(model: object, tokenizer: object) -> None:
    """Refuse objects that cannot be written as a plain model, before anything is.

    Raises:
        InputError: saying what to give instead.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        if hasattr(model, "peft_config"):
            raise InputError(
                "the given model carries adapters: merge them first "
                "(model = model.merge_and_unload()), or delete them"
            )
        raise InputError(
            f"model is a {type(model).__name__}: give a transformers model that is loaded already, "
            "or name one in the configuration (model: a directory or a hub name)"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}: give the model's own, such as "
            "AutoTokenizer.from_pretrained(...), or processor.tokenizer"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InputError(
            "the given model is quantised: load it in bfloat16, float16 or float32 to prune it"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"the given model is not all in memory: {name} is on the meta device or offloaded. "
                "Load it without device_map, or let Prunewright load it by its name"
            )


def write_given(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    trust_remote_code: bool,
) -> None:
    """Write a model and its tokenizer as a plain directory, and check that it loads as it is.

    The object stays as it is, its device and training mode, too.

    Args:
        model: as `check_given` lets it pass.
        tokenizer: the model's.
        directory: an empty one.
        trust_remote_code: run Python code that the model brings, to load what was written.

    Raises:
        InputError: transformers cannot write it, or what it writes is not the model in memory.
        StoreError: the disk is full or cannot be written.
    """
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _note_name(model, directory)
    except SafetensorError as error:
        raise StoreError(f"cannot write the given model: {error}. Free some space") from error
    except OSError:  # whoever made the directory has words for it
        raise
    except Exception as error:  # each family fails its own way
        raise InputError(f"the given model cannot be saved: {error_words(error)}") from error
    try:
        written = load_files(directory, trust_remote_code=trust_remote_code, dtype="auto")
    except InputError as error:
        words = str(error).replace(str(directory), "memory")
        raise InputError(f"the given model cannot be pruned: {words}") from error
    if changed := _difference(model, written):
        raise InputError(
            f"the given model does not load as it is in memory: {changed}. Its class and "
            "configuration must describe all that it computes with; undo parametrizations and "
            "replaced modules"
        )


def _difference(model: nn.Module, written: nn.Module) -> str:
    """The class or the first tensor that is not the same in both, in words; "" if all are.

    Where loading chose one dtype for all, values are compared as they are in that.
    """
    # By name: code that a model brings is imported once more, and its classes are others.
    names = [type(each).__name__ for each in (model, written)]
    if names[0] != names[1]:
        return f"its class is {names[0]}, and {names[1]} is what its configuration names"
    mine, theirs = model.state_dict(), written.state_dict()
    for name in sorted(mine.keys() ^ theirs.keys()):
        return f"{name} {'has no place in it' if name in mine else 'is new'}"
    for name, tensor in theirs.items():
        given = mine[name].detach().to(device=tensor.device, dtype=tensor.dtype)
        if given.shape != tensor.shape or not same_bits(given, tensor):
            return f"{name} has other values"
    return ""


def _note_name(model: PreTrainedModel, directory: Path) -> None:
    """Keep where the model was loaded from, which transformers leaves out, for the model card."""
    path = directory / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name = getattr(model, "name_or_path", "")
    if name and not Path(name).exists():
        path.write_text(json.dumps(content | {"_name_or_path": name}, indent=2), encoding="utf-8")
