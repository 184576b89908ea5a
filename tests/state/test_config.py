"""The configuration: one file, two halves, errors a user can act on."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prunewright.state import (
    InputError,
    PruneConfig,
    PruneContext,
    PruneRequest,
    load_config,
    parse_pattern,
    validate_config,
)
from prunewright.state.loading import PRESETS, read_preset
from prunewright.state.study import load_comparison_config


def test_every_key_belongs_to_exactly_one_half() -> None:
    request, context = set(PruneRequest.model_fields), set(PruneContext.model_fields)
    assert request & context == set()
    assert request | context == set(PruneConfig.model_fields)


def test_the_halves_hold_the_values_of_the_whole() -> None:
    config = validate_config({"target": 0.3, "agent": "greedy", "guard": {"max_increase": 0.5}})
    assert config.request.model_dump() | config.context.model_dump() == config.model_dump()


def test_the_defaults_are_those_of_the_design() -> None:
    config = load_config()
    assert config.model == "embedded"
    assert config.agent == "google_genai:gemini-3-flash-preview"
    assert config.agent_options == {}
    assert (config.target, config.max_steps, config.max_delta) == (0.45, 40, 0.15)
    assert (config.max_layer_sparsity, config.criterion) == (0.9, "obs")
    assert (config.reconstruct, config.allocation, config.adapt) == ("block", None, None)
    assert (config.guard.max_increase, config.profile.gradient_every) == (0.15, 3)
    windows = config.texts.windows
    assert (windows.calibration, windows.gradient, windows.guard) == (16, 8, 8)
    assert (windows.test, windows.length, config.seed) == (20, 1024, 0)
    assert config.feedback
    assert config.max_stalls == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"tarqet": 0.3}, "unknown key tarqet; did you mean target?"),
        ({"guard": {"max_increas": 0.3}}, "unknown key guard.max_increas; did you mean max_incr"),
        ({"texts": {"windows": {"gard": 3}}}, "unknown key texts.windows.gard; did you mean guard"),
        ({"zzz": 1}, "unknown key zzz; known: "),
        ({"guard": {"zzz": 1}}, "unknown key guard.zzz; known: max_increase, max_total_increase"),
        ({"target": "much"}, "target:"),
        ({"target": 0}, "target:"),
        ({"target": 0.96}, "target:"),
        ({"target": float("nan")}, "target:"),
        ({"guard": {"max_increase": -1}}, "guard.max_increase:"),
        ({"guard": 3}, "guard:"),
        ({"criterion": "wanda, obs"}, "criterion: a name is asked for"),
        ({"target": 0.8, "max_layer_sparsity": 0.7}, "above max_layer_sparsity 0.7"),
        ({"texts": {"windows": {"calibration": 2, "gradient": 3}}}, "gradient windows (3)"),
        ({"pattern": 124}, "in quotes"),
        ({"pattern": "4:2"}, "less than 2"),
        ({"pattern": "2-4"}, '"2:4"'),
        ({"seed": -1}, "seed:"),
        ({"max_steps": 0}, "max_steps:"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_config(data)
    assert words in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        validate_config({"target": 3, "seed": -1, "modle": "x"})
    assert len(str(caught.value).splitlines()) == 3


def test_yaml_reads_an_unquoted_pattern_as_a_number_and_the_user_is_told(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("pattern: 2:4\n")
    assert yaml.safe_load(file.read_text()) == {"pattern": 124}
    with pytest.raises(InputError, match="in quotes"):
        load_config(file)
    file.write_text('pattern: "2:4"\n')
    assert load_config(file).pattern == "2:4"
    assert load_config(overrides=["pattern=2:4"]).pattern == "2:4"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("target=0.3", ("target",), 0.3),
        ("max_steps=7", ("max_steps",), 7),
        ("feedback=false", ("feedback",), False),
        ("model=./some=dir", ("model",), "./some=dir"),
        ("texts.windows.length=64", ("texts", "windows", "length"), 64),
        ("guard.max_total_increase=null", ("guard", "max_total_increase"), None),
        ("guard.max_total_increase=2", ("guard", "max_total_increase"), 2.0),
        ("texts.guard=own.txt", ("texts", "guard"), "own.txt"),
        ("agent_options={temperature: 0, stop: [a, b]}", ("agent_options", "stop"), ["a", "b"]),
        ("agent_options.temperature=0.1", ("agent_options", "temperature"), 0.1),
        ("agent_options.delta=1e-3", ("agent_options", "delta"), 0.001),
        ("agent_options.streaming=false", ("agent_options", "streaming"), False),
        ("agent_options.base_url=http://[::1]:8", ("agent_options", "base_url"), "http://[::1]:8"),
        ("agent_options.day=2026-02-30", ("agent_options", "day"), "2026-02-30"),
        ("agent_options.name=nan", ("agent_options", "name"), "nan"),
        ("allocation_options.trials=3", ("allocation_options", "trials"), 3),
        ("seed=9223372036854775807", ("seed",), 2**63 - 1),
    ],
)
def test_set(override: str, path: tuple[str, ...], value: object) -> None:
    found: Any = load_config(overrides=[override]).model_dump()
    for part in path:
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("target", "key=value"),
        ("=3", "key=value"),
        ("target=", "target:"),
        ("target.low=3", "target:"),
        (f"target={10**400}", "target:"),
        ("gaurd.max_increase=3", "did you mean guard?"),
        ("agent_options=[", "not valid YAML"),
        ("texts.windows.guard=99999999999999999999", "texts.windows.guard: it is too large"),
    ],
)
def test_set_refuses(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(overrides=[override])
    assert words in str(caught.value)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agent_options: " + "[" * 1000, "nested too deeply"),
        ("agent_options: {a: " + "[" * 60 + "]" * 60 + "}", "nested too deeply"),
        ("agent_options: &a {x: *a}", "nested too deeply, or refers to itself"),
        (LAUGHS, "more than 100,000 values"),
        ("seed: 2026-02-30", "a date, a number or a tagged value is none"),
        ("seed: !!int q7Zk", "a date, a number or a tagged value is none"),
        ("seed: !!bool q7Zk", "a date, a number or a tagged value is none"),
        ("seed: !!timestamp q7Zk", "a date, a number or a tagged value is none"),
        ("seed: " + "9" * 5000, "a date, a number or a tagged value is none"),
        ("seed: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ],
)
def test_yaml_that_has_no_end_or_no_value_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    for read in (load_config, load_comparison_config):
        with pytest.raises(InputError, match=words) as caught:
            read(file)
        assert "q7Zk" not in str(caught.value)


def test_a_value_given_by_set_is_bounded_like_a_file() -> None:
    with pytest.raises(InputError, match="--set agent_options: not usable YAML"):
        load_config(overrides=["agent_options={y: &a {x: *a}}"])


def test_set_below_a_value_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("target: 0.3\n")
    with pytest.raises(InputError, match="target holds a value"):
        load_config(file, ["target.low=3"])


def test_precedence_file_then_set_then_values(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("target: 0.2\nseed: 1\nmax_steps: 5\nguard: {max_increase: 0.4}\n")
    config = load_config(
        file, ["seed=2", "max_steps=6", "guard.max_total_increase=3"], max_steps=7, agent=None
    )
    assert (config.target, config.seed, config.max_steps) == (0.2, 2, 7)
    assert (config.guard.max_increase, config.guard.max_total_increase) == (0.4, 3.0)
    assert config.agent == load_config().agent


@pytest.mark.parametrize("content", ["[1, 2]", "just words", "target: [", "a: b: c", "\x00"])
def test_files_that_are_no_mapping(content: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"c\.yaml"):
        load_config(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.yaml"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == load_config()


@pytest.mark.parametrize(
    "key", ["api_key", "google_api_key", "apikey", "KEY", "secret", "password", "access_token"]
)
def test_secrets_do_not_enter_a_config(key: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_config({"agent_options": {key: "hunter2hunter2"}})
    assert key in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["max_tokens", "temperature", "base_url", "top_k", "keyboard"])
def test_options_that_only_look_alike_are_fine(key: str) -> None:
    assert validate_config({"agent_options": {key: 1}}).agent_options == {key: 1}


def test_a_config_cannot_be_altered() -> None:
    config = load_config()
    with pytest.raises(Exception, match="frozen"):
        config.target = 0.2  # type: ignore[misc]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@given(
    target=st.floats(0.01, 0.9),
    model=TEXT,
    seed=st.integers(0, 2**63 - 1),
    options=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "note"]), st.one_of(st.integers(), TEXT)
    ),
    guard=st.one_of(st.none(), TEXT),
    total=st.one_of(st.none(), st.floats(1e-6, 1e6)),
    pattern=st.sampled_from(["unstructured", "2:4", "1:2", "12:34"]),
)
def test_yaml_round_trip(
    target: float,
    model: str,
    seed: int,
    options: dict[str, Any],
    guard: str | None,
    total: float | None,
    pattern: str,
) -> None:
    config = validate_config(
        {
            "target": target,
            "model": model,
            "seed": seed,
            "agent_options": options,
            "texts": {"guard": guard},
            "guard": {"max_total_increase": total},
            "pattern": pattern,
        }
    )
    assert validate_config(yaml.safe_load(config.to_yaml())) == config


@given(keep=st.integers(0, 20), group=st.integers(0, 20))
def test_patterns(keep: int, group: int) -> None:
    if 0 < keep < group:
        assert parse_pattern(f"{keep}:{group}") == (keep, group)
    else:
        with pytest.raises(ValueError, match="keep at least 1"):
            parse_pattern(f"{keep}:{group}")


@pytest.mark.parametrize("pattern", ["", "2", "2:", ":4", "2:4:8", "two:four", " 2:4", "-1:4"])
def test_no_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        parse_pattern(pattern)


def test_a_removed_key_says_what_to_use_and_its_null_is_read() -> None:
    with pytest.raises(InputError, match=r"guard: max_price no longer exists: .*max_increase"):
        validate_config({"guard": {"max_price": 2.0}})
    old = validate_config({"guard": {"max_price": None, "max_increase": 0.1}})
    assert old == validate_config({"guard": {"max_increase": 0.1}})


def test_calibration_is_a_source_or_a_mix() -> None:
    (alone,) = load_config(None, ["texts.calibration=a"]).texts.mix
    assert (alone.source, alone.weight) == ("a", 1)
    config = load_config(None, ["texts.calibration=[a, {source: 'b:c', weight: 2}]"])
    assert [(one.source, one.weight) for one in config.texts.mix] == [("a", 1), ("b:c", 2)]
    assert config.texts.sources("guard") == config.texts.mix
    assert config.texts.calibration_words == "1 a + 2 b:c"
    assert validate_config(yaml.safe_load(config.to_yaml())) == config
    assert load_config(None, ["texts.calibration=[a]"]).texts.calibration == "a"
    moved = config.texts.renamed(lambda source: f"/there/{source}")
    assert [one.source for one in moved.mix] == ["/there/a", "/there/b:c"]
    assert (moved.guard, moved.test) == (None, "/there/embedded")


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "a mix has at least one source"),
        (["a", "b", "a"], "a is named twice"),
        (["a", {"source": "b", "wieght": 2}], "calibration.list.1.wieght; did you mean weight?"),
        (["a", {"source": "b", "weight": 0}], "weight: Input should be greater than 0"),
        (["a", {"source": "b", "weight": float("inf")}], "weight: Input should be a finite number"),
        (["a", {"weight": 2}], "source: Field required"),
        (3, "texts.calibration"),
    ],
)
def test_what_is_no_mix_is_refused(calibration: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        validate_config({"texts": {"calibration": calibration}})
    assert words in str(error.value)


def test_nothing_is_reported_on_text_that_the_model_wrote() -> None:
    with pytest.raises(InputError, match="no text to report on"):
        validate_config({"texts": {"test": "self"}})


def test_the_guard_asks_no_questions_that_calibration_answers() -> None:
    texts = {"calibration": ["embedded", "facts.json"], "knowledge": "facts.json"}
    assert validate_config({"texts": texts}).texts.knowledge == "facts.json"
    with pytest.raises(InputError, match="give them in two files"):
        validate_config({"texts": texts, "guard": {"max_knowledge_drop": 0.2}})
    own = {"texts": {"calibration": "embedded"}, "guard": {"max_knowledge_drop": 0.2}}
    assert validate_config(own).texts.knowledge == "embedded"  # questions, and a corpus


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_below_a_file_and_above_the_defaults(name: str, tmp_path: Path) -> None:
    written = yaml.safe_load(read_preset(name))
    alone = load_config(preset=name)
    defaults = load_config()
    for key, value in written.items():
        if not isinstance(value, dict):
            assert alone.model_dump(mode="json")[key] == value
    assert alone.target == defaults.target
    file = tmp_path / "config.yaml"
    file.write_text("criterion: magnitude\ntexts: {calibration: x, windows: {guard: 3}}\n")
    below = load_config(file, ["texts.windows.test=5"], preset=name, target=0.2)
    assert (below.criterion, below.texts.calibration, below.target) == ("magnitude", "x", 0.2)
    windows, own = below.texts.windows, alone.texts.windows
    assert (windows.guard, windows.test) == (3, 5)
    assert (windows.calibration, windows.gradient) == (own.calibration, own.gradient)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="no preset 'bset'; known: paper, fast, best"):
        load_config(preset="bset")


DOMAINS = {"calibration": {"general": "embedded", "code": "c.txt"}}


def test_texts_may_be_domains() -> None:
    (override,) = ["texts.calibration={general: embedded, code: c.txt}"]
    config = load_config(None, [override, "weights={general: 1, code: 0.5}"])
    texts = config.texts
    assert texts.domains("calibration") == texts.domains("guard") == ("code", "general")
    assert [one.source for one in texts.sources("guard")] == ["c.txt", "embedded"]
    assert texts.domains("test") == ()
    assert texts.named == {"embedded", "c.txt"}
    assert texts.guard_words == "code: c.txt, general: embedded (other windows)"
    assert texts.renamed(str.upper).calibration == {"code": "C.TXT", "general": "EMBEDDED"}
    assert config.domain_weights == {"code": 0.5, "general": 1.0}
    assert validate_config({"texts": DOMAINS}).domain_weights == {"code": 1.0, "general": 1.0}
    assert load_config(None, ["texts.calibration=a"]).domain_weights == {}
    # In whatever order they were stored.
    turned = {"calibration": dict(reversed(DOMAINS["calibration"].items()))}
    assert (
        validate_config({"texts": turned}).to_yaml()
        == validate_config({"texts": DOMAINS}).to_yaml()
    )
    assert validate_config(yaml.safe_load(config.to_yaml())) == config


def test_what_is_measured_by_domain_names_the_domains() -> None:
    one, other = validate_config({}), validate_config({"texts": DOMAINS})
    renamed = {"calibration": {"general": "embedded", "python": "c.txt"}}
    assert other.identity() != validate_config({"texts": renamed}).identity()
    assert "domains" not in one.identity()
    only = {"guard": DOMAINS["calibration"]}
    assert validate_config({"texts": only}).domain_weights == {}
    assert one.guard.bounds([]) == {}
    assert other.guard.bounds(["code", "general"]) == {"code": 0.15, "general": 0.15}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": {"calibration": {"general": "embedded"}}}, "two domains or more"),
        ({"texts": {"calibration": {"A": "a", "b": "b"}}}, "a domain's name is a small letter"),
        ({"texts": {"calibration": {"a": 3, "b": "b"}}}, "texts.calibration.domains.a: "),
        ({"texts": {"guard": {"source": "a", "b": "b"}}}, "and not source"),
        ({"texts": DOMAINS | {"guard": "x"}}, "calibration has domains and guard names one text"),
        ({"texts": DOMAINS | {"guard": {"a": "a", "b": "b"}}}, "guard has a, b: give both the"),
        (
            {"texts": {"calibration": {"a": "a", "b": "b", "c": "c"}}},
            "8 guard windows cannot be shared out equally over 3 domains: set windows.guard to 6",
        ),
        (
            {"texts": DOMAINS | {"windows": {"gradient": 1}}},
            "1 gradient windows are too few for 2 domains",
        ),
        ({"weights": {"general": 1}}, "texts.calibration has no domains"),
        (
            {"texts": {"guard": DOMAINS["calibration"]}, "weights": {"general": 1, "code": 1}},
            "texts.calibration has no domains",
        ),
        ({"texts": DOMAINS, "weights": {"general": 1}}, "has the domains code, general"),
        ({"texts": DOMAINS, "weights": {"general": 0, "code": 0}}, "weights are all 0"),
        ({"texts": DOMAINS, "weights": {"general": -1, "code": 1}}, "weights.general: "),
        ({"guard": {"max_increase": {"code": 0.1}}}, "the guard's text has no domains"),
        (
            {"texts": DOMAINS, "guard": {"max_increase": {"code": 0.1}}},
            "guard.max_increase bounds code, and the guard's text has the domains code, general",
        ),
        (
            {"texts": DOMAINS, "guard": {"max_increase": {"code": 0, "general": 1}}},
            "guard.max_increase.domains.code: Input should be greater than 0",
        ),
    ],
)
def test_domains_that_say_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        validate_config(changes)
    assert words in str(error.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", ["target", "fit.learning_rate", "asking.timeout", "adapt.warmup"])
def test_no_number_is_infinite(key: str, value: float) -> None:
    """Files of a run are JSON, which has no such number."""
    outer, _, inner = key.partition(".")
    with pytest.raises(InputError, match=f"{key}: Input should be a finite number"):
        validate_config({outer: {inner: value} if inner else value})


def test_a_guard_may_let_everything_pass() -> None:
    config = validate_config({"guard": {"max_increase": math.inf}})
    assert config.guard.max_increase == math.inf
    assert validate_config(yaml.safe_load(config.to_yaml())) == config
    for value in (-math.inf, math.nan):
        with pytest.raises(InputError, match=r"guard\.max_increase"):
            validate_config({"guard": {"max_increase": value}})


@pytest.mark.parametrize("batch", [0, -3])
def test_a_batch_has_a_window(batch: int) -> None:
    with pytest.raises(InputError, match=r"texts\.windows\.batch"):
        load_config(None, [f"texts.windows.batch={batch}"])
