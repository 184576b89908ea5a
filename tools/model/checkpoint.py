"""What a model's directory holds, and whether that is a causal LM whose weights can be pruned.

Nothing here loads weights: files are listed, their headers read, and names compared with those
of the live model. `prunewright.tools.model.loading` asks before and after it loads.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from prunewright.state import InputError
from prunewright.tools.model.layers import find_blocks

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIES = re.compile(
    r"consolidated|model\.\w+(-\d+-of-\d+)?\.safetensors|.*-of-\d+\.\w+\.safetensors"
)
"""The same weights once more: in their makers' own form, or a variant such as ``model.fp16``."""
_FLOATS = {"F64", "F32", "F16", "BF16"}
_POINTER = b"version https://git-lfs"

_QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTISED_FILES = (
    "hf_quant_config.json",  # ModelOpt
    "quantize_config.json",  # AutoGPTQ
    "quant_config.json",  # AWQ
    "quantization_config.json",
    "quant_strategy.json",  # Quark
)
_CODES = re.compile(
    r"(^|[._:])(qweight|qzeros|g_idx|qdata|w_q|scb|absmax|quant_map|nested_absmax|codebooks?|"
    r"nested_quant_map|quant_state|weight_format|\w*weight_(packed|shape|g_idx|zero_point)|"
    r"\w*(weight|input|output|proj)_scales?(_inv|_\d)?|\w+_scale_inv|\w+_(blocks|scales)|[kvq]_scale)($|[._:])",
    re.IGNORECASE,
)
"""Names of quantised codes, or of what turns them into weights."""
_PLAIN_SCALES = re.compile(r"(.*[._:])(scales?|zeros?|zero_point)")
"""Names that only mean so beside a weight: some norms call their weight ``scale``."""
_ADAPTER = re.compile(
    r"(^|[._])(lora_\w+|ia3_l|prompt_(embeddings|encoder)|adapters?|base_layer|modules_to_save|hada_w\d\w*|lokr_w\d\w*|"
    r"oft_[rs]|vera_lambda_\w|boft_[rs]|prefix_encoder)($|\.)",
    re.IGNORECASE,
)
_CAUSAL = re.compile(r"\w+(ForCausalLM|LMHeadModel)", re.IGNORECASE)
"""Names of causal LMs, those that transformers has renamed since among them."""
_OTHER_HEADS = re.compile(
    r"(\w+\.)?(score|classifier|classification_head|qa_outputs|reward_head)\."
)
_OTHER_PARTS = re.compile(
    r"(^|[._])(vision\w*|visual\w*|vit|vqmodel|image\w*|img\w*|video\w*|audio\w*|speech\w*|"
    r"multi_?modal\w*|mm_\w+|encoder|talker|thinker|token2wav|code2wav)($|[._])"
)
_BUFFERS = re.compile(
    r"(^|[._])((original_)?inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias|"
    r"crossattention\.bias|(cos|sin)_cached|token_type_ids|num_batches_tracked|"
    r"relative_position_index|(en|de)coder\.version)$"
)
"""What older checkpoints hold although every model computes it again."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: the file.
        dtype: as safetensors names it, such as ``BF16``.
        shape: its shape.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_configuration(directory: Path) -> dict[str, Any]:
    """The model's config.json, after a look at what lies beside it.

    Raises:
        InputError: it cannot be read, or the directory holds a quantised model, an adapter or an
            embedding model: nothing that is loaded and pruned as it is.
    """
    adapters = sorted(p.name for p in directory.glob("adapter_*") if p.is_file())
    if adapters:
        raise InputError(_adapter_words(directory, adapters[0]))
    config = _read_json(directory / "config.json")
    for key, value in _entries(config):
        if key in _QUANTISED_KEYS and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise InputError(
                _quantised_words(
                    directory, f"config.json holds {key}" + (f": {method}" if method else "")
                )
                + f". If its weights are plain, remove {key} from config.json"
            )
    for name in _QUANTISED_FILES:
        if (directory / name).exists():
            raise InputError(
                _quantised_words(directory, f"it holds {name}")
                + f". If its weights are plain, remove {name}"
            )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            named = part.get(key)
            if named is not None and not isinstance(getattr(torch, str(named), None), torch.dtype):
                raise InputError(
                    f"{key} in the config.json of {directory} is {named!r}, which is no dtype of "
                    'torch: write one such as "bfloat16", or remove it'
                )
    if config.get("transformers_weights") is not None:
        raise InputError(
            f"config.json in {directory} names its weights by transformers_weights, which is not "
            f"supported: rename them to {_WEIGHTS} and remove the entry"
        )
    if (directory / "modules.json").exists():
        raise InputError(
            f"{directory} holds an embedding model of sentence-transformers (modules.json), not a "
            "causal LM: it has no next token to be scored on"
        )
    return config


def auto_class(
    directory: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False
) -> tuple[Any, PretrainedConfig]:
    """The class of transformers that loads a model as what ``architectures`` says that it is.

    A model of text and images or sound is loaded whole, so that what is saved is the same model
    with a pruned text decoder.

    Args:
        directory: where the model is.
        config: its config.json.
        trust_remote_code: run Python code that the model brings.

    Returns:
        ``AutoModelForCausalLM`` or ``AutoModelForMultimodalLM``, and the configuration.

    Raises:
        InputError: transformers does not know the model, or it is no causal LM: a classifier, a
            masked LM, an encoder, a reward model, a body without a head.
    """
    kind, own = config.get("model_type"), config.get("auto_map") or {}
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and not (own and trust_remote_code):
        raise InputError(
            f"cannot load the model {directory}: transformers {__version__} does not know its "
            f"model_type {kind!r}: "
            + (
                "the Python code that comes with it does. Read that, and only if you trust it: "
                "--set trust_remote_code=true"
                if own
                else "a newer one may"
            )
        )
    try:
        parsed = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        text = parsed.get_text_config()
    except Exception as error:  # a configuration is foreign input; each family fails its own way
        raise InputError(load_words(directory, error)) from error
    if parsed.is_encoder_decoder:
        raise InputError(_no_causal_words(directory, config, "an encoder-decoder"))
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise InputError(_no_causal_words(directory, config, "a model without a vocabulary"))
    name, kind = _architecture(config), type(parsed)
    if trust_remote_code and isinstance(own, dict) and "AutoModelForCausalLM" in own:
        return AutoModelForCausalLM, parsed
    multimodal = _names(MODEL_FOR_MULTIMODAL_LM_MAPPING.get(kind, None))
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None))
    if name in multimodal or (name is None and multimodal and not causal):
        return AutoModelForMultimodalLM, parsed
    if not causal:
        what = f"a {parsed.model_type}, a type that transformers has no causal LM of,"
        raise InputError(_no_causal_words(directory, config, what))
    if name and name not in causal and not _CAUSAL.fullmatch(name):
        raise InputError(_no_causal_words(directory, config, "a model for another task"))
    decoder = getattr(parsed, "is_decoder", False) or getattr(parsed, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not decoder:
        what = "an encoder, since is_decoder is not true,"
        raise InputError(_no_causal_words(directory, config, what))
    return AutoModelForCausalLM, parsed


def _names(entry: Any) -> set[str]:
    """Names of the classes of an entry of transformers' tables: none, one or several."""
    classes = entry if isinstance(entry, tuple) else (entry,)
    return {found.__name__ for found in classes if found is not None}


