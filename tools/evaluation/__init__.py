"""Perplexity, answers and sparsity of any model, pruned here or not."""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from prunewright.state.config import Offload
from prunewright.tools.evaluation.harness import Quiz, ask
from prunewright.tools.evaluation.kept import Kept
from prunewright.tools.evaluation.scores import Comparison, TaskScore, compare
from prunewright.tools.fast import count_zeros, read_at_once
from prunewright.tools.losses import perplexity
from prunewright.tools.model.head import Head, Progress
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.model.tokens import embedding_rows
from prunewright.tools.store.storage import canonical_json, sha256_bytes, write_json
from prunewright.tools.texts.windows import load_test_windows


class TextScore(BaseModel):
    """Perplexity on one text.

    Attributes:
        source: the text, as it was named.
        windows: how many of its windows were scored, from the first on.
        length: tokens in one.
        perplexity: exp of the mean token loss; None where that is not finite.
        stderr: its standard error over the windows; None for one window.
        losses: mean token loss of each window, nats; None where that is not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    windows: int
    length: int
    perplexity: float | None
    stderr: float | None
    losses: list[float | None]


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
        tasks: one score a task.
        against: the other model, if one was asked the same.
        comparisons: the model against it, task by task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: str
    device: str
    parameters: int
    prunable: int
    sparsity: float
    texts: list[TextScore]
    tasks: list[TaskScore] = []
    against: "Evaluation | None" = None
    comparisons: list[Comparison] = []


def evaluate(
    model: str,
    texts: Sequence[tuple[str, int | None]] = (),
    quizzes: Sequence[Quiz] = (),
    *,
    against: str | None = None,
    length: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
    offload: Offload = "none",
    trust_remote_code: bool = False,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score texts and put questions to a model, dense or pruned.

    Args:
        model: ``embedded``, a model directory or a hub name.
        texts: sources, as in a config's ``texts.test``, and how many of its first windows are
            scored of each, every one begun as the tokenizer begins a text; None: all windows of
            the text tokenized once, as GPTQ, SparseGPT and Wanda do.
        quizzes: of `prepare_quizzes`.
        against: another model that is asked the same, mostly the dense one.
        length: tokens in one.
        dtype: as in a config.
        device: as in a config.
        offload: likewise.
        trust_remote_code: run Python code that the models bring.
        store: directory for ``evaluation.json`` and for what was measured so far, so that a
            killed evaluation goes on where it was.
        progress: told after each window and question.

    Raises:
        InputError: a model or a text cannot be used.
        StoreError: what is in ``store`` is damaged, or it cannot be written.
    """

    def one(name: str) -> Evaluation:
        loaded = load_model(
            name,
            dtype=dtype,
            device=device,
            offload=offload,
            trust_remote_code=trust_remote_code,
            keep_dense=False,
        )
        try:
            if texts:
                loaded.check_length(length)
            rows = embedding_rows(loaded.model)
            drawn = [
                load_test_windows(source, loaded.tokenizer, count, length, rows=rows)
                for source, count in texts
            ]
            with closing(Kept(store, loaded)) as kept:
                scores = [
                    _score(source, _losses(loaded, ids, kept, progress), length)
                    for (source, _), ids in zip(texts, drawn, strict=True)
                ]
                tasks = [ask(loaded, quiz, kept, progress) for quiz in quizzes]
            return Evaluation(
                model=name,
                dtype=str(loaded.dtype).removeprefix("torch."),
                device=str(loaded.device),
                parameters=sum(p.numel() for p in loaded.model.parameters()),
                prunable=loaded.prunable,
                sparsity=_sparsity(loaded),
                texts=scores,
                tasks=tasks,
            )
        finally:
            loaded.close()

    found = one(model)
    if against is not None:
        reference = one(against)
        pairs = zip(found.tasks, reference.tasks, strict=True)
        comparisons = [compare(ours, theirs) for ours, theirs in pairs]
        found = found.model_copy(update={"against": reference, "comparisons": comparisons})
    if store is not None:
        write_json(store / "evaluation.json", found.model_dump(mode="json"))
    return found


def _losses(
    loaded: LoadedModel, windows: Tensor, kept: Kept, progress: Progress | None
) -> list[float]:
    """Mean token loss of each window [windows, length], those that are kept not computed again."""
    keys = [sha256_bytes(canonical_json([window.tolist()])) for window in windows]
    found = {key: loss for key in keys if isinstance(loss := kept.get(key), float)}
    left = [number for number, key in enumerate(keys) if key not in found]
    if left:
        head, known = Head(loaded.model), len(windows) - len(left)

        def told(label: str, done: int, total: int) -> None:
            if progress is not None:
                progress(label, known + done, known + total)

        losses = loaded.execution.each_loss(head, windows[left], told)
        for number, loss in zip(left, losses, strict=True):
            kept[keys[number]] = found[keys[number]] = loss
    return [found[key] for key in keys]


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
        losses=[loss if math.isfinite(loss) else None for loss in losses],
    )


def _sparsity(loaded: LoadedModel) -> float:
    zeros = read_at_once(count_zeros(loaded.weight(layer)) for layer in loaded.layers.values())
    return sum(zeros) / loaded.prunable
