"""captum's way to ask, as a plan: tuples of tensors of every rank become images, its targets scores of rows.

One floating input (B, C, H, W) is the plan's images as it is. Anything else is laid out as images (B, 1, 1, N), the inputs of
an example end to end, and taken apart again before the forward function: so the queue, the paths and the noise of the engine
serve them all.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, finite_rows, refuse
from pysal.engine.not_applicable import NotApplicable
from pysal.engine.plan import Plan
from pysal.engine.prepared import PreparedModel
from pysal.engine.target import RowTarget, class_scores
from pysal.engine.training import training_part
from pysal.methods import gradient

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
Target: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Found = TypeVar("Found")


class PerBatch(Exception):
    """The forward function answers for the whole batch, not row by row, so the batch must not be split."""


def as_tuple(inputs: object) -> tuple[Tensor, ...]:
    """Return one tensor or a tuple of them as a tuple.

    Raises:
        AssertionError: neither.
    """
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    for one in several:
        if not isinstance(one, Tensor):
            refuse("pysal.captum", "inputs", "be a tensor or a tuple of tensors", type(one).__name__, AssertionError)
    return several


def arguments(additional_forward_args: object) -> tuple[Any, ...]:
    """Return the further arguments of the forward function as a tuple."""
    if additional_forward_args is None:
        return ()
    return additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)


def spread(input: Tensor, baseline: Tensor | float) -> Tensor:
    """Return a baseline as a tensor of the input's shape and dtype."""
    return torch.as_tensor(baseline, dtype=input.dtype, device=input.device).expand_as(input)


def call(forward: Callable[..., Any], inputs: Sequence[Tensor], further: Sequence[Any]) -> Any:
    """Return the forward function's output; a function of no arguments gets none."""
    if not isinstance(forward, (nn.Module, PreparedModel)) and not inspect.signature(forward).parameters:
        return forward()
    return forward(*inputs, *further)


def is_training(forward: object) -> bool:
    """Whether a forward function is a model with a part whose training mode counts, so that rows must stay together."""
    return isinstance(forward, nn.Module) and training_part(forward) is not None


def evaluate(
    forward: Callable[..., Any], inputs: tuple[Tensor, ...], target: Target, additional_forward_args: object
) -> Tensor:
    """Return the selected output of one pass over all inputs, whatever its shape."""
    output = call(forward, inputs, arguments(additional_forward_args))
    selected: Tensor = select("pysal.captum", output, target)
    return selected


def check_target_count(where: str, target: Target, examples: int) -> None:
    """Refuse a list of targets that is not one for each example.

    Raises:
        AssertionError: another number.
    """
    if (isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)) and len(target) != examples:
        refuse(where, "target", f"be one for each of {examples} examples", len(target), AssertionError)


def select(where: str, output: Any, target: Target, rows: Tensor | None = None) -> Any:
    """Return the target's part of an output: (N,), or what is left where the target is None or names fewer dimensions.

    Args:
        where: the public name, for errors.
        output: (N, ...).
        target: None; an int or a tuple of them for all rows; a list of either, or a tensor of ints, one for each example.
        rows: (N,) the example of each row; None where row n is example n.

    Raises:
        AssertionError: a target that does not fit.
    """
    if target is None:
        return output
    if isinstance(target, Tensor) and target.numel() == 1 and isinstance(target.item(), int):
        target = int(target.item())
    if isinstance(target, (int, tuple)):
        index = (target,) if isinstance(target, int) else target
        if len(index) > output.ndim - 1:
            refuse(where, "target", f"fit an output of shape {tuple(output.shape)}", repr(target), AssertionError)
        return output[(slice(None), *index)]
    if isinstance(target, Tensor):
        if target.ndim != 1:
            refuse(where, "target", "have at most 1 dimension", f"shape {tuple(target.shape)}", AssertionError)
        chosen = target if rows is None else target[rows.to(target.device)]
        return _gather(where, output, chosen)
    if not isinstance(target, list) or not target:
        requirement = "be an int, a tuple of ints, a tensor of ints or a list"
        refuse(where, "target", requirement, type(target).__name__, AssertionError)
    entries: list[Any] = list(target) if rows is None else [target[row] for row in rows.tolist()]
    if isinstance(entries[0], int):
        return _gather(where, output, torch.tensor(entries))
    if not isinstance(entries[0], tuple):
        refuse(where, "target", "list ints or tuples of ints", type(entries[0]).__name__, AssertionError)
    _check_length(where, output, len(entries))
    return torch.stack([output[(i, *one)] for i, one in enumerate(entries)])


