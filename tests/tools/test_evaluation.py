"""Tasks against prompts and log-probabilities worked out here, and pairs against scipy."""

import importlib.metadata
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from prunewright.state import InputError, StoreError
from prunewright.tools.evaluation import Evaluation, evaluate
from prunewright.tools.evaluation.harness import evaluate_tasks
from prunewright.tools.evaluation.scores import (
    QuestionOutcome,
    TaskScore,
    compare,
    mcnemar,
    mean_interval,
    summarize,
)
from prunewright.tools.evaluation.tasks.utils import match, normalise
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.texts.windows import load_test_windows

SHOWN = [
    {"subject": "sea_life", "question": f"Shown {n}?", "choices": ["x", "yes", "no", "z"]}
    | {"answer": n}
    for n in range(3)
]
ASKED = [
    {
        "id": f"q{n}",
        "subject": "sea_life",
        "question": f" Is it {word}?",
        "choices": ["the sea", "a hill of sand", word, "no"],
        "answer": n % 4,
    }
    for n, word in enumerate(["old", "new", "the river", "a mill", "water"])
]
FACTS = [
    {"id": f"f{n}", "question": f"Who saw the {word}?", "answers": [f"The {word} man", "him"]}
    for n, word in enumerate(["river", "hill", "mill", "sea"])
]


@pytest.fixture(scope="module")
def directory(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama, said to be made for texts that hold questions with their examples."""
    found = tmp_path_factory.mktemp("long")
    shutil.copytree(pico_models(), found, dirs_exist_ok=True)
    config = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return found


@pytest.fixture(scope="module")
def loaded(directory: Path) -> LoadedModel:
    return load_model(str(directory), dtype="float32", device="cpu", keep_dense=False)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, rows in (("shown", SHOWN), ("asked", ASKED), ("facts", FACTS)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        found[name] = str(path)
    return found


def token_scores(loaded: LoadedModel, context: str, words: str) -> list[float]:
    """Log-probability of each token of some words after a context, by a whole forward pass."""
    before, ids = (loaded.tokenizer(text).input_ids for text in (context, context + words))
    with torch.no_grad():
        rows = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(rows[i - 1, ids[i]]) for i in range(len(before), len(ids))]


def lettered(row: dict[str, Any]) -> str:
    a, b, c, d = row["choices"]
    return f"{row['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"


def test_mmlu_by_letters(loaded: LoadedModel, files: dict[str, str]) -> None:
    (score,) = evaluate_tasks(
        loaded, ["mmlu"], data={"mmlu": files["asked"]}, examples={"mmlu": files["shown"]}, shots=2
    )
    head = "The following are multiple choice questions (with answers) about sea life.\n\n"
    head += "".join(f"{lettered(r)} {'ABCD'[r['answer']]}\n\n" for r in SHOWN[:2])
    assert (score.questions, score.shots, score.data) == (5, 2, files["asked"])
    outcomes = {o.id: o for o in score.outcomes}
    for row in ASKED:
        scores = [token_scores(loaded, head + lettered(row), f" {x}") for x in "ABCD"]
        values = [sum(s) for s in scores]
        outcome = outcomes[row["id"]]
        assert outcome.correct is (values.index(max(values)) == row["answer"])
        right = scores[row["answer"]]
        assert outcome.log_probability == pytest.approx(sum(right) / len(right), abs=1e-3)
    assert score.accuracy == sum(o.correct for o in score.outcomes) / 5
    mean = sum(o.log_probability or 0 for o in score.outcomes) / 5
    assert score.log_probability == pytest.approx(mean)


def test_mmlu_by_the_words_of_the_answers(loaded: LoadedModel, files: dict[str, str]) -> None:
    (score,) = evaluate_tasks(loaded, ["mmlu-cloze"], data={"mmlu-cloze": files["asked"]}, shots=0)
    head = "The following are questions (with answers) about sea life.\n\n"
    rights = []
    for row in ASKED:
        context = f"{head}Question: {row['question'].strip()}\nAnswer:"
        scores = [token_scores(loaded, context, f" {c}") for c in row["choices"]]
        values = [sum(s) / len(c.encode()) for s, c in zip(scores, row["choices"], strict=True)]
        outcome = next(o for o in score.outcomes if o.id == row["id"])
        right = scores[row["answer"]]
        assert outcome.log_probability == pytest.approx(sum(right) / len(right), abs=1e-3)
        assert outcome.correct is (values.index(max(values)) == row["answer"])
        rights.append(outcome.correct)
    assert set(rights) == {True, False}


def test_facts_by_greedy_answers(loaded: LoadedModel, files: dict[str, str]) -> None:
    rows = FACTS.copy()
    random.Random(0).shuffle(rows)
    (score,) = evaluate_tasks(loaded, ["facts"], data={"facts": files["facts"]}, shots=2)
    greedy = {}
    for row in FACTS:
        shown = [r for r in rows if r is not row][:2]
        turns = [f"Question: {r['question']}\nAnswer: {r['answers'][0]}\n\n" for r in shown]
        context = "".join(turns) + f"Question: {row['question']}\nAnswer:"
        ids = loaded.tokenizer(context, return_tensors="pt").input_ids
        with torch.no_grad():
            made = loaded.model.generate(ids, max_new_tokens=32, do_sample=False)
        words = loaded.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        greedy[row["id"]] = words.partition("\n")[0]
        scores = token_scores(loaded, context, f" {row['answers'][0]}")
        outcome = next(o for o in score.outcomes if o.id == row["id"])
        assert outcome.log_probability == pytest.approx(sum(scores) / len(scores), abs=1e-3)
        assert outcome.correct is False
    # The first answers stay, since they stand in the examples.
    knowing = [r | {"answers": [r["answers"][0], f"THE {greedy[r['id']]}!"]} for r in FACTS]
    Path(files["facts"]).write_text(json.dumps(knowing))
    (score,) = evaluate_tasks(loaded, ["facts"], data={"facts": files["facts"]}, shots=2)
    said = [bool(normalise(words)) for words in greedy.values()]
    assert score.accuracy == sum(said) / 4 > 0


@pytest.mark.parametrize(
    ("said", "right"),
    [(" the Yellow, Submarine!", True), ("a submarine", False), (" ", False), ("Theyellow", False)],
)
def test_answers_are_matched_after_normalisation(said: str, right: bool) -> None:
    assert match({"answers": ["Sub", "yellow submarine", "the"]}, [said]) == {"correct": right}


def test_a_limit_takes_equally_many_of_every_subject(loaded: LoadedModel) -> None:
    told: list[tuple[str, int, int]] = []
    (score,) = evaluate_tasks(
        loaded, ["mmlu-cloze"], shots=1, limit=56, progress=lambda *p: told.append(p)
    )
    from prunewright.tools.texts.questions import load_choices

    subjects = {q.id: q.subject for q in load_choices("embedded")}
    taken = [subjects[o.id] for o in score.outcomes]
    assert {s: taken.count(s) for s in taken} == dict.fromkeys(set(subjects.values()), 2)
    done = [part[1] for part in told]
    assert done == sorted(done)
    assert told[-1] == ("mmlu-cloze", 56, 56)
    assert len(set(done)) > 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["mmul"]}, "did you mean mmlu"),
        ({"tasks": ["facts"], "data": {"mmlu": "embedded"}}, "not among the tasks"),
        ({"tasks": ["mmlu"], "shots": 10}, "there are 9 of the subject"),
        ({"tasks": ["facts"], "shots": 100, "limit": 1}, "fewer --shots"),
    ],
)
def test_what_cannot_be_asked(loaded: LoadedModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate_tasks(loaded, **options)


def test_without_the_harness_its_extra_is_named(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InputError, match=r"pip install 'prunewright\[eval\]'"):
        evaluate_tasks(loaded, ["facts"])


def kill_when_kept(code: str, directory: Path, store: Path) -> Path:
    """Run code in a process that is killed once it keeps some values; the file that has them."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(store)], stderr=subprocess.DEVNULL
    )
    while not any(file.stat().st_size > 500 for file in store.glob("kept-*.jsonl")):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (file,) = store.glob("kept-*.jsonl")
    return file


