"""Saving a pruned model: the directory that it was loaded from, with other weights in it.

Every tensor is written as it is stored, in its name, place and dtype, so that all that no mask
touched stays as it was, bit for bit. `try_saving` does beforehand what could fail in the end.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from prunewright.state import InputError, PruneRequest, PrunewrightError, StoreError
from prunewright.state.run import DENSE
from prunewright.state.shown import clean
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.checkpoint import auto_class, read_configuration, weight_files
from prunewright.tools.model.loading import LoadedModel, load_files
from prunewright.tools.saving.copying import copy_files, files_to_copy
from prunewright.tools.saving.shards import Live, has_values, read_header, rewrite, would_be
from prunewright.tools.solve.solving import solves
from prunewright.tools.store.rundir import RunDirectory

_SAMPLE = "A tokenizer's\tsample: 3.14159 <|x|> naïve 你好, def f(x): return x\n\n"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_RETURNED = ".returned"
"""Where transformers saves, inside the directory that is being written."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def try_saving(run: RunDirectory, bench: Workbench, revisions: int) -> str:
    """Do what saving will do, but for the weights, and reload it; nothing of it stays.

    Files are copied for real and reloaded: configuration, tokenizer, generation settings, and the
    model without its weights. Weights that transformers must be asked to write are written, too.

    Args:
        run: where the model will be saved.
        bench: the model.
        revisions: how many sets of masks the run may store, at a guess.

    Returns:
        What a reader should know of the values that are saved; "" if it goes without saying.

    Raises:
        InputError: the model could not be saved, or would not be the same when it is reloaded.
        StoreError: the directory cannot be written, or has too little room.
    """
    with _scratch(run) as scratch:
        try:
            saving = _Saving(bench, run)
            if not saving.named_alike:
                bench.sync(DENSE)
            _check_room(run, bench.request, saving, revisions)
            words = saving.write(scratch, trial=True)
            _check_reload(bench.loaded, scratch, trust_remote_code=bench.request.trust_remote_code)
        except PrunewrightError:
            raise
        except Exception as error:  # whatever a family's own code raises
            # The copies are gone by the time that this is read.
            words = _reason(error).replace(str(scratch), str(bench.loaded.directory))
            if isinstance(error, OSError) and error.errno is not None:
                raise StoreError(
                    f"the pruned model could not be saved in {run.path}: {words}. Nothing was "
                    "computed yet: mend that, or give another --out"
                ) from error
            raise InputError(
                f"the model {bench.request.model} could not be saved and loaded again: {words}. "
                "Nothing was computed yet"
            ) from error
    return words


def save_model(run: RunDirectory, bench: Workbench, card: Callable[[str], str]) -> None:
    """Save the live model as a plain Hugging Face directory, reload it and compare.

    The directory appears whole or not at all.

    Args:
        run: where to.
        bench: the model, at the revision that is saved.
        card: makes the README.md, given what `try_saving` returns.

    Raises:
        PrunewrightError: a value differs after reloading.
        StoreError: cannot write, or the model cannot be reloaded; the run can go on.
    """
    with _scratch(run) as scratch:
        try:
            words = _Saving(bench, run).write(scratch, trial=False)
            (scratch / "README.md").write_text(clean(card(words)), encoding="utf-8")
            _verify(scratch, bench)
            if run.model.exists():
                shutil.rmtree(run.model)
            scratch.rename(run.model)
        except Exception as error:  # a family's own code takes part in saving and reloading
            if isinstance(error, PrunewrightError) and not isinstance(error, InputError):
                raise
            raise StoreError(
                f"cannot save the model into {run.path}: {_reason(error)}. The run is kept: free "
                f"some space or mend what is named, then: prunewright resume {run.path}"
            ) from error


