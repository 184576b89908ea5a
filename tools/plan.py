"""What a run would load, and the memory, disk and time that it would take. Nothing is run."""

import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from prunewright.state import InputError, PruneRequest
from prunewright.state.config import ALL, EMBEDDED, SELF, AdaptOptions, Offload
from prunewright.state.profile import KNOWLEDGE_SIGNAL
from prunewright.tools.adapt.memory import (
    Sizes,
    check_disk,
    check_room,
    disk_bytes,
    free_memory,
    pass_bytes,
    sizes_of,
    state_bytes,
)
from prunewright.tools.adapt.training import MEASURED, check_offload, chosen_layers
from prunewright.tools.criteria import LayerStatistics, find_criterion, prune_mask
from prunewright.tools.execution.base import TOKENS
from prunewright.tools.execution.blocks import STATES
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
from prunewright.tools.model.writing import AT_ONCE, LENGTH, batches_of
from prunewright.tools.saving.model import revision_bytes
from prunewright.tools.solve import reconstruction
from prunewright.tools.solve.fit import HELD_OUT
from prunewright.tools.solve.solving import solves
from prunewright.tools.texts.windows import own_windows

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
TEXTS = 160 * 2**20
"""Bytes that reading and tokenizing texts takes, at most: of a long text 124 MiB were measured."""
PRODUCT = 1024
"""Rows and columns of the product that is timed."""
OWN = "own text"
"""What is predicted of the text that the dense model writes by itself, where it does."""
SHORT = 32 * 2**20
"""The same of the embedded texts."""
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
        disk: ``model`` (saved at the end, as it is stored), ``masks`` (each layer once),
            ``updated`` (the last revision with its kept weights, where they are solved for),
            ``copy`` (in the cache, of layers that transformers renames or fuses while loading; as
            far as the files' index says), ``total`` (masks of all steps included).
        disk_free: free where the run directory would be.
        memory: of the run as it is configured, beyond files that are mapped. ``weights`` that are
            live, ``passes``, ``profile`` (the backward pass), ``masks`` and ``solve`` are the
            device's, and so is ``peak``, the largest of them beside the weights. ``host`` is what
            the machine itself holds, on a processor all of it: ``texts`` and ``gradients`` of each
            weight, where the criterion keeps them, are part of it.
        ways: ``device`` and ``host`` at their peaks by ``offload``.
        recommended: the ``offload`` that fits and is fastest; None if none fits.
        memory_available: of the device or, on the processor, of the machine.
        host_available: of the machine.
        flops: by what is done in a step, after the last one: ``solve``, ``finish``, and before
            the first one: ``own text``.
        steps: fewest steps that reach the target.
        seconds: ``window`` (measured) and ``masks`` of all layers (from one that is measured), and
            from them ``step`` (mean), ``finish`` and ``run`` (with the fewest steps); ``own text``,
            from the time of a token; empty if nothing was timed.
        adapt: what the training at the end takes: bytes of the device's ``memory``, the live
            weights among it, and of ``disk`` while it goes on; ``flops``; and ``seconds``, which
            are part of the run's, if it was timed. Empty if there is none.
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
    ways: dict[str, dict[str, int]]
    recommended: str | None
    memory_available: int
    host_available: int
    flops: dict[str, float]
    steps: int
    seconds: dict[str, float]
    adapt: dict[str, float]
    warnings: list[str]


class _Shape(BaseModel):
    """The sizes that the predictions are made from."""

    blocks: int
    width: int
    inner: int
    vocabulary: int
    parameters: int
    inside: int
    """Parameters of the blocks."""
    prunable: int
    active: float
    largest: int
    cached: int
    """Values that a block keeps of each token while text is written: its keys and values."""
    squares: float
    """Sum of the layers' inputs squared."""
    cubes: float
    """Sum of the layers' outputs times inputs squared."""


def make_plan(
    request: PruneRequest,
    out: Path = Path(),
    *,
    training: AdaptOptions | None = None,
    signals: Collection[str] = (),
    timed: bool = False,
) -> Plan:
    """Predict a run from the model's structure; no weights are read, unless it is to be timed.

    Operations: a forward pass takes 2 operations a weight and token, plus 4 a block, width and
    token pair for attention; the head 2 a vocabulary entry, width and token where losses are
    taken. A backward pass takes two forward passes, and a third to recompute activations with
    ``gradient_checkpointing``. Experts count by the share of them that a token is routed to.
    Where weights are solved for, which is done after the last step, the calibration windows go
    through the blocks some times more (`_solve_passes`), and in float32 come 2 inputs squared a
    layer and token for X^T X, and the solve itself.

    Time: one window is scored by the loaded model, and all else takes as much longer as it has
    operations more. But for solves, whose float32 products are timed by themselves, for masks, of
    which one is timed, and for text that the model writes by itself, of which a token is. Loading,
    saving, and what an LLM takes to answer are not counted.

    Memory: this process now, the live weights, and the largest of a pass, of a backward pass
    (activations of every block, or with checkpointing every block's input and one block's
    activations; 256 tokens' logits three times in float32; one layer's gradient), of a mask (scores
    and mask of the largest layer), and of a solve. Block by block as many windows go together as
    have room in `STATES`.

    Args:
        request: what would be run.
        out: where the run directory would be.
        training: how the kept weights would be trained at the end; None: not at all.
        signals: what an LLM would be shown; z_k is counted as a second backward pass.
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
    if KNOWLEDGE_SIGNAL in signals:
        flops["gradients"] *= 2
    steps = math.ceil(request.target / min(request.step, request.target))
    tensors = _tensors(directory)
    stored = _stored(tensors.values())
    copy = _copied(layers, directory, tensors) * dtype.itemsize
    mapped = not copy and set(stored) <= {str(dtype).removeprefix("torch.")}
    memory = _memory(request, shape, dtype, device, mapped=mapped)
    ways = _ways(request, shape, dtype, device, mapped=mapped)
    saved = sum(stored.values()) or shape.parameters * dtype.itemsize
    disk = _disk(request, shape, dtype, steps, saved, copy)
    count = torch.cuda.device_count() if request.device == ALL else 0
    available = free_memory([torch.device("cuda", i) for i in range(count)] or [device])
    host, free = free_memory([torch.device("cpu")]), _free(out)
    seconds = _seconds(request, flops, steps, shape.prunable, dtype) if timed else {}
    # All weights that are trained are on the device.
    fit = ways if training is None else {"none": ways["none"]}
    warnings = _warnings(request, fit, available, host, disk["total"], free)
    adapt: dict[str, float] = {}
    if training is not None:
        chosen = chosen_layers(list(layers.values()), training)
        sizes = sizes_of(model, chosen, request, training, dtype, device)
        adapt = _training(request, training, sizes, flops)
        own = {"weights", "texts", "gradients", "host", "peak"}
        # What is there beside the largest of the other parts, which is over by then.
        beside = memory["peak"] - max(n for name, n in memory.items() if name not in own)
        adapt["memory"] += beside
        left, folder = max(available - beside, 0), out.expanduser() / "adapt"
        checks: list[Callable[[], None]] = [
            lambda: check_offload(request),
            lambda: check_room(training, sizes, chosen, left, device.type),
            lambda: check_disk(training, sizes, request.texts.windows.calibration, folder),
        ]
        for check in checks:
            try:
                check()
            except InputError as error:
                warnings.append(str(error))
        if seconds:
            rate = flops["guard"] / request.texts.windows.guard / seconds["window"]
            adapt["seconds"] = adapt["flops"] / rate
            seconds["run"] += adapt["seconds"]
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
        ways=ways,
        recommended=_recommended(fit, available, host),
        memory_available=available,
        host_available=host,
        flops=flops,
        steps=steps,
        seconds=seconds,
        adapt=adapt,
        warnings=warnings,
    )


def _seconds(
    request: PruneRequest, flops: dict[str, float], steps: int, prunable: int, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of a run's parts, from those that one window takes."""
    window, token = time_window(request)
    rate = flops["guard"] / request.texts.windows.guard / window
    parts = {name: n / rate for name, n in flops.items()}
    device = resolve_device(request.device)
    if flops["solve"]:
        parts["solve"] = flops["solve"] / time_products(device)
    masks = prunable * time_mask(request.criterion, dtype, device)
    finish = sum(parts.pop(name) for name in ("finish", "solve", "solve passes"))
    own: dict[str, float] = {}
    if OWN in parts:
        del parts[OWN]
        tokens = _own_windows(request) * request.texts.windows.length
        batches = batches_of(tokens, chats=True)
        own[OWN] = len(batches) * LENGTH * token
    step = sum(parts.values()) + masks
    run = window * request.texts.windows.guard + steps * step + finish + sum(own.values())
    return {"window": window, "masks": masks, "step": step, "finish": finish, "run": run} | own


def _training(
    request: PruneRequest, training: AdaptOptions, sizes: Sizes, flops: dict[str, float]
) -> dict[str, float]:
    """What the training at the end takes, as `Plan.adapt` but for the live weights.

    A token takes what one of a backward pass does, and the head once more, for the dense model's
    logits. The calibration windows go through the dense model once, and the guard is measured
    before the training and `MEASURED` times in its course.
    """
    windows = request.texts.windows
    window = flops["guard"] / windows.guard
    head = 2.0 * sizes.vocabulary * sizes.width * windows.length
    trained = max(1, training.tokens // (training.batch * windows.length)) * training.batch
    back = (4 if sizes.checkpointing else 3) * (window - head) + 4 * head
    return {
        "memory": state_bytes(training.optimizer, sizes) + pass_bytes(sizes),
        "disk": disk_bytes(training, sizes, windows.calibration),
        "flops": trained * back
        + windows.calibration * (window - head)
        + (MEASURED + 1) * windows.guard * window,
    }


def time_products(device: torch.device) -> float:
    """Operations a second in products of float32, as solves make them."""
    matrix = torch.rand(PRODUCT, PRODUCT, device=device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        # A number of Python: a device that computes on its own is waited for.
        float((matrix @ matrix)[0, 0])
        seconds.append(time.perf_counter() - began)
    return 2 * PRODUCT**3 / min(seconds)


def time_mask(criterion: str, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds a weight that masks of half of a matrix take, its scores included."""
    weight = torch.randn(PRODUCT, PRODUCT, device=device).to(dtype)
    ones = torch.ones(PRODUCT, device=device)
    statistics = LayerStatistics(ones, ones, torch.ones_like(weight, dtype=torch.float32))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        mask = prune_mask(weight, statistics, criterion, pruned=weight.numel() // 2)
        int(mask.sum())  # likewise
        seconds.append(time.perf_counter() - began)
    return min(seconds) / weight.numel()


def time_window(request: PruneRequest) -> tuple[float, float]:
    """Seconds that the loaded model takes to score one window, once it is warm.

    And those of one more token of each text of a batch, 0 if it writes none.

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
        seconds = time.perf_counter() - began
        if not _writes(request) or request.offload != "none":
            return seconds, 0.0
        tokens = window[:, :1].expand(AT_ONCE, 1).to(loaded.device)
        with torch.no_grad():
            began = time.perf_counter()
            float(loaded.model(input_ids=tokens).logits[0, 0, 0])
        return seconds, time.perf_counter() - began
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
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _Shape(
        blocks=len(named_blocks(model)),
        width=config.hidden_size,
        inner=max(max(_outputs_inputs(layer)) for layer in layers.values()),
        vocabulary=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        inside=sum(p.numel() for _, block in named_blocks(model) for p in block.parameters()),
        prunable=prunable,
        active=prunable - routed + routed * share,
        largest=max(layer.numel for layer in layers.values()),
        cached=2 * width * (getattr(config, "num_key_value_heads", None) or heads),
        squares=sum(float(_outputs_inputs(ly)[1]) ** 2 for ly in layers.values()),
        cubes=sum(float(ly.numel) * _outputs_inputs(ly)[1] for ly in layers.values()),
    )


def _flops(request: PruneRequest, shape: _Shape) -> dict[str, float]:
    windows = request.texts.windows
    blocks = 2 * shape.active + 4 * shape.blocks * windows.length * shape.width
    head = 2.0 * shape.vocabulary * shape.width
    passes = 4 if request.profile.gradient_checkpointing else 3
    scored = windows.length * (blocks + head)
    solve = passed = 0.0
    if solves(request):
        rounds = reconstruction.ITERATIONS if request.reconstruct != "none" else 1
        tokens = windows.calibration * windows.length
        passed = tokens * _solve_passes(request) * blocks
        solve = tokens * 2 * shape.squares + rounds * 2 * shape.cubes
    return {
        "activations": windows.calibration * windows.length * blocks,
        "gradients": windows.gradient
        * windows.length
        * (passes * blocks + 3 * head)
        / request.profile.gradient_every,
        "solve passes": passed,
        "solve": solve,
        "guard": windows.guard * scored,
        "finish": 2 * windows.test * scored,
    } | ({OWN: _own_windows(request) * scored} if _writes(request) else {})


def _own_windows(request: PruneRequest) -> int:
    return own_windows(request.texts, request.domain_weights)


def _writes(request: PruneRequest) -> bool:
    """Whether the dense model writes text by itself first."""
    return SELF in request.texts.named


def _solve_passes(request: PruneRequest) -> float:
    """Times that the calibration windows go through the blocks when kept weights are solved for.

    The sweep sees a block's inputs and makes its outputs. Least squares sees the inputs of the
    first layers, of the output projection, of the first and the second half of the MLP, which is
    some 1.7 passes. A fit makes the dense outputs, and goes forwards and backwards.
    """
    if request.reconstruct == "none":
        return 2
    fit = 1 + request.fit.epochs * (3 + 1 / HELD_OUT) if request.reconstruct == "block" else 0
    return 2.7 + fit


def _memory(
    request: PruneRequest, shape: _Shape, dtype: torch.dtype, device: torch.device, *, mapped: bool
) -> dict[str, int]:
    """Bytes of a run, at most; see `Plan.memory`.

    Args:
        request: what would be run; its ``offload`` says how.
        shape: the model's sizes.
        dtype: what would be computed in.
        device: where.
        mapped: whether the weights are stored as they are computed with, so that a processor reads
            them where they lie.
    """
    length, size = request.texts.windows.length, dtype.itemsize
    windows, offload = request.texts.windows, request.offload
    away, processor = offload != "none", device.type == "cpu"
    state = length * shape.width * size
    # Queries, keys, values, output, residuals, norms; gate, up, activation and product.
    block = length * size * (8 * shape.width + 4 * shape.inner)
    logits = 3 * 4 * min(TOKENS_AT_ONCE, length) * shape.vocabulary
    weights, outside = shape.parameters * size, (shape.parameters - shape.inside) * size
    one_block = shape.inside * size // shape.blocks
    if not away or (processor and offload == "cpu"):
        live = weights
    elif processor:
        # Masked weights of the block at work, and what lies beside the blocks if it is converted.
        live = one_block + (0 if mapped else outside + one_block)
    else:
        live = one_block + outside

    def at_once(wanted: int, each: int) -> int:
        """Hidden states of as many windows as go through the blocks together."""
        return min(wanted, max(1, STATES // each)) * each

    back = state * (shape.blocks + 3)
    if away:
        passed, kept = at_once(windows.calibration, 3 * state), at_once(windows.gradient, back)
    else:
        passed = state * (1 if processor else max(1, TOKENS // length)) * 3
        kept = back if request.profile.gradient_checkpointing else block * shape.blocks
    largest = shape.largest
    parts = {
        "passes": passed + block + logits,
        # A layer's gradient, its absolute values, and which weights are there.
        "profile": kept + 2 * block + logits + largest * (2 * size + 1),
        # Dense values if they are copied, scores twice in float32, their part in order, masks.
        "masks": largest * ((0 if mapped and processor else size) + 12 + 3),
    }
    if solves(request):
        # What enters and leaves a block; what the dense model gives to both, if it is fitted.
        fitted = request.reconstruct == "block"
        entering = (4 if fitted else 2) * state * windows.calibration
        # X^T X, its factor, the weights in float32 and what the sweep keeps of them; the solved
        # layers of a block.
        solved = 4 * (3 * shape.inner**2 + 4 * largest)
        # Of a block's weights: float32 copies, their gradients and two moments; those at work,
        # their gradients, and the best so far.
        fit = one_block // size * (16 + 3 * size) + block
        parts["solve"] = entering + block + max(solved, fit if fitted else 0) + one_block
    if _writes(request) and not away:
        cache = LENGTH * shape.blocks * shape.cached * size
        parts[OWN] = AT_ONCE * (cache + 3 * 4 * shape.vocabulary)
    base = _base()
    # The mean squares of each weight's gradient, in float32, and those of the newest, too, while
    # the older are let go.
    gradients = 8 * shape.prunable if find_criterion(request.criterion).by_weight else 0
    texts = SHORT if request.texts.named <= {EMBEDDED, SELF} else TEXTS
    if processor:
        # A small model leaves small holes.
        host = base + min(HELD, weights) + texts + gradients + live + max(parts.values())
        peak = host
    else:
        # What of the weights the machine holds: the blocks, or the masks of two revisions.
        here = {"none": 0, "cpu": shape.inside * size, "disk": 2 * shape.prunable // 8}[offload]
        host = base + texts + gradients + here
        peak = live + max(parts.values())
    return {
        "weights": live,
        **parts,
        "texts": texts,
        "gradients": gradients,
        "host": host,
        "peak": peak,
    }


def _base() -> int:
    """Bytes that this process has by itself, beyond files that are mapped."""
    held = psutil.Process().memory_info()
    return int(held.rss - getattr(held, "shared", 0))


def _ways(
    request: PruneRequest, shape: _Shape, dtype: torch.dtype, device: torch.device, *, mapped: bool
) -> dict[str, dict[str, int]]:
    """Peaks of the device and of the machine by ``offload``, for those that a device has."""
    found = {}
    for offload in get_args(Offload):
        if device.type == "cpu" and offload == "cpu":
            continue  # the weights are in memory either way
        memory = _memory(
            request.model_copy(update={"offload": offload}), shape, dtype, device, mapped=mapped
        )
        found[offload] = {"device": memory["peak"], "host": memory["host"]}
    return found


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
    masks, last = revision_bytes(request, shape.prunable, dtype.itemsize)
    # While the model is saved again after a crash, the earlier copy may still be there.
    total = model + masks * steps + last + copy
    return {"model": model, "masks": masks, "updated": last, "copy": copy, "total": total}


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


def _free(out: Path) -> int:
    place = out.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _fits(way: dict[str, int], available: int, host: int) -> bool:
    return way["device"] <= available and way["host"] <= host


def _recommended(ways: dict[str, dict[str, int]], available: int, host: int) -> str | None:
    """The first of the ways, which are in the order of their speed, that fits."""
    return next((name for name, way in ways.items() if _fits(way, available, host)), None)


def _warnings(
    request: PruneRequest,
    ways: dict[str, dict[str, int]],
    available: int,
    host: int,
    disk: int,
    free: int,
) -> list[str]:
    found = []
    if _writes(request) and request.offload != "none":
        found.append(
            f"with offload {request.offload} a model does not write text by itself: a run is "
            "refused, unless it is resumed and has its self.jsonl"
        )
    # On a processor the weights are in memory, whether none of them or all are sent there.
    way = ways.get(request.offload, ways["none"])
    if not _fits(way, available, host):
        better = _recommended(ways, available, host)
        less = "lower texts.windows.length, or choose dtype bfloat16"
        if find_criterion(request.criterion).by_weight:
            less += ", or a criterion that keeps no gradient of each weight"
        on_device = max(way["device"] - available, 0) >= max(way["host"] - host, 0)
        needed, there, where = (
            (way["device"], available, "of the device's")
            if on_device
            else (way["host"], host, "of the machine's")
        )
        found.append(
            f"the run needs about {needed / 2**30:.1f} GiB {where} memory and "
            f"{there / 2**30:.1f} GiB are available: "
            + (f"set offload={better}" if better else less)
        )
    if disk > free:
        found.append(
            f"the run needs about {disk / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are "
            "free: free some space or give another --out"
        )
    return found
