"""One frozen configuration: what a run is (request) and who decides how (context)."""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prunewright.state.profile import SIGNALS
from prunewright.state.secrets import find_secret
from prunewright.state.shown import clean

DEFAULT_AGENT = "google_genai:gemini-3-flash-preview"
EMBEDDED = "embedded"
"""The name of the model, texts and questions that are installed with the package."""
ALL = "all"
"""The name that stands for all GPUs of a machine."""
NUMBER = "<number>"
"""Where an error's place says that a value was taken for a number, and not for a mapping."""
SELF = "self"
"""The name that stands for text that the dense model writes itself."""
Offload = Literal["none", "cpu", "disk"]
Reconstruct = Literal["none", "layer", "block"]
MAX_GOAL = 1_000
"""Characters of what the user wants kept."""
BASELINE = "baseline"
"""The name that stands for "no agent" in a run directory's config and trace."""


CRITERIA = ("magnitude", "wanda", "gblm", "fisher", "sparsegpt", "obs")
"""The project's own criteria: those of `prunewright.tools.criteria`, which takes seconds."""


def _plain_name(value: str) -> str:
    """Refuse what no name is: names come from files of others, and are shown."""
    if not re.fullmatch(r"[\w.:\-]{1,200}", value):
        raise ValueError("a name is asked for, or import:package.module:name")
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
"""What stands for something that is found by its name when it is used, perhaps outside."""


def _all_seen(value: str) -> str:
    """Refuse a text that holds more than is seen of it."""
    if clean(value) != value:
        raise ValueError("it holds control or invisible characters: leave them out")
    return value


Goal = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_GOAL),
    AfterValidator(_all_seen),
]
"""Words of the user's for an LLM."""


