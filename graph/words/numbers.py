"""Numbers as people say them."""

import math


def percent(value: float) -> str:
    """A relative change with its sign, in at most eight characters."""
    size = abs(100 * value)
    if size < 10:
        return f"{value:+.2%}"
    if size < 1000:
        return f"{value:+.1%}"
    return f"{value:+.0%}" if size < 1e5 else f"{100 * value:+.0e}%"


def perplexity(value: float) -> str:
    """A perplexity in at most nine characters."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.3e}"


def nats(value: float | None) -> str:
    """A log-probability or a difference of some, in nats."""
    return "not finite" if value is None else f"{value:+.3f}"


def count(number: int, noun: str) -> str:
    """How many, with the noun in its number."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def calls(number: int, tokens: int) -> str:
    """What an LLM was asked; "" if it was not."""
    return f"{count(number, 'call')}, {tokens:,} tokens" if number or tokens else ""


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def clock(seconds: float) -> str:
    """Seconds as a clock that counts them shows them."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def about(seconds: float) -> str:
    """An estimate of seconds, without digits that it does not have."""
    if seconds < 60:
        return "under 1 min"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.0f} h"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
