"""What a source names: something embedded, what lies on this machine, or a name on the hub.

Models, texts and questions are all named so. `EMBEDDED` is each one's own; the rest is told apart
here.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prunewright.state import InputError
from prunewright.tools.texts.rows import is_file_name


def find_local(source: str, what: str) -> Path | None:
    """The file or directory that a source names; None where it can only be a name on the hub.

    Args:
        source: as in the configuration, not embedded.
        what: it is called in messages, such as ``the model``.

    Raises:
        InputError: it is no path and no name, or a path to nothing.
    """
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # too long for a path; no such user's home
        raise InputError(f"{what} {source} cannot be read: {error}") from error
    if exists:
        return path
    if source.startswith((".", "/", "~")) or is_file_name(path.name):
        raise InputError(f"{what} {source} does not exist")
    return None


@contextmanager
def loading_data_set(source: str, what: str) -> Iterator[None]:
    """Words for whatever `datasets` raises inside the block; arguments as `find_local`.

    Raises:
        InputError: the source cannot be loaded as a data set.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # foreign input, and it raises many kinds
        raise InputError(
            f"{what} {source} is neither a local file nor could be loaded as a data set: "
            f"{first_line(error)}"
        ) from error


def choose_split(source: str, wanted: Sequence[str], splits: Iterable[str]) -> str:
    """The first wanted split that a data set has.

    Raises:
        InputError: it has none of them.
    """
    found = list(splits)
    for split in wanted:
        if split in found:
            return split
    raise InputError(
        f"the data set {source} has none of the splits {', '.join(wanted)}, only {', '.join(found)}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's words; its kind, if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