class Options(BaseModel):
    """Base of every options model: frozen, and an unknown key is an error.

    Attributes:
        removed: keys of earlier versions, each with what to use instead. Their null is dropped, so
            that the configuration of an earlier run, which names every key, can be read.
    """

    # Inputs stay out of error messages: someone may have put a key there.
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    removed: ClassVar[dict[str, str]] = {}

    def to_yaml(self) -> str:
        """The options as YAML from which an equal object is read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_removed(cls, data: Any) -> Any:
        for key, instead in cls.removed.items():
            if isinstance(data, dict) and key in data:
                if data[key] is not None:
                    raise ValueError(f"{key} no longer exists: {instead}")
                data = {name: value for name, value in data.items() if name != key}
        return data

    @field_validator("*")
    @classmethod
    def _storable(cls, value: object) -> object:
        if isinstance(value, int) and value >= 2**63:
            raise ValueError("it is too large")
        return value


class WindowOptions(Options):
    """How many windows of how many tokens each use of text takes."""

    calibration: int = Field(16, ge=1, description="windows for the activation statistics")
    gradient: int = Field(8, ge=1, description="how many of them also give gradients")
    guard: int = Field(8, ge=1, description="windows that accept or roll back a step")
    test: int = Field(20, ge=1, description="windows that the reported perplexity is taken on")
    length: int = Field(1024, ge=8, description="tokens in one window")
    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="windows that go through the model at once; auto: one on a processor, more on "
        "a GPU",
    )

    @model_validator(mode="after")
    def _gradient_within_calibration(self) -> "WindowOptions":
        if self.gradient > self.calibration:
            raise ValueError(
                f"gradient windows ({self.gradient}) are taken from the calibration windows "
                f"({self.calibration}) and cannot be more"
            )
        return self


class TextSource(Options):
    """A source of a mix."""

    source: str = Field(description="as a single source is named")
    weight: float = Field(1.0, gt=0, description="its share of the windows, against the others'")


def _domain_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,15}", name) or name == "source":
        raise ValueError(
            "a domain's name is a small letter and at most 15 more, digits, - or _, and not source"
        )
    return name


DomainName = Annotated[str, AfterValidator(_domain_name)]
"""What a user calls a kind of text: ``german``, ``code``, ``facts``."""


def _several(given: dict[str, str]) -> dict[str, str]:
    """Domains by name, so that their order is the same wherever they were stored."""
    if len(given) < 2:
        raise ValueError(
            "a mapping gives a source to each of two domains or more, such as {general: "
            "embedded, code: code.txt}; a single source is named without one"
        )
    return dict(sorted(given.items()))


Domains = Annotated[dict[DomainName, str], AfterValidator(_several)]


def _source_or_mix(value: Any) -> Any:
    """A mix with its bare names as sources; what holds one plain source is that source."""
    if isinstance(value, dict):
        if "source" not in value:
            return value
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    if len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return [{"source": item} if isinstance(item, str) else item for item in value]


def _unlike(sources: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
    names = [one.source for one in sources]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{doubled} is named twice: give it one weight")
    if not sources:
        raise ValueError("a mix has at least one source")
    return sources


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "domains"
    return "list" if isinstance(value, list | tuple) else "source"


Mix = Annotated[
    Annotated[str, Tag("source")]
    | Annotated[tuple[TextSource, ...], AfterValidator(_unlike), Tag("list")]
    | Annotated[Domains, Tag("domains")],
    Discriminator(_kind),
    BeforeValidator(_source_or_mix),
]


_Guard = Annotated[
    Annotated[str, Tag("source")] | Annotated[Domains, Tag("domains")], Discriminator(_kind)
]


class TextOptions(Options):
    """Sources of text: ``embedded``, a hub data set ``name[:config]``, or a local file.

    Calibration and guard may be ``self``, too: text that the dense model writes itself.
    """

    calibration: Mix = Field(
        "embedded",
        description="source of the statistics; self: text that the dense model writes; a list of "
        "sources, plain or as {source: NAME, weight: 2}, is a mix of their windows; a mapping "
        "such as {general: SOURCE, code: SOURCE} has domains, whose costs are told apart",
    )
    guard: _Guard | None = Field(
        None,
        description="source of the guard, or a mapping as for calibration, whose domains are "
        "measured one by one; null: what calibration has, mixed alike, other windows",
    )
    test: str = Field("embedded", description="source reported on, never chosen on")
    knowledge: str = Field(
        "embedded",
        description="questions of guard.max_knowledge_drop: FreebaseQA's JSON, or rows of "
        "question and answers in a local file or hub data set",
    )
    facts: int = Field(64, ge=1, description="how many of these questions are scored")
    windows: WindowOptions = Field(WindowOptions(), description="how many windows, how long")

    @property
    def mix(self) -> tuple[TextSource, ...]:
        """The sources of calibration, one or more."""
        return _as_mix(self.calibration)

    def sources(self, role: str) -> tuple[TextSource, ...]:
        """What a role reads, one source or more: ``calibration``, ``guard`` or ``test``.

        Those of domains are in the order of their names.
        """
        return _as_mix(self._given(role))

    def domains(self, role: str) -> tuple[str, ...]:
        """The names of a role's domains, in order; none where it has one text."""
        given = self._given(role)
        return tuple(given) if isinstance(given, dict) else ()

    def _given(self, role: str) -> str | tuple[TextSource, ...] | dict[str, str]:
        if role == "test":
            return self.test
        return self.calibration if role == "calibration" or self.guard is None else self.guard

    @property
    def named(self) -> set[str]:
        """All sources of texts and questions."""
        texts = {
            one.source for role in ("calibration", "guard", "test") for one in self.sources(role)
        }
        return texts | {self.knowledge}

    @property
    def calibration_words(self) -> str:
        """Calibration's sources, with their weights where these differ, for people to read."""
        if isinstance(self.calibration, dict):
            return _domain_words(self.calibration)
        if len({one.weight for one in self.mix}) == 1:
            return " + ".join(one.source for one in self.mix)
        return " + ".join(f"{one.weight:g} {one.source}" for one in self.mix)

    @property
    def guard_words(self) -> str:
        """The guard's source or sources, for people to read."""
        if self.guard is None:
            return f"{self.calibration_words} (other windows)"
        return _domain_words(self.guard) if isinstance(self.guard, dict) else self.guard

    def renamed(self, name: Callable[[str], str]) -> "TextOptions":
        """The same with every source under another name, such as where it lies now."""
        return self.model_copy(
            update={
                "calibration": _renamed(self.calibration, name),
                "guard": None if self.guard is None else _renamed(self.guard, name),
                "test": name(self.test),
                "knowledge": name(self.knowledge),
            }
        )

    @model_validator(mode="after")
    def _test_is_given(self) -> "TextOptions":
        if self.test == SELF:
            raise ValueError(
                "test is reported on, and what the model writes itself is no text to report on: "
                "name another source (a file of that name is ./self)"
            )
        return self

    @model_validator(mode="after")
    def _domains_are_alike(self) -> "TextOptions":
        own, judged = self.domains("calibration"), self.domains("guard")
        if own and not judged:
            raise ValueError(
                "calibration has domains and guard names one text, so that no step could be "
                "judged by domain: leave guard out, or give it the same domains"
            )
        if own and own != judged:
            raise ValueError(
                f"calibration has the domains {', '.join(own)} and guard has {', '.join(judged)}: "
                "give both the same"
            )
        number, windows = len(judged), self.windows
        if number and windows.guard % number:
            low = max(1, windows.guard // number) * number
            raise ValueError(
                f"{windows.guard} guard windows cannot be shared out equally over {number} "
                f"domains: set windows.guard to {low} or {low + number}"
            )
        if own and windows.gradient < number:
            raise ValueError(
                f"{windows.gradient} gradient windows are too few for {number} domains: set "
                f"windows.gradient to {number} or more"
            )
        return self


def _as_mix(given: str | tuple[TextSource, ...] | dict[str, str]) -> tuple[TextSource, ...]:
    if isinstance(given, str):
        return (TextSource(source=given),)
    if isinstance(given, dict):
        return tuple(TextSource(source=source) for source in given.values())
    return given


def _domain_words(given: dict[str, str]) -> str:
    return ", ".join(f"{domain}: {source}" for domain, source in given.items())


def _renamed(given: Any, name: Callable[[str], str]) -> Any:
    """A role's sources under other names."""
    if isinstance(given, str):
        return name(given)
    if isinstance(given, dict):
        return {domain: name(source) for domain, source in given.items()}
    return tuple(one.model_copy(update={"source": name(one.source)}) for one in given)


class ProfileOptions(Options):
    """How the profile is taken."""

    gradient_every: int = Field(3, ge=1, description="steps between two gradient passes")
    gradient_checkpointing: bool = Field(
        True, description="recompute activations in the backward pass: less memory, 10 % more time"
    )


class FitOptions(Options):
    """How blocks are fitted to the dense ones."""

    epochs: int = Field(3, ge=1, description="times that each calibration window is used")
    learning_rate: float = Field(3e-4, gt=0, description="Adam's at the start; falls on a cosine")
    batch: int = Field(2, ge=1, description="windows of one step")


def _number_or_domains(value: Any) -> str:
    return "domains" if isinstance(value, dict) else NUMBER


# Infinite: no step is rolled back.
_Rise = Annotated[float, Field(gt=0, allow_inf_nan=True)]
_Bound = Annotated[
    Annotated[_Rise, Tag(NUMBER)] | Annotated[dict[DomainName, _Rise], Tag("domains")],
    Discriminator(_number_or_domains),
]


class GuardOptions(Options):
    """When a step is rolled back."""

    removed = {"max_price": "bound the rise itself, by max_increase or max_total_increase"}

    max_increase: _Bound = Field(
        0.15,
        description="largest perplexity rise over the last accepted revision; of each domain, "
        "where the guard has some: one number for all, or a mapping with one for each",
    )
    max_total_increase: float | None = Field(
        None, gt=0, description="largest perplexity rise over the dense model; null: no bound"
    )
    max_knowledge_drop: float | None = Field(
        None,
        gt=0,
        description="largest fall below the dense model of the mean log-probability of the right "
        "answers to texts.knowledge, nats a token of the answers; null: no bound, not measured",
    )

    def bounds(self, domains: Iterable[str]) -> dict[str, float]:
        """The largest rise of each domain.

        Raises:
            ValueError: ``max_increase`` is a mapping of other domains.
        """
        names, given = tuple(domains), self.max_increase
        if not isinstance(given, dict):
            return dict.fromkeys(names, given)
        if set(given) != set(names):
            has = f"has the domains {', '.join(names)}" if names else "has no domains"
            raise ValueError(
                f"guard.max_increase bounds {', '.join(given)}, and the guard's text {has}: give "
                "one number, or one for each domain"
            )
        return {name: given[name] for name in names}


class AskingOptions(Options):
    """How an LLM is asked."""

    timeout: float = Field(120, gt=0, description="seconds that one whole answer may take")
    attempts: int = Field(5, ge=1, le=20, description="tries on transient errors, in all")
    wait: float = Field(
        2.0, ge=0, description="seconds before the second try; doubled, with jitter, after each"
    )
    repairs: int = Field(
        2, ge=0, le=5, description="times a refused answer is sent back with what was wrong"
    )
    max_calls: int | None = Field(
        None,
        ge=1,
        description="calls in the whole run, but for the small question that each start asks "
        "first; null: no bound",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="tokens exchanged in the whole run; null: no bound"
    )


class AdaptOptions(Options):
    """How the kept weights are trained once the target is reached, with the masks fixed."""

    tokens: int = Field(
        1_228_800,
        ge=1,
        description="tokens of calibration text to train on, in whole batches; where there are "
        "fewer, they come again in another order",
    )
    learning_rate: float = Field(3e-4, gt=0, description="its highest value, after the warm-up")
    batch: int = Field(8, ge=1, description="windows of one step of the optimizer")
    warmup: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of the steps in which the rate rises; it then falls to 0 on a cosine",
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adamw keeps two moments of each trained weight, 8 bytes; adafactor a mean "
        "square of each row and column",
    )
    layers: tuple[str, ...] | None = Field(
        None,
        description='names of the layers that are trained, with wildcards: ["*.mlp.*"]; null: all '
        "that are pruned",
    )
    checkpoint_minutes: float = Field(
        10.0, ge=0, description="minutes between two checkpoints that a killed run goes on from"
    )


