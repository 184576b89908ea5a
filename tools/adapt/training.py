"""Distillation of the kept weights from the dense model, end to end. This is training.

The student's distribution of each next token is drawn to the dense model's: KL(dense || pruned),
the mean over all tokens of a batch, by AdamW with betas 0.9 and 0.95 and no decay, gradients
clipped at a norm of 1, a rate that rises linearly and falls to 0 on a cosine. Only kept weights of
pruned layers change: a gradient is 0 wherever a weight is, so zeros stay zeros. Weights of half
precision have masters in float32.
"""

import math
import random
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers.optimization import Adafactor

from prunewright.state import InputError, PruneRequest, PrunewrightError
from prunewright.state.config import AdaptOptions
from prunewright.state.metrics import TRAINING
from prunewright.tools.adapt.checkpoints import Checkpoints, Standing
from prunewright.tools.adapt.memory import check_disk, check_room, free_memory, sizes_of
from prunewright.tools.adapt.teacher import Teacher
from prunewright.tools.bench.workbench import Workbench, no_room
from prunewright.tools.execution.base import ordered_attention
from prunewright.tools.fast import unpack_bits
from prunewright.tools.losses import perplexity
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head, Progress, told
from prunewright.tools.model.layers import Layer

BETAS = (0.9, 0.95)
NORM = 1.0
"""Largest norm of a step's gradient."""
MEASURED = 10
"""Times that the guard is measured in the course of the training."""
PATIENCE = 5
"""Times in a row that the guard may be worse than at its best before the training ends.

Half of all: while the rate is high the guard swings, and most is gained where it falls. With 2 a
training of SmolLM2-135M ended after 8 of 20 steps.
"""


@dataclass(frozen=True)
class Adapted:
    """What training came to.

    Attributes:
        revision: the one with the lowest guard loss; the one that training began with, if that was
            never lower.
        curve: after each step the tokens trained on and the step's loss: KL(dense || pruned), mean
            over its tokens, nats.
        guard: tokens trained on, and the guard's perplexity then.
        tokens: that it was trained on in all.
        notes: what a reader must know.
        before: seconds that it took in processes before this one.
    """

    revision: str
    curve: list[tuple[int, float]]
    guard: list[tuple[int, float]]
    tokens: int
    notes: list[str]
    before: float = field(default=0.0, compare=False)


def adapt(
    bench: Workbench,
    revision: str,
    options: AdaptOptions,
    folder: Path,
    progress: Progress | None = None,
) -> Adapted:
    """Train the kept weights of a revision to give what the dense model gives.

    On a processor the same settings give the same weights bit for bit, however often the training
    is stopped or killed and called again.

    Args:
        bench: the model and its texts; trained on the calibration windows, stopped by the guard's.
        revision: what to begin with; it stays as it is.
        options: how.
        folder: of its checkpoints and of the dense model's outputs. Its own: what another training
            left there is deleted. It is left as it is, for whoever calls again before the result
            is stored, and then discards it.
        progress: told of each window, and may raise a `PrunewrightError` to stop.

    Raises:
        InputError: nothing can be trained so.
        StoreError: a file cannot be written, or is damaged.
    """
    layers = trained_layers(bench, revision, options)
    if not layers:
        words = "adapt trained nothing: no layer that adapt.layers names was pruned"
        return Adapted(revision, curve=[], guard=[], tokens=0, notes=[words])
    windows = bench.windows.calibration
    schedule = Schedule(options, len(windows), windows.shape[1], bench.request.seed)
    kept = Checkpoints(folder, _identity(bench, revision, options))
    if not _ended(kept.saved, schedule):
        check_training(bench, options, folder, layers)
        _train(bench, revision, layers, schedule, kept, options, progress)
    standing = kept.saved
    found = _store(bench, revision, layers, standing, kept, progress)
    each = schedule.tokens
    bench.tokens["adapt"] += each * standing.step  # those from before a kill, too
    return Adapted(
        revision=found,
        curve=[(each * step, loss) for step, loss in enumerate(standing.losses, start=1)],
        guard=[(each * step, perplexity([loss])) for step, loss in standing.guard],
        tokens=each * standing.step,
        notes=_notes(schedule, standing, len(windows)),
        before=kept.before,
    )


