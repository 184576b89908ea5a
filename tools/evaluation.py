"""Perplexity and sparsity of any model, pruned here or not."""

import math

import torch
from pydantic import BaseModel, ConfigDict

from prunewright.tools.models import LoadedModel, load_model
from prunewright.tools.perplexity import Head, Progress, perplexity, window_losses
from prunewright.tools.texts import load_test_windows


class TextScore(BaseModel):
    """Perplexity on one text.

    Attributes:
        source: the text, as it was named.
        windows: how many of its first windows were scored.
        length: tokens in one.
        perplexity: exp of the mean token loss; None where that is not finite.
        stderr: its standard error over the windows; None for one window.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    windows: int
    length: int
    perplexity: float | None
    stderr: float | None


class Evaluation(BaseModel):
    """What `evaluate` found.

    Attributes:
        model: its name, as given.
        dtype: what was computed in.
        device: what it was computed on.
        parameters: all parameters.
        prunable: weights of the prunable layers.
        sparsity: fraction of exact zeros among those.
        texts: one score a text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: str
    device: str
    parameters: int
    prunable: int
    sparsity: float
    texts: list[TextScore]


def evaluate(
    model: str,
    texts: list[str],
    *,
    windows: int = 20,
    length: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the first windows of some texts with a model, dense or pruned.

    Args:
        model: ``embedded``, a model directory or a hub name.
        texts: sources, as in a config's ``texts.test``.
        windows: windows of each text.
        length: tokens in one.
        dtype: as in a config.
        device: as in a config.
        trust_remote_code: run Python code that the model brings.
        progress: told after each window.

    Raises:
        InputError: the model or a text cannot be used.
    """
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        keep_dense=False,
    )
    try:
        loaded.check_length(length)
        drawn = {s: load_test_windows(s, loaded.tokenizer, windows, length) for s in texts}
        head = Head(loaded.model)
        scores = [
            _score(source, window_losses(loaded.model, head, ids, progress), length)
            for source, ids in drawn.items()
        ]
        return Evaluation(
            model=model,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            parameters=sum(p.numel() for p in loaded.model.parameters()),
            prunable=loaded.prunable,
            sparsity=_sparsity(loaded),
            texts=scores,
        )
    finally:
        loaded.close()


def _score(source: str, losses: list[float], length: int) -> TextScore:
    value = perplexity(losses)
    finite = math.isfinite(value)
    n = len(losses)
    stderr = None
    if finite and n > 1:
        mean = sum(losses) / n
        stderr = value * math.sqrt(sum((x - mean) ** 2 for x in losses) / (n - 1) / n)
    return TextScore(
        source=source,
        windows=n,
        length=length,
        perplexity=value if finite else None,
        stderr=stderr,
    )


def _sparsity(loaded: LoadedModel) -> float:
    kept = sum(int(torch.count_nonzero(loaded.weight(ly))) for ly in loaded.layers.values())
    return 1 - kept / loaded.prunable
