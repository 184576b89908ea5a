"""Where people read: lines, names with values, and tables.

Names and words from models, files and LLMs are untrusted: they are shown as plain text, without
markup, and with control characters written out.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunewright.state.shown import clean

_NAMES = 11
"""Columns that a name takes before its value."""
_GAP = 2
"""Columns between two columns of a table."""


class Screen:
    """Standard output, or standard error while that is kept for JSON.

    On a terminal lines break between words; elsewhere a line stays one, for those who search it.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        make = partial(
            Console, stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False
        )
        self.console = make()
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console = make(width=200)

    def line(self, *parts: str | tuple[str, str], indent: int = 0) -> None:
        """Print one line of plain strings and ``(string, style)`` pairs.

        Args:
            parts: of the line.
            indent: columns that what does not fit on the first line is moved by.
        """
        text = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            text.append(clean(words), style)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True)
            return
        head, rest = text[:indent], text[indent:]
        for row in _rows(rest, max(20, self.console.width - indent)):
            self.console.print(head + row, soft_wrap=True)
            head = Text(" " * indent)

    def exact(self, words: str) -> None:
        """Print words as they stand, without line ends of ours."""
        self.console.print(Text(clean(words)), soft_wrap=True)

    def pairs(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, aligned."""
        for name, value in rows:
            head = f"{name:<{_NAMES}}"
            self.line((head, "bold"), value, indent=len(head))

    def warn(self, words: str, name: str = "warning") -> None:
        """Print a warning as `pairs` prints a value."""
        head = f"{name:<{_NAMES}}"
        self.line((head, "yellow"), words, indent=len(head))

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        left: int = 1,
        keys: int | None = None,
    ) -> None:
        """Print a table, and cut nothing of it.

        Where it is too wide, the widest of the columns on the left is broken between words. If that
        is not enough, the columns stand in several tables below each other.

        Args:
            columns: their names.
            rows: one word a column.
            left: how many of the first columns are aligned to the left; the others are to the
                right.
            keys: how many of the first columns tell the rows apart, and so stand in each of
                several tables; None: those on the left.
        """
        cells = [[clean(cell) for cell in row] for row in [columns, *rows]]
        widths = [max(cell_len(row[i]) for row in cells) for i in range(len(columns))]
        widest = max(range(left), key=lambda i: widths[i])
        words = [word for row in cells for word in row[widest].split()]
        least = max(map(cell_len, words), default=1)
        over = self._over(widths)
        if over > 0:
            fitting, half = widths[widest] - over, self.console.width // 2
            shrunk = fitting if fitting >= least else max(least, half)
            widths[widest] = min(widths[widest], shrunk)
            over = self._over(widths)
        first = list(range(left if keys is None else keys))
        part: list[int] = []
        for column in range(len(first), len(columns)):
            wider = [widths[i] for i in [*first, *part, column]]
            if part and over > 0 and self._over(wider) > 0:
                self._print_table(cells, widths, [*first, *part], left)
                self.line()
                part = []
            part.append(column)
        self._print_table(cells, widths, [*first, *part], left)

    def _over(self, widths: Sequence[int]) -> int:
        """Columns by which a table is too wide."""
        return sum(widths) + _GAP * (len(widths) - 1) - self.console.width

    def _print_table(
        self, cells: list[list[str]], widths: list[int], shown: list[int], left: int
    ) -> None:
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
        for index in shown:
            table.add_column(
                Text(cells[0][index]),
                justify="left" if index < left else "right",
                width=widths[index],
                overflow="fold",
            )
        for row in cells[1:]:
            table.add_row(*(Text(row[index]) for index in shown))
        self.console.print(table)


def _rows(text: Text, width: int) -> Iterator[Text]:
    """Text broken between words; one that is longer than a line, such as a path, is left whole."""
    for line in text.split("\n", allow_blank=True):
        breaks, used = [], 0
        for word in re.finditer(r"\S+\s*|\s+", line.plain):
            if used and used + cell_len(word[0].rstrip()) > width:
                breaks.append(word.start())
                used = 0
            used += cell_len(word[0])
        for row in line.divide(breaks):
            row.rstrip()
            yield row
