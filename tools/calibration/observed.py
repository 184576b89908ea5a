"""What both passes of the calibration share: their sums, and what nothing was seen of."""

import torch
from torch import Tensor

from prunewright.state import InputError
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel

NAMED = 6
"""Layers that a note names."""


def accumulators(
    loaded: LoadedModel, *, inputs: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros [experts or 1, inputs or outputs] in a wide dtype, and token counts, by layer."""
    squares, counts = {}, {}
    for name, layer in loaded.layers.items():
        device, _ = loaded.execution.weights.place(layer)
        experts = layer.form[0] if len(layer.form) == 3 else 1
        width = layer.inputs if inputs else layer.outputs
        squares[name] = torch.zeros(experts, width, dtype=wide_dtype(device), device=device)
        counts[name] = torch.zeros(experts, dtype=torch.int64, device=device)
    return squares, counts


def fill_unseen(
    loaded: LoadedModel, means: dict[str, Tensor], seen: dict[str, Tensor]
) -> list[str]:
    """Give what was not seen the mean of what is beside it; name what has nothing beside.

    Beside an expert of a fused tensor are the others; beside an expert that is a module of its
    own, those of its block.

    Args:
        loaded: the model.
        means: values [experts or 1, n] by layer, written in place.
        seen: [experts or 1] by layer.
    """
    orphans = []
    for name, layer in loaded.layers.items():
        if bool(seen[name].all()):
            continue
        beside = [
            means[n][seen[n]]
            for n, other in loaded.layers.items()
            if (other.block, other.form, other.kind) == (layer.block, layer.form, layer.kind)
        ]
        if sum(map(len, beside)) == 0:
            orphans.append(name)
        else:
            means[name][~seen[name]] = torch.cat(beside).mean(dim=0)
    return orphans


def fill_from_afar(
    loaded: LoadedModel, means: dict[str, Tensor], seen: dict[str, Tensor], names: list[str]
) -> None:
    """Give layers that have nothing beside them the mean of the other blocks', or of all layers."""
    if not names:
        return
    anywhere = [means[n][seen[n]].mean().item() for n in loaded.layers if bool(seen[n].any())]
    for name in names:
        layer = loaded.layers[name]
        like = [
            means[n][seen[n]]
            for n, other in loaded.layers.items()
            if (other.form, other.kind) == (layer.form, layer.kind)
        ]
        if sum(map(len, like)):
            means[name][:] = torch.cat(like).mean(dim=0)
        elif anywhere:
            means[name].fill_(sum(anywhere) / len(anywhere))


def unseen_words(words: str, seen: dict[str, Tensor]) -> list[str]:
    """One sentence on what was not seen; none where all was."""
    parts = [
        name if len(there) == 1 else f"{int((~there).sum())} of {len(there)} in {name}"
        for name, there in seen.items()
        if not bool(there.all())
    ]
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return [words.format(", ".join(parts[:NAMED]) + more)] if parts else []


def finished(values: Tensor, layer: Layer, what: str) -> Tensor:
    """float32, without the leading dimension where nothing is fused.

    Raises:
        InputError: not finite.
    """
    values = values.float()
    if not bool(values.isfinite().all()):
        raise InputError(
            f"the {what} of {layer.name} are not finite: the model is broken, or its dtype is too "
            "narrow for it (try bfloat16 or float32)"
        )
    return values if len(layer.form) == 3 else values[0]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of long sums: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