def trained_layers(bench: Workbench, revision: str, options: AdaptOptions) -> list[Layer]:
    """The pruned layers that are trained.

    Raises:
        InputError: no layer is pruned, or a pattern names none.
    """
    layers, manifest = list(bench.loaded.layers.values()), bench.store.manifest(revision)
    if not any(layer.name in manifest for layer in layers):
        raise InputError("adapt trains the kept weights of pruned layers, and no layer is pruned")
    return [layer for layer in chosen_layers(layers, options) if layer.name in manifest]


def chosen_layers(layers: list[Layer], options: AdaptOptions) -> list[Layer]:
    """Those of a model's layers that are to be trained where they are pruned.

    Raises:
        InputError: a pattern names none.
    """
    if options.layers is None:
        return layers
    for pattern in options.layers:
        if not any(fnmatchcase(layer.name, pattern) for layer in layers):
            raise InputError(
                f"adapt.layers: no layer has a name like {pattern!r}: write {layers[0].name}, for "
                "one, with * for any part of it"
            )
    return [ly for ly in layers if any(fnmatchcase(ly.name, one) for one in options.layers)]


def check_training(
    bench: Workbench, options: AdaptOptions, folder: Path, layers: list[Layer] | None = None
) -> None:
    """Refuse what cannot be trained, or has no room.

    Args:
        bench: the model.
        options: how it is to be trained.
        folder: where its checkpoints will be.
        layers: those that are trained; None: as many as may be once they are pruned.

    Raises:
        InputError: saying why.
    """
    check_offload(bench.request)
    if not bench.head.exact:
        raise InputError(
            "adapt cannot train this model: its logits do not follow from its last hidden states "
            "by its head alone, so the dense model's cannot be kept"
        )
    loaded = bench.loaded
    if layers is None:
        layers = chosen_layers(list(loaded.layers.values()), options)
    sizes = sizes_of(loaded.model, layers, bench.request, options, loaded.dtype, loaded.device)
    devices = {loaded.model.get_parameter(layer.parameter).device for layer in layers}
    check_room(options, sizes, layers, free_memory(devices), loaded.device.type)
    check_disk(options, sizes, len(bench.windows.calibration), folder)


def check_offload(request: PruneRequest) -> None:
    """Refuse blocks that are not on the device.

    Raises:
        InputError: they are elsewhere.
    """
    if request.offload != "none":
        raise InputError(
            f"adapt trains all blocks at once, so they must be on the device: offload is "
            f"{request.offload}. Set offload=none, on several GPUs with device=all, or leave adapt "
            "away (adapt=null)"
        )


def _identity(bench: Workbench, revision: str, options: AdaptOptions) -> dict[str, object]:
    """What a training is of: its checkpoints are good for no other."""
    return {
        "revision": revision,
        "options": options.model_dump(mode="json", exclude={"checkpoint_minutes"}),
        "seed": bench.request.seed,
        "model": bench.loaded.fingerprint,
        "windows": [bench.windows.hashes["calibration"], bench.windows.hashes["guard"]],
        "dtype": str(bench.loaded.dtype),
        "device": bench.loaded.device.type,
    }


