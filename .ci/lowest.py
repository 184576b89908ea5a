"""Prints constraints under which pip installs the lowest versions that pyproject.toml allows.

What pyproject.toml names gets its lower bound; all else is at most what constraints.txt has, so
that a release of tomorrow changes nothing. Where pip finds no such versions, a bound is too low.
"""

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """One constraint a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *chain(*(v for k, v in extras.items() if k != "lint"))]
    lowest = {}
    for requirement in map(Requirement, named):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        lowest[canonicalize_name(requirement.name)] = bound.version
    for name, version in lowest.items():
        print(f"{name}=={version}")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and canonicalize_name(line.partition("==")[0]) not in lowest:
            print(line.replace("==", "<="))


if __name__ == "__main__":
    main()