class PruneRequest(Options):
    """What defines a run; it never changes on a thread."""

    model: str = Field("embedded", description="hub name, local directory, or embedded")
    trust_remote_code: bool = Field(False, description="run Python code that the model brings")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: what suits the machine"
    )
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps ..., or all: every GPU, blocks shared out"
    )
    offload: Offload = Field(
        "none",
        description="where the blocks are while they are not at work, for a model that does not "
        "fit: none, on the device; cpu, in the machine's memory; disk, in the model's files",
    )
    target: float = Field(0.45, gt=0, le=0.95, description="sparsity over all prunable weights")
    step: float = Field(
        0.05,
        gt=0,
        le=0.95,
        description="largest sparsity that one step adds to the whole model; less than max_delta "
        "leaves a choice between layers",
    )
    max_delta: float = Field(
        0.15,
        gt=0,
        le=0.95,
        description="largest sparsity that one step adds to one layer; an N:M pattern, which "
        "takes layers as a whole, is not bound by it",
    )
    max_layer_sparsity: float = Field(0.9, gt=0, le=1, description="ceiling of any one layer")
    criterion: Name = Field(
        "obs",
        description="which weights inside a layer go first; your own as import:package.module:name",
        examples=list(CRITERIA),
    )
    pattern: str = Field(
        "unstructured",
        description='unstructured, or "keep_n:group_m": "2:4"; in a run the agent chooses which '
        "layers take it, each as a whole, until the target is reached",
    )
    shrinkage: float = Field(
        0.2,
        ge=0,
        description="criterion sparsegpt: share of its own diagonal added to X^T X, which is known "
        "from few tokens; 0: as published",
    )
    reconstruct: Reconstruct = Field(
        "block",
        description="what is done to the kept weights after the last step, without training: none; "
        "layer, each matrix by least squares; block, after that each block fitted to the dense one "
        "(true and false are read as layer and none)",
    )
    fit: FitOptions = Field(FitOptions(), description="how reconstruct block fits each block")
    pruned: str | None = Field(
        None,
        description="a pruned copy of the model, a local directory or hub name: a baseline takes "
        "its zeros and kept weights as they are, in place of an allocation; null: none",
    )
    profile: ProfileOptions = Field(ProfileOptions(), description="how the profile is taken")
    texts: TextOptions = Field(
        TextOptions(), description="texts to calibrate on, to judge steps on and to report on"
    )
    weights: dict[DomainName, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="how much each domain of texts.calibration counts, in its share of the windows "
        "and in masks and predicted costs, such as {general: 1, code: 0.5}; null: all alike",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="draws the windows and seeds the agent")

    @property
    def domain_weights(self) -> dict[str, float]:
        """How much each domain of calibration counts, by name; empty where it has one text."""
        names = self.texts.domains("calibration")
        return {name: 1.0 if self.weights is None else self.weights[name] for name in names}

    def identity(self) -> dict[str, Any]:
        """The request as JSON values, but for where things lie and how the model is run.

        What lies at a path has a hash of its own; device, offload and batch change no more than
        the last digits.
        """
        texts: dict[str, Any] = dict.fromkeys(("calibration", "guard", "test", "knowledge"), True)
        windows = {"windows": {"batch"}}
        values = self.model_dump(
            mode="json",
            exclude=dict.fromkeys(("model", "pruned", "device", "offload"), True)
            | {"texts": texts | windows},
        )
        domains = {role: list(self.texts.domains(role)) for role in ("calibration", "guard")}
        return values | ({"domains": domains} if any(domains.values()) else {})

    @property
    def crowded(self) -> bool:
        """Whether predicted costs hold a factor for how sparse a layer is.

        They hold none where kept weights are solved for: these make up for more where more goes.
        """
        return self.reconstruct == "none" and self.pattern == "unstructured"

    @property
    def criterion_words(self) -> str:
        """Criterion, pattern, and whether weights are reconstructed, for people to read."""
        words = f"{self.criterion}, {self.pattern}"
        if self.pruned is not None:
            words = "that of the pruned copy"
        if self.reconstruct == "none":
            return words
        return f"{words}, kept weights reconstructed by {self.reconstruct}"

    @field_validator("target", mode="before")
    @classmethod
    def _no_per_cent(cls, value: object) -> object:
        number = 0.0
        with suppress(ValueError, OverflowError):
            number = float(value) if isinstance(value, str | int | float) else 0.0
        if 1 < number <= 95:
            raise ValueError(f"a fraction is asked for: {number:g} % is {number / 100:g}")
        return value

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _as_named(cls, value: object) -> object:
        # Words, too: the command line has no others.
        return {"true": "layer", "false": "none"}.get(str(value).lower(), value)

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern_form(cls, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError('write N:M patterns in quotes, "2:4": YAML reads 2:4 as a number')
        parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "PruneRequest":
        if self.device == ALL and self.offload != "none":
            raise ValueError(
                f"device {ALL} keeps all blocks on the GPUs, and offload {self.offload} keeps them "
                "elsewhere: leave one of the two away"
            )
        return self

    @model_validator(mode="after")
    def _weighs_domains(self) -> "PruneRequest":
        names = self.texts.domains("calibration")
        if self.weights is not None and set(self.weights) != set(names):
            has = f"has the domains {', '.join(names)}" if names else "has no domains"
            raise ValueError(
                f"weights names {', '.join(self.weights) or 'nothing'}, and texts.calibration "
                f"{has}: give each domain a weight, or leave weights out"
            )
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights are all 0: at least one domain must count")
        return self

    @model_validator(mode="after")
    def _reachable(self) -> "PruneRequest":
        if self.target > self.max_layer_sparsity:
            raise ValueError(
                f"target {self.target} is above max_layer_sparsity {self.max_layer_sparsity}: "
                "raise the one or lower the other"
            )
        return self

    @property
    def pattern_sparsity(self) -> float | None:
        """Sparsity of a layer that has the N:M pattern, 0.5 for 2:4; None if unstructured."""
        return pattern_sparsity(self.pattern)


class PruneContext(Options):
    """Who decides and how; may change when a run is resumed."""

    agent: str = Field(
        DEFAULT_AGENT,
        description="provider:model, greedy, replay:FILE, exchange:DIR, "
        "import:package.module:Class ...; `prunewright agents` lists all",
    )
    agent_options: dict[str, Any] = Field(
        default_factory=dict,
        description="passed to the agent; Gemini's temperature is 0.5 unless it is set here",
    )
    allocation: str | None = Field(
        None,
        description="how a baseline shares the target out over the layers (null: global): uniform, "
        "owl, alphapruning, atp, greedy, evolutionary, global, from:RUN_DIR, or your own as "
        "import:package.module:name; a run's agent does this itself, and a run refuses any",
    )
    allocation_options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the allocation"
    )
    goal: Goal | None = Field(
        None,
        description="what you want kept, in your own words, which an LLM is shown as such: keep "
        "German and facts, code may suffer; null: nothing is said",
    )
    asking: AskingOptions = Field(AskingOptions(), description="how an LLM is asked")
    feedback: bool = Field(True, description="show the agent what its earlier steps did")
    signals: tuple[Name, ...] = Field(
        SIGNALS,
        description="what an LLM is shown of each layer: z_s, z_g, z_c, which stands for all of "
        "the predicted cost, z_k, that of right answers to questions, which takes gradients of its "
        "own, and your own as import:package.module:name",
    )
    probes: int = Field(
        4,
        ge=0,
        le=32,
        description="moves that an LLM may have measured before it decides on a step, each on a "
        "quarter of the guard windows; 0: none",
    )
    prompts: str | None = Field(
        None, description="folder with a system.md or step.md of your own; null: the project's"
    )
    review: bool = Field(False, description="ask a person to approve, edit or reject each decision")
    guard: GuardOptions = Field(GuardOptions(), description="when a step is rolled back")
    with_control: bool = Field(
        False,
        description="measure uniform pruning at the sparsity reached, too, by the same criterion "
        "on the same texts, so that there is something to compare the run with",
    )
    adapt: AdaptOptions | None = Field(
        None,
        description="train the kept weights at the end, distilled from the dense model; null: no "
        "training",
    )
    max_steps: int = Field(40, ge=1, le=10_000, description="steps that end the run")
    max_stalls: int = Field(
        3, ge=1, description="rollbacks or empty decisions in a row that end the run"
    )
    out: str | None = Field(None, description="run directory; null: runs/<thread>")

    @field_validator("agent_options", "allocation_options", "goal")
    @classmethod
    def _no_secrets(cls, value: Any, info: ValidationInfo) -> Any:
        secret = find_secret(value, info.field_name or "")
        if secret:
            raise ValueError(
                f"{secret} does not belong into a config, which every run stores: "
                "set the provider's environment variable instead, or write env:NAME for the value "
                "of a variable of your own"
            )
        return value


