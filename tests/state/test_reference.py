"""The configuration's reference is whole, can be edited, and is the page that docs/ holds."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prunewright.graph.cli import app
from prunewright.state import InputError, load_config, validate_config
from prunewright.state.loading import PRESETS
from prunewright.state.reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_what_the_command_prints_is_read_back_to_the_defaults(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["config"])
    assert printed.exit_code == 0
    file = tmp_path / "config.yaml"
    file.write_text(printed.stdout, encoding="utf-8")
    assert load_config(file) == validate_config({})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_printed_is_what_it_sets(name: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["config", "--preset", name])
    assert printed.exit_code == 0
    file = tmp_path / "config.yaml"
    file.write_text(printed.stdout, encoding="utf-8")
    assert load_config(file) == load_config(preset=name) != load_config()
    as_json = CliRunner().invoke(app, ["config", "--preset", name, "--json"])
    assert json.loads(as_json.stdout) == yaml.safe_load(printed.stdout)


def test_an_edited_reference_is_what_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    edited = reference().replace("max_increase: 0.15", "max_increase: 0.05")
    file.write_text(edited.replace("criterion: obs", "criterion: gblm"), encoding="utf-8")
    found = load_config(file)
    assert (found.guard.max_increase, found.criterion) == (0.05, "gblm")
    file.write_text(edited.replace("max_stalls: 3", "max_stalls: 0"), encoding="utf-8")
    with pytest.raises(InputError, match="max_stalls"):
        load_config(file)


def test_every_key_has_a_meaning_and_a_type() -> None:
    lines = reference().splitlines()
    keys = [i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    written = yaml.safe_load(reference())

    def count(value: object) -> int:
        return sum(1 + count(v) for v in value.values()) if isinstance(value, dict) else 0

    assert len(keys) == count(written)
    assert all(lines[i - 1].strip().startswith("# ") for i in keys)
    text = " ".join(line.strip(" #") for line in lines)
    for words in (
        "(number, above 0, at most 0.95) target: 0.45",
        "(integer, at least 1 or null) max_calls: null",
        "(true or false) review: false",
        "(string, such as magnitude, wanda, gblm, fisher, sparsegpt, obs) criterion: obs",
    ):
        assert words in text


def test_the_page_in_docs_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"```yaml\n{reference()}```\n" in page, (
        "docs/configuration.md is old: put the output of `prunewright config` into it"
    )
