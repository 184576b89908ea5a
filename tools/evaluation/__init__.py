"""Perplexity, answers and sparsity of any model, pruned here or not."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prunewright.tools.evaluation.harness import Quiz, ask
from prunewright.tools.evaluation.scores import Comparison, TaskScore, compare
from prunewright.tools.evaluation.windows import kept_losses
from prunewright.tools.losses import perplexity
from prunewright.tools.masks import count_zeros
from prunewright.tools.model.head import Head, Progress
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.model.tokens import embedding_rows
from prunewright.tools.store.storage import write_json
from prunewright.tools.texts.windows import load_test_windows

Protocol = Literal["windows", "literature"]


class TextScore(BaseModel):
    """Perplexity on one text.

    Attributes:
        source: the text, as it was named.
        windows: how many of its windows were scored, from the first on.
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
    texts: Sequence[str] = (),
    quizzes: Sequence[Quiz] = (),
    *,
    against: str | None = None,
    protocol: Protocol = "windows",
    windows: int = 20,
    length: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score texts and put questions to a model, dense or pruned.

    Args:
        model: ``embedded``, a model directory or a hub name.
        texts: sources, as in a config's ``texts.test``.
        quizzes: of `prepare_quizzes`.
        against: another model that is asked the same, mostly the dense one.
        protocol: ``windows`` scores the first windows of each text, each begun as the tokenizer
            begins a text; ``literature`` all windows of the text tokenized once, as GPTQ,
            SparseGPT and Wanda do.
        windows: windows of each text; ``literature`` takes all there are.
        length: tokens in one.
        dtype: as in a config.
        device: as in a config.
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
            trust_remote_code=trust_remote_code,
            keep_dense=False,
        )
        try:
            if texts:
                loaded.check_length(length)
            count = windows if protocol == "windows" else None
            rows = embedding_rows(loaded.model)
            drawn = {
                s: load_test_windows(s, loaded.tokenizer, count, length, rows=rows) for s in texts
            }
            head = Head(loaded.model)
            scores = [
                _score(source, kept_losses(loaded, head, ids, store, progress), length)
                for source, ids in drawn.items()
            ]
            return Evaluation(
                model=name,
                dtype=str(loaded.dtype).removeprefix("torch."),
                device=str(loaded.device),
                parameters=sum(p.numel() for p in loaded.model.parameters()),
                prunable=loaded.prunable,
                sparsity=_sparsity(loaded),
                texts=scores,
                tasks=[ask(loaded, quiz, store, progress) for quiz in quizzes],
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
    zeros = sum(count_zeros(loaded.weight(layer)) for layer in loaded.layers.values())
    return zeros / loaded.prunable
