"""Models that are given in memory: what is there is pruned, not what lies on some disk."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prunewright import baseline, fork, resume, run, save
from prunewright.state import InputError

Submit = Callable[[dict[str, Any]], dict[str, Any]]
Given = dict[str, Any]


def load(directory: Path, **options: Any) -> Given:
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(directory)}


@torch.no_grad()
def change(model: PreTrainedModel) -> None:
    """What a user may have done to a model since it was loaded."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(0.05 * parameter.std() * noise)


@pytest.fixture
def given(learned_model: Path) -> Given:
    found = load(learned_model, dtype=torch.float32)
    change(found["model"])
    return found


@pytest.fixture
def short(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"model": "no/such-model", "target": 0.2}


def test_a_changed_model_is_pruned_as_it_is_and_stays_so(
    given: Given, short: dict[str, Any], tmp_path: Path
) -> None:
    model = given["model"].train()
    before, settings = copy.deepcopy(model.state_dict()), model.config.to_dict()
    result = run(short, out=tmp_path / "run", **given)
    assert model.training
    assert model.config.to_dict() == settings
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The same as if the user had saved it and named the directory.
    model.save_pretrained(tmp_path / "saved")
    given["tokenizer"].save_pretrained(tmp_path / "saved")
    other = run(short | {"model": str(tmp_path / "saved")}, out=tmp_path / "other")
    assert result.metrics.revision == other.metrics.revision
    assert result.metrics.perplexity == other.metrics.perplexity
    pruned = AutoModelForCausalLM.from_pretrained(result.model_directory, dtype=torch.float32)
    zeros = total = 0
    for name, value in pruned.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept])
        if name.endswith("proj.weight"):
            zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    assert zeros / total == pytest.approx(0.2, abs=1e-3)


def test_a_stopped_run_goes_on_in_a_process_without_the_object(
    given: Given, short: dict[str, Any], submit: Submit, tmp_path: Path
) -> None:
    def stop(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "apply_prune" in event:
            raise KeyboardInterrupt

    whole = run(short, out=tmp_path / "whole", **given).metrics
    with pytest.raises(KeyboardInterrupt):
        run(short, out=tmp_path / "run", on_event=stop, **given)
    (tmp_path / "run").rename(tmp_path / "moved")
    submit({"do": "resume", "of": str(tmp_path / "moved"), "out": str(tmp_path / "moved")})
    ended = json.loads((tmp_path / "moved" / "metrics.json").read_text())
    assert ended["revision"] == whole.revision
    assert ended["perplexity"] == whole.perplexity.model_dump()
    shutil.rmtree(tmp_path / "moved" / "model")
    assert save(tmp_path / "moved").model_directory == tmp_path / "moved" / "model"


def test_a_fork_needs_no_parent(given: Given, short: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the run is called when it is forked."""
    (tmp_path / "there").mkdir()
    run(short, out=tmp_path / "there" / ".." / "run", **given)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    names = ("run", "there/../run", "link", "copy")
    for number, name in enumerate(names):
        fork(tmp_path / name, 1, out=tmp_path / f"fork-{number}", agent="uniform")
    for name in ("run", "copy"):
        shutil.rmtree(tmp_path / name)
    for number, _ in enumerate(names):
        metrics = resume(tmp_path / f"fork-{number}", target=0.3).metrics
        assert metrics.status == "target_reached"


def test_a_model_that_has_gone_is_named_also_in_the_process_that_had_it(
    given: Given, short: dict[str, Any], tmp_path: Path
) -> None:
    run(short, out=tmp_path / "run", **given)
    shutil.rmtree(tmp_path / "run" / "dense")
    with pytest.raises(InputError, match="dense"):
        resume(tmp_path / "run", target=0.3)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("LlamaConfig", "bfloat16"),
        ("GPT2Config", "float16"),  # its head is tied
        ("MixtralConfig", "float32"),  # its experts are fused on loading
        ("DbrxConfig", "float16"),  # a layer of each block stays in float32
        ("MambaConfig", "float32"),
    ],
)
def test_families_and_dtypes(
    family: str,
    dtype: str,
    pico_models: Callable[..., Path],
    pico_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    given = load(pico_models(family), dtype=getattr(torch, dtype))
    change(given["model"])
    result = baseline(pico_config, out=tmp_path / "run", **given)
    assert result.metrics.sparsity == pytest.approx(0.3, abs=1e-3)
    pruned = AutoModelForCausalLM.from_pretrained(result.model_directory, dtype="auto")
    before = given["model"].state_dict()
    for name, value in pruned.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept].to(value.dtype)), name
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"# {given['model'].config.model_type}, pruned to 30.0%" in card


def test_the_card_names_the_hub_model_that_it_was_loaded_from(
    given: Given, short: dict[str, Any], tmp_path: Path
) -> None:
    given["model"].name_or_path = "acme/tiny-llama"
    result = baseline(short, out=tmp_path / "run", **given)
    assert result.model_directory is not None
    card = (result.model_directory / "README.md").read_text()
    assert "base_model: acme/tiny-llama" in card
    assert "# tiny-llama, pruned to 20.0%" in card


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Adapted(torch.nn.Module):
    """As a model of PEFT shows itself, which is not installed here."""

    peft_config: dict[str, Any] = {}  # noqa: RUF012 - as it is there


def quantised(given: Given) -> None:
    given["model"].hf_quantizer = object()  # what quantises needs a GPU


def offloaded(given: Given) -> None:
    given["model"].model.layers[1].to("meta")


def parametrized(given: Given) -> None:
    parametrize.register_parametrization(
        given["model"].model.layers[0].mlp.up_proj, "weight", Doubled()
    )


def biased(given: Given) -> None:
    given["model"].model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=True)


class LouderForCausalLM(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits *= 2
        return found


def of_its_own_class(given: Given) -> None:
    given["model"].__class__ = LouderForCausalLM


def saved_by_a_framework(given: Given) -> None:
    """As one that keeps averages of the weights for saving."""
    given["model"].save_pretrained = copy.deepcopy(given["model"]).save_pretrained
    change(given["model"])


def not_finite(given: Given) -> None:
    with torch.no_grad():
        given["model"].model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan


def of_another_model(given: Given) -> None:
    given["model"].resize_token_embeddings(64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda given: given.update(model="acme/model"), "model is a str: give a transformers"),
        (lambda given: given.update(model=None), "model is a NoneType"),
        (lambda given: given.update(tokenizer=None), "tokenizer is a NoneType: give the model's"),
        (lambda given: given.update(model=Adapted()), r"merge them first .*merge_and_unload"),
        (quantised, "is quantised: load it in bfloat16"),
        (offloaded, r"not all in memory: model\.layers\.1\..* is on the meta device"),
        (parametrized, "the given model cannot be pruned"),
        (biased, r"up_proj\.bias"),
        (
            of_its_own_class,
            "its class is LouderForCausalLM, and LlamaForCausalLM is",
        ),
        (saved_by_a_framework, r"as it is in memory: \S+ has other values"),
        (not_finite, "are not finite"),
        (of_another_model, "token"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(
    spoil: Callable[[Given], None],
    words: str,
    given: Given,
    short: dict[str, Any],
    tmp_path: Path,
) -> None:
    spoil(given)
    for act in (run, baseline):
        with pytest.raises(InputError, match=words) as caught:
            act(short, out=tmp_path / "run", **given)
        assert ".writing-" not in str(caught.value)
        assert not (tmp_path / "run").exists()
