"""What is passed on between the parts: configuration, decisions, profiles, history, state."""

import logging

from prunewright.state.config import PruneConfig, PruneContext, PruneRequest, parse_pattern
from prunewright.state.decision import (
    Decision,
    GroupDelta,
    LayerDelta,
    Move,
    Trials,
    check_decision,
)
from prunewright.state.errors import (
    AgentError,
    InputError,
    PrunewrightError,
    ReviewPendingError,
    StoreError,
)
from prunewright.state.loading import load_config, validate_config
from prunewright.state.profile import COST_DELTAS, LayerProfile, ModelProfile
from prunewright.state.review import Review, ReviewAnswer, ReviewRequest
from prunewright.state.run import STATUS_WORDS, PruneInput, PruneState, PruneUpdate
from prunewright.state.step import FromRanking, ProbeReport, Spent, Step, StepSummary

# A library configures no logging: what is not asked for is not heard.
logging.getLogger("prunewright").addHandler(logging.NullHandler())

__all__ = [
    "COST_DELTAS",
    "STATUS_WORDS",
    "AgentError",
    "Decision",
    "FromRanking",
    "GroupDelta",
    "InputError",
    "LayerDelta",
    "LayerProfile",
    "ModelProfile",
    "Move",
    "ProbeReport",
    "PruneConfig",
    "PruneContext",
    "PruneInput",
    "PruneRequest",
    "PruneState",
    "PruneUpdate",
    "PrunewrightError",
    "Review",
    "ReviewAnswer",
    "ReviewPendingError",
    "ReviewRequest",
    "Spent",
    "Step",
    "StepSummary",
    "StoreError",
    "Trials",
    "check_decision",
    "load_config",
    "parse_pattern",
    "validate_config",
]
