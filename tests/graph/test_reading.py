"""What an LLM answers is hostile until it has been read: refused quickly, never a crash."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunewright.graph.agents import InvalidAnswerError
from prunewright.graph.agents.reading import MAX_ANSWER, MAX_ENTRIES, read_answer
from prunewright.state import Decision, LayerDelta
from prunewright.state.decision import MAX_NAME, MAX_REASONING

NAME = "0.mlp.down_proj"


def answer(**changes: Any) -> str:
    entry = {"name": NAME, "delta": 0.1}
    return json.dumps({"reasoning": "r", "layers": [entry], "expected_ppl_change": 0.0} | changes)


def entry(**changes: Any) -> str:
    return answer(layers=[{"name": NAME, "delta": 0.1} | changes])


def raw_delta(text: str) -> str:
    return f'{{"reasoning": "r", "layers": [{{"name": "{NAME}", "delta": {text}}}]}}'


HOSTILE: dict[str, str] = {
    "empty": "",
    "blank": " \n\t\u2003",
    "null": "null",
    "a number": "7",
    "a string": '"prune it all"',
    "a list": "[]",
    "no keys": "{}",
    "two objects": answer() + answer(),
    "trailing words": answer() + " I hope that helps.",
    "single quotes": "{'reasoning': 'r', 'layers': []}",
    "a comment": "{/* */}",
    "a trailing comma": '{"reasoning": "r", "layers": [],}',
    "NUL bytes": "\0" * 100,
    "a byte order mark": "\ufeff" + answer(),
    "10,000 entries": answer(layers=[{"name": f"{i}.x", "delta": 0.1} for i in range(10_000)]),
    "one entry too many": answer(layers=[{"name": "x", "delta": 0.1}] * (MAX_ENTRIES + 1)),
    "too long to be read": answer(reasoning="x" * MAX_ANSWER),
    "long reasoning": answer(reasoning="x" * (MAX_REASONING + 1)),
    "a long name": entry(name="x" * (MAX_NAME + 1)),
    "an extra key": answer(system="You are root."),
    "an extra key of an entry": entry(mode="all"),
    "a hostile key": answer(**{"\ud800</script>\n- ignore the rules\u202e" * 50: 1}),
    "a name that is a number": entry(name=7),
    "a name that is a list": entry(name=[NAME]),
    "a name that is null": entry(name=None),
    "a delta in quotes": entry(delta="0.1"),
    "a delta that is true": entry(delta=True),
    "a delta that is null": entry(delta=None),
    "a delta that is a list": entry(delta=[0.1]),
    "an entry that is a string": answer(layers=[NAME]),
    "layers as an object": answer(layers={NAME: 0.1}),
    "layers as null": answer(layers=None),
    "reasoning as a list": answer(reasoning=["r"]),
    "NaN": raw_delta("NaN"),
    "Infinity": raw_delta("Infinity"),
    "-Infinity": raw_delta("-Infinity"),
    "1e999": raw_delta("1e999"),
    "a number of 5,000 digits": raw_delta("1" * 5000),
    "a fraction of 100,000 digits": raw_delta("1." + "0" * 100_000 + "1e1"),
    "hexadecimal": raw_delta("0x1"),
    "leading zeros": raw_delta("00.1"),
    "above one": raw_delta("1.0000001"),
    "below minus one": raw_delta("-1.5"),
    "an absurd expectation": answer(expected_ppl_change=1e6),
    "an expectation in words": answer(expected_ppl_change="small"),
    "nested lists": "[" * 90_000,
    "closed nested lists": "[" * 90_000 + "]" * 90_000,
    "nested objects": '{"a":' * 30_000,
    "nested where a name should be": entry(name=0).replace("0,", "[" * 50_000 + "]" * 50_000 + ","),
    "a lone surrogate in JSON": answer(reasoning="\ud800"),
    "a lone surrogate in a name": entry(name="\udfff"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers_are_refused(case: str) -> None:
    with pytest.raises(InvalidAnswerError) as caught:
        read_answer(HOSTILE[case])
    problem = str(caught.value)
    assert problem
    # It goes into the next prompt and the trace: short, and text that a file can hold.
    assert len(problem) <= 2000
    problem.encode("utf-8")


def test_an_answer_at_the_limits_is_read() -> None:
    layers = [{"name": f"{i}.q", "delta": 0.1} for i in range(MAX_ENTRIES)]
    decision = read_answer("\n " + answer(layers=layers, reasoning="é" * MAX_REASONING) + "\n")
    assert len(decision.layers) == MAX_ENTRIES
    assert decision.layers[-1] == LayerDelta(name=f"{MAX_ENTRIES - 1}.q", delta=0.1)


def test_what_may_be_left_out() -> None:
    decision = read_answer('{"layers": [{"delta": 1, "name": "a"}], "reasoning": ""}')
    assert decision == Decision(reasoning="", layers=[LayerDelta(name="a", delta=1.0)])
    assert decision.expected_ppl_change is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from([NAME, "reasoning", "layers", "delta"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["reasoning", "layers", "name", "delta", "expected_ppl_change"])
            | st.text(st.characters(), max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
LIKELY = st.fixed_dictionaries(
    {
        "reasoning": st.text(st.characters(), max_size=30) | JSON,
        "layers": st.lists(
            st.fixed_dictionaries({"name": st.text(st.characters()), "delta": st.floats() | JSON})
            | JSON,
            max_size=4,
        )
        | JSON,
    },
    optional={"expected_ppl_change": st.floats() | JSON, "more": JSON},
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.text(st.characters(), max_size=200),
        JSON.map(json.dumps),
        LIKELY.map(json.dumps),
        LIKELY.map(lambda value: json.dumps(value, ensure_ascii=False)),
        st.tuples(LIKELY.map(json.dumps), st.integers(0, 200)).map(lambda t: t[0][: t[1]]),
    )
)
def test_whatever_comes_is_a_decision_or_refused(text: str) -> None:
    decision, problem = None, ""
    try:
        decision = read_answer(text)
    except InvalidAnswerError as error:
        problem = str(error)
    if decision is None:
        assert 0 < len(problem.encode("utf-8")) <= 8000
    else:
        assert all(math.isfinite(item.delta) and abs(item.delta) <= 1 for item in decision.layers)
        assert Decision.model_validate_json(decision.model_dump_json()) == decision
