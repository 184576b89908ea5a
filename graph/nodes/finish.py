"""The last node: what is done once the masks are there, and what the run leaves."""

from prunewright.graph.nodes.common import Work, node
from prunewright.graph.words.summary import finished_words
from prunewright.state import PruneState, PruneUpdate, Step
from prunewright.state.metrics import Pair, Stage
from prunewright.state.run import DENSE
from prunewright.tools.ending import describe_ending


@node
def finish(state: PruneState, work: Work) -> PruneUpdate:
    """Do the stages that come after the last step, write the results, record the end.

    The state's revision stays that of the masks: a run that goes on goes on from them.
    """
    # torch takes seconds
    from prunewright.tools.losses import perplexities, perplexity
    from prunewright.tools.results import Outcome
    from prunewright.tools.results import finish as write_results

    work.tell({"finishing": True})
    request, context, run = work.request, work.context, work.run
    steps, revision = run.read_steps(state["history"]), state["revision"]
    status = state["status"]
    ending = describe_ending(status, steps, context, request.target, saved=revision != DENSE)
    outcome = Outcome(
        status=status,
        reason=ending.reason,
        method={"agent": steps[-1].agent, "criterion": request.criterion},
        revision=revision,
        guard=Pair(dense=state["dense_perplexity"], final=perplexity(state["guard_losses"])),
        domains={
            name: Pair(dense=state["dense_domains"][name], final=final)
            for name, final in perplexities(
                request.texts.domains("guard"), state["guard_losses"]
            ).items()
        },
        knowledge=_knowledge(state),
        seconds=state["seconds"],
        tokens=state["tokens"],
        **_counted(state, steps),
    )

    def tell(stage: Stage) -> None:
        work.tell({"stage": stage.model_dump(mode="json")})

    with work.live_model() as bench:
        metrics = write_results(run, bench, outcome, work.progress, tell)
    work.tell({"metrics": metrics.model_dump(mode="json")})
    return {
        "summary": finished_words(metrics),
        "result": {
            "directory": str(run.path),
            "model_directory": str(run.model) if metrics.saved else None,
            "test_perplexity": metrics.perplexity.test.model_dump(),
            "stages": [
                {"name": one.name, "before": one.before, "after": one.after, "kept": one.kept}
                for one in metrics.stages
            ],
        },
    }


def _counted(state: PruneState, steps: list[Step]) -> dict[str, int]:
    """The counts of an outcome."""
    return {
        "steps": len(steps),
        "rollbacks": state["rollbacks"],
        "decisions": sum(s.verdict != "empty" for s in steps),
        "repairs": sum(s.repairs for s in steps),
        "invalid_answers": sum(len(s.invalid_answers) for s in steps),
        "probes": sum(not probe.refused for s in steps for probe in s.probes),
        "llm_calls": sum(s.llm_calls for s in steps),
    }


def _knowledge(state: PruneState) -> Pair | None:
    """Factual recall of the masks; None where the bound was lifted before their step."""
    known = state.get("knowledge")
    if known is None or known["revision"] != state["revision"]:
        return None
    return Pair(dense=known["dense"], final=known["accepted"])
