"""Results of an evaluation that were kept in files, so that a killed one goes on."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from prunewright.state import StoreError
from prunewright.tools.store.storage import read_json

Kept = TypeVar("Kept", bound=BaseModel)


def read_kept(file: Path, kind: type[Kept], again: str) -> Kept:
    """What a file keeps.

    Args:
        file: that exists.
        kind: what it holds.
        again: what is done anew once it is deleted, for the message.

    Raises:
        StoreError: unreadable or damaged.
    """
    try:
        return kind.model_validate(read_json(file))
    except ValidationError:
        raise damaged(file, again) from None
    except StoreError as error:
        raise StoreError(f"{error}: delete it, and {again}") from error


def damaged(file: Path, again: str) -> StoreError:
    """The error for a file whose content cannot be what was kept; arguments as `read_kept`."""
    return StoreError(f"{file} is damaged: delete it, and {again}")
