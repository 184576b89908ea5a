"""The README.md of a saved model: where it comes from, how it was pruned, what that came to."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from prunewright.state import PruneConfig
from prunewright.state.config import BASELINE, EMBEDDED
from prunewright.state.metrics import NEGLIGIBLE, Metrics
from prunewright.tools.ending import control_words
from prunewright.tools.store.rundir import DENSE_MODEL

BASE_OF_EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_NOT_OWNERS = {
    "checkpoint", "checkpoints", "content", "data", "home", "mnt", "model", "models", "out",
    "output", "outputs", "results", "root", "runs", "saved", "tmp", "workspace",
}  # fmt: skip
"""What begins a path and is not an account's name."""
_FRONT_BYTES = 65_536


def model_card(config: PruneConfig, metrics: Metrics, directory: Path, values: str = "") -> str:
    """The README.md of a saved model: base model, method, numbers, and what zeros do not give.

    Args:
        config: of the run; it holds no secrets.
        metrics: what the run came to.
        directory: of the model that was pruned.
        values: what to know of the values saved.
    """
    base = hub_name(config.model, directory)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        front["base_model"] = base
    front |= license_of(directory)
    front["tags"] = ["pruning", "sparse", "prunewright"]
    if config.pruned is None:
        front["tags"].append(config.criterion)
    title = (base or Path(config.model).name).rpartition("/")[2]
    if title == DENSE_MODEL:  # given in memory, and not from the hub
        title = str(_config(directory).get("model_type"))
    # Where it was written says nothing of how.
    recipe = config.model_dump(mode="json", exclude={"out"})
    if base and config.model != EMBEDDED:
        recipe["model"] = base  # not where it lay on this machine
    before = _dense_words(metrics)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---
# {title}, pruned to {metrics.sparsity:.1%}

{_origin_words(config, metrics)}.
{metrics.sparsity:.2%} of the weights in the decoder blocks' linear layers are exactly zero{before}.
Embeddings, norms and the head are dense.
{f"{chr(10)}Numbers: {values}.{chr(10)}" if values else ""}
{_table(metrics, config.texts.test)}

Method: {_method_words(metrics.method)}, criterion {config.criterion_words};
{_steps_words(metrics)}.
{_stages_words(metrics)}Masks: `{metrics.revision}`.

Zeros alone make a model neither smaller on disk nor faster: that takes a storage format or a
runtime that uses them.{_pattern_words(config.pattern, whole=metrics.status != BASELINE)}

## Recipe

```yaml
{yaml.safe_dump(recipe, sort_keys=False)}```
"""


def _table(metrics: Metrics, test: str) -> str:
    """Perplexities of the dense and the pruned model, and of the uniform control where measured."""
    ppl, control = metrics.perplexity, metrics.control
    rows = [
        ["", "dense", "pruned"],
        ["---"] * 3,
        ["perplexity, guard text", f"{ppl.guard.dense:.3f}", f"{ppl.guard.final:.3f}"],
        *(
            [f"perplexity, guard text, {name}", f"{pair.dense:.3f}", f"{pair.final:.3f}"]
            for name, pair in metrics.domains.items()
        ),
        [f"perplexity, test text ({test})", f"{ppl.test.dense:.3f}", f"{ppl.test.final:.3f}"],
    ]
    if control is not None:
        values = [control.guard, *map(control.domains.get, metrics.domains), control.test]
        measured = ["not finite" if value is None else f"{value:.3f}" for value in values]
        words = ["uniform control", "---", *measured]
        rows = [[*row, word] for row, word in zip(rows, words, strict=True)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{lines}\n\nAgainst the uniform control: {control_words(control)}." if control else lines
    )


def hub_name(name: str, directory: Path) -> str | None:
    """The hub name of a model, where one is known; never a path of some machine.

    It is the name given, that of the hub's cache that the directory lies in, or the one that an
    earlier version of transformers noted in the configuration.

    Args:
        name: as the user gave it.
        directory: where the model was found.
    """
    if name == EMBEDDED:
        return BASE_OF_EMBEDDED
    if not Path(name).expanduser().is_dir():
        return name
    cache = directory.parent.parent.name
    if directory.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/")
    config = _config(directory)
    noted = config.get("_name_or_path")
    return noted if isinstance(noted, str) and _plausible(noted) else None


def _config(directory: Path) -> dict[str, Any]:
    # Not `read_json`: some hold Infinity.
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _plausible(name: str) -> bool:
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
    if re.fullmatch(f"{part}/{part}", name, re.ASCII) is None or Path(name).exists():
        return False
    owner, _, own = name.partition("/")
    return owner.lower() not in _NOT_OWNERS and re.match(r"checkpoint-\d", own) is None


def license_of(directory: Path) -> dict[str, str]:
    """What the front matter of a model's README.md says of its licence."""
    found = _front_of(directory)
    return {
        key: value for key in _LICENSE_KEYS if isinstance(value := found.get(key), str) and value
    }


