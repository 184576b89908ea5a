"""What an LLM answers is hostile until it has been read: refused quickly, never a crash."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunewright.graph.agents import InvalidAnswerError
from prunewright.graph.agents.chat.reading import MAX_ANSWER, MAX_ENTRIES, read_answer
from prunewright.state import Decision, LayerDelta, Move, Trials
from prunewright.state.decision import MAX_MOVES, MAX_NAME, MAX_REASONING

NAME = "0.mlp.down_proj"
PROBE = {"layers": [{"name": NAME, "delta": -0.1}]}


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
    "two objects": answer() + answer(reasoning="s"),
    "a draft and an answer": f"Draft: {answer(layers=[])}\nFinal: {answer()}",
    "an object in its thoughts alone": f"<think>{answer()}</think>",
    "a whole object and a cut one": answer() + '{"reasoning": "s", "layers": [',
    "a key twice": answer().replace("{", '{"reasoning": "s", ', 1),
    "a key twice in an entry": answer().replace('"delta"', '"delta": 0.05, "delta"'),
    "typographic quotes": answer().replace('"', "\u201d"),
    "a comment at the end": answer().replace("}]", "}] // the cheapest"),
    "single quotes": "{'reasoning': 'r', 'layers': []}",
    "a comment": "{/* */}",
    "a trailing comma": '{"reasoning": "r", "layers": [],}',
    "NUL bytes": "\0" * 100,
    "many braces": "{" * 100_000,
    "many thoughts": "<think>" * 20_000 + "</think>" * 5_000,
    "many objects": "{}" * 20_000,
    "many cut objects in thoughts": '{"a":"</think>","b":' * 9_000,
    "many keys": "{" + ",".join(f'"{i}":1' for i in [*range(15_000), 14_999]) + "}",
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
    "probes and layers": answer(probes=[PROBE]),
    "more moves than may be asked for": json.dumps({"probes": [PROBE] * (MAX_MOVES + 1)}),
    "a move that is a list": json.dumps({"probes": [[PROBE]]}),
    "an extra key of a move": json.dumps({"probes": [PROBE | {"windows": 99}]}),
    "a move with words for a delta": json.dumps(
        {"probes": [{"layers": [{"name": NAME, "delta": "much"}]}]}
    ),
    "moves with one entry too many": json.dumps(
        {"probes": [{"layers": [{"name": "x", "delta": 0.1}] * (MAX_ENTRIES // 2 + 1)}] * 2}
    ),
    "moves by another name": json.dumps({"moves": [PROBE]}),
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


@pytest.mark.parametrize(
    "beside",
    [{}, {"reasoning": None, "layers": []}, {"reasoning": "r", "groups": [], "done": True}],
)
def test_moves_to_measure_are_an_answer(beside: dict[str, Any]) -> None:
    group = {"projection": "mlp.up_proj", "from": 1, "to": 3, "delta": 0.05}
    found = read_answer(json.dumps(beside | {"probes": [PROBE, {"groups": [group]}]}))
    layer = LayerDelta(name=NAME, delta=-0.1)
    assert found == Trials(moves=[Move(layers=[layer]), Move.model_validate({"groups": [group]})])
    nothing = {"reasoning": "r", "layers": []}
    for none in ([], None):
        assert read_answer(json.dumps(nothing | {"probes": none})) == Decision(**nothing)


AROUND: dict[str, str] = {
    "a fence": "```json\n{}\n```",
    "a fence without a language": "```\n{}```",
    "two fences": "```json\n{}\n```\nOnce more:\n```json\n{}\n```",
    "words": "Here is the decision:\n\n{}\n\nI hope that helps.",
    "words with braces": "Of the set {{a, b}} and {{layers}} I choose {} (see {{above}}).",
    "thoughts": '<think>\nMaybe {{\'a\': 1}} or {{"reasoning": "r"}}?\n</think>\n{}',
    "thoughts that begin before": 'Maybe {{"a": 1}} {{"b":\n</think>\n\n{}',
    "thoughts that do not end": "<think>\nI shall answer:\n{}",
    "Mistral's thoughts": '[THINK]Maybe {{"a": 1}}[/THINK]{}',
    "a list": "[{}]",
    "the object twice": "{}\n{}",
    "LaTeX": "\\boxed{{ {} }}",
}


@pytest.mark.parametrize("case", AROUND)
def test_one_object_is_read_whatever_is_around_it(case: str) -> None:
    notes: list[str] = []
    said = answer(reasoning="{braces} in it")
    decision = read_answer(AROUND[case].format(said, said), notes)
    assert decision == Decision.model_validate_json(said)
    (note,) = notes
    assert note.startswith("the answer's one JSON object was read; there was '")
    assert note.isascii()


def test_tags_inside_an_answer_are_text_like_any_other() -> None:
    notes: list[str] = []
    said = answer(reasoning="<think> {} </think> ```json {")
    assert read_answer(said, notes) == Decision.model_validate_json(said)
    assert notes == []


def test_an_object_in_a_string_is_read() -> None:
    notes: list[str] = []
    assert read_answer(json.dumps(answer()), notes) == read_answer(answer())
    assert notes == ["the answer's one JSON object was read; it was written as a JSON string"]


@pytest.mark.parametrize("blank", ["\ufeff", "\xa0\n", "\u200b", "\u3000"])
def test_what_nobody_sees_around_an_object_is_not_worth_a_note(blank: str) -> None:
    notes: list[str] = []
    assert read_answer(blank + answer() + blank, notes) == read_answer(answer())
    assert notes == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I would prune up_proj.", "no JSON object in the answer, which is 'I would prune up_p"),
        ("x" * 70, f"which is '{'x' * 60}...' (70 characters)"),
        (f"<think>{answer()}</think>", "no JSON object after the thoughts"),
        ('{"reasoning": "a", "layers": [', "not complete, it was cut off or left open"),
        ("{'reasoning': 'a'}", "keys and strings need double quotes"),
        ('{"reasoning": "a", // why\n"layers": []}', "JSON has no comments"),
        ('{"reasoning": "a", "layers": [],}', "no comma before a closing bracket"),
        (raw_delta("NaN"), "NaN is no number in JSON"),
        (answer().replace('"r"', '"a\nb"'), "written as an escape, such as \\n"),
        (answer().replace("{", '{"layers": [], ', 1), "the key 'layers' is in one object twice"),
        (answer() + answer(layers=[]), "2 different JSON objects, at characters 0, "),
        ("[" * 30_000 + '{"a":' * 30_000, "nested too deeply"),
        ('Sure! {"layers": []} Done.', "answer; there was 'Sure!' before it and 'Done.' after"),
        ('Sure! {"layers": []}', "reasoning must be there, or accept: true (of"),
    ],
)
def test_a_refusal_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(InvalidAnswerError) as caught:
        read_answer(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["groups", "rebalance", "expected_ppl_change", "lessons"])
def test_a_key_that_is_null_is_as_good_as_absent(key: str) -> None:
    said = json.loads(answer())
    said.pop(key, None)
    assert read_answer(json.dumps(said | {key: None})) == read_answer(json.dumps(said))


@pytest.mark.parametrize("layers", [{}, {"layers": None}, {"layers": []}])
def test_who_chooses_groups_need_not_choose_layers(layers: dict[str, Any]) -> None:
    group = {"projection": "mlp.down_proj", "from": 0, "to": 2, "delta": 0.1}
    decision = read_answer(json.dumps({"reasoning": "r", "groups": [group]} | layers))
    assert decision.layers == []
    assert decision.groups[0].last == 2


@pytest.mark.parametrize("key", ["reasoning", "more"])
def test_null_stands_for_no_key_that_is_needed_or_unknown(key: str) -> None:
    with pytest.raises(InvalidAnswerError, match=f"{key}(: Extra inputs| must be there)"):
        read_answer(answer(**{key: None}))


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
