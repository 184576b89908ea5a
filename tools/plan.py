"""What a run would load, and the memory, disk and time that it would take. Nothing is run."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from prunewright.state import InputError, PruneRequest
from prunewright.tools.criteria import find_criterion
from prunewright.tools.model.checkpoint import Stored, read_tensors
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head
from prunewright.tools.model.layers import Layer, find_layers, left_dense, named_blocks
from prunewright.tools.model.loading import (
    load_model,
    model_skeleton,
    resolve_device,
    resolve_dtype,
)
from prunewright.tools.model.tokens import embedding_rows
from prunewright.tools.saving.model import revision_bytes
from prunewright.tools.solve import reconstruction
from prunewright.tools.solve.solving import PASSES, solves

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
TEXTS = 160 * 2**20
"""Bytes that reading and tokenizing texts takes, at most: of a long text 124 MiB were measured."""
HELD = 384 * 2**20
"""Bytes on a processor beyond what is counted: libraries that a run loads later, and freed memory
that the allocator keeps by thread. The demo's peak is 369 MiB above the rest (two threads)."""


class Plan(BaseModel):
    """A prediction; bytes and seconds.

    Attributes:
        model: its name, as given.
        directory: where its files are.
        dtype: what would be computed in.
        device: what it would be computed on.
        blocks: decoder blocks.
        layers: prunable layers.
        parameters: all parameters.
        prunable: weights of the prunable layers.
        left_dense: what of the blocks' weights is in none by its structure; a pass of the model,
            which a run begins with, may leave more.
        stored: bytes of the weight files by dtype; empty while they are not on this machine.
        weights: bytes of the weights in memory.
        disk: ``model`` (saved at the end, as it is stored), ``masks`` (each layer once, with its
            kept weights where they are solved for), ``copy`` (in the cache, of layers that
            transformers renames or fuses while loading; as far as the files' index says),
            ``total`` (masks of all steps included).
        disk_free: free where the run directory would be.
        memory: ``weights``, ``profile`` (backward pass), ``masks``, ``apply`` (on a processor,
            the weights of the step before beside the map of the dense ones), ``finish`` (the
            saved model is reloaded beside the live one) and ``peak``, the largest in all, all on
            the device. ``host`` is what the machine itself holds throughout, a processor's
            ``peak`` includes it: ``texts``, and ``gradients`` of each weight, where the criterion
            keeps them.
        memory_available: of the device or, on the processor, of the machine.
        host_available: of the machine.
        flops: by what is done in a step, and ``finish``.
        steps: fewest steps that reach the target.
        seconds: ``window`` (measured), and from it ``step`` (mean), ``finish`` and ``run`` (with
            the fewest steps); empty if nothing was timed.
        warnings: what will not fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    directory: str
    dtype: str
    device: str
    blocks: int
    layers: int
    parameters: int
    prunable: int
    left_dense: str
    stored: dict[str, int]
    weights: int
    disk: dict[str, int]
    disk_free: int
    memory: dict[str, int]
    memory_available: int
    host_available: int
    flops: dict[str, float]
    steps: int
    seconds: dict[str, float]
    warnings: list[str]


class _Shape(BaseModel):
    """The sizes that the predictions are made from."""

    blocks: int
    width: int
    inner: int
    vocabulary: int
    parameters: int
    prunable: int
    active: float
    largest: int
    squares: float
    """Sum of the layers' inputs squared."""
    cubes: float
    """Sum of the layers' outputs times inputs squared."""