def error_words(error: Exception) -> str:
    """What an error of transformers says; some say the name of a key and no more."""
    words = str(error)
    if isinstance(error, KeyError | IndexError | AttributeError | TypeError) or not words:
        return f"{type(error).__name__} {words} while its files were read"
    return words


def load_words(directory: Path, error: Exception) -> str:
    """The message for a model that transformers does not load."""
    return f"cannot load the model {directory}: {error_words(error)}"


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _entries(config: Any) -> Iterable[tuple[str, Any]]:
    """Every key and value of nested objects."""
    waiting = [config]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found.items()
            waiting += found.values()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): is {path.parent} a model directory?"
        ) from error
    if content.startswith(_POINTER):
        raise InputError(_pointer_words(path))
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON in UTF-8 ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not valid: it must hold one JSON object")
    return found


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads the weights from: one, or the shards of an index.

    Raises:
        InputError: there are none, they are pickles, or the index names what is not there.
    """
    if (directory / _WEIGHTS).exists():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).exists():
        return _shards(directory / _INDEX)
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        raise InputError(
            f"{directory} holds no file named {_WEIGHTS} and no {_INDEX}, which {others[0]} and "
            "other shards would need: fetch what is missing, or rename a single file"
        )
    pickles = sorted(
        p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in directory.glob(suffix)
    )
    if pickles:
        raise InputError(
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code when "
            "loaded: convert them to safetensors first"
        )
    forms = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")
    other = sorted(p.name for form in forms for p in directory.glob(form))
    held = f"{other[0]} but " if other else ""
    raise InputError(
        f"{directory} holds {held}no *.safetensors weights: "
        + ("convert them first" if other else "is it a model directory?")
    )


def _shards(index: Path) -> list[Path]:
    content = _read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(_is_plain, names.values())):
        raise InputError(f"{index} is not valid: weight_map must name a file for each tensor")
    if not isinstance(content.get("metadata"), dict):
        raise InputError(
            f'{index} has no "metadata", without which transformers does not load it: add '
            '"metadata": {} to it'
        )
    files = [index.parent / name for name in sorted(set(names.values()))]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise InputError(
            f"{index} names {len(files)} shards and {len(absent)} of them are missing, {absent[0]} "
            "among them: fetch the model again"
        )
    return files


def _is_plain(name: object) -> bool:
    """Whether a name is that of a file in the same directory."""
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def read_tensors(directory: Path) -> dict[str, Stored]:
    """All tensors that are loaded from a directory, and those of files that nothing loads.

    Raises:
        InputError: as `weight_files`; a file is damaged, a tensor is stored twice or not at all,
            or tensors hold quantised codes or an adapter.
    """
    loaded = weight_files(directory)
    beside = {p for p in directory.glob("*.safetensors") if not _COPIES.match(p.name)}
    found: dict[str, Stored] = {}
    for path in [*loaded, *sorted(beside - set(loaded))]:
        for name, tensor in _read_header(path).items():
            if name in found:
                raise InputError(
                    f"{name} is stored twice, in {found[name].path.name} and in {path.name} of "
                    f"{directory}: remove the file that does not belong to the model"
                )
            found[name] = tensor
    if loaded != [directory / _WEIGHTS]:
        absent = sorted(set(_read_json(directory / _INDEX)["weight_map"]) - set(found))
        if absent:
            raise InputError(
                f"{directory / _INDEX} names {len(absent)} tensors that no shard holds, "
                f"{absent[0]} among them: fetch the model again"
            )
    _refuse_codes(directory, found)
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            raise InputError(_pointer_words(path))
        if not start:
            raise InputError(f"{path} is empty: fetch it again")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is no whole safetensors file ({error}): it is damaged or was cut short; "
            "fetch it again"
        ) from error


def _refuse_codes(directory: Path, stored: Mapping[str, Stored]) -> None:
    """Refuse what shows by its dtype alone to be codes and not weights."""
    for name, tensor in stored.items():
        integer = tensor.dtype not in _FLOATS and tensor.dtype != "BOOL"
        narrow = integer and tensor.dtype[0] not in "IU"  # F8, F6, F4 and kin
        if narrow or (integer and (name.endswith("weight") or _CODES.search(name))):
            raise InputError(_quantised_words(directory, f"{name} is stored as {tensor.dtype}"))


def check_fit(
    directory: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    model: PreTrainedModel,
    info: Mapping[str, Any],
) -> dict[str, Path]:
    """Compare what is stored with what the live model took of it.

    Tensors that the model has no place for, such as a head that predicts several tokens, are
    returned, to be copied as they are into what is saved. Buffers that every model computes again
    are not among them. Refused are a second tower, a head for another task and half or more of all
    values: then the model is not the one that is loaded.

    Args:
        directory: where the model is.
        config: its config.json.
        stored: what its files hold.
        model: the live model, or its structure.
        info: what transformers tells of loading: missing, unexpected and mismatched keys.

    Returns:
        The file of each extra tensor by its stored name.

    Raises:
        InputError: quantised codes, an adapter, tensors that are missing or have another shape,
            that hold integers where weights belong, or that belong to more than a causal LM.
    """
    places = live_names(model, stored)
    extras = {name: tensor for name, tensor in stored.items() if places[name] is None}
    extras = {name: tensor for name, tensor in extras.items() if not _BUFFERS.search(name)}
    for name in extras:
        scale = _PLAIN_SCALES.fullmatch(name)
        beside = scale is not None and f"{scale[1]}weight" in stored
        if beside or _CODES.search(name):
            raise InputError(_quantised_words(directory, f"{name} is stored beside the weights"))
        if _ADAPTER.search(name):
            raise InputError(_adapter_words(directory, name))
    state = model.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        place = places[name]
        floating = place is None or state[place].is_floating_point()
        harmless = name in places and place is None and name not in extras
        if tensor.dtype not in _FLOATS and floating and not harmless:
            raise InputError(
                _quantised_words(directory, f"{name} is stored as {tensor.dtype}, not as floats")
            )
    _refuse_misfit(directory, info, extras, _unplaced(model, extras))
    _refuse_other_models(directory, config, stored, extras, state)
    return {name: tensor.path for name, tensor in extras.items()}


def live_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str | None]:
    """The name in the live model of each stored tensor, None where it has no place in it.

    Where transformers fuses several tensors into one or splits one, a name stands for what it
    becomes a part of. The model's own lists of names to be ignored are not looked at: they hide
    what is not loaded.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    names: dict[str, str | None] = {}
    for name in sorted(stored):  # as transformers does: some renamings wait for an earlier name
        live = rename_source_key(name, renamings, converters, prefix, state)[0]
        if live not in state:
            live = rename_source_key(name, [], [], prefix, state)[0]
        names[name] = live if live in state else None
    return names