class _Saving:
    """What is written of a loaded model, and how."""

    def __init__(self, bench: Workbench, run: RunDirectory) -> None:
        self.bench = bench
        self.loaded: LoadedModel = bench.loaded
        self.directory = self.loaded.directory
        self.files = files_to_copy(self.directory, run.path)
        self.shards = weight_files(self.directory)
        self.extra = sorted({*self.loaded.extra_tensors.values()} - {*self.shards})
        """Files beside the shards that hold tensors which the live model has not."""
        if self.shards[0].name != _SINGLE:
            self.extra.append(self.directory / _INDEX)
        headers = {path: read_header(path) for path in self.shards}
        self.stored = {name: place for held in headers.values() for name, place in held.items()}
        self.named_alike = all(
            layer.parameter in headers.get(self.loaded.dense_file(layer), {})
            for layer in self.loaded.layers.values()
        )
        """Whether each prunable parameter is stored under its live name."""

    def write(self, target: Path, *, trial: bool) -> str:
        """Write the directory; a trial leaves out weights that need no help of transformers.

        Returns:
            As `try_saving`.
        """
        copy_files(self.files, self.directory, target)
        with self._live_values(target) as live:
            if live is None:
                self._keep_returned(target, trial=trial)
                return self._words(converted=True)
            for path in self.shards:
                if not trial:
                    rewrite(path, target / path.name, live)
                elif not self.named_alike:
                    _check_same(path, live)
        if not trial:
            copy_files(self.extra, self.directory, target)
        return self._words(converted=False)

    @contextmanager
    def _live_values(self, target: Path) -> Iterator[Live | None]:
        """The live value of each stored tensor; None where transformers writes other tensors.

        Where it has renamed, split or joined them on loading, it is asked to save, since it knows
        the way back.
        """
        model: Any = self.loaded.model
        if self.named_alike:
            layers = {
                id(model.get_parameter(layer.parameter)): layer
                for layer in self.loaded.layers.values()
            }
            # A parameter that several blocks share has several names.
            named = model.named_parameters(remove_duplicate=False)
            alike = {name: layers[id(p)] for name, p in named if id(p) in layers}
            yield lambda name: self.loaded.weight(alike[name]) if name in alike else None
            return
        settings = model.generation_config
        try:
            # The input's own is copied; one that transformers would refuse must not be in the way.
            model.generation_config = GenerationConfig() if settings is not None else None
            with self.loaded.execution.weights.whole():
                model.save_pretrained(target / _RETURNED)
        finally:
            model.generation_config = settings
        returned = {
            path: read_header(path) for path in sorted((target / _RETURNED).glob("*.safetensors"))
        }
        pairs = self._pairs(returned)
        if pairs is None:
            yield None
        else:
            with ExitStack() as stack:
                files: dict[Path, Any] = {
                    path: stack.enter_context(safe_open(path, framework="pt")) for path in returned
                }

                def live(name: str) -> Tensor | None:
                    if name not in pairs:
                        return None
                    path, other = pairs[name]
                    tensor: Tensor = files[path].get_tensor(other)
                    return tensor

                yield live
        shutil.rmtree(target / _RETURNED)

    def _pairs(self, returned: dict[Path, dict[str, Any]]) -> dict[str, tuple[Path, str]] | None:
        """File and name that transformers writes for each stored name; None if it writes others.

        A stored name may lack the prefix of the base model, or have one that the other lacks.

        Args:
            returned: the headers of the files that it wrote.
        """
        prefix = f"{self.loaded.model.base_model_prefix}."
        pairs: dict[str, tuple[Path, str]] = {}
        for path, header in returned.items():
            for name, place in header.items():
                for form in (name, name.removeprefix(prefix), prefix + name):
                    if self.stored.get(form, {}).get("shape") == place["shape"]:
                        break
                else:
                    return None
                if form in pairs:
                    return None
                pairs[form] = path, name
        return pairs

    def _keep_returned(self, target: Path, *, trial: bool) -> None:
        """Make what transformers wrote the saved model's weights and configuration.

        Raises:
            InputError: tensors would be lost, or others be there when they are loaded.
        """
        if self.loaded.extra_tensors:
            raise InputError(
                f"{self.directory} holds {len(self.loaded.extra_tensors)} tensors that are not "
                f"part of the model ({self._few_extra()}), and transformers writes the others "
                "under other names than they have there, so that they cannot be saved together: "
                "load it with transformers, save it, and prune that"
            )
        mode = (target / _RETURNED / "config.json").stat().st_mode
        for path in (target / _RETURNED).iterdir():
            if path.name == "config.json" or ".safetensors" in path.name:
                path.chmod(mode)  # safetensors writes for the owner alone
                path.replace(target / path.name)
        if trial:
            try:
                _verify(target, self.bench)
            except PrunewrightError as error:
                raise InputError(f"the model could not be saved: {error}") from error

    def room(self) -> int:
        """Bytes that are written at most."""
        size = sum(path.stat().st_size for path in {*self.files, *self.shards, *self.extra})
        if not self.named_alike:
            model = self.loaded.model
            size += sum(p.numel() * p.element_size() for p in model.parameters())
        return size

    def _words(self, *, converted: bool) -> str:
        kinds = {place["dtype"] for place in self.stored.values() if len(place["shape"]) > 1}
        stored = " and ".join(sorted(_DTYPES.get(kind, kind) for kind in kinds))
        computed = str(self.loaded.dtype).removeprefix("torch.")
        words = []
        if stored != computed:
            values = f"the values saved are the stored {stored} ones"
            if converted:
                values = (
                    f"saved in {computed}, not {stored}, since transformers does not write this "
                    "model back as it is stored"
                )
            elif solves(self.bench.request):
                values += ", but for those that were updated"
            words.append(f"computed in {computed}, perplexities too; {values}")
        if self.loaded.extra_tensors:
            words.append(
                f"{len(self.loaded.extra_tensors)} tensors that are not part of the loaded model "
                f"({self._few_extra()}) are copied as they are"
            )
        return "; ".join(words)

    def _few_extra(self) -> str:
        names = sorted(self.loaded.extra_tensors)
        return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def revision_bytes(request: PruneRequest, prunable: int, itemsize: int) -> tuple[int, int]:
    """Bytes of a step's revision that changes every layer, and of the last one's values.

    Args:
        request: says what is solved after the last step or taken from a pruned copy, and the
            target.
        prunable: weights of the prunable layers.
        itemsize: bytes of one of them.

    Returns:
        A bit a weight; and that with the values of kept weights, 0 if none is solved for.
    """
    masks = (prunable + 7) // 8
    kept = math.ceil((1 - request.target / 2) * prunable) * itemsize
    return masks, masks + kept if solves(request) or request.pruned else 0


