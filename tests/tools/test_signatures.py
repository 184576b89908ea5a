from prunewright.state import Decision, Step
from prunewright.state.step import Verdict
from prunewright.tools.signatures import failure_signatures


def record(step: int, before: float, after: float, verdict: Verdict = "accepted") -> Step:
    return Step(
        step=step,
        agent="greedy",
        verdict=verdict,
        reason="",
        decision=Decision(reasoning="", layers=[]),
        applied={},
        invalid_answers=[],
        notes=[],
        profile="",
        revision="r",
        candidate=None,
        sparsity_before=before,
        sparsity=after,
        perplexity_before=10.0,
        candidate_perplexity=None,
        change=None,
        change_stderr=None,
        predicted_change=None,
        llm_tokens=0,
    )


def run(*verdicts: Verdict, gain: float = 0.05) -> list[Step]:
    records, sparsity = [], 0.0
    for step, verdict in enumerate(verdicts):
        after = sparsity + gain * (verdict == "accepted")
        records.append(record(step, sparsity, after, verdict))
        sparsity = after
    return records


def test_a_good_run_has_none() -> None:
    assert failure_signatures([]) == []
    # One rollback in four is not more than a quarter.
    assert failure_signatures(run("accepted", "rolled_back", "accepted", "accepted")) == []


def test_many_rollbacks() -> None:
    (words,) = failure_signatures(run("accepted", "rolled_back", "accepted"))
    assert words.startswith("1 of 3 steps were rolled back (33%)")


def test_stagnant_sparsity() -> None:
    records = run("accepted", *["empty"] * 4, "accepted")
    assert failure_signatures(records) == ["no progress over steps 2 to 5: sparsity gained 0.0000"]
    crawl = run(*["accepted"] * 8, gain=0.001)
    assert failure_signatures(crawl) == ["no progress over steps 1 to 4: sparsity gained 0.0040"]


def test_steps_that_ask_for_little_do_not_stand_still() -> None:
    small = [r.model_copy(update={"asked": 0.001}) for r in run(*["accepted"] * 6, gain=0.001)]
    assert failure_signatures(small) == []
    at_target = [r.model_copy(update={"asked": 0.0}) for r in run(*["accepted"] * 6, gain=0)]
    assert failure_signatures(at_target) == []
    idle = [r.model_copy(update={"asked": 0.001}) for r in run(*["empty"] * 4)]
    assert failure_signatures(idle) == ["no progress over steps 1 to 4: sparsity gained 0.0000"]


def test_a_step_that_is_meant_to_rebalance_is_no_standstill() -> None:
    records = run(*["accepted"] * 7, gain=0.001)
    meant = Decision(reasoning="", layers=[], rebalance=True)
    records[3] = records[3].model_copy(update={"decision": meant})
    assert failure_signatures(records) == []


def test_invalid_answers() -> None:
    records = run("accepted", "accepted")
    records[1] = records[1].model_copy(update={"invalid_answers": ["no layer", "cut off"]})
    assert failure_signatures(records) == ["2 of 4 answers were invalid (50%)"]