def _gather(where: str, output: Tensor, chosen: Tensor) -> Tensor:
    if output.ndim != 2:
        refuse(
            where, "the output", "have 2 dimensions for one index per example", f"shape {tuple(output.shape)}", AssertionError
        )
    _check_length(where, output, len(chosen))
    return output.gather(1, chosen.to(output.device).long()[:, None]).squeeze(1)


def _check_length(where: str, output: Tensor, count: int) -> None:
    if len(output) != count:
        refuse(where, "target", f"be one for each of {len(output)} rows of the output", count, AssertionError)


class Score(RowTarget):
    """captum's target as a score of each row.

    Args:
        where: the public name, for errors.
        target: see `select`.
        whole: the output may be about the batch as a whole: its sum is what is differentiated.
    """

    def __init__(self, where: str, target: Target, *, whole: bool = False) -> None:
        self.where, self.target, self.whole = where, target, whole

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores.

        Raises:
            AssertionError: more than one number for each row.
            PerBatch: not one number for each row, and the batch may have been split.
        """
        table = output if isinstance(output, (Tensor, int, float)) else class_scores(output)
        if not self.whole and (not isinstance(table, Tensor) or table.ndim == 0 or len(table) != len(rows)):
            raise PerBatch
        selected = select(self.where, table, self.target, rows)
        if selected[0].numel() != 1:
            requirement = "pick one number of each row of the output"
            refuse(self.where, "target", requirement, f"{selected[0].numel()} of them", AssertionError)
        if selected.shape[0] == len(rows):
            scores: Tensor = selected.reshape(-1)
            return scores
        if not self.whole:
            raise PerBatch
        total = selected.sum().reshape(1)
        return torch.cat([total, total.new_zeros(len(rows) - 1)])


class Request:
    """One call of `attribute`.

    Args:
        where: the public name, for errors.
        forward: the forward function.
        inputs: a tensor (B, ...), or a tuple of them.
        target: see `select`.
        additional_forward_args: further arguments of the forward function; tensors of B rows go with their example.
        rows: most rows of one pass; None = as many as memory allows.
        whole_numbers: inputs of whole numbers are "refused", become "floating" or are "kept", for a layer behind them.

    Raises:
        AssertionError: inputs that are no tensors or of different numbers of rows; the wrong number of targets.
        RuntimeError: whole numbers, where they are "refused": they have no gradient.
    """

    def __init__(
        self,
        where: str,
        forward: Callable[..., Any],
        inputs: Inputs,
        target: Target,
        additional_forward_args: object,
        rows: int | None = None,
        whole_numbers: Literal["floating", "kept", "refused"] = "refused",
    ) -> None:
        self.where, self.forward, self.target = where, forward, target
        self.is_tuple = isinstance(inputs, tuple)
        self.inputs = as_tuple(inputs)
        self.further = arguments(additional_forward_args)
        self.examples = len(self.inputs[0])
        if any(len(one) != self.examples for one in self.inputs):
            shapes = [tuple(one.shape) for one in self.inputs]
            refuse(where, "inputs", "have the same number of rows", shapes, AssertionError)
        self.rows = None if rows is None else max(1, rows)
        check_target_count(where, target, self.examples)
        self.sizes = [math.prod(one.shape[1:]) for one in self.inputs]
        self.dtypes = [one.dtype for one in self.inputs]
        if not all(dtype.is_floating_point for dtype in self.dtypes):
            if whole_numbers == "refused":
                refuse(where, "inputs", "be floating point", self.dtypes, RuntimeError)
            if whole_numbers == "floating":
                default = torch.get_default_dtype()
                self.dtypes = [dtype if dtype.is_floating_point else default for dtype in self.dtypes]
        first = self.inputs[0]
        one_image = len(self.inputs) == 1 and first.ndim == 4 and first.dtype in FLOATING
        self.as_is = one_image and first.shape[1] > 0 and first.shape[2] * first.shape[3] > 1
        self.training = is_training(forward)
        self.whole = self.training  # batch statistics are those of all rows together

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the inputs' shapes, with any number N of rows, as images: (N, C, H, W) or (N, 1, 1, sizes)."""
        if self.as_is:
            return tensors[0]
        exact = [one if one.is_floating_point else torch.float64 for one in self.dtypes]
        dtype = functools.reduce(torch.promote_types, exact)
        first = tensors[0]
        flat = [one.reshape(len(one), -1).to(device=first.device, dtype=dtype) for one in tensors]
        if sum(self.sizes) < 2:
            flat.append(flat[0].new_zeros(len(first), 2))  # an image has more than one pixel
        packed = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        return packed[:, None, None]

    def unpack(self, images: Tensor, least: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
        """Return images taken apart into tensors of the inputs' shapes, devices and dtypes, or `least` where that is wider."""
        dtypes = [one if least == torch.float16 else torch.promote_types(one, least) for one in self.dtypes]
        if self.as_is:
            return (images.to(dtypes[0]),)
        found, start = [], 0
        for one, size, dtype in zip(self.inputs, self.sizes, dtypes, strict=True):
            part = images[:, 0, 0, start : start + size].reshape(len(images), *one.shape[1:])
            found.append(part.to(device=one.device, dtype=dtype))
            start += size
        return tuple(found)

    def answer(self, found: Sequence[Tensor]) -> Any:
        """Return what `attribute` returns: a tuple for a tuple of inputs, else a tensor."""
        return tuple(found) if self.is_tuple else found[0]

    def plan(self) -> Plan:
        """Return the plan of this request."""
        images = self.pack(self.inputs).detach()
        finite = bool(finite_rows(images).all())
        plan = Plan(
            self.where,
            self._model(),
            images if finite else torch.zeros_like(images),
            Score(self.where, self.target, whole=self.whole),
            score="logit",
            extra_inputs=self.further,
            batch_size=sys.maxsize if self.whole else self.rows,
            precision="float32",
            dtype=images.dtype,
        )
        if not finite:  # captum lets NaN through, and so must its face
            plan = plan.derive(images, torch.arange(self.examples, device=images.device))
        return plan

    def run(self, work: Callable[[Plan], Found]) -> Found:
        """Return `work(plan)`, with all rows in one pass where the forward function answers for the batch as a whole.

        Raises:
            RuntimeError: the output does not depend on the inputs, as autograd would say it.
        """
        try:
            try:
                return work(self.plan())
            except PerBatch:
                self.whole = True
                return work(self.plan())
        except NotApplicable as error:
            if "must be differentiable" not in str(error):
                raise
            raise RuntimeError(str(error)) from error

    def _model(self) -> Callable[..., Any]:
        forward = self.forward
        if self.as_is and not self.training:
            if isinstance(forward, PreparedModel):
                return forward
            if isinstance(forward, nn.Module):
                first = next((p for p in forward.parameters() if p.dtype.is_floating_point), None)
                if first is None or (first.device, first.dtype) == (self.inputs[0].device, self.inputs[0].dtype):
                    return forward

        def model(images: Tensor, *further: Any) -> Any:
            return call(forward, self.unpack(images), further)

        return model


def floating(tensor: Tensor) -> Tensor:
    """Return a tensor of whole numbers as one of the default floating dtype."""
    return tensor if tensor.dtype.is_floating_point else tensor.to(torch.get_default_dtype())


def compute_gradients(
    forward_fn: Callable[..., Any], inputs: Inputs, target_ind: Target = None, additional_forward_args: object = None
) -> tuple[Tensor, ...]:
    """Return the gradient of the selected output with respect to each input."""
    request = Request("pysal.captum.compute_gradients", forward_fn, inputs, target_ind, additional_forward_args)
    return request.unpack(request.run(lambda plan: gradient.attribute(plan).map))
