"""The live model of a process, brought to whichever revision a node needs."""

import ctypes
import itertools
import json
import logging
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prunewright.state import InputError, PruneRequest, StoreError, parse_pattern
from prunewright.state.config import EMBEDDED, SELF
from prunewright.state.profile import KNOWLEDGE_SIGNAL, ModelProfile
from prunewright.state.run import DENSE
from prunewright.tools import criteria
from prunewright.tools.calibration.activations import Activations, measure_activations
from prunewright.tools.calibration.gradients import Gradients, measure_gradients
from prunewright.tools.calibration.profile import build_profile, statistics_of
from prunewright.tools.criteria import find_criterion, prune_mask
from prunewright.tools.fast import count_bits, count_zeros, read_at_once
from prunewright.tools.masks import nm_count
from prunewright.tools.model.checkpoint import weight_files
from prunewright.tools.model.continuations import answer_scores, continue_text, fact_tokens
from prunewright.tools.model.head import Head, Progress, told
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel, load_model, resolve_directory
from prunewright.tools.model.tokens import check_ids, embedding_rows
from prunewright.tools.model.writing import write_documents
from prunewright.tools.solve.fit import Fit
from prunewright.tools.solve.solving import BlockSolver, Solved, Wanted, solves
from prunewright.tools.sources import first_line
from prunewright.tools.store.revisions import Manifest, RevisionStore, StoredLayer
from prunewright.tools.store.rundir import OWN_TEXT
from prunewright.tools.store.standing import setting_files, weights_digest
from prunewright.tools.store.storage import (
    canonical_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from prunewright.tools.texts.answered import pack_answered
from prunewright.tools.texts.questions import as_text, hash_questions, load_facts
from prunewright.tools.texts.windows import Windows, load_windows

_log = logging.getLogger("prunewright")


class Workbench:
    """A loaded model with its texts; knows which revision its weights are at.

    All that it computes is a function of the request and a revision: what is remembered here
    only saves time, and a new process computes the same again.
    """

    def __init__(
        self, request: PruneRequest, run_directory: Path = Path(), progress: Progress | None = None
    ) -> None:
        find_criterion(request.criterion)  # an unknown one is refused before a model is loaded
        self.request = request
        source = criteria.REGISTRY.source(request.criterion)
        self._code = {} if source is None else {"criterion": sha256_file(source)}
        self.loaded: LoadedModel = load_model(
            request.model,
            dtype=request.dtype,
            device=request.device,
            offload=request.offload,
            batch=None if request.texts.windows.batch == "auto" else request.texts.windows.batch,
            trust_remote_code=request.trust_remote_code,
        )
        _own_memory(self.loaded, request.offload)
        self.loaded.check_length(request.texts.windows.length)
        self._rows = embedding_rows(self.loaded.model)
        self.store = RevisionStore(run_directory / "revisions")
        self._own_text = b""
        self.windows: Windows = self._load_windows(progress)
        self._stamps = _stamps(request, self.loaded.directory)
        self.head = Head(self.loaded.model)
        self._at: Manifest = {}
        zeros = read_at_once(
            count_zeros(self.loaded.weight(ly)) for ly in self.loaded.layers.values()
        )
        self._zeros = dict(zip(self.loaded.layers, zeros, strict=True))
        self.dense_zeros = dict(self._zeros)
        """Number of exact zeros that each layer has in the dense model: no mask takes them away."""
        self._pattern_gains: dict[str, int] | None = None
        self._counted: dict[tuple[str, str | None], int] = {
            (name, None): zeros for name, zeros in self._zeros.items()
        }
        """Zeros of a layer by the mask that it had: a rollback need not count them again."""
        uses = ("calibration", "gradient", "solve", "guard", "probe", "allocation", "adapt", "test")
        self.tokens = dict.fromkeys(uses, 0)
        """Tokens run through the model so far, by use."""
        self._activations: tuple[str, Activations] | None = None
        self._gradients: tuple[str, Gradients] | None = None
        self._answers: tuple[str, dict[str, Tensor]] | None = None
        self._facts: tuple[str, list[tuple[list[int], list[int]]]] | None = None

    def move(self, run_directory: Path) -> None:
        """Serve another run of the same request, which may have text of its own."""
        if self.store.directory == run_directory / "revisions":
            return
        self.store = RevisionStore(run_directory / "revisions")
        if SELF in self.request.texts.named:
            self.windows = self._load_windows()
            self.forget_statistics()

    def _load_windows(self, progress: Progress | None = None) -> Windows:
        texts, tokenizer, seed = self.request.texts, self.loaded.tokenizer, self.request.seed

        def write(windows: int) -> Path:
            """The run's file of what the dense model writes by itself, made once."""
            path = self.store.directory.parent / OWN_TEXT
            if path.exists():
                self._own_text = path.read_bytes()
                return path
            if not self._own_text:
                if self.request.offload != "none":
                    raise InputError(
                        f"with offload {self.request.offload} a model does not write text by "
                        "itself, for which all its weights would be read for each token: let "
                        f"texts.calibration name the {OWN_TEXT} of another run of this model, or "
                        "another text"
                    )
                tokens = windows * texts.windows.length
                documents = write_documents(
                    self.loaded.model, tokenizer, tokens, seed, rows=self._rows, progress=progress
                )
                rows = [f"{json.dumps({'text': text})}\n" for text in documents]
                self._own_text = "".join(rows).encode()
            write_atomic(path, self._own_text)
            return path

        weights = self.request.domain_weights
        return load_windows(texts, tokenizer, seed, rows=self._rows, weights=weights, write=write)

    @property
    def stale(self) -> bool:
        """Whether a file that the model or a local text was read from has changed since."""
        return self._stamps != _stamps(self.request, self.loaded.directory)

    def facts(self) -> dict[str, Any]:
        """What a run on this model and these texts stands on, as JSON values."""
        pruned = {}
        if self.request.pruned is not None:
            pruned["pruned"] = weights_digest(weight_files(resolve_directory(self.request.pruned)))
        return {
            "model": pruned
            | {
                "name": self.request.model,
                "sha256": self.loaded.fingerprint,
                "settings": self.loaded.settings,
                "prunable_layers": len(self.loaded.layers),
                "prunable_weights": self.loaded.prunable,
                "zero_weights": sum(self.dense_zeros.values()),
            },
            "texts": {
                role: {"source": self.windows.sources[role], "sha256": digest}
                for role, digest in self.windows.hashes.items()
            },
            # Of modules from outside that masks are made by.
            "code": self._code,
            "seed": self.request.seed,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "device": str(self.loaded.device),
            "threads": torch.get_num_threads(),
        }

    def sync(self, revision: str) -> None:
        """Bring the live weights to a revision, touching only the layers that differ.

        Raises:
            StoreError: a manifest or mask is missing or damaged, or of another model; the weights
                stay as they were.
        """
        target = self.store.manifest(revision)
        if unknown := set(target) - set(self.loaded.layers):
            raise StoreError(
                f"revision {revision} belongs to another model: it prunes {min(unknown)}, which "
                f"{self.request.model} does not have"
            )
        layers = [ly for n, ly in self.loaded.layers.items() if target.get(n) != self._at.get(n)]
        # All of them read and checked before any weight changes. Values are as large as the model,
        # and read again.
        stored = {}
        for layer in layers:
            if layer.name in target:
                found = self._stored(target[layer.name], layer)
                if found.kept is None:
                    stored[layer.name] = found
        weights = self.loaded.execution.weights
        dense_layers = self._dense_layers(layers, home=True)
        fresh: list[tuple[str, str | None]] = []

        def restored() -> Iterator[Tensor]:
            for layer, dense in zip(layers, dense_layers, strict=True):
                digest = target.get(layer.name)
                self._at[layer.name] = ""  # should this be interrupted, the next sync mends it
                held = stored.pop(layer.name, None)
                if held is None and digest is not None:
                    held = self._stored(digest, layer)
                weights.restore(layer, dense, held)
                if (layer.name, digest) not in self._counted:
                    fresh.append((layer.name, digest))
                    yield count_zeros(weights.read(layer))

        counts = read_at_once(restored())
        self._counted |= zip(fresh, counts, strict=True)
        for layer in layers:
            digest = target.get(layer.name)
            self._zeros[layer.name] = self._counted[layer.name, digest]
            if digest is None:
                self._at.pop(layer.name)
            else:
                self._at[layer.name] = digest

    def _dense_layers(self, layers: Iterable[Layer], *, home: bool = False) -> Iterator[Tensor]:
        """Dense weights of some layers in turn, each good until its live weights change.

        Where no mask is on a layer the live ones are dense, and no file is read.
        """
        live = self.request.offload == "none"
        for dense, group in itertools.groupby(layers, lambda ly: live and ly.name not in self._at):
            if dense:
                yield from map(self.loaded.weight, group)
            else:
                yield from self.loaded.dense_layers(group, home=home)

    def _stored(self, digest: str, layer: Layer) -> StoredLayer:
        found = self.store.read(digest, layer.shape)
        _, dtype = self.loaded.execution.weights.place(layer)
        if found.kept is not None and found.kept.dtype != dtype:
            raise StoreError(
                f"the weights that a revision holds of {layer.name} are {found.kept.dtype}, and "
                f"they are loaded as {dtype}"
            )
        return found

    def sparsities(self) -> dict[str, float]:
        """Fraction of exact zeros of each layer's live weights."""
        return {n: self._zeros[n] / ly.numel for n, ly in self.loaded.layers.items()}

    def sparsity(self) -> float:
        """Fraction of exact zeros over all prunable weights."""
        return sum(self._zeros.values()) / self.loaded.prunable

    def zeros(self) -> dict[str, int]:
        """Number of exact zeros of each layer's live weights."""
        return dict(self._zeros)

    def pattern_gains(self) -> dict[str, int]:
        """Weights that the N:M pattern takes from each layer whose inputs divide into groups.

        What is zero in the dense model is not taken, so a layer that has the pattern there gives
        none.
        """
        pattern = parse_pattern(self.request.pattern)
        if pattern is None:
            return {}
        if self._pattern_gains is None:
            keep_n, group_m = pattern
            self._pattern_gains = {
                name: nm_count(layer.matrix(self.loaded.dense(layer)), keep_n, group_m)
                - self.dense_zeros[name]
                if self.dense_zeros[name]
                else layer.numel // group_m * (group_m - keep_n)
                for name, layer in self.loaded.layers.items()
                if layer.inputs % group_m == 0
            }
        return dict(self._pattern_gains)

    def activations(self, revision: str, progress: Progress | None = None) -> Activations:
        """Input statistics at a revision."""
        if self._activations is None or self._activations[0] != revision:
            self.sync(revision)
            measured = measure_activations(self.loaded, self.windows.calibration, progress)
            self._activations = (revision, measured)
            self.tokens["calibration"] += self.windows.calibration.numel()
        return self._activations[1]

    def gradients(self, revision: str, progress: Progress | None = None) -> Gradients:
        """Gradient statistics at a revision."""
        if self._gradients is None or self._gradients[0] != revision:
            self.sync(revision)
            count, drawn = self.request.texts.windows.gradient, self.windows
            windows, scored = drawn.calibration[:count], drawn.scored.get("calibration")
            measured = measure_gradients(
                self.loaded,
                self.head,
                windows,
                scored=None if scored is None else scored[:count],
                domains=drawn.domains.get("calibration", ())[:count],
                weights=self.request.domain_weights,
                checkpointing=self.request.profile.gradient_checkpointing,
                by_weight=find_criterion(self.request.criterion).by_weight,
                progress=progress,
            )
            self._gradients = (revision, measured)
            self.tokens["gradient"] += windows.numel()
        return self._gradients[1]

    def _answer_gradients(self, revision: str, progress: Progress | None) -> dict[str, Tensor]:
        """E[d_i^2] of the right answers to questions, by layer, at a revision.

        Of the first calibration domain that holds questions. Where there is none, questions of
        ``texts.knowledge`` that `knowledge` does not ask fill as many windows as give gradients, or
        as many as they can.

        Raises:
            InputError: the questions cannot be read, or are too few for a window.
        """
        texts, drawn = self.request.texts, self.windows
        marks = drawn.scored.get("calibration")
        if marks is not None:
            names = drawn.domains["calibration"]
            asking = next(d for d, mark in zip(names, marks, strict=True) if not bool(mark.all()))
            return self.gradients(revision, progress).domains[asking]
        if self._answers is None or self._answers[0] != revision:
            facts = load_facts(texts.knowledge)
            guarded = set(self._guarded(len(facts)))
            others = [as_text(fact) for n, fact in enumerate(facts) if n not in guarded]
            random.Random(f"{self.request.seed}/{KNOWLEDGE_SIGNAL}").shuffle(others)
            count, length = texts.windows.gradient, texts.windows.length
            ids, scored, _ = pack_answered(
                others,
                self.loaded.tokenizer,
                length,
                label=texts.knowledge,
                most=count,
            )
            if not len(ids):
                raise InputError(
                    f"the signal {KNOWLEDGE_SIGNAL} needs {length} tokens of questions at least, "
                    f"and {texts.knowledge} holds too few beside the {texts.facts} of texts.facts: "
                    "give more, or leave the signal out"
                )
            windows = torch.from_numpy(ids[:count].astype("int64"))
            check_ids(windows, self.loaded.tokenizer, self._rows, texts.knowledge)
            self.sync(revision)
            measured = measure_gradients(
                self.loaded,
                self.head,
                windows,
                scored=torch.from_numpy(scored[:count]),
                checkpointing=self.request.profile.gradient_checkpointing,
                progress=progress,
            )
            self._answers = (revision, measured.gradient_square)
            self.tokens["gradient"] += windows.numel()
        return self._answers[1]

    def forget_statistics(self) -> None:
        """Let statistics be taken, and their tokens be counted, again."""
        self._activations = self._gradients = self._answers = None

    def statistics_notes(self) -> list[str]:
        """What a reader must know of the statistics as taken, such as experts short of tokens."""
        taken = (self._activations, self._gradients)
        return [note for one in taken if one is not None for note in one[1].notes]

    def profile(
        self,
        revision: str,
        gradient_revision: str,
        progress: Progress | None = None,
        signals: Iterable[str] = (),
    ) -> ModelProfile:
        """Every layer's signals at a revision, with gradients from another.

        Args:
            revision: where the model and the activations are.
            gradient_revision: where gradients were taken.
            progress: told after each window.
            signals: names of more signals than the project's own, as in a configuration.
        """
        names = tuple(signals)
        gradients, knowledge = self.gradients(gradient_revision, progress), None
        if KNOWLEDGE_SIGNAL in names:
            knowledge = self._answer_gradients(gradient_revision, progress)
        activations = self.activations(revision, progress)
        self.sync(revision)
        layers, pattern = self.loaded.layers, parse_pattern(self.request.pattern)
        whole, gains = self.request.pattern_sparsity or 0.0, self.pattern_gains()
        return build_profile(
            self.loaded,
            activations,
            gradients,
            self.request.criterion,
            revision=revision,
            gradient_revision=gradient_revision,
            sparsities=self.sparsities(),
            own={n: zeros / layers[n].numel for n, zeros in self.dense_zeros.items()},
            pattern=pattern,
            pattern_own={n: whole - gain / layers[n].numel for n, gain in gains.items()},
            patterned=set(self.store.manifest(revision)),
            reconstruct=self.request.reconstruct != "none",
            signals=names,
            weights=self.request.domain_weights,
            knowledge=knowledge,
        )

    def check_blocks(self) -> None:
        """Refuse a model that does not run block by block, where its blocks shall be solved so.

        Raises:
            InputError: it does more between its blocks than handing hidden states on.
        """
        if solves(self.request):
            self.loaded.execution.check_blocks(self.windows.calibration)

    def guard_losses(self, revision: str, progress: Progress | None = None) -> list[float]:
        """Mean loss of each guard window at a revision, nats a token."""
        self.sync(revision)
        return self.live_guard_losses(progress)

    def live_guard_losses(self, progress: Progress | None = None) -> list[float]:
        """`guard_losses` of the live weights as they are."""
        self.tokens["guard"] += self.windows.guard.numel()
        return self._guard_losses(range(len(self.windows.guard)), progress)

    def _guard_losses(self, windows: Sequence[int], progress: Progress | None) -> list[float]:
        """Of guard windows by index; of questions the mean is over the answers' tokens."""
        scored, chosen = self.windows.scored.get("guard"), list(windows)
        return self.loaded.execution.window_losses(
            self.head,
            self.windows.guard[chosen],
            progress,
            None if scored is None else scored[chosen],
        )

    def facts_hash(self) -> str:
        """sha256 of the questions that `knowledge` scores.

        Raises:
            InputError: they cannot be read, or are too few.
        """
        return self._drawn_facts()[0]

    def knowledge(self, revision: str, progress: Progress | None = None) -> float:
        """Factual recall at a revision: mean log-probability of the right answers, nats a token.

        Each preferred answer comes after its bare question: the mean over its tokens, then over
        the questions. Not finite where the model is broken.

        Raises:
            InputError: the questions cannot be read, or are too few.
        """
        pairs = self._drawn_facts()[1]
        self.sync(revision)
        self.tokens["guard"] += sum(len(a) + len(b) - 1 for a, b in pairs)
        scores = answer_scores(self.loaded.model, self.head, pairs, progress)
        return sum(scores) / len(scores)

    def _drawn_facts(self) -> tuple[str, list[tuple[list[int], list[int]]]]:
        """Hash and tokens of the questions, drawn by the seed when they are first needed."""
        if self._facts is None:
            source, count = self.request.texts.knowledge, self.request.texts.facts
            facts = load_facts(source)
            if len(facts) < count:
                raise InputError(
                    f"{source} holds {len(facts)} questions, {count} are asked for: "
                    "lower texts.facts"
                )
            drawn = [facts[number] for number in self._guarded(len(facts))]
            pairs = fact_tokens(drawn, self.loaded.tokenizer, rows=self._rows)
            self._facts = hash_questions(drawn), pairs
        return self._facts

    def _guarded(self, held: int) -> list[int]:
        """Which of the questions that a source holds `knowledge` asks; all, if there are fewer."""
        count = min(self.request.texts.facts, held)
        return random.Random(f"{self.request.seed}/knowledge").sample(range(held), count)

    def test_losses(self, revision: str, progress: Progress | None = None) -> list[float]:
        """Mean loss of each test window at a revision, nats a token."""
        self.sync(revision)
        self.tokens["test"] += self.windows.test.numel()
        return self.loaded.execution.window_losses(self.head, self.windows.test, progress)

    def sample(self, revision: str, prompt: str, progress: Progress | None = None) -> str:
        """How the model continues a prompt at a revision; its few tokens are not counted."""
        self.sync(revision)
        model, tokenizer, text = self.loaded.model, self.loaded.tokenizer, ""
        for given in told("sample text", (prompt,), 1, progress):
            text = continue_text(model, tokenizer, given, rows=self._rows)
        return text

    def prune(
        self,
        revision: str,
        gradient_revision: str,
        counts: dict[str, int] | None = None,
        progress: Progress | None = None,
    ) -> str:
        """Store the revision in which some layers have a given number of zeros.

        Masks are made from the dense weights with the statistics of ``revision``. With an N:M
        pattern a layer takes it as a whole, or is dense again if its count is `dense_zeros`.

        Args:
            revision: the revision to change; statistics are taken at it.
            gradient_revision: where gradients were taken.
            counts: zeros wanted by layer, the dense model's own included; None prunes every layer
                to the request's N:M pattern.
            progress: told after each layer.

        Returns:
            The new revision's name. The live model is left at ``revision``.

        Raises:
            InputError: a layer's inputs do not divide into the pattern's groups.
            StoreError: cannot write.
        """
        request = self.request
        about = {"parent": revision, "criterion": request.criterion, "pattern": request.pattern}
        writer = self.store.writer(self.store.manifest(revision), about)
        with writer:
            for name, mask in self._masks(revision, gradient_revision, counts, progress):
                writer.add(name, mask, own=self.dense_zeros[name])
        return writer.revision

    def solve(self, revision: str, progress: Progress | None = None) -> str:
        """Store the revision in which the kept weights of another one are solved.

        Layers keep their masks, or where the criterion solves their numbers of zeros; the request
        says what is done. What is done is kept block by block, so that whoever is stopped goes on
        with the block at which it was.

        Args:
            revision: whose masks are taken.
            progress: told after each block.

        Returns:
            The new revision's name. The live model is left at none.

        Raises:
            InputError: the model does not run block by block, or inputs do not divide into groups.
            StoreError: cannot write.
        """
        request = self.request
        wanted = self._wanted(revision, progress)
        parent = self.store.manifest(revision)
        key = sha256_bytes(
            canonical_json([revision, request.identity(), self.windows.hashes["calibration"]])
        )
        done, notes = _solved_before(self.store, key)
        if any(not self.store.holds(digest) for digest in done.values()):
            _log.warning("layers that were solved before are missing: all are solved again")
            done, notes = {}, []
        about = {"parent": revision, "reconstruct": request.reconstruct, "notes": notes}
        writer = self.store.writer(parent | done, about)

        def take(solved: list[Solved]) -> None:
            for layer in solved:
                writer.add(layer.name, layer.mask, layer.weight, self.dense_zeros[layer.name])
                notes.extend(layer.notes)
            found = writer.settle()
            done.update((layer.name, found[layer.name]) for layer in solved)
            write_json(self.store.solving, {"key": key, "layers": done, "notes": notes})

        solver = BlockSolver(
            self.loaded,
            wanted,
            criterion=request.criterion,
            reconstruct=request.reconstruct,
            fit=Fit(**request.fit.model_dump(), seed=request.seed),
        )
        self.lend(wanted)
        try:
            with writer:
                self.tokens["solve"] += solver.solve(
                    self.windows.calibration,
                    take,
                    lambda layer: (
                        self._stored(done[layer.name], layer) if layer.name in done else None
                    ),
                    progress,
                )
        except ValueError as error:
            raise InputError(f"the layers cannot be pruned so: {error}") from error
        self.store.solving.unlink(missing_ok=True)
        return writer.revision

    def _amount(
        self, name: str, counts: dict[str, int] | None
    ) -> tuple[int | None, tuple[int, int] | None]:
        """What `prune` takes from a layer: a number of weights, or the request's pattern."""
        pattern = parse_pattern(self.request.pattern)
        count = None if counts is None else counts[name]
        dense = count == self.dense_zeros[name]
        return (count, None) if pattern is None or dense else (None, pattern)

    def _wanted(self, revision: str, progress: Progress | None) -> dict[str, Wanted]:
        """What a solve is asked for: all layers that a revision prunes."""
        request = self.request
        rule = find_criterion(request.criterion)
        squares: dict[str, Tensor] = {}
        if rule.needs_gradients or request.reconstruct != "none":
            squares = self.gradients(DENSE, progress).gradient_square
        pattern = parse_pattern(request.pattern)
        wanted = {}
        for name, digest in self.store.manifest(revision).items():
            bits = self._stored(digest, self.loaded.layers[name]).bits
            wanted[name] = Wanted(
                bits=None if rule.solves else bits,
                pruned=count_bits(bits) if pattern is None else None,
                pattern=pattern,
                gradient_square=squares.get(name),
                shrinkage=request.shrinkage if rule.shrinks else 0.0,
            )
        self.sync(revision)
        return wanted

    def trial_losses(
        self,
        revision: str,
        gradient_revision: str,
        counts: dict[str, int],
        windows: Sequence[int] | None = None,
        progress: Progress | None = None,
        *,
        use: Literal["probe", "allocation"] = "probe",
    ) -> list[float]:
        """Losses of some guard windows if some layers had a given number of zeros.

        Masks are those of `prune`, but none is stored, and the live model is left at ``revision``.
        Nothing is solved: with SparseGPT or ``reconstruct`` the mask is that of its ``score``, the
        weights that are left keep their values, and the losses are higher than they would be.

        Args:
            revision: the revision to change; statistics are taken at it.
            gradient_revision: where gradients were taken.
            counts: zeros wanted by layer, as for `prune`.
            windows: which of the guard windows, by index; None: all.
            progress: told after each layer and window.
            use: what the tokens are counted for.

        Returns:
            Mean loss of each window, nats a token.
        """
        chosen = range(len(self.windows.guard)) if windows is None else windows
        try:
            for name, mask in self._masks(revision, gradient_revision, counts, progress):
                self.try_mask(name, mask, self.loaded.dense(self.loaded.layers[name]))
            self.tokens[use] += len(chosen) * self.windows.guard.shape[1]
            return self._guard_losses(chosen, progress)
        finally:
            self.sync(revision)

    def try_mask(self, name: str, mask: Tensor, dense: Tensor) -> None:
        """Give a live layer a mask that is not stored; the next `sync` takes it back.

        Args:
            name: the layer's.
            mask: bool, True where pruned, of the weights' shape.
            dense: its dense weights.
        """
        layer = self.loaded.layers[name]
        self.lend([name])
        tried = dense.masked_fill(mask.to(dense.device), 0)
        self.loaded.execution.weights.write(layer, tried)

    def lend(self, names: Iterable[str]) -> None:
        """Let someone change the live weights of some layers; the next `sync` takes that back.

        Args:
            names: of the layers.
        """
        self._at |= dict.fromkeys(names, "")  # no revision's

    def _masks(
        self,
        revision: str,
        gradient_revision: str,
        counts: dict[str, int] | None,
        progress: Progress | None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The layers of `prune` with their masks: bool, True where pruned, on the device."""
        request = self.request
        rule = find_criterion(request.criterion)
        gradients = self.gradients(gradient_revision, progress) if rule.needs_gradients else None
        activations = self.activations(revision, progress)
        self.sync(revision)
        names = self.loaded.layers if counts is None else counts
        layers = [self.loaded.layers[name] for name in names]
        pairs = zip(layers, self._dense_layers(layers), strict=True)
        for layer, dense in told("masks", pairs, len(names), progress):
            name = layer.name
            pruned, pattern = self._amount(name, counts)
            try:
                mask = prune_mask(
                    layer.matrix(dense),
                    statistics_of(name, activations, gradients),
                    request.criterion,
                    pruned=pruned,
                    pattern=pattern,
                )
            except ValueError as error:
                raise InputError(f"{name} cannot be pruned so: {error}") from error
            yield name, layer.stored(mask)


def _solved_before(store: RevisionStore, key: str) -> tuple[dict[str, str], list[str]]:
    """The layers that a solve which was stopped had done, by digest, and what it had to tell.

    Empty where there was none, or another one.
    """
    content = store.read_solving()
    if content.get("key") != key:
        return {}, []
    return dict(content["layers"]), list(content["notes"])


def _own_memory(loaded: LoadedModel, offload: str) -> None:
    """Give each tensor memory of its own.

    On a processor they are loaded as views of one map of the file, which stays as long as any of
    them is alive: beside the pages that masks are written to. Weights that are sent away have seen
    to that already.
    """
    if loaded.device.type == "cpu" and offload == "none":
        for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
            tensor.data = tensor.data.clone()


def _stamps(request: PruneRequest, directory: Path) -> set[tuple[str, int, int]]:
    """Path, size and time of change of the files of a model and of the local texts."""
    paths = [*directory.glob("*.safetensors"), *setting_files(directory)]
    for source in request.texts.named - {EMBEDDED, SELF}:
        path = Path(source).expanduser()
        paths += path.rglob("*") if path.is_dir() else [path]
    stamps = set()
    for path in paths:
        with suppress(OSError):  # a data set of the hub; a file that has just gone
            found = path.stat()
            stamps.add((str(path), found.st_size, found.st_mtime_ns))
    return stamps


_lock = threading.RLock()
_current: Workbench | None = None


@contextmanager
def workbench(
    request: PruneRequest, run_directory: Path, progress: Progress | None = None
) -> Iterator[Workbench]:
    """The process's workbench for a request, held by the caller until the block ends.

    One model is live at a time: threads with the same request share it in turn, each syncing
    it to its own revisions; another request replaces it, and so does a change of the files
    that the model and the texts were read from.

    Args:
        request: what to load.
        run_directory: where the caller's revisions are stored, and the text that its model writes.
        progress: told of that text, if it has to be written.
    """
    global _current
    with _lock:
        try:
            if _current is None or _current.request != request or _current.stale:
                if _current is not None:
                    _current.loaded.close()
                    _current = None
                _current = Workbench(request, run_directory, progress)
            _current.move(run_directory)
            yield _current
        except (RuntimeError, MemoryError) as error:
            if not no_room(error):
                raise
            if _current is not None:  # whoever goes on loads it anew, perhaps elsewhere
                _current.loaded.close()
            _current = None
            raise InputError(_no_room_words(request, error)) from error
        finally:
            _release_memory()


def no_room(error: Exception) -> bool:
    """Whether an error says that there is no memory, in the words of a device or of a processor."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)


def _no_room_words(request: PruneRequest, error: Exception) -> str:
    """What a device without room for the run means, and which settings take less of it.

    Whoever was at work may have said so in a note of the error.
    """
    lacking = f"the device has too little memory: {first_line(error)}"
    if notes := getattr(error, "__notes__", []):
        return f"{lacking}. {notes[0]}. What was recorded so far is kept"
    smaller = ["offload=cpu (or disk; not with adapt)"] if request.offload == "none" else []
    if request.offload == "none" and request.texts.windows.batch != 1:
        smaller.append("texts.windows.batch=1")
    ways = f"give --set {', --set '.join(smaller)}, or begin" if smaller else "begin"
    return (
        f"{lacking}. To go on, {ways} a new run with "
        "shorter texts.windows.length. What was recorded so far is kept"
    )


def _release_memory() -> None:
    """Give freed memory back to the system, where glibc would keep it.

    Each node computes in a thread of its own, and glibc keeps what a thread frees for the next
    ones: without this a run grows by some 100 MB a step.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in other C libraries
        if trim is not None:
            trim(0)
