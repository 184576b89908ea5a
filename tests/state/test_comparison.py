"""The configuration of a comparison: what each experiment gets, and errors a user can act on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prunewright.state import InputError
from prunewright.state.study import load_comparison_config, validate_comparison

WANDA = {"name": "uniform wanda", "settings": {"criterion": "wanda"}}
GREEDY = {"name": "greedy", "settings": {"agent": "greedy"}}


def comparison(**keys: Any) -> dict[str, Any]:
    return {"methods": [WANDA, GREEDY]} | keys


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"contol": "greedy"}, "unknown key contol; did you mean control?"),
        ({"methods": []}, "methods:"),
        ({"methods": [WANDA, {"nam": "x"}]}, "unknown key methods.1.nam; did you mean name?"),
        (
            {"evaluation": {"texts": [{"name": "a", "sorce": "b"}]}},
            "unknown key evaluation.texts.0.sorce; did you mean source?",
        ),
        ({"base": {"tarqet": 0.3}}, "base: unknown key tarqet; did you mean target?"),
        ({"base": {"step": 7}}, "base: step:"),
        (
            {"methods": [{"name": "m", "settings": {"guard": {"max_increas": 1}}}]},
            "method m: unknown key guard.max_increas; did you mean max_increase?",
        ),
        ({"targets": [0.3, 0.97]}, "method uniform wanda: target:"),
        ({"methods": [WANDA, WANDA]}, "the method uniform wanda stands there twice"),
        ({"seeds": [1, 2, 1]}, "the seed 1 stands there twice"),
        ({"targets": [0.3, 0.3]}, "the target 0.3 stands there twice"),
        ({"control": "uniform wand"}, "no method uniform wand; did you mean uniform wanda?"),
        ({"methods": [{"name": "dense"}]}, "dense is the unpruned model"),
        ({"methods": [{"name": "a\u202eb"}]}, "printable characters"),
        ({"base": {"seed": 1}}, "base: seed does not belong here: seeds says which"),
        ({"base": {"target": 0.3}, "targets": [0.4]}, "target does not belong here"),
        ({"methods": [{"name": "m", "settings": {"out": "x"}}]}, "m: out does not belong here"),
        ({"base": {"review": True}}, "a person cannot be asked"),
        ({"methods": [{"name": "m", "settings": {"model": "x"}}]}, "m: model belongs into base"),
        ({"base": {"agent": "greedy"}}, "uniform wanda: base names an agent, so say kind"),
        ({"base": {"agent_options": {"api_key": "x"}}}, "api_key does not belong into a config"),
        (
            {
                "evaluation": {
                    "tasks": [{"name": "m", "task": "mmlu"}, {"name": "m", "task": "mmlu"}]
                }
            },
            "the task m stands there twice",
        ),
    ],
)
def test_what_is_wrong_is_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_comparison(comparison(**keys))
    assert words in str(caught.value)
    assert "Value error" not in str(caught.value)


def test_an_experiment_has_base_then_the_methods_own_keys_at_any_depth() -> None:
    windows = {"calibration": 4, "gradient": 2, "guard": 3}
    own = {"criterion": "fisher", "texts": {"windows": {"calibration": 8}}}
    config = validate_comparison(
        {
            "base": {"criterion": "wanda", "step": 0.2, "texts": {"windows": windows}},
            "methods": [{"name": "m", "settings": own}],
        }
    )
    experiment = config.settle(config.methods[0], seed=5, target=0.3)
    assert (experiment.criterion, experiment.step, experiment.seed, experiment.target) == (
        "fisher",
        0.2,
        5,
        0.3,
    )
    found = experiment.texts.windows
    assert (found.calibration, found.gradient, found.guard) == (8, 2, 3)
    assert config.settle().criterion == "wanda"
    assert config.base["texts"]["windows"] == windows


def test_a_method_with_an_agent_is_a_run_and_kind_wins() -> None:
    config = validate_comparison(
        {
            "base": {"agent": "greedy"},
            "methods": [
                {"name": "a", "settings": {"agent": "random"}},
                {"name": "b", "kind": "baseline"},
                {"name": "c", "kind": "run"},
            ],
        }
    )
    assert [method.resolved_kind for method in config.methods] == ["run", "baseline", "run"]
    config = validate_comparison(comparison())
    assert [method.resolved_kind for method in config.methods] == ["baseline", "run"]


def test_targets_are_the_comparisons_or_the_methods_or_the_patterns() -> None:
    methods = [WANDA, {"name": "2:4", "settings": {"pattern": "2:4"}}]
    config = validate_comparison({"methods": methods, "targets": [0.3, 0.6]})
    assert [config.targets_of(method) for method in config.methods] == [(0.3, 0.6), (0.5,)]
    # A run takes whole layers to its pattern, up to each target.
    greedy = {"name": "greedy 2:4", "settings": {"agent": "greedy", "pattern": "2:4"}}
    config = validate_comparison({"methods": [greedy], "targets": [0.3, 0.4]})
    assert config.targets_of(config.methods[0]) == (0.3, 0.4)
    assert config.settle(config.methods[0], target=0.3).target == 0.3
    own = {"name": "own", "settings": {"target": 0.2}}
    config = validate_comparison({"base": {"target": 0.4}, "methods": [WANDA, own]})
    assert [config.targets_of(method) for method in config.methods] == [(0.4,), (0.2,)]


def test_the_command_line_chooses_seeds_and_methods_and_keeps_the_control(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    third = {"name": "third", "settings": {"criterion": "magnitude"}}
    path.write_text(
        yaml.safe_dump(comparison(methods=[WANDA, GREEDY, third], control="uniform wanda"))
    )
    config = load_comparison_config(
        path, ["base.step=0.2", "targets=[0.2]"], seeds="3,4", methods=["third"]
    )
    assert [method.name for method in config.methods] == ["uniform wanda", "third"]
    assert (config.seeds, config.targets, config.settle().step) == ((3, 4), (0.2,), 0.2)
    with pytest.raises(InputError, match=r"no method thrid; did you mean third\?"):
        load_comparison_config(path, methods=["thrid"])
    with pytest.raises(InputError, match="seeds"):
        load_comparison_config(path, seeds="1,x")
    with pytest.raises(InputError, match="cannot read"):
        load_comparison_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml")), ids=str
)
def test_the_shipped_studies_are_valid(path: Path) -> None:
    config = load_comparison_config(path)
    assert config.control in [method.name for method in config.methods]
