"""A run read back from its directory: its story, and its trace as pandas frames."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from prunewright.state import (
    COST_DELTAS,
    InputError,
    LayerProfile,
    PruneConfig,
    Step,
    StoreError,
)
from prunewright.state.metrics import Metrics, Pair, Stage
from prunewright.state.profile import SIGNALS, short_name
from prunewright.state.shown import clean
from prunewright.tools.store.finishing import read_finishing
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import read_json

if TYPE_CHECKING:
    import pandas as pd

_HISTORY = (
    "step",
    "agent",
    "verdict",
    "reason",
    "layers",
    "gained",
    "sparsity",
    "perplexity",
    "accepted_perplexity",
    "change",
    "stderr",
    "predicted",
    "expected",
    "proposal",
    "invalid_answers",
    "repairs",
    "calls",
    "tokens",
    "reasoning",
    "notes",
    "review",
    "revision",
)
_DECISIONS = ("step", "verdict", "layer", "block", "projection", "delta", "edit")
_STAGES = ("stage", "before", "after", "kept", "seconds", "tokens", "revision", "notes")
_CURVE = ("stage", "tokens", "loss")
_DOMAINS = ("step", "domain", "dense", "before", "candidate", "change", "stderr")
_CURVES = ("loss_cost", "regrow_gain")
_BY_NAME = ("signals", "measured")
_BY_DOMAIN = {"domain_costs": "loss_cost", "domain_gains": "regrow_gain"}
_APART = {"name", *_CURVES, *_BY_NAME, *_BY_DOMAIN}
_SCALARS = tuple(n for n in LayerProfile.model_fields if n not in _APART)


@dataclass(frozen=True)
class Story:
    """A run, finished or not.

    Attributes:
        directory: where it is.
        config: what it was started with.
        records: its steps so far.
        metrics: what it came to; None while unfinished.
        stages: what was done after its last step so far.
    """

    directory: RunDirectory
    config: PruneConfig
    records: list[Step]
    metrics: Metrics | None
    stages: list[Stage]

    @property
    def domains(self) -> dict[str, Pair]:
        """Guard perplexity by domain: of the dense model, and at the end or so far."""
        if self.metrics is not None:
            return self.metrics.domains
        last = self.records[-1].accepted_domains if self.records else {}
        return {n: Pair(dense=self.records[-1].domains[n].dense, final=v) for n, v in last.items()}


@dataclass(frozen=True, repr=False)
class Trace:
    """A run as pandas frames; steps are counted from 1, as ``prunewright show`` counts them.

    Attributes:
        history: a row a step. ``gained`` and ``sparsity`` (after the step) are fractions of all
            prunable weights; ``perplexity`` is what the step's candidate measured on the guard
            text, ``accepted_perplexity`` that of the revision it left; ``change``, ``stderr``,
            ``predicted`` (by the profile) and ``expected`` (by the agent) are relative
            perplexity changes; ``proposal`` says how the ranking's was taken, None of a decision
            of the agent's own; ``tokens`` are those exchanged with an LLM; ``review`` is what a
            person said to the decision.
        decisions: a row a step and layer: the ``delta`` of sparsity that was applied, and the
            ``edit`` that the agent had added to the ranking's proposal. Those of a rolled-back step
            were taken back.
        profiles: a row a step and layer: all that `LayerProfile` holds before the step. A signal
            has two columns, its z-score (``z_s``) and what that is of (``s``); ``loss_cost`` and
            ``regrow_gain``, in nats, have one for each delta: ``loss_cost_0.05``, and with domains
            one for each of these, too: ``loss_cost_german_0.05``.
        stages: a row a stage after the last step: ``before`` and ``after`` are perplexities on the
            guard text, ``revision`` is what it came to, kept or not.
        curves: a row a point of a stage that trains: ``tokens`` seen so far, and the ``loss``
            there in nats a token.
        domains: a row a step and domain of the guard text: perplexity of the ``dense`` model,
            ``before`` the step and of its ``candidate``; ``change`` and ``stderr`` as above.
    """

    history: "pd.DataFrame"
    decisions: "pd.DataFrame"
    profiles: "pd.DataFrame"
    stages: "pd.DataFrame"
    curves: "pd.DataFrame"
    domains: "pd.DataFrame"

    def __repr__(self) -> str:
        frames = ("history", "decisions", "profiles", "stages", "curves", "domains")
        words = ", ".join(f"{name}: {len(getattr(self, name))} rows" for name in frames)
        return f"<Trace {words}>"


def read_story(directory: RunDirectory) -> Story:
    """Read a run.

    Raises:
        InputError: there is no run here, or a newer version made it.
        StoreError: a file is damaged.
    """
    config = directory.config()
    metrics = load_metrics(directory) if directory.metrics_file.exists() else None
    if metrics is not None:
        stages = metrics.stages
    else:
        finishing = read_finishing(directory.finishing_file)
        stages = [one.stage for one in finishing.done] if finishing is not None else []
    return Story(directory, config, directory.read_trace(), metrics, stages)


def load_metrics(directory: RunDirectory) -> Metrics:
    """metrics.json of a finished run.

    Raises:
        StoreError: missing or damaged.
    """
    content = read_json(directory.metrics_file)
    try:
        metrics = Metrics.model_validate(content)
    except ValidationError as error:
        raise StoreError(f"{directory.metrics_file} is damaged: {error}") from error
    if not directory.holds(metrics.steps, "metrics", content):
        raise StoreError(f"{directory.metrics_file} is damaged: it is not what the run wrote")
    return metrics


def layer_sparsities(story: Story) -> dict[str, float]:
    """Each layer's sparsity as the steps left it: the last profile's, and what its step added.

    Of a run that went back to an earlier step, that step's.

    Raises:
        StoreError: the last step's profile is missing or damaged.
    """
    if not story.records:
        return {}
    last = story.records[-1]
    if last.kept is not None:
        last = story.records[last.kept.step]
    found: dict[str, float] = {}
    if last.profile:
        profile = story.directory.read_profile(last.profile)
        found = {layer.name: layer.sparsity for layer in profile.layers}
    if last.verdict == "accepted":
        for name, delta in last.applied.items():
            found[name] = found.get(name, 0.0) + delta
    return found


def load_trace(run_dir: str | Path) -> Trace:
    """Read a run's steps, decisions, profiles and stages, finished or not, as pandas frames.

    Control and invisible characters in words are written out, since notebooks show the frames. A
    baseline has one step and no profiles.

    Raises:
        InputError: pandas is not installed, there is no run here, or a newer version made it.
        StoreError: a file is missing or damaged.
    """
    try:
        import pandas as pd
    except ImportError:
        raise InputError("load_trace needs pandas: pip install 'prunewright[report]'") from None

    directory = RunDirectory(run_dir)
    story = read_story(directory)
    records = story.records

    def frame(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> "pd.DataFrame":
        words = [{k: clean(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
        return pd.DataFrame(words, columns=list(columns))

    curves = tuple(f"{name}_{delta:.2f}" for name in _CURVES for delta in COST_DELTAS)
    profiles = [
        {"step": record.step + 1, "layer": layer.name, **_columns(layer)}
        for record in records
        if record.profile
        for layer in directory.read_profile(record.profile).layers
    ]
    known = ("step", "layer", *_SCALARS, *map(_value_of, SIGNALS), *SIGNALS, *curves)
    outside = dict.fromkeys(name for row in profiles for name in row if name not in known)
    return Trace(
        history=frame([_history_row(record) for record in records], _HISTORY),
        decisions=frame([row for record in records for row in _decision_rows(record)], _DECISIONS),
        profiles=frame(profiles, (*known, *outside)),
        stages=frame([_stage_row(stage) for stage in story.stages], _STAGES),
        curves=frame(
            [
                {"stage": stage.name, "tokens": tokens, "loss": loss}
                for stage in story.stages
                for tokens, loss in stage.curve
            ],
            _CURVE,
        ),
        domains=frame([row for record in records for row in _domain_rows(record)], _DOMAINS),
    )


def _history_row(record: Step) -> dict[str, Any]:
    return {
        "step": record.step + 1,
        "agent": record.agent,
        "verdict": record.verdict,
        "reason": record.reason,
        "layers": len(record.applied),
        "gained": record.sparsity - record.sparsity_before,
        "sparsity": record.sparsity,
        "perplexity": record.candidate_perplexity,
        "accepted_perplexity": record.accepted_perplexity,
        "change": record.change,
        "stderr": record.change_stderr,
        "predicted": record.predicted_change,
        "expected": record.decision.expected_ppl_change,
        "proposal": None if record.ranking is None else record.ranking.words,
        "invalid_answers": len(record.invalid_answers),
        "repairs": record.repairs,
        "calls": record.llm_calls,
        "tokens": record.llm_tokens,
        "reasoning": record.decision.reasoning,
        "notes": "\n".join(record.notes),
        "review": record.review.verdict if record.review is not None else None,
        "revision": record.revision,
    }


def _stage_row(stage: Stage) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "before": stage.before,
        "after": stage.after,
        "kept": stage.kept,
        "seconds": stage.seconds,
        "tokens": sum(stage.tokens.values()),
        "revision": stage.revision,
        "notes": "\n".join(stage.notes),
    }


def _decision_rows(record: Step) -> list[dict[str, Any]]:
    rows = []
    edits = record.ranking.edits if record.ranking is not None else {}
    for name, delta in record.applied.items():
        block, _, projection = short_name(name).partition(".")
        rows.append(
            {
                "step": record.step + 1,
                "verdict": record.verdict,
                "layer": name,
                "block": int(block) if block.isdigit() else None,
                "projection": projection,
                "delta": delta,
                "edit": edits.get(name, 0.0),
            }
        )
    return rows


def _domain_rows(record: Step) -> list[dict[str, Any]]:
    return [
        {"step": record.step + 1, "domain": name, "stderr": one.change_stderr}
        | one.model_dump(exclude={"change_stderr"})
        for name, one in record.domains.items()
    ]


def _value_of(signal: str) -> str:
    """The column of what a signal's z-score is of."""
    return signal.removeprefix("z_")


def _columns(layer: LayerProfile) -> dict[str, Any]:
    values = layer.model_dump(include=set(_SCALARS)) | layer.signals
    values |= {_value_of(name): value for name, value in layer.measured.items()}
    for curve in _CURVES:
        for delta, value in zip(COST_DELTAS, getattr(layer, curve), strict=True):
            values[f"{curve}_{delta:.2f}"] = value
    for field, curve in _BY_DOMAIN.items():
        for domain, costs in getattr(layer, field).items():
            for delta, value in zip(COST_DELTAS, costs, strict=True):
                values[f"{curve}_{domain}_{delta:.2f}"] = value
    return values
