"""Words of others are shown without what is not seen, or moves what is seen."""

import pytest

from prunewright.state.shown import clean, one_line


def test_control_characters_are_written_out() -> None:
    assert (
        clean("a\x1b[31mb\x07\u202e\ud800\n\t\u00a0é")
        == "a\\x1b[31mb\\x07\\u202e\\ud800\n\t\u00a0é"
    )


@pytest.mark.parametrize(
    "hidden",
    [
        *("\r", "\x00", "\x7f", "\x85", "\x9b", "\xad", "\u200b", "\u200d", "\u200e", "\u2028"),
        *("\u2066", "\u2069", "\u061c", "\ufeff", "\u2060", "\u2061", "\u206a", "\ufff9", "\ue000"),
        *("\U000e0041", "\U000e0100", "\ufe00", "\u3164", "\uffa0", "\u115f", "\u2800", "\u034f"),
    ],
)
def test_what_nobody_sees_is_written_out(hidden: str) -> None:
    shown = clean(f"a{hidden}b")
    assert shown == f"a{hidden.encode('unicode_escape').decode()}b"
    assert shown.isascii()


@pytest.mark.parametrize("text", ["naïve", "שלום", "日本語", "a\u0301", "❤\ufe0f", "x\u3000y"])
def test_letters_of_every_script_are_left_alone(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    ("most", "words"),
    [
        (40, "The middle blocks of up_proj are cheap."),
        (39, "The middle blocks of up_proj are cheap."),
        (38, "The middle blocks of up_proj are..."),
        (28, "The middle blocks of up_proj..."),
        (27, "The middle blocks of..."),
        # A word that is most of it is cut.
        (2, "Th..."),
    ],
)
def test_words_are_cut_between_two_of_them(most: int, words: str) -> None:
    assert one_line("The  middle\nblocks of up_proj are cheap.", most, "...") == words