def make_plan(request: PruneRequest, out: Path = Path(), *, timed: bool = False) -> Plan:
    """Predict a run from the model's structure; no weights are read, unless it is to be timed.

    Operations: a forward pass takes 2 operations a weight and token, plus 4 a block, width and
    token pair for attention; the head 2 a vocabulary entry, width and token where losses are
    taken. A backward pass takes two forward passes, and a third to recompute activations with
    ``gradient_checkpointing``. Experts count by the share of them that a token is routed to.
    Where weights are solved for, the calibration windows go through the blocks `PASSES` times
    more, with 2 inputs squared a layer and token for X^T X, and the solve itself.

    Time: one window is scored by the loaded model, and all else takes as much longer as it has
    operations more. Loading and saving, ordering the weights by their scores, and what an LLM
    takes to answer are not counted.

    Memory: this process now, the weights, and the largest of a backward pass (activations of
    every block, or with checkpointing every block's input and one block's activations; 256
    tokens' logits three times in float32; one layer's gradient and two temporaries), of a mask
    (scores, order and mask of the largest layer), of a solve, and of the reload at the end. Texts,
    and 8 bytes a weight where a criterion keeps the gradient of each (GBLM), are the machine's.

    Args:
        request: what would be run.
        out: where the run directory would be.
        timed: load the model and score one window, to predict the time.

    Raises:
        InputError: no such model, or nothing in it can be pruned.
    """
    model, directory = model_skeleton(request.model, trust_remote_code=request.trust_remote_code)
    layers = find_layers(model)
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, directory, device)
    shape = _shape(model, layers)
    flops = _flops(request, shape)
    steps = math.ceil(request.target / min(request.step, request.target))
    memory = _memory(request, shape, dtype, device)
    tensors = _tensors(directory)
    stored = _stored(tensors.values())
    saved = sum(stored.values()) or shape.parameters * dtype.itemsize
    copy = _copied(layers, directory, tensors) * dtype.itemsize
    disk = _disk(request, shape, dtype, steps, saved, copy)
    available, free = _available(device), _free(out)
    host = _available(torch.device("cpu"))
    return Plan(
        model=request.model,
        directory=str(directory),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        blocks=shape.blocks,
        layers=len(layers),
        parameters=shape.parameters,
        prunable=shape.prunable,
        left_dense=left_dense(model, layers, {})[0],
        stored=stored,
        weights=shape.parameters * dtype.itemsize,
        disk=disk,
        disk_free=free,
        memory=memory,
        memory_available=available,
        host_available=host,
        flops=flops,
        steps=steps,
        seconds=_seconds(request, flops, steps) if timed else {},
        warnings=_warnings(memory, available, host, disk["total"], free),
    )


def _seconds(request: PruneRequest, flops: dict[str, float], steps: int) -> dict[str, float]:
    """Seconds of a run's parts, from those that one window takes."""
    window = time_window(request)
    windows = {name: n * request.texts.windows.guard / flops["guard"] for name, n in flops.items()}
    step = window * sum(n for name, n in windows.items() if name != "finish")
    finish = window * windows["finish"]
    run = window * windows["guard"] + steps * step + finish
    return {"window": window, "step": step, "finish": finish, "run": run}


def time_window(request: PruneRequest) -> float:
    """Seconds that the loaded model takes to score one window, once it is warm.

    Raises:
        InputError: as `load_model`, or windows are longer than the model takes.
    """
    length = request.texts.windows.length
    loaded = load_model(
        request.model,
        dtype=request.dtype,
        device=request.device,
        offload=request.offload,
        trust_remote_code=request.trust_remote_code,
        keep_dense=False,
    )
    try:
        loaded.check_length(length)
        head = Head(loaded.model)
        window = torch.arange(length).unsqueeze(0) % embedding_rows(loaded.model)
        loaded.execution.window_losses(head, window)
        began = time.perf_counter()
        # The losses are numbers of Python: a device that computes on its own is waited for.
        loaded.execution.window_losses(head, window)
        return time.perf_counter() - began
    finally:
        loaded.close()


def _shape(model: torch.nn.Module, layers: dict[str, Layer]) -> _Shape:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    experts = next(
        (n for key in ("num_experts", "num_local_experts", "n_routed_experts")
         if isinstance(n := getattr(config, key, None), int) and n),
        1,
    )  # fmt: skip
    share = min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)
    routed = sum(ly.numel for ly in layers.values() if "experts" in ly.projection.split("."))
    prunable = sum(layer.numel for layer in layers.values())
    return _Shape(
        blocks=len(named_blocks(model)),
        width=config.hidden_size,
        inner=max(max(_outputs_inputs(layer)) for layer in layers.values()),
        vocabulary=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        prunable=prunable,
        active=prunable - routed + routed * share,
        largest=max(layer.numel for layer in layers.values()),
        squares=sum(float(_outputs_inputs(ly)[1]) ** 2 for ly in layers.values()),
        cubes=sum(float(ly.numel) * _outputs_inputs(ly)[1] for ly in layers.values()),
    )


def _flops(request: PruneRequest, shape: _Shape) -> dict[str, float]:
    windows = request.texts.windows
    blocks = 2 * shape.active + 4 * shape.blocks * windows.length * shape.width
    head = 2.0 * shape.vocabulary * shape.width
    passes = 4 if request.profile.gradient_checkpointing else 3
    scored = windows.length * (blocks + head)
    solve = 0.0
    if solves(request):
        rounds = reconstruction.ITERATIONS if request.reconstruct else 1
        tokens = windows.calibration * windows.length
        solve = tokens * (PASSES * blocks + 2 * shape.squares) + rounds * 2 * shape.cubes
    return {
        "activations": windows.calibration * windows.length * blocks,
        "gradients": windows.gradient * windows.length * (passes * blocks + 3 * head)
        / request.profile.gradient_every,
        "solve": solve,
        "guard": windows.guard * scored,
        "finish": 2 * windows.test * scored,
    }  # fmt: skip