class Schedule:
    """Which windows each step takes, and at which rate.

    Attributes:
        steps: of the optimizer, in all.
        windows: of one step.
        tokens: of one step.
    """

    def __init__(self, options: AdaptOptions, windows: int, length: int, seed: int) -> None:
        self._options, self._of, self._seed = options, windows, seed
        self.windows = options.batch
        self.tokens = options.batch * length
        self.steps = max(1, options.tokens // self.tokens)
        self._rising = math.ceil(options.warmup * self.steps)
        self._order: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[int]:
        """The windows of a step, counted from 0: each once before any comes again."""
        first = step * self._options.batch
        places = (divmod(n, self._of) for n in range(first, first + self._options.batch))
        return [self._epoch(epoch)[place] for epoch, place in places]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._order:
            draw = random.Random(f"{self._seed}/adapt/{epoch}")
            self._order = {epoch: draw.sample(range(self._of), self._of)}
        return self._order[epoch]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self._rising:
            return self._options.learning_rate * (step + 1) / self._rising
        share = (step - self._rising) / max(1, self.steps - self._rising)
        return self._options.learning_rate * (1 + math.cos(math.pi * share)) / 2

    def measured(self, step: int) -> bool:
        """Whether the guard is measured after so many steps; before the first it is, too."""
        return step * MEASURED // self.steps > (step - 1) * MEASURED // self.steps


class _Student:
    """The live model while it is trained: its weights, their masters, and the optimizer."""

    def __init__(self, bench: Workbench, layers: list[Layer], options: AdaptOptions) -> None:
        bench.lend(layer.name for layer in layers)
        model = bench.loaded.model
        self._parameters = {ly.name: model.get_parameter(ly.parameter) for ly in layers}
        self._hooks = []
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                master = parameter.detach().float()
                self.masters[name] = master
                hook = parameter.register_post_accumulate_grad_hook(_adder(master))
                self._hooks.append(hook)
            self.masters[name].grad = torch.zeros_like(self.masters[name])
        self.optimizer: torch.optim.Optimizer
        if options.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(
                list(self.masters.values()), betas=BETAS, weight_decay=0.0, fused=True
            )
        else:
            self.optimizer = Adafactor(
                list(self.masters.values()), lr=1.0, scale_parameter=False, relative_step=False
            )

    def close(self) -> None:
        """Let the model compute without gradients again."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        # A notebook keeps an error's frames, and all that they hold.
        self.masters.clear()
        self._parameters.clear()
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()

    def clear(self) -> None:
        """Begin a step: no gradients."""
        for master in self.masters.values():
            assert master.grad is not None
            master.grad.zero_()

    def clip(self, tokens: int) -> Tensor:
        """Bring gradients of summed losses to those of their mean, masked and clipped.

        Args:
            tokens: that the losses are of.

        Returns:
            Their norm before it was clipped, [] on a device.
        """
        for master in self.masters.values():
            assert master.grad is not None
            master.grad.mul_(master != 0).div_(tokens)
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), NORM)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._to_live()

    def _to_live(self) -> None:
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.data.copy_(self.masters[name])

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The live weights by layer, to be stored."""
        for index, parameter in enumerate(self._parameters.values()):
            yield _file(index), {"weight": parameter.data}

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Masters and the optimizer's state by layer, to be stored."""
        for index, master in enumerate(self.masters.values()):
            state = self.optimizer.state[master]
            values = {key: torch.as_tensor(value) for key, value in state.items()}
            yield (
                _file(index),
                {"master": master.data} | {f"state.{k}": v for k, v in values.items()},
            )

    @torch.no_grad()
    def load(self, read: Callable[[str], dict[str, Tensor]]) -> None:
        """Take what `state` gave.

        Args:
            read: gives the tensors of a layer.
        """
        for index, master in enumerate(self.masters.values()):
            tensors = read(_file(index))
            master.data.copy_(tensors.pop("master"))
            self.optimizer.state[master] = {
                key.removeprefix("state."): value.item()
                if value.dtype == torch.int64
                else value.to(master.device, copy=True)
                for key, value in tensors.items()
            }
        self._to_live()


def _file(index: int) -> str:
    return f"{index:06d}"


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert master.grad is not None
        assert parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return add


def _train(
    bench: Workbench,
    revision: str,
    layers: list[Layer],
    schedule: Schedule,
    kept: Checkpoints,
    options: AdaptOptions,
    progress: Progress | None,
) -> None:
    """Train what a revision has, and let go of masters and moments once it is over."""
    student = None
    try:
        teacher = Teacher(bench, kept.folder / "dense", progress)
        bench.sync(revision)
        student = _Student(bench, layers, options)
        _take_steps(bench, student, teacher, schedule, kept, options, progress)
    except (RuntimeError, MemoryError) as error:
        if no_room(error):
            error.add_note(
                f"To go on: prunewright resume {shlex.quote(str(kept.folder.parent))} with --set "
                "texts.windows.batch=1, --set adapt.optimizer=adafactor or fewer adapt.layers; or "
                "with --set adapt=null, without training"
            )
        raise
    finally:
        if student is not None:
            student.close()


def _take_steps(
    bench: Workbench,
    student: _Student,
    teacher: Teacher,
    schedule: Schedule,
    kept: Checkpoints,
    options: AdaptOptions,
    progress: Progress | None,
) -> None:
    """Take all steps, from the last checkpoint on, and leave one that says so."""
    standing = deepcopy(kept.saved)
    if standing.step:
        path = kept.state(standing.step)
        student.load(lambda name: kept.read(path, name))
    total, last = schedule.steps * schedule.tokens, time.monotonic()

    def tell(done: int) -> None:
        """Say how many tokens of the step in hand are done."""
        if progress is not None:
            loss = f": KL {standing.losses[-1]:.4f} nats" if standing.losses else ""
            progress(f"{TRAINING}{loss}, token", standing.step * schedule.tokens + done, total)

    try:
        while True:
            _measure(bench, student, schedule, standing, kept, progress)
            if _ended(standing, schedule):
                break
            _step(bench, student, teacher, schedule, standing, tell)
            if time.monotonic() - last >= 60 * options.checkpoint_minutes:
                kept.save_state(standing, student.state())
                last = time.monotonic()
    except _DivergedError:
        standing.diverged = True
    except PrunewrightError:
        # No pass changes a weight, so the last whole step is what is there.
        if standing.step > kept.saved.step:
            kept.save_state(standing, student.state())
        raise
    kept.end(standing)
    if progress is not None:
        progress(TRAINING, total, total)


def _ended(standing: Standing, schedule: Schedule) -> bool:
    """Whether no step is left, the guard has turned, or the weights are broken."""
    if standing.diverged:
        return True
    measured = bool(standing.guard) and standing.guard[-1][0] == standing.step
    return measured and (standing.step == schedule.steps or standing.turned >= PATIENCE)


def _measure(
    bench: Workbench,
    student: _Student,
    schedule: Schedule,
    standing: Standing,
    kept: Checkpoints,
    progress: Progress | None,
) -> None:
    """Measure the guard where that is due, and keep the weights that are the best so far."""
    step = standing.step
    if not schedule.measured(step) or (standing.guard and standing.guard[-1][0] == step):
        return
    losses = bench.live_guard_losses(progress)
    loss = sum(losses) / len(losses)
    _check_finite(loss, step)
    if loss < min((before for _, before in standing.guard), default=loss):
        kept.save_best(step, student.weights())
        standing.best = step
    standing.guard.append((step, loss))


def _step(
    bench: Workbench,
    student: _Student,
    teacher: Teacher,
    schedule: Schedule,
    standing: Standing,
    tell: Callable[[int], None],
) -> None:
    """Take one step of the optimizer."""
    execution, step = bench.loaded.execution, standing.step
    batch = schedule.batch(step)
    chosen, length = bench.windows.calibration[batch], bench.windows.calibration.shape[1]
    student.clear()
    losses, left = [], iter(batch)
    with ExitStack() as stack:
        stack.enter_context(execution.recomputing(bench.request.profile.gradient_checkpointing))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(ordered_attention(execution.device))
        for ids in execution.groups(TRAINING, chosen, lambda _, done, __: tell(done * length)):
            states = torch.stack(
                [teacher.states(window) for _, window in zip(ids, left, strict=False)]
            )
            hidden = execution.hidden_states(ids)
            losses.append(
                _backward(bench.head, hidden, states.to(hidden.device, non_blocking=True))
            )
    tokens = chosen.numel()
    norm = student.clip(tokens)
    # One transfer: a device that computes on its own is waited for once a step.
    mean = torch.stack(losses).sum() / tokens
    loss, size = torch.stack([mean, norm.to(mean.device)]).tolist()
    _check_finite(loss + size, step)
    student.step(schedule.rate(step))
    standing.losses.append(loss)
    standing.step += 1


def _backward(head: Head, hidden: Tensor, states: Tensor) -> Tensor:
    """Backward pass of the summed KL(dense || pruned) of a group of windows.

    Piece by piece, so that full logits of neither model ever exist.

    Args:
        head: the model's, which both share.
        hidden: the student's last hidden states [windows, length, width], with their graph.
        states: the dense model's, of the same shape.

    Returns:
        The sum over all tokens in nats, float32 [].
    """
    losses, gradients = [], []
    # A piece of tokens of all windows: theirs have no other order.
    pieces = hidden.detach().flatten(0, 1).split(TOKENS_AT_ONCE)
    for piece, dense in zip(pieces, states.flatten(0, 1).split(TOKENS_AT_ONCE), strict=True):
        leaf = piece.requires_grad_()
        with torch.no_grad():
            wanted = functional.log_softmax(head(dense), dim=-1)
        found = functional.log_softmax(head(leaf), dim=-1)
        loss = functional.kl_div(found, wanted, reduction="sum", log_target=True)
        loss.backward()
        assert leaf.grad is not None
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    hidden.backward(torch.cat(gradients).view_as(hidden))
    return torch.stack(losses).sum()


class _DivergedError(Exception):
    """Training has broken the weights; the best ones from before are kept."""


def _check_finite(value: float, step: int) -> None:
    """Refuse to go on with weights that training, or what was before, has broken.

    Raises:
        _DivergedError: a loss or a gradient is not finite after some steps.
        InputError: it was not finite before the first.
    """
    if math.isfinite(value):
        return
    if step:
        raise _DivergedError
    raise InputError("adapt: the pruned model is broken: its loss or a gradient is not finite")


def _store(
    bench: Workbench,
    revision: str,
    layers: list[Layer],
    standing: Standing,
    kept: Checkpoints,
    progress: Progress | None,
) -> str:
    """The revision of the best weights, with the masks that are there."""
    if not standing.best:
        return revision
    manifest, path = bench.store.manifest(revision), kept.best(standing.best)
    about = {"parent": revision, "adapt": {"step": standing.best}}
    writer = bench.store.writer(manifest, about)
    with writer:
        numbered = told("storing the trained weights", enumerate(layers), len(layers), progress)
        for index, layer in numbered:
            bits = bench.store.read(manifest[layer.name], layer.shape).bits
            mask = unpack_bits(bits, layer.numel).view(torch.bool).view(layer.shape)
            weight = kept.read(path, _file(index))["weight"]
            writer.add(layer.name, mask, weight, own=bench.dense_zeros[layer.name])
    return writer.revision


def _notes(schedule: Schedule, standing: Standing, windows: int) -> list[str]:
    """What a reader must know of a training."""
    trained = standing.step * schedule.tokens
    notes = [
        f"adapt is training: the kept weights were distilled from the dense model on {trained:,} "
        f"tokens, {windows} windows {standing.step * schedule.windows / windows:.1f} times over"
    ]
    if standing.diverged:
        notes.append(
            f"adapt ended after {standing.step} of {schedule.steps} steps: a loss or gradient was "
            "not finite. Lower adapt.learning_rate"
        )
    elif standing.step < schedule.steps:
        notes.append(
            f"adapt ended after {standing.step} of {schedule.steps} steps: the guard was worse "
            f"than at its best {PATIENCE} times in a row"
        )
    if standing.best < standing.step:
        notes.append(
            f"adapt keeps the weights after {standing.best} steps, where the guard is best"
        )
    return notes
