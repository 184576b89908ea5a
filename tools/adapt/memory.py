"""What training takes beside the live weights, predicted before it begins, and what would fit."""

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from prunewright.state import InputError, PruneRequest
from prunewright.state.config import AdaptOptions
from prunewright.tools.execution.base import TOKENS
from prunewright.tools.model.head import TOKENS_AT_ONCE
from prunewright.tools.model.layers import Layer, named_blocks

_LOGITS = 6
"""Logits in float32 of a piece: both models' and their logarithms, and two gradients."""


@dataclass(frozen=True)
class Sizes:
    """What the prediction is made from.

    Attributes:
        trained: weights that are trained.
        largest: weights of the largest trained layer.
        itemsize: bytes of a live weight.
        windows: that go through the model at once.
        length: tokens of one.
        width: of the hidden states.
        inner: the most outputs or inputs of a layer.
        blocks: decoder blocks.
        vocabulary: entries of the head.
        checkpointing: whether activations are made again in the backward pass.
    """

    trained: int
    largest: int
    itemsize: int
    windows: int
    length: int
    width: int
    inner: int
    blocks: int
    vocabulary: int
    checkpointing: bool


def sizes_of(
    model: nn.Module,
    layers: Sequence[Layer],
    request: PruneRequest,
    options: AdaptOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> Sizes:
    """The sizes of a training.

    Args:
        model: the model, or its structure.
        layers: those that are trained.
        request: of the run.
        options: how it is trained.
        dtype: of the live weights.
        device: where.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    windows = request.texts.windows
    batch: int | str = windows.batch
    if isinstance(batch, str):
        batch = 1 if device.type == "cpu" else max(1, TOKENS // windows.length)
    return Sizes(
        trained=sum(layer.numel for layer in layers),
        largest=max(layer.numel for layer in layers),
        itemsize=dtype.itemsize,
        windows=min(batch, options.batch),
        length=windows.length,
        width=config.hidden_size,
        inner=max(max(layer.outputs, layer.inputs) for layer in layers),
        blocks=len(named_blocks(model)),
        vocabulary=config.vocab_size,
        checkpointing=request.profile.gradient_checkpointing,
    )


def state_bytes(optimizer: str, sizes: Sizes) -> int:
    """Gradients, masters and moments of what is trained, and what one layer's step takes."""
    each = 4 + (8 if optimizer == "adamw" else 0) + (4 if sizes.itemsize < 4 else 0)
    # A live gradient and which weights are there; Adafactor's update, and what it is made from.
    step = sizes.itemsize + 1 if optimizer == "adamw" else 12
    return each * sizes.trained + step * sizes.largest


def pass_bytes(sizes: Sizes) -> int:
    """Activations of a group of windows, and logits of a piece of them."""
    states = sizes.windows * sizes.length * sizes.width * sizes.itemsize
    # Queries, keys, values, output, residuals, norms; gate, up, activation and product.
    inside = 8 * sizes.width + 4 * sizes.inner
    block = sizes.windows * sizes.length * inside * sizes.itemsize
    kept = states * (sizes.blocks + 5) if sizes.checkpointing else block * sizes.blocks
    tokens = min(TOKENS_AT_ONCE, sizes.windows * sizes.length)
    return kept + 2 * block + _LOGITS * 4 * tokens * sizes.vocabulary


def disk_bytes(options: AdaptOptions, sizes: Sizes, windows: int) -> int:
    """Files while training goes on.

    That is two checkpoints, two sets of weights, and the dense model's outputs.

    Args:
        options: how it is trained.
        sizes: see there.
        windows: of calibration.
    """
    state = 4 + (8 if options.optimizer == "adamw" else 0)
    outputs = windows * sizes.length * sizes.width * sizes.itemsize
    return 2 * (state + sizes.itemsize) * sizes.trained + outputs


def free_memory(devices: Iterable[torch.device]) -> int:
    """Bytes that the devices of a model have left, with what torch holds there and does not use."""
    free = 0
    for device in set(devices):
        if device.type == "cuda":
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free += int(torch.cuda.mem_get_info(device)[0]) + held
        else:
            free += int(psutil.virtual_memory().available)
    return free


def check_room(
    options: AdaptOptions, sizes: Sizes, layers: Sequence[Layer], free: int, device: str
) -> None:
    """Refuse a training that does not fit, with what would.

    Args:
        options: how it is trained.
        sizes: of what is trained.
        layers: those that are trained.
        free: bytes of the device, or of all that share the blocks.
        device: its type.

    Raises:
        InputError: it needs more than is free.
    """
    needed = state_bytes(options.optimizer, sizes) + pass_bytes(sizes)
    if needed <= free:
        return
    where = "machine" if device == "cpu" else "device"
    raise InputError(
        f"adapt needs about {_gib(needed)} of the {where}'s memory, {_gib(pass_bytes(sizes))} of "
        f"it for activations, and {_gib(free)} are free. {_fitting(options, sizes, layers, free)}"
    )


def _fitting(options: AdaptOptions, sizes: Sizes, layers: Sequence[Layer], free: int) -> str:
    """What would fit, in words."""
    ways = []
    least = replace(sizes, windows=1, checkpointing=True)
    for optimizer in dict.fromkeys([options.optimizer, "adafactor"]):
        for fewer in (sizes, least):
            needed = state_bytes(optimizer, fewer) + pass_bytes(fewer)
            if needed <= free:
                settings = _changed(options, sizes, optimizer, fewer)
                ways.append(f"{settings} ({_gib(needed)})")
                break
    # The fewest weights that may be asked for: whole kinds of layers, the largest first.
    chosen, trained = list[str](), 0
    kinds = Counter[str]()
    for layer in layers:
        kinds[layer.kind] += layer.numel
    for kind, weights in kinds.most_common():
        fewer = replace(least, trained=trained + weights)
        if state_bytes("adafactor", fewer) + pass_bytes(least) <= free:
            chosen, trained = [*chosen, f"*.{kind}"], trained + weights
    if chosen and not ways:
        words = [shlex.quote(f"adapt.layers={json.dumps(chosen)}")]
        if changed := _changed(options, sizes, "adafactor", least):
            words.append(changed)
        ways.append(" --set ".join(words))
    if not ways:
        return "Nothing of it fits: take shorter texts.windows.length, or leave adapt away"
    return "What would fit: --set " + ", or --set ".join(ways)


def _changed(options: AdaptOptions, sizes: Sizes, optimizer: str, fewer: Sizes) -> str:
    settings = [f"adapt.optimizer={optimizer}"] if optimizer != options.optimizer else []
    if fewer.windows < sizes.windows:
        settings.append("texts.windows.batch=1")
    if fewer.checkpointing and not sizes.checkpointing:
        settings.append("profile.gradient_checkpointing=true")
    return " --set ".join(settings)


def check_disk(options: AdaptOptions, sizes: Sizes, windows: int, folder: Path) -> None:
    """Refuse a training whose checkpoints have no room.

    Args:
        options: how it is trained.
        sizes: of what is trained.
        windows: of calibration.
        folder: of its files; what is there already needs no room.

    Raises:
        InputError: it needs more than is free where the folder will be.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = disk_bytes(options, sizes, windows) - held, shutil.disk_usage(place).free
    if needed > free:
        other = "" if held else ", set adapt.optimizer=adafactor, or give another --out"
        raise InputError(
            f"adapt needs about {_gib(needed)} of disk for its checkpoints and the dense model's "
            f"outputs, and {_gib(free)} are free at {place}: free some space{other}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
