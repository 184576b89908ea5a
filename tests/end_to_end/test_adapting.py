"""Training at the end of a run, and of any pruned model by `prunewright adapt`."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from prunewright.graph import baseline, resume, run
from prunewright.graph.cli import app
from prunewright.state import InputError, StoreError
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics
from tests.conftest import make_pico
from tests.end_to_end.conftest import learned_config

Submit = Callable[[dict[str, Any]], dict[str, Any]]

ADAPT: dict[str, Any] = {
    "tokens": 8 * 4 * 48,
    "batch": 4,
    "learning_rate": 1e-3,
    "checkpoint_minutes": 0,
}


@pytest.fixture(scope="module")
def settings(learned_model: Path) -> dict[str, Any]:
    """One shot at half of the weights, then training."""
    return learned_config(learned_model) | {"target": 0.5, "reconstruct": "none", "adapt": ADAPT}


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a baseline that was trained, uninterrupted."""
    return baseline(settings, out=tmp_path_factory.mktemp("trained") / "run").directory


@pytest.fixture(scope="module")
def untrained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same baseline without training."""
    out = tmp_path_factory.mktemp("untrained") / "run"
    return baseline(settings | {"adapt": None}, out=out).directory


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def adapt(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapt", *map(str, words)])


def test_a_run_ends_with_training_and_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    events: list[dict[str, Any]] = []
    steps = {"agent": "greedy", "target": 0.3, "guard": {"max_increase": 1.0}}
    result = run(settings | steps, out=out, on_event=lambda _, event: events.append(event))
    (stage,) = result.metrics.stages
    assert (stage.name, stage.kept) == ("adapt", True)
    assert stage.before is not None
    assert stage.after is not None
    assert stage.after < stage.before
    # The masks of the last step, with other values.
    (*_, last) = RunDirectory(out).read_trace()
    assert stage.revision == result.metrics.revision != last.revision
    dense, saved = tensors(Path(settings["model"])), tensors(out / "model")
    names = [name for name in dense if "_proj" in name]
    zeros = sum(int((saved[name] == 0).sum()) for name in names)
    assert zeros / sum(dense[name].numel() for name in names) == result.metrics.sparsity
    assert all((saved[n][saved[n] != 0] != dense[n][saved[n] != 0]).any() for n in names)
    assert all(torch.equal(saved[name], dense[name]) for name in dense if name not in names)
    # Nothing of it is left behind, and nobody is told that this was no training.
    assert not (out / "adapt").exists()
    trained = stage.curve[-1][0]
    card = (out / "model" / "README.md").read_text("utf-8")
    assert f"trained on {trained:,} tokens" in card
    assert "without retraining" not in card
    shown = CliRunner().invoke(app, ["show", str(out)]).stdout
    assert "adapt (training): guard perplexity" in shown
    labels = [e["progress"]["label"] for e in events if "progress" in e]
    assert any(label.startswith("adapt (training): KL") for label in labels)


@pytest.mark.parametrize(
    "kill",
    [
        {"at": "prunewright.tools.adapt.teacher:save_file", "nth": 3},
        {"at": "prunewright.tools.adapt.checkpoints:save_file", "nth": 20},
        {"at": "prunewright.tools.finishing:discard", "nth": 1},
    ],
    ids=["dense outputs", "in a checkpoint", "stage stored"],
)
def test_a_kill_in_training_ends_at_the_same_weights(
    kill: dict[str, Any],
    settings: dict[str, Any],
    trained: Path,
    submit: Submit,
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    job = {"config": settings, "out": str(out)}
    ended = submit(job | {"do": "baseline", "kill": kill | {"when": "before"}})
    assert ended == {"signal": signal.SIGKILL}
    assert (out / "adapt").exists()
    standing = out / "adapt" / "standing.json"
    before = json.loads(standing.read_text())["seconds"] if standing.exists() else 0.0
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(trained, out)
    assert not (out / "adapt").exists()
    (stage,) = answer["metrics"]["stages"]
    (whole,) = json.loads((trained / "metrics.json").read_text())["stages"]
    assert stage["tokens"]["adapt"] == whole["tokens"]["adapt"] == whole["curve"][-1][0]
    assert stage["seconds"] > before


def test_the_command_trains_a_run_and_a_plain_directory_alike(
    settings: dict[str, Any], trained: Path, untrained: Path, tmp_path: Path
) -> None:
    """As at the end of the run itself: from the same masks, on the same texts."""
    plain = Path(shutil.copytree(untrained / "model", tmp_path / "plain"))
    options = [f"--set=adapt={json.dumps(ADAPT)}"]
    of_run = adapt(untrained, "-o", tmp_path / "one", *options)
    assert of_run.exit_code == 0, of_run.output
    assert "training" in of_run.output
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({k: settings[k] for k in ("texts", "dtype", "device")}))
    of_plain = adapt(
        plain, "-m", settings["model"], "--config", file, "-o", tmp_path / "two", *options
    )
    assert of_plain.exit_code == 0, of_plain.output
    wanted = tensors(trained / "model")
    for name in ("one", "two"):
        found = tensors(tmp_path / name / "model")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
        card = (tmp_path / name / "model" / "README.md").read_text("utf-8")
        assert "from a model that was pruned before; then the kept weights were trained" in card
        metrics = RunDirectory(tmp_path / name).read_trace()
        assert len(metrics) == 1
    again = CliRunner().invoke(app, ["resume", str(tmp_path / "one")])
    assert again.exit_code == 0, again.output
    # What was trained before may be trained again, from its own values.
    more = adapt(trained, "-o", tmp_path / "more", "--tokens", str(4 * 48))
    assert more.exit_code == 0, more.output
    (stage,) = json.loads((tmp_path / "more" / "metrics.json").read_text())["stages"]
    (before,) = json.loads((trained / "metrics.json").read_text())["stages"]
    assert stage["before"] == before["after"]


def test_what_is_no_pruned_copy_is_refused(
    settings: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("config.yaml")
    file.write_text(yaml.safe_dump({k: settings[k] for k in ("texts", "dtype", "device")}))
    shutil.copytree(trained / "model", "plain")
    dense, plain = Path(settings["model"]), Path("plain")
    other, wide = make_pico(Path("other")), make_pico(Path("wide"), hidden_size=64)
    shutil.copytree(plain, "broken")
    values = load_file("broken/model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(values, "broken/model.safetensors", metadata={"format": "pt"})

    def refused(copy: Path, model: Path | None, *more: str) -> str:
        named = [] if model is None else ["-m", str(model)]
        result = adapt(copy, *named, "--config", file, "-o", "new", *more)
        assert result.exit_code == 2, result.output
        assert not Path("new").exists()
        return " ".join(result.output.split())

    assert "README of plain names no model that it was made from" in refused(plain, None)
    assert "is not pruned: its layers have no more zeros" in refused(dense, dense)
    assert "where nothing is pruned, has other values" in refused(plain, other)
    assert "is of shape [512, 64], and it has one of shape [512, 32]" in refused(plain, wide)
    assert "broken: model.layers.1.mlp.up_proj.weight holds" in refused(Path("broken"), dense)
    assert "no.txt does not exist" in refused(plain, dense, "--calibration", "no.txt")
    assert "offload is disk" in refused(plain, dense, "--set", "offload=disk")
    trained = Path(shutil.copytree(trained, "trained"))
    shutil.rmtree(trained / "model")
    deleted = adapt(trained, "-o", "new")
    assert deleted.exit_code == 2
    assert f"prunewright save {trained}" in " ".join(deleted.output.split())
    (trained / "metrics.json").unlink()
    unfinished = adapt(trained, "-o", "new")
    assert unfinished.exit_code == 2
    assert "is not finished: prunewright resume" in " ".join(unfinished.output.split())
    step_by_step = CliRunner().invoke(
        app, ["run", "--set", f"pruned={plain}", "-m", str(dense), "-a", "greedy", "-o", "new"]
    )
    assert step_by_step.exit_code == 2
    assert "a run prunes the dense model step by step" in " ".join(step_by_step.output.split())


def test_a_changed_copy_stops_a_run_that_began_from_it(
    settings: dict[str, Any], untrained: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(untrained / "model", tmp_path / "pruned"))

    def stop(_: str, event: dict[str, Any]) -> None:
        if event.get("progress", {}).get("label", "").startswith("adapt (training): KL"):
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        baseline(settings | {"pruned": str(copy)}, out=out, on_event=stop)
    assert list((out / "adapt").glob("state-*"))
    values = tensors(copy)
    values["model.layers.1.mlp.up_proj.weight"].mul_(1.5)
    save_file(values, copy / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["resume", str(out)])
    assert result.exit_code == 1
    assert "its model is no longer what it began with" in " ".join(result.output.split())


def test_training_without_room_is_refused_with_a_command_that_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "run", list[int]()

    def full(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return kl_div(*tensors, **options)

    def raiser(*_: object) -> None:
        raise MemoryError

    kl_div = torch.nn.functional.kl_div
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "kl_div", full)
        with pytest.raises(InputError, match="too little memory: CUDA out of memory") as caught:
            baseline(settings, out=out)
        patch.undo()
        patch.setattr("prunewright.tools.adapt.training._Student.__init__", raiser)
        with pytest.raises(InputError, match=r"too little memory.*adapt\.optimizer=adafactor"):
            baseline(settings, out=tmp_path / "other")
    said = str(caught.value)
    assert f"prunewright resume {out} with --set texts.windows.batch=1, --set adapt.opt" in said
    for change in ("texts.windows.batch=1", "adapt.optimizer=adafactor", "adapt=null"):
        copy = Path(shutil.copytree(out, tmp_path / change))
        result = CliRunner().invoke(app, ["resume", str(copy), "--set", change])
        assert result.exit_code == 0, result.output
        stages = [stage.name for stage in load_metrics(RunDirectory(copy)).stages]
        assert stages == ([] if change == "adapt=null" else ["adapt"])


def test_what_is_changed_on_resuming_counts_for_a_baseline(
    settings: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("prunewright.tools.adapt.training.Teacher", full)
        with pytest.raises(StoreError, match="full"):
            baseline(settings, out=out)
    tokens = ADAPT["tokens"] // 2
    metrics = resume(out, adapt=ADAPT | {"tokens": tokens}).metrics
    (stage,) = metrics.stages
    assert stage.curve[-1][0] <= tokens
    assert load_metrics(RunDirectory(trained)).stages[0].curve[-1][0] > tokens
    assert RunDirectory(out).config().adapt.tokens == tokens  # type: ignore[union-attr]


def test_where_no_named_layer_was_pruned_nothing_is_trained(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    steps = [{"layers": {"0.mlp.up_proj": 0.1}}]
    config = settings | {
        "agent": "import:scripted_agents:Steps",
        "agent_options": {"steps": steps},
        "max_steps": 1,
        "adapt": ADAPT | {"layers": ["*.q_proj"]},
    }
    result = run(config, out=tmp_path / "run")
    (stage,) = result.metrics.stages
    assert (stage.name, stage.kept, stage.curve) == ("adapt", False, [])
    assert any("no layer that adapt.layers names was pruned" in note for note in stage.notes)
    assert result.model_directory is not None


def test_the_commands_own_file_says_what_is_solved_for(
    settings: dict[str, Any], untrained: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    wanted = {key: settings[key] for key in ("texts", "dtype", "device")}
    file.write_text(yaml.safe_dump(wanted | {"criterion": "fisher", "reconstruct": "layer"}))
    out = tmp_path / "run"
    ended = adapt(untrained, "--config", file, "-o", out, f"--set=adapt={json.dumps(ADAPT)}")
    assert ended.exit_code == 0, ended.output
    assert RunDirectory(out).config().criterion == "fisher"
    assert [stage.name for stage in load_metrics(RunDirectory(out)).stages] == [
        "reconstruct",
        "adapt",
    ]
