"""Words of others, as they may be shown: what is not seen, or moves what is seen, written out."""

import math
import re
import unicodedata

# Letters and marks that show nothing, beside the control and format characters. The variation
# selectors 15 and 16 are not among them: they follow every other emoji.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0"
    "\U000e0100-\U000e01ef]"
)


def one_line(text: str, most: int, end: str = "") -> str:
    """Text without line ends and runs of blanks, cut to a length; ``end`` says that it was cut.

    It is cut between words, unless much would be lost by that.
    """
    joined = " ".join(text.split())
    if len(joined) <= most:
        return joined
    words = joined[: most + 1].rpartition(" ")[0]
    return (words if len(words) > most // 2 else joined[:most]) + end


def clean(text: str) -> str:
    """Text whose control and invisible characters are written out, line ends and tabs apart.

    So are those that turn the direction of what follows: ``\\x1b`` and ``\\u202e`` are shown.
    """
    return "".join(
        c if c in "\n\t" or _is_seen(c)
        # A lone surrogate cannot even be encoded.
        else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )  # fmt: skip


def _is_seen(c: str) -> bool:
    return (c.isprintable() or unicodedata.category(c) == "Zs") and not _BLANK.match(c)


def told_apart(value: float, bound: float, form: str = "%", digits: int = 1) -> tuple[str, str]:
    """A number and the bound that it passes, in as many digits as it takes to see that.

    Args:
        value: not equal to the bound.
        bound: shown whole, if eight digits are enough.
        form: "%" or "f".
        digits: behind the point, at least.
    """
    scale = 100 if form == "%" else 1
    while digits < 8 and not math.isclose(round(scale * bound, digits), scale * bound):
        digits += 1
    while digits < 16 and f"{value:.{digits}{form}}" == f"{bound:.{digits}{form}}":
        digits += 1
    return f"{value:.{digits}{form}}", f"{bound:.{digits}{form}}"
