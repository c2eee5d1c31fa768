"""A validated request: the model, the images, the target, and how the model is run on them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, check_tensor, finite_rows, refuse
from pysal.engine.chunks import fast_rows, run_chunks
from pysal.engine.class_names import names_of
from pysal.engine.default_layer import Look
from pysal.engine.features import Layer
from pysal.engine.not_applicable import NotApplicable
from pysal.engine.precision import PRECISIONS, Precision, precision_mode
from pysal.engine.prepared import PreparedModel, check_eval
from pysal.engine.relu_rules import ReluRules
from pysal.engine.sweeps import Found, Sweep, Swept, sweep
from pysal.engine.target import Score, ScoreKind, Target, sums_to_one

Model: TypeAlias = Callable[..., Any]
ExtraInputs: TypeAlias = Sequence[Any] | Mapping[str, Any]
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
        inputs: (B, C, H, W), floating point, finite, on the model's device.
        target: what is explained; see `engine.target`.
        score: which number of a classifier's output is meant.
        extra_inputs: further arguments of the model, positional (a sequence) or by name (a mapping); tensors whose first
            dimension is B go with their image.
        batch_size: most rows in one model pass; None = as many as memory allows.
        precision: the arithmetic of the model passes; see `engine.precision`.
        dtype: of the result; None = float32, or float64 for float64 inputs.
        report: whether to find out what only `explain` tells beside the map, where that takes passes of its own.
    """

    def __init__(
        self,
        where: str,
        model: Model,
        inputs: Tensor,
        target: Target,
        *,
        score: ScoreKind,
        extra_inputs: ExtraInputs,
        batch_size: int | None,
        precision: Precision,
        dtype: torch.dtype | None,
        report: bool = True,
    ) -> None:
        self.where, self.model, self.report = where, model, report
        self.inputs = _checked_inputs(where, inputs)
        _check_model(where, model, self.inputs)
        if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
            refuse(where, "batch_size", "be None or a whole number of at least 1", repr(batch_size))
        if precision not in PRECISIONS:
            refuse(where, "precision", f"be one of {', '.join(map(repr, PRECISIONS))}", repr(precision))
        if dtype is not None and dtype not in FLOATING:
            refuse(where, "dtype", "be a floating-point torch.dtype or None", dtype, TypeError)
        if isinstance(extra_inputs, (str, bytes, Tensor)) or not isinstance(extra_inputs, (Sequence, Mapping)):
            refuse(where, "extra_inputs", "be a sequence or a mapping", type(extra_inputs).__name__, TypeError)
        self.extra_inputs = extra_inputs
        # a model may say how many rows it takes at a time
        self.batch_size, self.precision = batch_size or getattr(model, "rows_per_pass", None), precision
        self.asked_batch_size = batch_size
        if isinstance(model, PreparedModel):
            if precision not in ("float32", model.precision):
                refuse(where, "precision", f"be that of the prepared model, {model.precision!r}", repr(precision))
            self.batch_size, self.precision = batch_size or model.rows_for(self.inputs), model.precision
        self.accumulator_dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        self.dtype = dtype or self.accumulator_dtype
        named = model.original if isinstance(model, PreparedModel) else model
        self.score = Score(where, target, score, len(inputs), self.device, lambda: names_of(named))
        self.without_cudnn = False
        self._root: Plan | None = None
        self.origin = torch.arange(len(inputs), device=self.device)
        self._clean: Clean | None = None
        self._shared: dict[object, Any] = {}

    def derive(self, inputs: Tensor, rows: Tensor, *, batch_size: int | None = None) -> "Plan":
        """Return a plan for other images under the same request; image n stands for image `rows[n]` of this one."""
        derived: Plan = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived._root, derived.inputs, derived.origin = self.root, inputs, self.origin[rows]
        derived.batch_size = batch_size or self.batch_size
        derived.asked_batch_size = batch_size or self.asked_batch_size
        derived._clean, derived._shared = None, {}
        return derived

    def renamed(self, where: str, score: ScoreKind) -> "Plan":
        """Return this request for another method and kind of score, sharing the clean pass and the target."""
        renamed = self.derive(self.inputs, torch.arange(self.images, device=self.device))
        renamed.where, renamed._root = where, None
        renamed.score, renamed._shared, renamed._clean = self.score.renamed(where, score), self._shared, self._clean
        if renamed._clean is not None:
            renamed._warn_of_probabilities(renamed._clean.table)
        return renamed

    def rehearse(self, attribute: Callable[..., Any], options: Mapping[str, Any], *, announce: bool = False) -> None:
        """Run a method's core up to its first use of the model: what it refuses is refused before any work.

        With `announce` the sweeps it asks of the unchanged images are noted, and will be made with the clean pass.
        """
        rehearsal = _Rehearsal.__new__(_Rehearsal)
        rehearsal.__dict__.update(self.__dict__)
        rehearsal._root, rehearsal.announcing = None, announce
        with contextlib.suppress(_ModelUsed):
            attribute(rehearsal, **options)

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
        if isinstance(self.model, PreparedModel) and self.model.fused:
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
            body: see `engine.chunks.run_chunks`.
            batch_size: most rows per chunk where they are no model passes of common size; None = those of the request.
            ends: see `engine.chunks.run_chunks`.
        """
        run_chunks(
            total,
            body,
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

    @contextlib.contextmanager
    def modes(self, *, grad: bool) -> Iterator[None]:
        """Set what autograd and arithmetic a model pass needs."""
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            _unoptimised_scripts() if grad else contextlib.nullcontext(),
            precision_mode(self.precision, self.device, backward=grad),
            torch.backends.cudnn.flags(enabled=False) if grad and self.root.without_cudnn else contextlib.nullcontext(),
        ):
            yield

    def differentiated(self, passes: Callable[[], Shared]) -> Shared:
        """Return `passes()`, which run forward and backward; again without cuDNN where its RNNs are in eval mode.

        cuDNN keeps what the backward pass of an RNN needs in training mode alone; torch's own kernels always do.
        """
        try:
            return passes()
        except RuntimeError as error:
            if self.root.without_cudnn or "cudnn RNN backward" not in str(error):
                raise
        self.root.without_cudnn = True
        return passes()

    def forward(self, model: Model, batch: Tensor, rows: Tensor) -> Any:
        """Return what a model answers to rows of the images, with the extra inputs of each."""
        origin = self.origin[rows]

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            own = value.ndim > 0 and len(value) == self.root.images
            return value[origin.to(value.device)] if own else _ordinary(value)

        if isinstance(self.extra_inputs, Mapping):
            return model(batch, **{name: pick(value) for name, value in self.extra_inputs.items()})
        return model(batch, *(pick(value) for value in self.extra_inputs))

    def clean(self) -> Clean:
        """Return the scores of the unchanged images; the first call runs the model once per image and fixes the target."""
        if self._clean is None:
            clean = self._announced() or self._look()
            self._clean = clean
            self.score.close()
            if self.root is self:
                self._warn_of_probabilities(clean.table)
        return self._clean

    def _announced(self) -> Clean | None:
        """Make the sweeps that were announced, all in one pass, and return the clean scores it tells."""
        announced: list[tuple[ScoreKind, Sweep]] = self._shared.pop("announced", [])
        if not announced:
            return None
        kind = announced[0][0]
        together = self.renamed(self.where, kind)
        with contextlib.suppress(NotApplicable):  # which whoever asked for it will say in its own name
            together._sweep_images(list(dict.fromkeys(one for other, one in announced if other == kind)), required=False)
        return together._clean

    def _look(self) -> Clean:
        """Run the model once per image."""
        tables: list[Tensor] = []
        scores: list[Tensor] = []

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=self.device)
            # a copy: a model that works in place must change neither the caller's images nor ours
            output = self._output(self.inputs[start:stop].clone(), rows)
            table = self.score.table(output, rows)
            self.score.resolve(table, self.origin[rows])
            if table is None:
                scores.append(self.score(output, self.origin[rows]).detach().clone())
            else:
                tables.append(table.clone())  # a model may answer into one buffer, as captured CUDA graphs do

        self.run(self.images, body)
        return Clean(torch.cat(tables) if tables else None, torch.cat(scores) if scores else None)

    def _warn_of_probabilities(self, table: Tensor | None) -> None:
        if table is None or table.shape[1] == 1 or self.score.kind == "logit" or "warned" in self._shared:
            return
        if sums_to_one(table):
            self._shared["warned"] = True
            warnings.warn(
                f"{self.where}: the model's output already sums to 1, and score takes its softmax again; "
                "pass score='logit' to explain the output as it is",
                stacklevel=6,
            )

    def clean_scores(self) -> tuple[Tensor, Tensor | None]:
        """Return the explained score of the unchanged images (B,) and, for class targets, that of every class (B, K)."""
        clean = self.clean()
        if clean.table is None:
            assert clean.scores is not None
            return clean.scores, None
        classes = self.score.scaled(clean.table)
        return self.score.pick(classes, self.origin), classes

    def look(self, image: int) -> Look:
        """Run the model with gradients on one of the images, for whoever watches its layers."""
        rows = torch.tensor([image], device=self.device)
        with self.modes(grad=True):
            leaf = self.inputs[image : image + 1].clone().requires_grad_()
            output = self.forward(self.layered_model, leaf.clone(), rows)
            return Look(leaf, output, self._preview(output, rows))

    def _preview(self, output: Any, rows: Tensor) -> Tensor:
        return self.score.preview(output, rows)

    def fix_target(self) -> None:
        """Make sure that the target of every image is known, with a clean pass where it is not."""
        if self.score.open:
            self.clean()

    def _output(self, batch: Tensor, rows: Tensor, model: Model | None = None) -> Any:
        with self.modes(grad=False):
            return self.forward(self.model if model is None else model, _ordinary(batch), rows)

    def scores(self, batch: Tensor, rows: Tensor, model: Model | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the explained score (N,) of changed images and, for class targets, that of every class (N, K).

        The model may overwrite `batch`. Where another `model` is given, it is that which turns `batch` into outputs.
        """
        output = self._output(batch, rows, model)
        table = self.score.table(output, rows)
        if table is None:
            return self.score(output, self.origin[rows]).detach().clone(), None
        classes = self.score.scaled(table)
        return self.score.pick(classes, self.origin[rows]), classes

    def score_of(self, output: Any, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the class scores (N, K), None for a callable target, and the explained score (N,); fix an open target."""
        table = self.score.table(output, rows)
        self.score.resolve(table, self.origin[rows])
        return table, self.score(output, self.origin[rows])

    def gradients(self, batch: Tensor, rows: Tensor) -> Tensor:
        """Return df/dx (N, C, H, W) at each row of `batch`."""
        image = Sweep()
        return sweep(self, batch, rows, [image]).found[image][0]

    def layer_gradients(
        self, batch: Tensor, rows: Tensor, layer: Layer, rules: ReluRules | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's activation A, G = df/dA and, with `rules`, df/dx under the rule, all from one forward pass.

        Without `rules` nothing below the layer is kept for the backward pass, unless its input is meant: others may use that.
        """
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

    def _sweep_images(self, wanted: Sequence[Sweep], *, required: bool) -> None:
        """Make sweeps over the unchanged images, which also tell the clean scores; what is not required may be left out."""
        parts: list[Swept] = []

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=self.device)
            parts.append(sweep(self, self.inputs[start:stop], rows, wanted, required=required))

        self.run(self.images, body)
        self.score.close()
        made = self._shared.setdefault("sweeps", {})
        # autocast, where the caller has it on, does not join tensors of every dtype
        with torch.autocast(self.device.type, enabled=False):
            for one in wanted:
                if all(one in part.found for part in parts):
                    pieces = zip(*(part.found[one] for part in parts), strict=True)
                    made[self.score.kind, one] = tuple(torch.cat(some) for some in pieces)
            if self._clean is None:
                tables = [part.table for part in parts if part.table is not None]
                scores = [part.scores for part in parts]
                self._clean = Clean(torch.cat(tables), None) if tables else Clean(None, torch.cat(scores))