class PruneConfig(PruneRequest, PruneContext):
    """The whole configuration, as one YAML file holds it."""

    @model_validator(mode="after")
    def _asks_what_was_not_shown(self) -> "PruneConfig":
        asked, shown = self.texts.knowledge, {one.source for one in self.texts.mix} - {EMBEDDED}
        if self.guard.max_knowledge_drop is not None and asked in shown:
            raise ValueError(
                f"guard.max_knowledge_drop asks the questions of {asked}, which texts.calibration "
                "holds with their answers: give them in two files"
            )
        return self

    @model_validator(mode="after")
    def _bounds_domains(self) -> "PruneConfig":
        self.guard.bounds(self.texts.domains("guard"))
        return self

    @model_validator(mode="after")
    def _has_control(self) -> "PruneConfig":
        if self.with_control and self.pattern != "unstructured":
            raise ValueError(
                f"with_control: pattern {self.pattern} fixes each layer's sparsity, so there is no "
                "uniform control at any other: leave one of the two away"
            )
        return self

    @property
    def request(self) -> PruneRequest:
        """The half that defines the run."""
        return PruneRequest(**{k: getattr(self, k) for k in PruneRequest.model_fields})

    @property
    def one_shot(self) -> str:
        """The allocation of a baseline; an N:M pattern takes every layer alike."""
        if self.allocation is not None:
            return self.allocation
        return "global" if self.pattern == "unstructured" else "uniform"

    @property
    def context(self) -> PruneContext:
        """The half that says who decides and how."""
        return PruneContext(**{k: getattr(self, k) for k in PruneContext.model_fields})


PatternNM = tuple[int, int]


def parse_pattern(pattern: str) -> PatternNM | None:
    """``(keep_n, group_m)`` of ``"keep_n:group_m"``; None for ``unstructured``.

    Raises:
        ValueError: neither form, or not 0 < keep_n < group_m.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern)
    if match is None:
        raise ValueError(f'pattern {pattern!r} is neither "unstructured" nor of the form "2:4"')
    keep_n, group_m = int(match[1]), int(match[2])
    if not 0 < keep_n < group_m:
        raise ValueError(f"pattern {pattern!r} must keep at least 1 and less than {group_m}")
    return keep_n, group_m


def pattern_sparsity(pattern: str) -> float | None:
    """Sparsity of a layer that has an N:M pattern, 0.5 for ``2:4``; None for ``unstructured``.

    Raises:
        ValueError: as `parse_pattern`.
    """
    parsed = parse_pattern(pattern)
    return None if parsed is None else (parsed[1] - parsed[0]) / parsed[1]
