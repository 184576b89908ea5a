"""Layers on a grid, a column a block and a row a projection, and small drawings of it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from prunewright.state.profile import short_name, unnumbered

LEVELS = 5
"""Shades of a small map."""


@dataclass(frozen=True)
class Grid:
    """Where each layer stands; experts of a block that are modules of their own share a place.

    Attributes:
        blocks: of all layers, in order.
        projections: of all layers, in order, as short as they can be told apart.
        places: projection and block of each layer.
    """

    blocks: list[str]
    projections: list[str]
    places: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, layers: Iterable[str]) -> "Grid":
        """The grid of some layers, by their names in the model's order."""
        split = {}
        for name in layers:
            block, _, path = short_name(name).partition(".")
            split[name] = unnumbered(path), block
        paths = list(dict.fromkeys(path for path, _ in split.values()))
        last = {path: path.rpartition(".")[2] for path in paths}
        short = last if len(set(last.values())) == len(paths) else {path: path for path in paths}
        places = {name: (short[path], block) for name, (path, block) in split.items()}
        blocks = dict.fromkeys(block for _, block in split.values())
        return cls(list(blocks), [short[path] for path in paths], places)

    def means(self, values: Mapping[str, float]) -> dict[tuple[str, str], float]:
        """The mean of some layers' values at each place that has any, by projection and block."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, value in values.items():
            if name in self.places:
                found.setdefault(self.places[name], []).append(value)
        return {place: fmean(some) for place, some in found.items()}

    def drawing(self, values: Mapping[str, float], most: float, words: str) -> Markup:
        """A small map as SVG: a square a place, the darker the larger its value is.

        Args:
            values: by layer; those below 0 have a colour of their own, and those of 0 none.
            most: the value that the darkest shade stands for, above 0.
            words: what it shows.
        """
        paths: dict[str, list[str]] = {}
        for (projection, block), value in self.means(values).items():
            level = min(LEVELS, math.ceil(LEVELS * abs(value) / most - 1e-9))
            if level:
                kind = f"{'more' if value > 0 else 'less'}-{level}"
                x, y = self.blocks.index(block), self.projections.index(projection)
                paths.setdefault(kind, []).append(f"M{x} {y}h.9v.9h-.9z")
        width, height = len(self.blocks), len(self.projections)
        squares = "".join(f'<path class="{k}" d="{"".join(d)}"/>' for k, d in sorted(paths.items()))
        return Markup(
            '<svg class="map" role="img" aria-label="{}" viewBox="0 0 {} {}" style="--blocks:{}">'
        ).format(words, width, height, width) + Markup(f"{squares}</svg>")
