"""What both passes of the calibration share: their sums, and what nothing was seen of."""

import torch
from torch import Tensor

from prunewright.state import InputError
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel

NAMED = 6
"""Layers that a note names."""
ENOUGH = 32
"""Tokens from which on an expert's E[x^2] is its own alone.

Measured on SmolLM2-135M (MLPs of three blocks, tokens routed to eight clusters, half of the weights
pruned as Wanda does) by the saliency that is lost, against the least, which other tokens of the
cluster give. 16 tokens lose 9 to 52 % more than the least, 32 about as much as all clusters' do (4
to 48 %), 16 of the cluster and 16 of all 3 to 29 %. Where the clusters' inputs mean other things,
as those of experts' second matrices do (shuffled by cluster), these are better in two of three.
"""


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


def mean_squares(
    loaded: LoadedModel, squares: dict[str, Tensor], counts: dict[str, Tensor], tokens: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Means of squares of inputs, and notes on what saw few tokens, or none.

    For the tokens that an expert lacks to `ENOUGH` stands the mean over all those that reached it
    or its like: the other experts of its tensor, or of its block where each is a module.

    Args:
        loaded: the model.
        squares: sums by layer [experts or 1, inputs].
        counts: tokens by layer [experts or 1].
        tokens: of the text; what saw all of them lacks none.

    Raises:
        InputError: a layer saw none, nor did its like.
    """
    alike: dict[tuple[int, tuple[int, ...], str], list[str]] = {}
    for name, layer in loaded.layers.items():
        alike.setdefault((layer.block, layer.form, layer.kind), []).append(name)
    enough, means = min(ENOUGH, tokens), {}
    for names in alike.values():
        seen = torch.stack([counts[name].sum() for name in names]).sum()
        if not seen:
            raise InputError(
                f"{names[0]} took part in no product that could be observed while the model ran: "
                "this model has a kind of layer that is not supported"
            )
        like = torch.stack([squares[name].sum(dim=0) for name in names]).sum(dim=0) / seen
        for name in names:
            missing = (enough - counts[name]).clamp(min=0).unsqueeze(1)
            means[name] = (squares[name] + missing * like) / (counts[name].unsqueeze(1) + missing)
    none = {name: count == 0 for name, count in counts.items()}
    few = {name: (count < enough) & ~none[name] for name, count in counts.items()}
    words = (
        f"{{}} saw fewer than {enough} calibration tokens: the mean of their like stands in for "
    )
    return means, [
        *said_of("{} saw no calibration token and count as the mean of their like", none),
        *said_of(f"{words}the missing ones", few),
    ]


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
            means[n][seen[n]].to(means[name].device)
            for n, other in loaded.layers.items()
            if (other.form, other.kind) == (layer.form, layer.kind)
        ]
        if sum(map(len, like)):
            means[name][:] = torch.cat(like).mean(dim=0)
        elif anywhere:
            means[name].fill_(sum(anywhere) / len(anywhere))


def said_of(words: str, which: dict[str, Tensor]) -> list[str]:
    """One sentence on some layers and experts, True in [experts or 1]; none where it is of none."""
    parts = [
        name if len(ones) == 1 else f"{int(ones.sum())} of {len(ones)} in {name}"
        for name, ones in which.items()
        if bool(ones.any())
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