def _check_room(run: RunDirectory, request: PruneRequest, saving: _Saving, revisions: int) -> None:
    """Refuse a directory without room for the saved model and the run's revisions.

    Raises:
        StoreError: with both numbers.
    """
    loaded, model = saving.loaded, saving.room()
    step, last = revision_bytes(request, loaded.prunable, loaded.dtype.itemsize)
    masks = revisions * step + last
    free = shutil.disk_usage(run.path).free
    if model + masks > free:
        raise StoreError(
            f"{run.path} has too little room: the run needs about {model + masks:,} bytes, "
            f"{model:,} of them for the saved model, and {free:,} are free. Free some space, or "
            "give another --out"
        )


def _check_same(path: Path, live: Live) -> None:
    """Refuse a model that transformers does not write as it was stored.

    Raises:
        InputError: naming a tensor.
    """
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            now = live(name)
            if now is not None and not has_values(now, file.get_tensor(name)):
                raise InputError(
                    f"the model could not be saved: transformers writes {name} with other "
                    f"values than {path.name} holds"
                )


def _check_reload(loaded: LoadedModel, directory: Path, *, trust_remote_code: bool) -> None:
    """Reload all but the weights from a directory and compare.

    Raises:
        InputError: something differs.
    """
    auto, config = auto_class(
        directory, read_configuration(directory), trust_remote_code=trust_remote_code
    )
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    ours, theirs = (
        # Those that the configuration ties, and the weights untie, are named twice here.
        {name: tuple(p.shape) for name, p in which.named_parameters(remove_duplicate=False)}
        for which in (loaded.model, model)
    )
    if ours != theirs:
        name = min(ours.items() ^ theirs.items())[0]
        raise InputError(
            f"the model could not be saved: with the copied configuration {name} has shape "
            f"{theirs.get(name)}, not {ours.get(name)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(
        directory, trust_remote_code=trust_remote_code, local_files_only=True
    )
    differs = _difference(loaded.tokenizer, tokenizer)
    if differs:
        raise InputError(
            f"the tokenizer could not be saved: its {differs} would differ when it is loaded "
            f"again. Are all its files in {loaded.directory}?"
        )
    if (directory / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(directory, local_files_only=True)


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    parts: dict[str, Callable[[PreTrainedTokenizerBase], object]] = {
        "class": lambda t: type(t).__name__,
        "vocabulary": lambda t: t.get_vocab(),
        "special tokens": lambda t: t.special_tokens_map,
        "chat template": lambda t: t.chat_template,
        "way with a sample text": lambda t: t(_SAMPLE).input_ids,
    }
    return next((name for name, part in parts.items() if part(one) != part(other)), "")


def _verify(directory: Path, bench: Workbench) -> None:
    """Load a saved model anew, as anyone would, and compare every parameter with the live one.

    On the processor and out of mapped files, parameter by parameter: another whole model on a
    device that is as full as it may be would lose a finished run. Equal values have equal losses.

    Raises:
        PrunewrightError: one differs.
    """
    again = load_files(
        directory,
        trust_remote_code=bench.request.trust_remote_code,
        dtype="auto",  # as they are stored: mapped, not converted all at once
    )
    theirs = dict(again.named_parameters())
    headers = map(read_header, weight_files(directory))
    stored = {place["dtype"] for header in headers for place in header.values()}
    layers = {layer.parameter: layer for layer in bench.loaded.layers.values()}
    for name, parameter in bench.loaded.model.named_parameters():
        layer = layers.get(name)
        live = parameter.data if layer is None else bench.loaded.weight(layer)
        if name not in theirs or not would_be(live, theirs[name].data.to(live.dtype), stored):
            raise PrunewrightError(
                f"the model saved in {directory} reloads with other values in {name}"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


@contextmanager
def _scratch(run: RunDirectory) -> Iterator[Path]:
    """A directory that is written before it gets its name, or only for a trial."""
    scratch = run.path / ".saving"
    # What a process left that was killed while saving.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"cannot write {run.path}: {_reason(error)}") from error
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