def _memory(
    request: PruneRequest, shape: _Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    length, size = request.texts.windows.length, dtype.itemsize
    inputs = length * shape.width * size
    # Queries, keys, values, output, residuals, norms; gate, up, activation and product.
    block = length * size * (8 * shape.width + 4 * shape.inner)
    kept = inputs * shape.blocks + 2 * block
    if not request.profile.gradient_checkpointing:
        kept = block * shape.blocks + block
    logits = 3 * 4 * min(TOKENS_AT_ONCE, length) * shape.vocabulary
    weights = shape.parameters * size
    parts = {
        "weights": weights,
        "profile": kept + logits + 3 * shape.largest * size,
        # Dense values, scores in float32, their order in int64, masks of all layers by then.
        "masks": shape.largest * (size + 4 + 8 + 2) + shape.prunable,
        # What enters and leaves a block by window; X^T X, its factor and the weights in float32.
        "solve": (2 * inputs * request.texts.windows.calibration + block)
        + 4 * (2 * shape.inner**2 + 4 * shape.largest),
        "finish": weights + 2 * block + logits,
    }
    if not solves(request):
        del parts["solve"]
    held = psutil.Process().memory_info().rss
    texts = TEXTS
    # The mean squares of each weight's gradient, in float32, and those of the newest, too, while
    # the older are let go.
    gradients = 8 * shape.prunable if find_criterion(request.criterion).by_weight else 0
    host = {"texts": texts, "gradients": gradients, "host": texts + gradients}
    if device.type == "cpu":
        parts["apply"] = 2 * shape.prunable * size
        held += HELD + host["host"]
    peak = held + weights + max(size for name, size in parts.items() if name != "weights")
    return parts | host | {"peak": peak}


def _tensors(directory: Path) -> dict[str, Stored]:
    """What the weight files hold, by name; nothing while they are not all on this machine."""
    try:
        return read_tensors(directory)
    except InputError:  # of a local model it was raised before
        return {}


def _copied(layers: dict[str, Layer], directory: Path, tensors: Mapping[str, Stored]) -> int:
    """Weights of the layers that are copied to the cache, since no file holds them by their names.

    A copy takes in all layers. 0 for a model whose files are not here and have no index.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for index in directory.glob("*.safetensors.index.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError):
            content = json.loads(index.read_text(encoding="utf-8"))
            shapes |= dict.fromkeys(content.get("weight_map", {}))
    shapes |= {name: tensor.shape for name, tensor in tensors.items()}
    held = all(shapes.get(ly.parameter, ()) in (None, ly.shape) for ly in layers.values())
    return 0 if held or not shapes else sum(layer.numel for layer in layers.values())


def _disk(
    request: PruneRequest, shape: _Shape, dtype: torch.dtype, steps: int, model: int, copy: int
) -> dict[str, int]:
    masks = revision_bytes(request, shape.prunable, dtype.itemsize)
    # While the model is saved again after a crash, the earlier copy may still be there.
    total = model + masks * steps + copy
    return {"model": model, "masks": masks, "copy": copy, "total": total}


def _stored(tensors: Iterable[Stored]) -> dict[str, int]:
    """Bytes by dtype."""
    found: dict[str, int] = {}
    for tensor in tensors:
        kind = _DTYPE_NAMES.get(tensor.dtype, tensor.dtype)
        size = getattr(torch, kind).itemsize if hasattr(torch, kind) else 1
        found[kind] = found.get(kind, 0) + tensor.numel * size
    return found


def _outputs_inputs(layer: Layer) -> tuple[int, int]:
    return layer.outputs, layer.inputs


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _free(out: Path) -> int:
    place = out.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _warnings(memory: dict[str, int], available: int, host: int, disk: int, free: int) -> list[str]:
    found, peak = [], memory["peak"]
    if memory["host"] > host:
        found.append(
            f"the run keeps about {memory['host'] / 2**30:.1f} GiB beside the model in the "
            f"machine's own memory and {host / 2**30:.1f} GiB are available: choose a criterion "
            "that keeps no gradient of each weight"
        )
    if peak > available:
        found.append(
            f"the run needs about {peak / 2**30:.1f} GiB of memory and {available / 2**30:.1f} "
            "GiB are available: lower texts.windows.length, keep "
            "profile.gradient_checkpointing on, or choose dtype bfloat16"
        )
    if disk > free:
        found.append(
            f"the run needs about {disk / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are "
            "free: free some space or give another --out"
        )
    return found
