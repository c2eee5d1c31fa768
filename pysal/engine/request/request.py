"""A validated request: the model, the images, the target, and what was said about running the model."""

from collections.abc import Callable
from typing import Any, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pysal._checks import FLOATING, all_finite, check_dense, check_tensor, finite_rows, refuse
from pysal._library import widest
from pysal.engine.model.class_names import ClassNames, names_of
from pysal.engine.model.placement import check_fits
from pysal.engine.model.rows import rows_exported
from pysal.engine.model.training import check_eval
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.extra_inputs import ExtraArguments, ordinary
from pysal.engine.request.independence import Company
from pysal.engine.request.row_score import Score
from pysal.engine.request.running import Running
from pysal.engine.request.score import Output, ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.running.chunks import fast_rows
from pysal.engine.running.states import outside_inference

Model: TypeAlias = Callable[..., Any]
Shared = TypeVar("Shared")


class Request:
    """What all methods share: everything is checked here, before any work.

    Args:
        where: the public name of the method, for errors: "pysal.gradient".
        model: an nn.Module in eval mode, or any callable on tensors.
        inputs: (B, C, H, W), floating point, on the model's device; finite, unless `company` is "given".
        target: what is explained; see `engine.request.target`.
        running: the score that is meant, further arguments, batching, arithmetic and dtype of the result; see `Running`.
        company: which rows a pass may hold; see `engine.request.independence`. "checked" is "whole" where `batch_size` is B.
        output: what the model's output is taken for, where that was decided before; None = what the images say.
        names: the classes by name; None = those that the model carries.
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
        names: ClassNames | None = None,
    ) -> None:
        self.where, self.model = where, model
        self.inputs = _checked_inputs(where, inputs, finite=company != "given")
        _check_model(where, model, self.inputs)
        running.check(where)
        batch_size, precision = running.batch_size, running.precision
        self.extra_inputs = ExtraArguments(where, running.extra_inputs, len(self.inputs))
        # a model may say how many rows it takes at a time
        self.batch_size, self.precision = batch_size or getattr(model, "rows_per_pass", None) or rows_exported(model), precision
        self.asked_batch_size = batch_size
        self.company: Company = "whole" if company == "checked" and batch_size == len(self.inputs) else company
        if isinstance(model, PreparedModel):
            if precision not in ("as set", "float32", model.precision):
                refuse(where, "precision", f"be that of the prepared model, {model.precision!r}", repr(precision))
            self.batch_size, self.precision = batch_size or model.rows_for(self.inputs), model.precision
        self.accumulator_dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        self.dtype = running.dtype or self.accumulator_dtype
        named = model.original if isinstance(model, PreparedModel) else model
        height, width = inputs.shape[2:]
        self.names: Callable[[], ClassNames | None] = (lambda: names_of(named)) if names is None else lambda: names
        self.score = Score(where, target, running.score, len(inputs), self.device, self.names, output, size=(height, width))
        self._root: Self | None = None
        # the image of the call's own that each stands for; None = they are those
        self._origin: Tensor | None = None
        # what is found out of these images under this target: one for all methods and kinds of score of a call
        self._shared: dict[object, Any] = {}

    def derive(self, inputs: Tensor, rows: Tensor, *, batch_size: int | None = None) -> Self:
        """Return a plan for other images under the same request; image n stands for image `rows[n]` of this one."""
        derived: Self = object.__new__(type(self))
        derived.__dict__.update(self.__dict__)
        derived._root, derived.inputs, derived._origin = self.root, inputs, self.origin_of(rows)
        derived.batch_size = batch_size or self.batch_size
        derived.asked_batch_size = batch_size or self.asked_batch_size
        derived._shared = {}
        return derived

    def renamed(self, where: str, score: ScoreKind) -> Self:
        """Return this request for another method and kind of score, sharing the clean pass and the target."""
        renamed: Self = object.__new__(type(self))
        renamed.__dict__.update(self.__dict__)
        renamed.where, renamed._root = where, None
        renamed.score, renamed._shared = self.score.renamed(where, score), self._shared
        return renamed

    @property
    def root(self) -> Self:
        """The plan of the call's own images, which this one is or is derived from."""
        # None stands for this plan: holding itself it would keep the images until Python's cyclic collector comes round
        return self if self._root is None else self._root

    @property
    def origin(self) -> Tensor:
        """The image (B,) of the call's own that each of these stands for."""
        return torch.arange(self.images, device=self.device) if self._origin is None else self._origin

    def origin_of(self, rows: Tensor) -> Tensor:
        """Return the image (N,) of the call's own that each of the images `rows` (N,) stands for."""
        return rows if self._origin is None else self._origin[rows]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.inputs.device

    @property
    def images(self) -> int:
        """Number of images B."""
        return self.inputs.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of model input."""
        return self.inputs.numel() // self.images * self.inputs.element_size()

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

    def laid_out(self, batch: Tensor) -> Tensor:
        """Return a batch (N, C, H, W) in the memory format the model is fed, where that is channels_last."""
        return batch.contiguous(memory_format=torch.channels_last) if self.channels_last else batch

    @property
    def eager_model(self) -> Model:
        """The model as Python runs it: without torch.compile, inside which activations cannot be reached."""
        own = self.model.original if isinstance(self.model, PreparedModel) else self.model
        eager: Model = getattr(own, "_orig_mod", self.model)
        return eager

    @property
    def layered_model(self) -> Model:
        """The model with its own layers: neither compiled nor prepared."""
        own = self.model.original if isinstance(self.model, PreparedModel) else self.model
        layered: Model = getattr(own, "_orig_mod", own)
        return layered

    def shared(self, key: object, make: Callable[[Self], Shared]) -> Shared:
        """Return `make(plan of the call's own images)`, made once however many derived plans ask for it."""
        if key not in self.root._shared:
            self.root._shared[key] = make(self.root)
        found: Shared = self.root._shared[key]
        return found

    def zeros(self, rows: int | None = None) -> Tensor:
        """Return an accumulator for the images, or for a number of rows of their shape, as exact as the device has it."""
        shape = (self.images if rows is None else rows, *self.inputs.shape[1:])
        return torch.zeros(shape, dtype=widest(self.device), device=self.device)

    def places(self, start: int, stop: int, each: int) -> tuple[Tensor, Tensor]:
        """Return the image (N,) of each item of a queue in which every image has `each` of them, and which of these it is.

        Image after image; or, where passes hold the whole batch, the batch again and again.
        """
        items = torch.arange(start, stop, device=self.device)
        if self.company == "whole":
            return items % self.images, items // self.images
        return items // each, items % each


def _checked_inputs(where: str, inputs: object, *, finite: bool) -> Tensor:
    tensor = check_dense(where, "inputs", check_tensor(where, "inputs", inputs, dtypes=FLOATING))
    shape = tuple(tensor.shape)
    if len(shape) != 4:
        refuse(where, "inputs", "be a batch of images (B, C, H, W)", f"shape {shape}")
    if shape[0] == 0:
        refuse(where, "inputs", "hold at least one image", f"shape {shape}")
    if shape[1] == 0 or shape[2] * shape[3] < 2:
        refuse(where, "inputs", "be images of more than one pixel", f"shape {shape}")
    if finite:
        if not all_finite(tensor):
            image = int(finite_rows(tensor).long().argmin())
            refuse(where, "inputs", "be finite", f"NaN or infinity in image {image}")
    return outside_inference(lambda: ordinary(tensor.detach()))


def _check_model(where: str, model: object, inputs: Tensor) -> None:
    if not callable(model):
        refuse(where, "model", "be callable", type(model).__name__, TypeError)
    if isinstance(model, ExportedProgram):  # it has a __call__, which raises
        refuse(where, "model", "be its module() or what pysal.prepare makes of it", type(model).__name__, TypeError)
    if isinstance(model, PreparedModel):
        model.check_unchanged(where)
        model = model.original
    elif isinstance(model, nn.Module):
        check_eval(where, model)
    if isinstance(model, nn.Module):
        check_fits(where, model, "inputs", inputs)
