"""What a configuration names and a package outside may bring: by import, or by an entry point.

Nothing is imported before it is asked for by name: reading a configuration runs no code.
"""

import difflib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from prunewright.state.errors import InputError

IMPORT = "import:"
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Registry(Generic[_Kind]):
    """The things of one kind that a configuration may name.

    Attributes:
        kind: what one is called: "criterion".
        group: of the entry points with which an installed package brings its own.
        known: the project's own, by name.
        fits: whether what was imported is one.
        must: what is wrong where it is not: "is no Criterion".
        form: what ``import:`` is followed by.
        others: more forms of a name that are understood, for the list of what is known.
    """

    kind: str
    group: str
    known: Mapping[str, _Kind]
    fits: Callable[[Any], bool]
    must: str
    form: str = "package.module:name"
    others: tuple[str, ...] = ()

    def find(self, name: str) -> _Kind:
        """What a name stands for.

        Raises:
            InputError: unknown, it cannot be imported, or it is something else.
        """
        if name in self.known:
            return self.known[name]
        found = self.own(name)
        if found is None:
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            known = ", ".join([*self.names(), *self.others, f"{IMPORT}{self.form}"])
            raise InputError(f"unknown {self.kind} {name!r}{hint}; known: {known}")
        return found

    def own(self, name: str) -> _Kind | None:
        """What comes from outside by this name; None where the name is of no such thing.

        Raises:
            InputError: it cannot be imported, or it is something else.
        """
        if name.startswith(IMPORT):
            module, _, attribute = name.removeprefix(IMPORT).rpartition(":")
            if not module or not attribute:
                raise InputError(f"{name!r} is not of the form {IMPORT}{self.form}")
            found = self._load(name, lambda: getattr(importlib.import_module(module), attribute))
        elif (entry := _entry(self.group, name)) is not None:
            found = self._load(name, entry.load)
        else:
            return None
        if not self.fits(found):
            raise InputError(f"the {self.kind} {name!r} {self.must}")
        own: _Kind = found
        return own

    def names(self) -> list[str]:
        """The project's own, then those of the entry points."""
        outside = {entry.name for entry in entry_points(group=self.group)} - set(self.known)
        return [*self.known, *sorted(outside)]

    def source(self, name: str) -> Path | None:
        """The file of the module that something from outside comes from.

        None for the project's own, and where no file is found: in an extension of Python's own.
        """
        if name in self.known:
            return None
        module = name.removeprefix(IMPORT).rpartition(":")[0] if name.startswith(IMPORT) else ""
        if not module and (entry := _entry(self.group, name)) is not None:
            module = entry.module
        try:
            found = importlib.util.find_spec(module)
        except Exception:  # a package of the user's is imported on the way
            return None
        path = Path(found.origin) if found is not None and found.origin else None
        return path if path is not None and path.is_file() else None

    def _load(self, name: str, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except ModuleNotFoundError as error:
            raise InputError(
                f"cannot import the {self.kind} {name!r}: {error}; is its folder on PYTHONPATH?"
            ) from error
        except Exception as error:  # the module is the user's: it may raise anything
            raise InputError(
                f"cannot import the {self.kind} {name!r}: {type(error).__name__}: {error}"
            ) from error


@functools.lru_cache(maxsize=64)  # a look at every installed package
def _entry(group: str, name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=group, name=name)), None)
