"""What an evaluation has measured so far, in a file, so that a killed one goes on."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from prunewright.state import StoreError
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.store.storage import canonical_json, sha256_bytes

Value = float | tuple[float, bool] | str
"""A window's loss, a continuation's log-likelihood and whether it is greedy, or an answer."""
_VALUES = TypeAdapter(dict[str, Value])


class Kept(dict[str, Value]):
    """Values by a hash of what was asked; each is a line of a file as soon as it is set.

    JSON, since lm-eval's own cache is pickled, which runs code when a stranger's is read.
    """

    def __init__(self, store: Path | None, loaded: LoadedModel) -> None:
        """Read what is kept of a model.

        Args:
            store: directory; None keeps nothing beyond the process.
            loaded: the model; with ``store`` its weights must be those of its files.

        Raises:
            StoreError: what is kept is damaged, or it cannot be written.
        """
        super().__init__()
        self._stream: TextIO | None = None
        if store is None:
            return
        name = sha256_bytes(canonical_json(loaded.standing()))[:24]
        self._file = store / f"kept-{name}.jsonl"
        try:
            store.mkdir(parents=True, exist_ok=True)
            self._stream = self._file.open("a+", encoding="ascii")
            self._stream.seek(0)
            text = self._stream.read()
            whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
            self._stream.truncate(len(whole))
            self.update(_VALUES.validate_python(dict(map(json.loads, whole.splitlines()))))
        except OSError as error:
            raise self._unwritten(error) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{self._file} is damaged: delete it, and what it kept is measured again"
            ) from error

    def __setitem__(self, key: str, value: Value) -> None:
        super().__setitem__(key, value)
        if self._stream is None:
            return
        try:
            self._stream.write(json.dumps([key, value]) + "\n")
            self._stream.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            with suppress(OSError):  # what a full disk refused, as was told, is tried once more
                self._stream.close()

    def _unwritten(self, error: OSError) -> StoreError:
        return StoreError(
            f"cannot write {self._file}: {error.strerror}. Free some space there (or mend the "
            "permissions), then try again"
        )