def test_a_killed_evaluation_goes_on(directory: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from prunewright.tools.evaluation.harness import evaluate_tasks\n"
        "from prunewright.tools.model.loading import load_model\n"
        "torch.set_num_threads(1)\n"
        "loaded = load_model(sys.argv[1], dtype='float32', device='cpu', keep_dense=False)\n"
        "evaluate_tasks(loaded, ['facts'], shots=1, limit=96, store=Path(sys.argv[2]))\n"
    )
    file = kill_when_kept(code, directory, store)
    done = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b'["cut off')
    again = evaluate_tasks(loaded, ["facts"], shots=1, limit=96, store=store)
    assert file.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    assert file.read_bytes().count(b"\n") == 2 * 96
    assert again == evaluate_tasks(loaded, ["facts"], shots=1, limit=96)
    # Now nothing is left to ask.
    seen: list[int] = []
    told: list[tuple[str, int, int]] = []
    handle = loaded.model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        options: dict[str, Any] = {"shots": 1, "limit": 96, "store": store}
        found = evaluate_tasks(loaded, ["facts"], **options, progress=lambda *p: told.append(p))
        assert found == again
        assert seen == []
        assert told[-1] == ("facts", 96, 96)
    finally:
        handle.remove()
    for damage in ('["key", "value", 3]\n', "no JSON\n", '["key", {"a": 1}]\n'):
        file.write_text(damage)
        with pytest.raises(StoreError, match="delete it, and what it kept is measured again"):
            evaluate_tasks(loaded, ["facts"], shots=1, limit=96, store=store)


