"""What manifest.json says: what a run stands on, who decides in it, where and when it began."""

import functools
import importlib.metadata
import json
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunewright.state import PruneConfig, PruneRequest

_PACKAGES = (
    "prunewright",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "langgraph",
    "langgraph-checkpoint-sqlite",
    "langchain-core",
    "langchain-google-genai",
    "langchain-openai",
    "langchain-anthropic",
    "langchain-ollama",
    "pydantic",
    "numpy",
)


def decides(config: PruneConfig) -> dict[str, Any]:
    """Who decides and how, as JSON values, but for the directory; infinity as its name."""
    values = config.context.model_dump(mode="json", exclude={"out"})
    found: dict[str, Any] = json.loads(json.dumps(values), parse_constant=str)
    return found


def standing(facts: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on, of a manifest or of now.

    Contents, not where they lie; a request has the keys, too, that did not exist when the run
    began.
    """
    request = facts.get("request")
    with suppress(ValidationError):
        request = PruneRequest.model_validate(request).identity()
        if targets := targets_of(facts):
            request["target"] = targets[-1]
    model, texts = facts.get("model"), facts.get("texts")
    return {
        "request": request,
        "model": {k: v for k, v in model.items() if k != "name"} if isinstance(model, dict) else {},
        "texts": {
            role: text.get("sha256") if isinstance(text, dict) else None
            for role, text in (texts if isinstance(texts, dict) else {}).items()
        },
        "code": facts.get("code") or {},
        "seed": facts.get("seed"),
        "dtype": facts.get("dtype"),
    }


def targets_of(facts: dict[str, Any]) -> list[float]:
    """The targets that a run had one after the other; empty if it was never raised."""
    found = facts.get("targets")
    values = [i.get("target") for i in found if isinstance(i, dict)] if found else []
    return [value for value in values if isinstance(value, int | float)]


def raised(facts: dict[str, Any], target: float, step: int) -> dict[str, Any]:
    """What a manifest says of targets once a run goes on to another: each, and from which step."""
    targets = facts.get("targets") or [{"target": facts["request"]["target"], "step": 0}]
    if targets[-1]["target"] == target:
        return {}
    return {"targets": [*targets, {"target": target, "step": step}]}


def until(facts: dict[str, Any], step: int) -> dict[str, Any]:
    """What a manifest says, but for the targets that a run had only after a step."""
    if not facts.get("targets"):
        return facts
    return facts | {"targets": [t for t in facts["targets"] if t["step"] <= step]}


def surroundings(directory: Path) -> dict[str, Any]:
    """When and where a run is begun."""
    return {
        "place": {"directory": str(directory.absolute()), "working": str(Path.cwd())},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
    }


@functools.cache
def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
