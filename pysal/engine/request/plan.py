"""A validated request: the model, the images, the target, and how the model is run on them."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, check_dense, check_tensor, finite_rows, refuse, warn
from pysal._library import without_autocast
from pysal.engine.layers.default_layer import Look
from pysal.engine.layers.features import Layer
from pysal.engine.model.class_names import names_of
from pysal.engine.model.gradient_layouts import lay_out
from pysal.engine.model.not_applicable import NotApplicable, differentiating
from pysal.engine.model.relu_rules import ReluRules
from pysal.engine.prepared.model import PreparedModel, check_eval, check_fits
from pysal.engine.request.extra_inputs import ExtraArguments, ordinary
from pysal.engine.request.independence import (
    MANY_ROWS,
    REPEATS,
    Company,
    Coupled,
    Random,
    check,
    check_chance,
    error_in_words,
    is_remembered,
    remember,
    roundoff_of,
    unlike,
)
from pysal.engine.request.row_score import Score
from pysal.engine.request.running import Running
from pysal.engine.request.score import FOUND_OUT, Output, ScoreKind
from pysal.engine.request.sweeps import Found, Sweep, Swept, sweep
from pysal.engine.request.target import Target
from pysal.engine.running.chunks import (
    GENEROUS_BYTES_PER_INPUT_BYTE,
    MEMORY_SHARE,
    fast_rows,
    free_memory,
    is_out_of_memory,
    run_chunks,
)
from pysal.engine.running.precision import Arithmetic, precision_mode
from pysal.engine.running.states import leave_inference_mode, outside_inference, restoring, undo_later, without_hooks

Model: TypeAlias = Callable[..., Any]
Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Clean:
    """What the model says of the unchanged images: class scores (B, K) or, for a callable target, its scores (B,)."""

    table: Tensor | None
    scores: Tensor | None


class Plan:
    """What all methods share: everything is checked here, before any work.

    Args:
        where: the public name of the method, for errors: "pysal.gradient".
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point, on the model's device; finite, unless `company` is "given".
        target: what is explained; see `engine.request.target`.
        running: the score that is meant, further arguments, batching, arithmetic and dtype of the result; see `Running`.
        company: which rows a pass may hold; see `engine.request.independence`. "checked" is "whole" where `batch_size` is B.
        output: what the model's output is taken for, where that was decided before; None = what the images say.
    """

    def __init__(
        self,
        where: str,
        model: Model,
        inputs: Tensor,
        target: Target,
        running: Running,
        *,
        company: Company = "checked",
        output: Output | None = None,
    ) -> None:
        self.where, self.model = where, model
        self.inputs = _checked_inputs(where, inputs, finite=company != "given")
        _check_model(where, model, self.inputs)
        running.check(where)
        batch_size, precision = running.batch_size, running.precision
        self.extra_inputs = ExtraArguments(where, running.extra_inputs, len(self.inputs))
        # a model may say how many rows it takes at a time
        self.batch_size, self.precision = batch_size or getattr(model, "rows_per_pass", None), precision
        self.asked_batch_size = batch_size
        self.company: Company = "whole" if company == "checked" and batch_size == len(self.inputs) else company
        if isinstance(model, PreparedModel):
            if precision not in ("as set", "float32", model.precision):
                refuse(where, "precision", f"be that of the prepared model, {model.precision!r}", repr(precision))
            self.batch_size, self.precision = batch_size or model.rows_for(self.inputs), model.precision
        self.accumulator_dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        self.dtype = running.dtype or self.accumulator_dtype
        named = model.original if isinstance(model, PreparedModel) else model
        self.score = Score(where, target, running.score, len(inputs), self.device, lambda: names_of(named), output)
        self._root: Plan | None = None
        self.origin = torch.arange(len(inputs), device=self.device)
        # what is found out of these images under this target: one for all methods and kinds of score of a call
        self._shared: dict[object, Any] = {}

    def derive(self, inputs: Tensor, rows: Tensor, *, batch_size: int | None = None) -> "Plan":
        """Return a plan for other images under the same request; image n stands for image `rows[n]` of this one."""
        derived: Plan = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived._root, derived.inputs, derived.origin = self.root, inputs, self.origin[rows]
        derived.batch_size = batch_size or self.batch_size
        derived.asked_batch_size = batch_size or self.asked_batch_size
        derived._shared = {}
        return derived

    def renamed(self, where: str, score: ScoreKind) -> "Plan":
        """Return this request for another method and kind of score, sharing the clean pass and the target."""
        renamed = self.derive(self.inputs, torch.arange(self.images, device=self.device))
        renamed.where, renamed._root = where, None
        renamed.score, renamed._shared = self.score.renamed(where, score), self._shared
        return renamed

    @property
    def root(self) -> "Plan":
        """The plan of the call's own images, which this one is or is derived from."""
        # None stands for this plan: holding itself it would keep the images until Python's cyclic collector comes round
        return self if self._root is None else self._root

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.inputs.device

    @property
    def images(self) -> int:
        """Number of images B."""
        return len(self.inputs)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of model input."""
        return self.inputs[0].numel() * self.inputs.element_size()

    @property
    def rows_at_once(self) -> int:
        """Most rows of a pass where memory is no limit."""
        return self.batch_size or fast_rows(self.device, self.row_bytes)

    @property
    def channels_last(self) -> bool:
        """Whether the model is fed channels_last: where the images are, or where it was prepared for that."""
        if isinstance(self.model, PreparedModel) and self.model.channels_last:
            return True
        return not self.inputs.is_contiguous() and self.inputs.is_contiguous(memory_format=torch.channels_last)

    def shared(self, key: object, make: Callable[["Plan"], Shared]) -> Shared:
        """Return `make(plan of the call's own images)`, made once however many derived plans ask for it."""
        if key not in self.root._shared:
            self.root._shared[key] = make(self.root)
        found: Shared = self.root._shared[key]
        return found

    def zeros(self, rows: int | None = None) -> Tensor:
        """Return an accumulator for the images, or for a number of rows of their shape."""
        shape = (self.images if rows is None else rows, *self.inputs.shape[1:])
        return torch.zeros(shape, dtype=self.accumulator_dtype, device=self.device)

    def run(
        self, total: int, body: Callable[[int, int], None], *, batch_size: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        """Run `body(start, stop)` over the queue of `total` model rows.

        Args:
            total: rows in the queue.
            body: see `engine.running.chunks.run_chunks`.
            batch_size: most rows per chunk where they are no model passes of common size; None = those of the request.
            ends: see `engine.running.chunks.run_chunks`.
        """
        if total >= MANY_ROWS:
            self.root._shared["many"] = True

        def part(start: int, stop: int) -> None:
            if stop - start < self.images:  # the batch did not fit into memory
                self._divide()
            body(start, stop)

        run_chunks(
            total,
            part if self.company == "whole" and self.images > 1 and not ends else body,
            label=self.where.removeprefix("pysal."),
            batch_size=batch_size or self.batch_size,
            device=self.device,
            row_bytes=self.row_bytes,
            ends=ends,
        )

    @property
    def eager_model(self) -> Model:
        """The model as Python runs it: without torch.compile, inside which activations cannot be reached."""
        if isinstance(self.model, PreparedModel):
            return self.model
        eager: Model = getattr(self.model, "_orig_mod", self.model)
        return eager

    @property
    def layered_model(self) -> Model:
        """The model with its own layers: neither compiled nor prepared."""
        return self.model.original if isinstance(self.model, PreparedModel) else self.eager_model

    def modes(self, *, grad: bool) -> precision_mode:
        """Return the context that sets what autograd and arithmetic a model pass needs, in a `restoring` function.

        Raises:
            NotApplicable: gradients are wanted of a model that was made in inference mode.
        """
        if grad:
            self._check_gradients()
        return _Modes(self.precision, self.device, backward=grad, without_cudnn=grad and "without cuDNN" in self.root._shared)

    def differentiated(self, passes: Callable[[], Shared]) -> Shared:
        """Return `passes()`, which run forward and backward; again without cuDNN where its RNNs are in eval mode.

        cuDNN keeps what the backward pass of an RNN needs in training mode alone; torch's own kernels always do.
        """
        with differentiating(self.where):
            try:
                return passes()
            except RuntimeError as error:
                if "without cuDNN" in self.root._shared or "cudnn RNN backward" not in str(error):
                    raise
            self.root._shared["without cuDNN"] = True
            return passes()

    def _check_gradients(self) -> None:
        """Refuse a model whose tensors autograd does not take; looked at once."""
        model = self.layered_model
        if not isinstance(model, nn.Module) or "may be differentiated" in self.root._shared:
            return
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_inference():
                raise NotApplicable(
                    f"{self.where}: model must be made outside torch.inference_mode, whose tensors have no gradients, "
                    f"got {name!r}; leave_one_out explains such a model"
                )
        self.root._shared["may be differentiated"] = True

    def places(self, start: int, stop: int, each: int) -> tuple[Tensor, Tensor]:
        """Return the image (N,) of each item of a queue in which every image has `each` of them, and which of these it is.

        Image after image; or, where passes hold the whole batch, the batch again and again.
        """
        items = torch.arange(start, stop, device=self.device)
        if self.company == "whole":
            return items % self.images, items // self.images
        return items // each, items % each

    def forward(self, model: Model, batch: Tensor, rows: Tensor) -> Any:
        """Return what a model answers to rows of the images, with the extra inputs of each.

        Raises:
            ValueError: it fails on these rows, and works on the caller's whole batch.
        """
        shared = self.root._shared
        before = None if "draws" in shared else _random_numbers(self.device)
        try:
            output = self._forward(model, batch, rows)
        except Exception as error:  # the model's own, of any kind
            if not is_out_of_memory(error) and not isinstance(error, NotApplicable) and self._works_on_whole(model, rows):
                number = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
                self._refuse_company(f"an error for {number} ({error_in_words(error)})", error)
            raise
        if before is not None:
            shared["draws"] = before != _random_numbers(self.device)
        return output

    def _forward(self, model: Model, batch: Tensor, rows: Tensor) -> Any:
        by_position, by_name = self.extra_inputs.of(self.origin[rows])
        return model(batch, *by_position, **by_name)

    def clean(self, announced: Sequence[tuple[ScoreKind, Sweep]] = ()) -> Clean:
        """Return the scores of the unchanged images; the first call runs the model once per image and fixes the target.

        Args:
            announced: sweeps that methods will ask for under a kind of score. Those of the first kind are made of that pass.
        """
        if "clean" not in self._shared and announced:
            kind = announced[0][0]
            wanted = list(dict.fromkeys(one for other, one in announced if other == kind))
            with contextlib.suppress(NotApplicable):  # the method that asked raises this later, under its own name
                self.renamed(self.where, kind)._sweep_images(wanted, required=False)
        if "clean" not in self._shared:
            self._shared["clean"] = self._look()
        clean: Clean = self._shared["clean"]
        self.score.close()
        if self.score.undecided:
            if self.root is self:
                self.score.look_at(clean.table)
            else:  # what the output is shows on the unchanged images
                self.root.clean()
        self._warn_of_the_score()
        return clean

    @property
    def output(self) -> Output | None:
        """What the model's output is taken for, from all unchanged images; None where the target is a callable."""
        table = self.root.clean().table
        if self.score.look.output is None and table is not None:
            self.score.look_at(table)
        return self.score.look.output

    def _look(self) -> Clean:
        """Run the model once per image."""
        tables: list[Tensor] = []
        scores: list[Tensor] = []

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=self.device)
            # a copy: a model that works in place must change neither the caller's images nor ours
            with self.modes(grad=False):  # a callable target is a part of the pass
                output = self.forward(self.model, ordinary(self.inputs[start:stop].clone()), rows)
                table = self.score.table(output, rows)
                self.score.resolve(table, self.origin[rows])
                if table is None:
                    scores.append(self.score(output, self.origin[rows]).detach().clone())
                else:
                    tables.append(table.clone())  # a model may answer into one buffer, as captured CUDA graphs do
            self.check_rows(rows)

        self.run(self.images, body)
        return _joined(tables, scores)

    def over_images(self, body: Callable[[int, int], None]) -> None:
        """Run `body(start, stop)` over the unchanged images, whose scores may depend on what the output is.

        Where a later part shows that an earlier one was taken for something else, all are run again: with logits that happens
        only where those of the first images all lie in [0, 1].
        """
        look = self.score.look
        if self.root is not self or not self.score.undecided:
            self.run(self.images, body)
            return
        known = False
        try:
            while not known:
                look.begin()
                self.run(self.images, body)
                known = not look.changed
        finally:
            look.open = False
            if not known:
                look.output = None
        self._warn_of_the_score()

    def _warn_of_the_score(self) -> None:
        """Say once in a call what may be wrong about the kind of score."""
        look, kind = self.score.look, self.score.kind
        if look.output is None or not self.score.looks or "warned" in self.root._shared:
            return
        if kind in ("softmax", "log_softmax") and look.output == "probabilities":
            what = f"the model's output already sums to 1, and score={kind!r} takes its softmax again"
            what += "; score='probability' takes it as it is"
        elif kind in ("sigmoid", "log_sigmoid") and look.lies_in_unit:
            what = f"the model's output already lies in [0, 1], and score={kind!r} takes its sigmoid again"
            what += "; score='probability' takes it as it is"
        elif kind in FOUND_OUT and look.is_a_guess:
            what = f"the model's {look.values} outputs lie in [0, 1] and are taken for probabilities of independent labels"
            what += "; score='softmax' or 'sigmoid' takes them for logits, 'raw' for plain numbers"
        else:
            return
        self.root._shared["warned"] = True
        warn(f"{self.where}: {what}")

    def clean_scores(self) -> tuple[Tensor, Tensor | None]:
        """Return the explained score of the unchanged images (B,) and, for class targets, that of every class (B, K)."""
        clean = self.clean()
        if clean.table is None:
            assert clean.scores is not None
            return clean.scores, None
        classes = self.score.scaled(clean.table)
        return self.score.pick(classes, self.origin), classes

    @restoring
    def look(self, image: int) -> Look:
        """Run the model with gradients on one of the images, for whoever watches its layers."""
        rows = torch.tensor([image], device=self.device)
        with self.modes(grad=True), differentiating(self.where):
            leaf = self.inputs[image : image + 1].clone().requires_grad_()
            output = self.forward(self.layered_model, leaf.clone(), rows)
            score = self._preview(output, rows)
            lay_out(score, 1)
            return Look(leaf, output, score)

    def _preview(self, output: Any, rows: Tensor) -> Tensor:
        return self.score.preview(output, rows)

    def fix_target(self) -> None:
        """Make sure that the target of every image and what the output is are known, with a clean pass where they are not."""
        if self.score.open:
            self.clean()
        if self.score.undecided:
            self.root.clean()

    def scores(self, batch: Tensor, rows: Tensor, model: Model | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the explained score (N,) of changed images and, for class targets, that of every class (N, K).

        The model may overwrite `batch`. Where another `model` is given, it is that which turns `batch` into outputs.
        """
        self.fix_target()
        with self.modes(grad=False):
            output = self.forward(self.model if model is None else model, ordinary(batch), rows)
            table = self.score.table(output, rows)
            scores = self.score(output, self.origin[rows]).detach().clone() if table is None else None
        if table is None:
            assert scores is not None
            self.check_rows(rows)
            return scores, None
        if model is None:
            self.check_rows(rows)
        classes = self.score.scaled(table)
        return self.score.pick(classes, self.origin[rows]), classes

    def check_rows(self, rows: Tensor) -> None:
        """Refuse a model whose rows depend on each other, now that a pass of these rows (N,) has been made.

        A pass of exactly the caller's images is what the caller would have run, and is not looked into, but where it is
        known without another pass that there is something to see: random numbers were drawn, the output is square, and so
        might be transposed, or there are several such passes, between which a model might change itself.

        Raises:
            ValueError: rows depend on each other, or answers on chance.
        """
        shared = self.root._shared
        if self.company == "given" or "independent" in shared:
            return
        shared["passes"] = shared.get("passes", 0) + 1
        several = self.company == "whole" and shared["passes"] > 1
        if (shared.get("draws") or several) and "repeats itself" not in shared:
            self._check_chance()
            shared["repeats itself"] = True
        if self.company == "whole" or len(rows) == 1 == self.root.images:
            return
        if self.company == "checked" and not self.score.is_square and self._is_batch(rows):
            return
        self.check_independence(len(rows), again="many" in self.root._shared and self.device.type == "cpu")

    @restoring
    def check_independence(self, number: int = 2, *, again: bool = False) -> None:
        """Refuse a model whose rows depend on each other, by passes of two rows and of one.

        Args:
            number: of rows that the model is known to take, or 2.
            again: whether to look though the model, as it is, has been looked at before.

        Raises:
            ValueError: see `check_rows`.
        """
        root, model = self.root, self.eager_model
        if self.company == "given" or "independent" in root._shared:
            return
        remembers, circumstances = self._remembers("independent")
        if remembers and not again and is_remembered(model, circumstances):
            root._shared["independent"] = True
            return

        rows = torch.tensor([0, root.images - 1], device=root.device)
        try:
            check(self._ask, unlike(root.inputs), rows, number, self._roundoff_of)
        except Random as error:
            self._refuse_chance(error)
        except Coupled as error:
            self._refuse_company(str(error), error.__cause__)
        root._shared["independent"] = True
        if remembers:
            remember(model, circumstances)

    @restoring
    def _check_chance(self) -> None:
        """Refuse a model that answers otherwise each time: by the random numbers it draws, or by what it kept of a pass."""
        root, model = self.root, self.eager_model
        remembers, circumstances = self._remembers("repeats itself")
        if remembers and is_remembered(model, circumstances):
            return
        try:
            rows = torch.arange(root.images, device=root.device)
            repeats = REPEATS if root._shared.get("draws") else 2
            check_chance(self._ask, root.inputs, rows, self._roundoff_of, repeats=repeats)
        except Random as error:
            self._refuse_chance(error)
        if remembers:
            remember(model, circumstances)

    def _remembers(self, what: str) -> tuple[bool, object]:
        """Return whether what was found out about the model holds in the next call, and in which circumstances."""
        root = self.root
        remembers = not self.extra_inputs and self.score.function is None  # which may be others then
        return remembers, (what, *root.inputs.shape[1:], root.inputs.dtype, root.device, root.precision)

    def _ask(self, batch: Tensor, rows: Tensor) -> Tensor:
        """Return what the model answers to rows of the call's own images, or of ones like them."""
        root = self.root
        with root.modes(grad=False):  # a callable target is a part of the pass
            output = root._forward(self.eager_model, batch.clone(), rows)
            table = root.score.table(output, rows)
            return (root.score(output, rows) if table is None else table).detach().clone()

    def _roundoff_of(self, dtype: torch.dtype) -> float:
        return roundoff_of(self.root.precision, dtype, self.device)

    def _refuse_chance(self, error: Random) -> NoReturn:
        refuse(self.where, "model", "answer the same to the same input in every call", str(error))

    def _divide(self) -> None:
        """Let passes hold a part of the batch that is too large for memory, if rows do not depend on each other."""
        try:
            self.check_independence()
        except ValueError as error:
            images = f"the {self.images} images of a model whose rows depend on each other"
            raise RuntimeError(f"{self.where}: {images} must fit into memory together") from error

    def _is_batch(self, rows: Tensor) -> bool:
        """Whether rows are the caller's images, all of them, in order."""
        return len(rows) == self.root.images and torch.equal(self.origin[rows], torch.arange(len(rows), device=rows.device))

    def _works_on_whole(self, model: Model, rows: Tensor) -> bool:
        root = self.root
        if self.company == "given" or self._is_batch(rows):
            return False
        if root.inputs.nbytes * GENEROUS_BYTES_PER_INPUT_BYTE > MEMORY_SHARE * free_memory(self.device):
            return False  # which was no reason to run so many at once

        # what failed once need not be the rows' doing
        return self._works(model, torch.arange(root.images, device=root.device)) and not self._works(model, self.origin[rows])

    @restoring
    def _works(self, model: Model, images: Tensor) -> bool:
        """Whether a model runs on some of the caller's images (N,)."""
        without_hooks()
        try:
            with self.modes(grad=False):
                self.root._forward(model, self.root.inputs[images], images)
        except Exception:  # the model's own, of any kind
            return False
        return True

    def _refuse_company(self, got: str, cause: BaseException | None) -> NoReturn:
        requirement = "answer for each row of a pass as if it were alone"
        images = self.root.images
        if self.company == "checked":
            way_out = (
                "batch_size=1, one row in a pass" if images == 1 else f"batch_size={images}, the whole batch in every pass"
            )
            requirement += f" unless it is called with {way_out}"
        try:
            refuse(self.where, "model", requirement, got)
        except ValueError as error:
            raise error from cause

    def score_of(self, output: Any, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class scores (N, K), None for a callable target, and the explained score (N,); fix an open target."""
        table = self.score.table(output, rows)
        self.score.resolve(table, self.origin[rows])
        if self.score.look.open:
            self.score.look_at(table)
        return table, self.score(output, self.origin[rows])

    def gradients(self, batch: Tensor, rows: Tensor) -> Tensor:
        """Return df/dx (N, C, H, W) at each row of `batch`."""
        image = Sweep()
        self.fix_target()
        return sweep(self, batch, rows, [image]).found[image][0]

    def layer_gradients(
        self, batch: Tensor, rows: Tensor, layer: Layer, rules: ReluRules | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's activation A, G = df/dA and, with `rules`, df/dx under the rule, all from one forward pass.

        Without `rules` nothing below the layer is kept for the backward pass, unless its input is meant: others may use that.
        """
        self.fix_target()
        at_layer, at_images = Sweep(layer=layer, where=self.where), Sweep(rules.rule, rules.other) if rules else None
        found = sweep(self, batch, rows, [at_layer, *([at_images] if at_images else [])]).found
        return *found[at_layer], found[at_images][0] if at_images else None  # type: ignore[return-value]

    def sweeps(self, *wanted: Sweep) -> list[Found]:
        """Return what sweeps over the unchanged images find; each is made once, however many methods ask for it."""
        made: dict[tuple[ScoreKind, Sweep], Found] = self._shared.setdefault("sweeps", {})
        missing = [one for one in wanted if (self.score.kind, one) not in made]
        if missing:
            self._sweep_images(missing, required=True)
        return [made[self.score.kind, one] for one in wanted]

    @restoring
    def _sweep_images(self, wanted: Sequence[Sweep], *, required: bool) -> None:
        """Make sweeps over the unchanged images, which also tell the clean scores; what is not required may be left out."""
        found: dict[int, Swept] = {}

        def body(start: int, stop: int) -> None:
            if start == 0:
                found.clear()  # all are run again
            rows = torch.arange(start, stop, device=self.device)
            found[start] = sweep(self, self.inputs[start:stop], rows, wanted, required=required)

        self.over_images(body)
        parts = list(found.values())
        self.score.close()
        made = self._shared.setdefault("sweeps", {})
        with without_autocast(self.device.type):  # which does not join tensors of every dtype
            for one in wanted:
                if all(one in part.found for part in parts):
                    pieces = zip(*(part.found[one] for part in parts), strict=True)
                    # a gradient of the images is nobody else's, and of one pass it is whole
                    own = one.layer is None and len(parts) == 1
                    made[self.score.kind, one] = tuple(some[0] if own else torch.cat(some) for some in pieces)
            if "clean" not in self._shared:
                tables = [part.table for part in parts if part.table is not None]
                self._shared["clean"] = _joined(tables, [part.scores for part in parts])


def _random_numbers(device: torch.device) -> tuple[bytes, ...]:
    """Return where torch's generators stand from which a model on a device draws."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return tuple(state.numpy().tobytes() for state in states)


def _joined(tables: list[Tensor], scores: list[Tensor]) -> Clean:
    """Return what the model says of the unchanged images, whose parts were run one after the other."""
    return Clean(torch.cat(tables), None) if tables else Clean(None, torch.cat(scores))


class _Modes(precision_mode):
    sets_grad = True

    def __init__(self, precision: Arithmetic, device: torch.device, *, backward: bool, without_cudnn: bool) -> None:
        super().__init__(precision, device, backward=backward)
        self.without_cudnn = without_cudnn

    def __enter__(self) -> None:
        super().__enter__()
        leave_inference_mode()
        torch._C._set_grad_enabled(self.backward)
        if self.backward:
            # TorchScript optimises a backward pass after some runs, for good, which hides it from ReLU rules
            torch._C._set_graph_executor_optimize(False)
        if self.without_cudnn:
            undo_later(functools.partial(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled()))
            torch._C._set_cudnn_enabled(False)


def _checked_inputs(where: str, inputs: object, *, finite: bool) -> Tensor:
    tensor = check_dense(where, "inputs", check_tensor(where, "inputs", inputs, dtypes=FLOATING))
    if tensor.ndim != 4:
        refuse(where, "inputs", "be a batch of images (B, C, H, W)", f"shape {tuple(tensor.shape)}")
    if tensor.shape[0] == 0:
        refuse(where, "inputs", "hold at least one image", f"shape {tuple(tensor.shape)}")
    if tensor.shape[1] == 0 or tensor.shape[2] * tensor.shape[3] < 2:
        refuse(where, "inputs", "be images of more than one pixel", f"shape {tuple(tensor.shape)}")
    if finite:
        rows = finite_rows(tensor)
        if not bool(rows.all()):
            refuse(where, "inputs", "be finite", f"NaN or infinity in image {int(rows.long().argmin())}")
    return outside_inference(lambda: ordinary(tensor.detach()))


def _check_model(where: str, model: object, inputs: Tensor) -> None:
    if not callable(model):
        refuse(where, "model", "be callable", type(model).__name__, TypeError)
    if isinstance(model, PreparedModel):
        model.check_unchanged(where)
        model = model.original
    elif isinstance(model, nn.Module):
        check_eval(where, model)
    if isinstance(model, nn.Module):
        check_fits(where, model, "inputs", inputs)