def unfused_words(
    directory: Path, model: PreTrainedModel, stored: Mapping[str, Stored]
) -> str | None:
    """Which stored tensors, of those that transformers fuses into one, do not go together.

    Its own error refers to a report in its log.

    Args:
        directory: where the model is.
        model: the live model's structure.
        stored: what its files hold.

    Returns:
        The message, with their names; None where all go together.
    """
    misfit = f"the weights in {directory} do not fit each other:"
    fused: dict[str, dict[str, list[str]]] = {}
    for name, place in live_names(model, stored).items():
        if place is not None:
            # All of one kind: experts differ in a number of their name.
            kinds = fused.setdefault(place, {})
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for place, kinds in fused.items():
        for names in kinds.values():
            odd = next((n for n in names if stored[n].shape != stored[names[0]].shape), None)
            if odd is not None:
                return (
                    f"{misfit} {odd} is stored as {list(stored[odd].shape)}, and {names[0]} as "
                    f"{list(stored[names[0]].shape)}: both are part of {place}"
                )
        most, least = max(kinds.values(), key=len), min(kinds.values(), key=len)
        if len(most) != len(least):
            return (
                f"{misfit} {place} is made of {len(most)} tensors such as {most[0]}, and only "
                f"{len(least)} such as {least[0]} are there"
            )
    return None


