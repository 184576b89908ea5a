"""Losses of a text's windows, kept as they come, so that a killed evaluation goes on."""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from prunewright.tools.evaluation.kept import damaged, read_kept
from prunewright.tools.model.head import Head, Progress, window_losses
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.store.storage import canonical_json, sha256_bytes, write_json

CHUNK = 8
"""Windows whose losses are stored together: what a kill can cost."""


class _Stored(BaseModel):
    """The losses of a text's first windows, nats a token; None where not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: list[float | None]


def kept_losses(
    loaded: LoadedModel,
    head: Head,
    windows: Tensor,
    store: Path | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Mean token loss of each window, those that are kept not computed again.

    Args:
        loaded: the model; with ``store`` its weights must be those of its files.
        head: its head.
        windows: token ids [windows, length].
        store: directory where losses are kept.
        progress: told after each window.

    Returns:
        One mean loss a window, nats a token.

    Raises:
        StoreError: what is kept is damaged, or it cannot be written.
    """
    if store is None:
        return window_losses(loaded.model, head, windows, progress)
    tokens = sha256_bytes(canonical_json(windows.tolist()))
    key = sha256_bytes(canonical_json([loaded.standing(), tokens]))[:24]
    file = store / "outcomes" / f"perplexity-{key}.json"
    losses = _read(file, len(windows)) if file.exists() else []
    for begin in range(len(losses), len(windows), CHUNK):

        def told(what: str, done: int, _: int, begin: int = begin) -> None:
            if progress is not None:
                progress(what, begin + done, len(windows))

        losses += window_losses(loaded.model, head, windows[begin : begin + CHUNK], told)
        kept = _Stored(losses=[loss if math.isfinite(loss) else None for loss in losses])
        write_json(file, kept.model_dump(mode="json"))
    return losses


def _read(file: Path, most: int) -> list[float]:
    again = "its text is scored again"
    losses = read_kept(file, _Stored, again).losses
    if len(losses) > most:
        raise damaged(file, again)
    return [math.nan if loss is None else loss for loss in losses]
