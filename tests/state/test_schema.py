"""The state's types hold together."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from prunewright.state import STATUS_WORDS
from prunewright.state.run import Status, add_up

COUNTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1000))


def test_every_status_has_words() -> None:
    assert set(STATUS_WORDS) == set(get_args(Status))
    assert all(STATUS_WORDS.values())


@given(COUNTS, COUNTS, COUNTS)
def test_sums_by_key_do_not_depend_on_order(
    a: dict[str, float], b: dict[str, float], c: dict[str, float]
) -> None:
    assert add_up(add_up(a, b), c) == add_up(a, add_up(c, b))
    assert add_up(a, {}) == a
    total = add_up(a, b)
    assert all(total[k] == a.get(k, 0) + b.get(k, 0) for k in {*a, *b})


def test_adding_up_alters_neither_side() -> None:
    a, b = {"x": 1.0}, {"x": 2.0, "y": 1.0}
    assert add_up(a, b) == {"x": 3.0, "y": 1.0}
    assert (a, b) == ({"x": 1.0}, {"x": 2.0, "y": 1.0})