def _unplaced(model: PreTrainedModel, extras: Iterable[str]) -> list[str]:
    """Extra tensors that belong to what is live: in a decoder block, or of a module with weights.

    Without them the model computes something else than what its weights were trained for, unless
    its family's own code says that they are of no use.
    """
    block = f"{find_blocks(model)[0]}."
    depth = len(find_blocks(model)[1])
    bearing = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    ignored = "|".join(f"({p})" for p in model._keys_to_ignore_on_load_unexpected or ())
    prefix = f"{model.base_model_prefix}."
    found = []
    for name in extras:
        if ignored and re.search(ignored, name):
            continue
        for full in (name, prefix + name, name.removeprefix(prefix)):
            index = full.removeprefix(block).partition(".")[0]
            inside = full.startswith(block) and index.isdigit() and int(index) < depth
            if inside or full.rpartition(".")[0] in bearing - {""}:
                found.append(name)
                break
    return found


def _refuse_misfit(
    directory: Path, info: Mapping[str, Any], extras: Iterable[str], unplaced: list[str]
) -> None:
    if info["mismatched_keys"]:
        mismatched = sorted(info["mismatched_keys"])
        shown = "; ".join(
            f"{name} is stored as {list(stored)} and should be {list(wanted)}"
            for name, stored, wanted in mismatched[:3]
        )
        raise InputError(
            f"the weights in {directory} do not fit its configuration: {len(mismatched)} tensors "
            f"have another shape: {shown}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        other = next(iter(extras), None)
        raise InputError(
            f"the weights in {directory} do not fit its configuration: {len(missing)} tensors are "
            f"missing, {missing[0]} among them, and would be random"
            + (f"; stored, but without a place in the model, is {other}" if other else "")
        )
    if unplaced:
        raise InputError(
            f"the weights in {directory} do not fit its configuration: {len(unplaced)} tensors "
            f"have no place in the model that it describes, {unplaced[0]} among them: is its "
            "model_type right, are all its settings there?"
        )


def _refuse_other_models(
    directory: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    extras: Mapping[str, Stored],
    state: Iterable[str],
) -> None:
    """Refuse extra tensors without which the model is not the one that its files hold."""
    known = {name.lower(): name for name in state}
    total = sum(tensor.numel for tensor in stored.values())
    for name in extras:
        if name.lower() in known:
            raise InputError(
                f"{directory} holds {name}, and the model's own name is {known[name.lower()]}: "
                "rename or remove one of them"
            )
        if _OTHER_HEADS.match(name):
            raise InputError(
                f"{directory} holds a classifier or reward model ({name}), not a causal LM"
            )
    towers = [name for name in extras if _OTHER_PARTS.search(name)]
    if towers or sum(tensor.numel for tensor in extras.values()) >= total / 2:
        dropped = towers or list(extras)
        share = sum(extras[name].numel for name in dropped) / total
        raise InputError(
            f"{directory} holds more than the causal LM that config.json describes "
            f"({_architecture(config) or 'without architectures'}): {len(dropped)} tensors, "
            f"{dropped[0]} among them, {share:.1%} of all values, would be dropped. Name the class "
            "of the whole model in architectures, or save the language model alone"
        )
    depth = _depth(config)
    for name in extras:
        index = re.search(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.", name)
        if depth and index and not name.startswith("mtp") and int(index[1]) >= sum(depth):
            raise InputError(
                f"{directory} holds {name}, but config.json describes {depth[0]} layers: "
                "num_hidden_layers does not fit the weights"
            )


def _depth(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Layers, and layers behind them that predict further tokens, by config.json."""
    found = dict(_entries(config))
    depth = found.get("num_hidden_layers", found.get("n_layer"))
    further = found.get("num_nextn_predict_layers", found.get("num_mtp_layers", 0))
    if not isinstance(depth, int):
        return None
    return depth, further if isinstance(further, int) else 0


def _quantised_words(directory: Path, why: str) -> str:
    return (
        f"{directory} holds a quantised model ({why}): dequantise it first and save it in "
        "bfloat16, with transformers by model.dequantize() and save_pretrained, or take the "
        "unquantised model that it was made from"
    )


def _no_causal_words(directory: Path, config: Mapping[str, Any], what: str) -> str:
    return (
        f"{directory} holds {what} ({_architecture(config) or config.get('model_type')} by "
        "config.json), not a causal LM: only decoders that predict the next token from those "
        "before it, with the head that does, can be pruned"
    )


def _adapter_words(directory: Path, what: str) -> str:
    return (
        f"{directory} holds an adapter ({what}), not a model's own weights alone: merge it with "
        "peft's merge_and_unload and save the result, or remove it"
    )


def _pointer_words(path: Path) -> str:
    return f"{path} is a pointer of Git LFS and not the file: fetch it with git lfs pull"