@contextlib.contextmanager
def _unoptimised_scripts() -> Iterator[None]:
    """Keep TorchScript from optimising a backward pass, which it does for good after some runs, hidden from ReLU rules."""
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(before)


class _ModelUsed(Exception):
    """A rehearsal has come to the model."""


class _Rehearsal(Plan):
    announcing: bool

    def run(
        self, total: int, body: Callable[[int, int], None], *, batch_size: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        raise _ModelUsed

    def look(self, image: int) -> Look:
        if not self.announcing or "refused" in self._shared:
            raise _ModelUsed
        return super().look(image)

    def _preview(self, output: Any, rows: Tensor) -> Tensor:
        try:
            return super()._preview(output, rows)
        except Exception as error:  # of the target, which the clean pass will refuse in the name of whoever was called
            self._shared["refused"] = True
            raise _ModelUsed from error

    def clean(self) -> Clean:
        if self._clean is None:
            raise _ModelUsed
        return self._clean

    def sweeps(self, *wanted: Sweep) -> list[Found]:
        if self.announcing:
            self._shared.setdefault("announced", []).extend((self.score.kind, one) for one in wanted)
        raise _ModelUsed


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd and in-place operations accept, also where the caller is in torch.inference_mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _checked_inputs(where: str, inputs: object) -> Tensor:
    tensor = check_tensor(where, "inputs", inputs, dtypes=FLOATING)
    if tensor.ndim != 4:
        refuse(where, "inputs", "be a batch of images (B, C, H, W)", f"shape {tuple(tensor.shape)}")
    if tensor.shape[0] == 0:
        refuse(where, "inputs", "hold at least one image", f"shape {tuple(tensor.shape)}")
    if tensor.shape[1] == 0 or tensor.shape[2] * tensor.shape[3] < 2:
        refuse(where, "inputs", "be images of more than one pixel", f"shape {tuple(tensor.shape)}")
    finite = finite_rows(tensor)
    if not bool(finite.all()):
        refuse(where, "inputs", "be finite", f"NaN or infinity in image {int(finite.long().argmin())}")
    with torch.inference_mode(False):
        return _ordinary(tensor.detach())


def _check_model(where: str, model: object, inputs: Tensor) -> None:
    if not callable(model):
        refuse(where, "model", "be callable", type(model).__name__, TypeError)
    if isinstance(model, PreparedModel):
        model.check_unchanged(where)
        model = model.original
    elif isinstance(model, nn.Module):
        check_eval(where, model)
    if not isinstance(model, nn.Module):
        return
    parameter = next((p for p in model.parameters() if p.dtype.is_floating_point), None)
    if parameter is None:
        return
    if parameter.device != inputs.device:
        refuse(where, "inputs", f"be on the model's device {parameter.device}", inputs.device)
    if parameter.dtype != inputs.dtype:
        names = [str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, inputs.dtype)]
        refuse(where, "inputs", f"have the model's dtype {names[0]}", names[1], TypeError)
