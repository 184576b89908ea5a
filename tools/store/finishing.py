"""finishing.json: how far the end of a run is, so that a kill inside it loses no stage."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from prunewright.state import StoreError
from prunewright.state.loading import problem_words
from prunewright.state.metrics import Stage
from prunewright.tools.store.storage import read_json


class Done(BaseModel):
    """A stage that has ended.

    Attributes:
        settings: what it was done by, beside the run's request, which never changes.
        stage: what it came to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    stage: Stage


class Finishing(BaseModel):
    """What finishing.json holds.

    Attributes:
        revision: the masks that the end began from; those of an earlier end are others.
        done: the stages that have ended, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: str
    done: list[Done] = []


def read_finishing(path: Path) -> Finishing | None:
    """How far an end is; None if it has not begun.

    Raises:
        StoreError: damaged.
    """
    try:
        return Finishing.model_validate(read_json(path)) if path.exists() else None
    except (StoreError, ValidationError) as error:
        if not path.exists():  # whoever works on the run has just gone on to a higher target
            return None
        words = problem_words(error, "it", 3) if isinstance(error, ValidationError) else error
        raise StoreError(
            f"{path} is damaged: {words}. Without it, what it tells of is done again: delete it, "
            "then resume the run"
        ) from error