def base_of(directory: Path) -> str | None:
    """The model that a README.md names as the one it was made from, as a configuration would."""
    found = _front_of(directory).get("base_model")
    if not isinstance(found, str) or not found:
        return None
    return EMBEDDED if found == BASE_OF_EMBEDDED else found


def _front_of(directory: Path) -> dict[str, Any]:
    """The front matter of a model's README.md; empty if there is none that can be read."""
    try:
        with (directory / "README.md").open(encoding="utf-8") as file:
            lines = file.read(_FRONT_BYTES).split("\n")
        end = lines.index("---", 1) if lines[0].strip() == "---" else 0
        front = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def _steps_words(metrics: Metrics) -> str:
    if not metrics.reason:
        return "one shot"
    return f"{metrics.steps} steps, {metrics.rollbacks} rolled back; {metrics.reason}"


def _origin_words(config: PruneConfig, metrics: Metrics) -> str:
    """How the zeros came about, and whether the weights were trained since."""
    words = metrics.trained_words
    if config.pruned is not None:
        taken = "Made with Prunewright from a model that was pruned before"
        return f"{taken}; then {words}" if words else f"{taken}, as it was"
    pruned = "Pruned with Prunewright after training"
    return f"{pruned}; then {words}" if words else f"{pruned}, without retraining"


def _stages_words(metrics: Metrics) -> str:
    """What was done after the last step, a line a stage; "" if nothing was."""
    lines = [f"- {stage.words}\n" for stage in metrics.stages]
    return f"\nAfter the last step:\n\n{''.join(lines)}\n" if lines else ""


def _dense_words(metrics: Metrics) -> str:
    """How many of the zeros were there before; "" if hardly any were."""
    if metrics.dense_sparsity < NEGLIGIBLE:
        return ""
    return f", {metrics.dense_sparsity:.2%} in the base model already"


def _pattern_words(pattern: str, *, whole: bool) -> str:
    """What is known of runtimes for an N:M pattern; the sources are in the project's documentation.

    Args:
        pattern: of the request.
        whole: whether a run chose the layers that take it, so that others are dense.
    """
    if pattern == "unstructured":
        return ""
    chosen = f" Each layer is dense or {pattern} as a whole." if whole else ""
    if pattern != "2:4":
        return f"{chosen} NVIDIA's sparse tensor cores take 2:4, not {pattern}: it is for research."
    return f"""{chosen}

2:4 is the pattern of NVIDIA's sparse tensor cores (Ampere and later; cuSPARSELt, CUTLASS). This
directory is stored dense: it runs no faster until each 2:4 layer is converted, in PyTorch by
`torch.sparse.to_sparse_semi_structured`. vLLM and llm-compressor no longer support 2:4."""


def _method_words(method: dict[str, str]) -> str:
    """Who or what shared the target out over the layers."""
    words = method["agent"]
    if "allocation" in method:
        words += f", allocation {method['allocation']}"
    if method.get("allocation_options", "{}") != "{}":
        words += f" {method['allocation_options']}"
    return words