def test_an_evaluation_on_a_full_disk_says_so_and_goes_on(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"shots": 1, "limit": 32, "store": tmp_path / "store"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot write .*kept-\w+\.jsonl: .*Free some space"):
            evaluate_tasks(loaded, ["facts"], **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = evaluate_tasks(loaded, ["facts"], **options)
    assert found == evaluate_tasks(loaded, ["facts"], shots=1, limit=32)


def test_a_killed_perplexity_goes_on(directory: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from prunewright.tools.evaluation import evaluate\n"
        "torch.set_num_threads(1)\n"
        "evaluate(sys.argv[1], [('embedded', 200)], length=64, dtype='float32',\n"
        "         device='cpu', store=Path(sys.argv[2]))\n"
    )
    file = kill_when_kept(code, directory, store)
    done = file.read_bytes()

    def score(store: Path | None) -> Evaluation:
        told: list[tuple[str, int, int]] = []
        found = evaluate(
            str(directory),
            [("embedded", 200)],
            length=64,
            dtype="float32",
            device="cpu",
            store=store,
            progress=lambda *values: told.append(values),
        )
        known = 200 - (len(told) - 1)
        assert told == [("perplexity", n, 200) for n in range(known, 201)]
        return found

    again = score(store)
    assert file.read_bytes().startswith(done[: done.rfind(b"\n") + 1])
    assert file.read_bytes().count(b"\n") == 200
    (text,) = again.texts
    assert text.perplexity == pytest.approx(score(None).texts[0].perplexity, rel=1e-5)
    losses = [loss for loss in text.losses if loss is not None]
    assert text.perplexity == pytest.approx(math.exp(sum(losses) / 200))
    whole = file.read_bytes()
    assert score(store) == again
    assert file.read_bytes() == whole


def test_another_model_shares_no_outcomes(
    loaded: LoadedModel, load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    other = load("Qwen3Config")
    found = [
        evaluate_tasks(model, ["facts"], shots=0, limit=8, store=tmp_path / "store")[0]
        for model in (loaded, other)
    ]
    assert found[0].log_probability != found[1].log_probability
    assert found[1] == evaluate_tasks(other, ["facts"], shots=0, limit=8)[0]


def outcomes(rights: str, values: list[float | None] | None = None) -> list[QuestionOutcome]:
    values = values or [-1.0] * len(rights)
    return [
        QuestionOutcome(id=str(i), correct=right == "1", log_probability=value)
        for i, (right, value) in enumerate(zip(rights, values, strict=True))
    ]


def score(rights: str, values: list[float | None] | None = None, **changes: Any) -> TaskScore:
    found = summarize("facts", "file", "hash", 5, outcomes(rights, values))
    return found.model_copy(update=changes)


def test_pairs_are_counted() -> None:
    ours, dense = [-1.5, -2.0, -1.0, -4.0], [-1.0, -1.0, -1.5, -2.0]
    found = compare(score("0011", [*ours]), score("1110", [*dense]))
    assert (found.questions, found.lost, found.gained) == (4, 2, 1)
    assert (found.accuracy, found.reference_accuracy) == (0.5, 0.75)
    assert found.retention == pytest.approx(100 * 2 / 3)
    assert found.p_value == 1.0
    assert found.log_probability_change == pytest.approx(-0.75)
    changes = [a - b for a, b in zip(ours, dense, strict=True)]
    low, high = stats.norm.interval(0.95, -0.75, stats.sem(changes))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_without_right_answers_there_is_no_retention() -> None:
    found = compare(score("01", [-1.0, None]), score("00"))
    assert found.retention is None
    assert found.log_probability_change is None
    assert found.low is None


@pytest.mark.parametrize("change", [{"task": "mmlu"}, {"shots": 1}, {"data_hash": "other"}])
def test_only_the_same_questions_are_compared(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        compare(score("01"), score("01", **change))
    with pytest.raises(InputError, match="cannot be compared"):
        compare(score("01"), score("011"))


def test_mcnemar_is_the_binomial_test() -> None:
    for lost in range(0, 40, 3):
        for gained in range(0, 40, 4):
            expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
            assert mcnemar(lost, gained) == pytest.approx(expected)
    assert mcnemar(1500, 900) == pytest.approx(stats.binomtest(900, 2400).pvalue)


def test_one_value_has_no_interval() -> None:
    assert mean_interval([2.0]) == (2.0, None, None)


def test_the_windows_of_the_literature(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = ["The river rose again.", "", "The mill stood still. " * 30]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    ids = loaded.tokenizer("\n\n".join(rows)).input_ids
    found = load_test_windows(str(path), loaded.tokenizer, None, 32, rows=512)
    count = len(ids) // 32
    assert found.tolist() == [ids[32 * i : 32 * (i + 1)] for i in range(count)]


def test_the_text_alone_is_begun_as_the_tokenizer_begins_texts(directory: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    every = load_test_windows("embedded", tokenizer, 3, 32, rows=512)
    once = load_test_windows("embedded", tokenizer, None, 32, rows=512)
    assert every[:, 0].tolist() == [0, 0, 0]
    assert once[0].tolist() == every[0].tolist()
    assert 0 not in once[1:, 0]
    assert math.isclose(once.numel(), every[0].numel() * len(once))
