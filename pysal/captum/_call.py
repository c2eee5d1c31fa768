"""captum's way to ask, as a plan: tuples of tensors of every rank become images, its targets scores of rows.

One floating input (B, C, H, W) is the plan's images as it is. Anything else is laid out as images (B, 1, 1, N), the inputs of
an example end to end, and taken apart again before the forward function: so the queue, the paths and the noise of the engine
serve them all.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pysal._checks import FLOATING, INTEGER, all_finite, check_flag, refuse
from pysal.captum._batches import call, copies_per_pass, independent, of_rows, takes_inputs
from pysal.engine.layers.features import Layer, capture
from pysal.engine.model.gradient_layouts import lay_out, lay_out_at, nodes_behind
from pysal.engine.model.gradients import gradients
from pysal.engine.model.not_applicable import NotApplicable, NotDifferentiable
from pysal.engine.model.relu_rules import ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.extra_inputs import PerImage, Shared, ordinary
from pysal.engine.request.passes import PassModes
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.sweeps import has_backward_hooks, hides_relus, is_watched
from pysal.engine.request.target import RowTarget
from pysal.engine.running.chunks import CPU_PASS_BYTES, CPU_ROWS, is_reported
from pysal.engine.running.states import Hooks, recorded, restoring

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
Target: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None
Found = TypeVar("Found")

# Of a photo as most networks take it, below which a pass costs what it costs to begin one.
PHOTO_BYTES = CPU_PASS_BYTES // CPU_ROWS
# Of targets.
WHOLE = INTEGER


class PerBatch(Exception):
    """The forward function answers for the whole batch, not row by row, so the batch must not be split."""


def check_rows(where: str, inputs: tuple[Tensor, ...]) -> None:
    """Refuse inputs whose rows are no common examples: captum repeats each by its own, or fails in the model's words.

    Raises:
        AssertionError: they have different numbers of rows.
    """
    if any(one.shape[:1] != inputs[0].shape[:1] for one in inputs):
        refuse(where, "inputs", "have the same number of rows", [tuple(one.shape) for one in inputs], AssertionError)


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


def evaluate(
    forward: Callable[..., Any], inputs: tuple[Tensor, ...], target: Target, additional_forward_args: object
) -> Tensor:
    """Return the selected output of one pass over all inputs, whatever its shape."""
    output = call(forward, inputs, arguments(additional_forward_args))
    selected: Tensor = select("pysal.captum", output, target, torch.arange(len(inputs[0]), device="cpu"))
    return selected


def check_target(where: str, target: Target, examples: int) -> None:
    """Refuse a target that is not one of captum's, or a list of them that is not one for each example, with captum's error.

    Raises:
        AssertionError: another type, another number of targets.
        IndexError: a tuple with something else than whole numbers in it.
        RuntimeError: fractions, or truth values, where whole numbers are meant.
        TypeError: a list of tuples and other things.
    """
    if target is None or isinstance(target, int):
        return
    if isinstance(target, tuple):
        _check_index(where, target)
    elif isinstance(target, Tensor):
        whole = target.dtype in WHOLE
        if target.numel() == 1 and whole:
            return
        if target.ndim != 1:
            refuse(where, "target", "have at most 1 dimension", f"shape {tuple(target.shape)}", AssertionError)
        _check_count(where, target, examples)
        if not whole:
            refuse(where, "target", "be whole numbers", str(target.dtype).removeprefix("torch."), RuntimeError)
    elif isinstance(target, list) and target:
        _check_count(where, target, examples)
        if not isinstance(target[0], (int, tuple)):
            refuse(where, "target", "list ints or tuples of ints", type(target[0]).__name__, AssertionError)
        if all(isinstance(one, bool) for one in target):
            refuse(where, "target", "list whole numbers", repr(target), RuntimeError)
        for one in target:
            if isinstance(target[0], tuple) and isinstance(one, tuple):
                _check_index(where, one)
            elif not (isinstance(target[0], int) and isinstance(one, int)):
                error = TypeError if isinstance(target[0], tuple) or not isinstance(one, float) else RuntimeError
                refuse(where, "target", f"list {type(target[0]).__name__}s alone", repr(one), error)
    else:
        requirement = "be an int, a tuple of ints, a tensor of ints or a list"
        refuse(where, "target", requirement, repr(target), AssertionError)


def target_of(target: Target, rows: Tensor) -> Target:
    """Return the target of copies of the examples `rows` (N,)."""
    if isinstance(target, list):
        return [target[row] for row in rows.tolist()]
    if isinstance(target, Tensor) and target.numel() > 1:
        return target[rows.to(target.device)]
    return target


def _check_index(where: str, index: tuple[object, ...]) -> None:
    for one in index:
        if not isinstance(one, (int, slice)):
            refuse(where, "target", "be a tuple of whole numbers", repr(index), IndexError)


def _check_count(where: str, target: Tensor | list[Any], examples: int) -> None:
    if len(target) != examples:
        refuse(where, "target", f"be one for each of {examples} examples", len(target), AssertionError)


def select(where: str, output: Any, target: Target, rows: Tensor | None = None) -> Any:
    """Return the target's part of an output: (N,), or what is left where the target is None or names fewer dimensions.

    Args:
        where: the public name, for errors.
        output: (N, ...); what a function gave that drops the dimension of a single row gets it back.
        target: None; an int or a tuple of them for all rows; a list of either, or a tensor of ints, one for each example.
        rows: (N,) the example of each row; None where row n is example n.

    Raises:
        AssertionError: a target that does not fit.
    """
    if target is None:
        return output
    if not isinstance(output, Tensor):
        refuse(where, "the output", "be a tensor where a target is given", type(output).__name__, AssertionError)
    if isinstance(target, Tensor) and target.numel() == 1:
        target = int(target)
    if isinstance(target, (int, tuple)):
        index = (target,) if isinstance(target, int) else target
        if output.ndim == len(index) and rows is not None and len(rows) == 1:
            output = output[None]
        if len(index) > output.ndim - 1:
            refuse(where, "target", f"fit an output of shape {tuple(output.shape)}", repr(target), AssertionError)
        return output[(slice(None), *index)]
    single = rows is not None and len(rows) == 1
    if isinstance(target, Tensor):
        chosen = target if rows is None else target[rows.to(target.device)]
        return _gather(where, output[None] if single and output.ndim == 1 else output, chosen)
    entries: list[Any] = list(target) if rows is None else [target[row] for row in rows.tolist()]
    if isinstance(entries[0], int):
        return _gather(where, output[None] if single and output.ndim == 1 else output, torch.tensor(entries, device="cpu"))
    if single and output.ndim == len(entries[0]):
        output = output[None]
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
        together: the output's rows are not those of the pass, but the target's.
    """

    follows_rows = False  # captum's targets may be about the batch as a whole

    def __init__(self, where: str, target: Target, *, whole: bool = False, together: bool = False) -> None:
        self.where, self.target, self.whole, self.together = where, target, whole, together

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores.

        Raises:
            AssertionError: more than one number for each row; no tensor.
            IndexError: one number for all rows.
            TypeError: a plain number.
            PerBatch: not one number for each row, and the batch may have been split.
        """
        if not isinstance(output, Tensor):
            error = TypeError if isinstance(output, (int, float)) else AssertionError
            refuse(self.where, "the output", "be a tensor", type(output).__name__, error)
        count = rows.shape[0]
        if count > 1 and not self.whole and (not output.ndim or output.shape[0] != count):
            raise PerBatch
        selected = select(self.where, output, self.target, None if self.together else rows)
        shape = selected.shape
        if len(shape) == 1 and shape[0] == count:
            scores: Tensor = selected
            return scores
        if not shape:
            if count > 1:
                refuse(self.where, "the output", f"have one number for each of {count} rows", "one in all", IndexError)
            selected = selected[None]  # squeezed
        if selected[0].numel() != 1:
            requirement = "pick one number of each row of the output"
            refuse(self.where, "target", requirement, f"{selected[0].numel()} of them", AssertionError)
        if selected.shape[0] == count:
            scores = selected.reshape(-1)
            return scores
        if not self.whole:
            raise PerBatch
        total = selected.sum().reshape(1)
        return torch.cat([total, total.new_zeros(count - 1)])


class Call:
    """One call of `attribute`.

    Args:
        where: the public name, for errors.
        forward: the forward function.
        inputs: a tensor (B, ...), or a tuple of them.
        target: see `select`.
        additional_forward_args: further arguments of the forward function; tensors of B rows go with their example.
        whole_numbers: inputs of whole numbers are "refused", become "floating" or are "kept", for a layer behind them.
        any_rows: whether inputs may have different numbers of rows. They are then explained together, by one pass.
        keeps_graph: whether what is found carries autograd's graph, to the model's weights and to the inputs.

    Raises:
        AssertionError: inputs that are no tensors or of different numbers of rows; the wrong number of targets.
        IndexError: inputs without rows.
        RuntimeError: whole numbers, where they are "refused": they have no gradient.
    """

    def __init__(
        self,
        where: str,
        forward: Callable[..., Any],
        inputs: Inputs,
        target: Target,
        additional_forward_args: object,
        whole_numbers: Literal["floating", "kept", "refused"] = "refused",
        any_rows: bool = False,
        keeps_graph: object = False,
    ) -> None:
        self.where, self.forward, self.target = where, forward, target
        self.keeps_graph = check_flag(where, "create_graph", keeps_graph)
        self.is_tuple = isinstance(inputs, tuple)
        self.inputs = as_tuple(inputs)
        self.further = arguments(additional_forward_args)
        self.examples = self.inputs[0].shape[0] if self.inputs[0].ndim else len(self.inputs[0])
        self.together = any_rows and len(self.inputs) > 1 and len({len(one) for one in self.inputs}) > 1
        if not self.together and len(self.inputs) > 1:
            check_rows(where, self.inputs)
        if not self.examples:
            refuse(where, "inputs", "hold at least one example", f"shape {tuple(self.inputs[0].shape)}", IndexError)
        check_target(where, target, self.examples)
        if self.together:  # all of them are one example
            self.inputs, self.examples = tuple(one[None] for one in self.inputs), 1
        self.dtypes = [one.dtype for one in self.inputs]
        if not all(map(is_differentiable, self.dtypes)):
            if whole_numbers == "refused":
                refuse(where, "inputs", "be floating point", self.dtypes, RuntimeError)
            if whole_numbers == "floating":
                default = torch.get_default_dtype()
                self.dtypes = [dtype if is_differentiable(dtype) else default for dtype in self.dtypes]
        self.sizes = [
            math.prod(one.shape[1:]) * (2 if dtype.is_complex else 1)
            for one, dtype in zip(self.inputs, self.dtypes, strict=True)
        ]
        first = self.inputs[0]
        one_image = len(self.inputs) == 1 and first.ndim == 4 and first.dtype in FLOATING
        self.as_is = one_image and self.sizes[0] > 0 and first.shape[2] * first.shape[3] > 1
        # one tensor whose numbers are in the order of an image's
        self.is_plain = len(self.inputs) == 1 and self.sizes[0] > 1 and first.dtype in FLOATING
        self.prepared = isinstance(forward, PreparedModel) and self.as_is
        self.fixed: int | None = getattr(forward, "rows_per_pass", None)  # of a model that takes no other number
        self.whole = False  # the function answers for all rows of a pass together
        self.copies = 1  # how often the batch runs
        self._splits: bool | None = None

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the inputs' shapes, with any number N of rows, as images: (N, C, H, W) or (N, 1, 1, sizes)."""
        if self.as_is:
            return tensors[0]
        if self.is_plain and tensors[0].dtype is self.dtypes[0]:
            return tensors[0].reshape(tensors[0].shape[0], 1, 1, -1)
        parts = [torch.view_as_real(one.resolve_conj()) if one.is_complex() else one for one in tensors]
        exact = [one.to_real() if one.is_complex else one if one.is_floating_point else torch.float64 for one in self.dtypes]
        dtype = functools.reduce(torch.promote_types, exact)
        first = tensors[0]
        flat = [one.reshape(len(one), -1).to(device=first.device, dtype=dtype) for one in parts]
        if sum(self.sizes) < 2:
            flat.append(flat[0].new_zeros(len(first), 2))  # an image has more than one pixel
        packed = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
        return packed[:, None, None]

    def unpack(self, images: Tensor, least: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
        """Return images taken apart into tensors of the inputs' shapes, devices and dtypes, or `least` where that is wider.

        Each lies in memory as a tensor of its own does, not as a strided view of the images: models call `view`.
        """
        dtypes = self.dtypes if least is torch.float16 else [torch.promote_types(one, least) for one in self.dtypes]
        if self.as_is:
            return (images if images.dtype is dtypes[0] else images.to(dtypes[0]),)
        if self.is_plain and images.dtype is dtypes[0] and images.is_contiguous():
            return (images.reshape(images.shape[0], *self.inputs[0].shape[1:]),)
        if all(one.device == images.device and own is images.dtype for one, own in zip(self.inputs, dtypes, strict=True)):
            width = images.shape[3] - sum(self.sizes)  # of what makes an image of a single number
            parts = images.flatten(1).split([*self.sizes, width] if width else self.sizes, 1)
            shapes = [one.shape[1:] for one in self.inputs]
            return tuple(
                part.reshape(images.shape[0], *shape).contiguous() for part, shape in zip(parts, shapes, strict=bool(not width))
            )
        found, start = [], 0
        for one, size, dtype in zip(self.inputs, self.sizes, dtypes, strict=True):
            part = images[:, 0, 0, start : start + size].to(one.device)
            if dtype.is_complex:
                part = torch.view_as_complex(part.to(dtype.to_real()).reshape(len(images), *one.shape[1:], 2))
            found.append(part.reshape(len(images), *one.shape[1:]).to(dtype).contiguous())
            start += size
        return tuple(found)

    def answer(self, found: Sequence[Tensor]) -> Any:
        """Return what `attribute` returns: a tuple for a tuple of inputs, else a tensor."""
        found = [one[0] for one in found] if self.together else found
        return tuple(found) if self.is_tuple else found[0]

    def plan(self) -> Plan:
        """Return the plan of this call: each batch in one pass, but for a prepared model, whose rows are independent."""
        packed = self.pack(self.inputs)
        images = packed.detach()
        prepared = self.prepared and not self.whole
        finite = not prepared or all_finite(images)
        running = Running(
            score="logit",
            extra_inputs=[self._with_rows(one) for one in self.further],
            batch_size=None if prepared else self.rows(None),
            precision="as set",
            dtype=images.dtype,
        )
        plan = Plan(
            self.where,
            self._model(),
            images if finite else torch.zeros_like(images),
            Score(self.where, self.target, whole=self.whole or self.together, together=self.together),
            running,
            company="checked" if prepared else "given",
        )
        if self.keeps_graph:
            return plan.connected(packed)
        if not finite:  # captum lets NaN through, and so must its face
            plan = plan.derive(images, torch.arange(self.examples, device=images.device))
        return plan

    def rows(self, points: Callable[[Tensor, Tensor], Tensor] | None, most: int | None = None) -> int:
        """Return how many rows run in one pass, in the order in which captum has them: the batch, then the batch again.

        Args:
            points: packed rows of examples (N,) of copies (N,) of the batch; None where it runs once.
            most: rows of a pass, as asked, of which captum takes whole batches, one at least. No pass has fewer than make the
                bytes of a photo: smaller ones save nothing, and take as long.
        """
        if self.whole:  # what one number answers for is then a matter of what runs together, as the caller asks
            return self.examples * (self.copies if most is None else min(self.copies, max(1, most // self.examples)))
        if self.fixed is not None and not isinstance(self.forward, PreparedModel):
            return self.fixed
        if points is None:
            return self.examples
        if most is not None and most < self.examples:
            row_bytes = sum(one.numel() * one.element_size() for one in self.inputs) // self.examples
            most = min(self.examples, max(1, most, PHOTO_BYTES // max(row_bytes, 1)))
        if most is not None and most < self.examples and self._independent(points):
            self._splits = True
            return most
        if most is not None and most < self.examples:
            warnings.warn(
                f"{self.where}: internal_batch_size must be at least the {self.examples} examples of a model whose rows "
                f"depend on each other, got {most}: whole batches run",
                stacklevel=4,
            )
        copies = copies_per_pass(
            self.forward,
            lambda rows, copies: self.unpack(points(rows, copies)),
            self.copies,
            self.inputs,
            self.further,
            None if most is None else max(1, most // self.examples),
        )
        return copies * self.examples

    def _with_rows(self, further: Any) -> PerImage | Shared:
        """Return a further argument as captum takes it: a tensor of as many rows as there are examples has one for each."""
        per_example = isinstance(further, Tensor) and further.ndim > 0 and len(further) == self.examples
        return PerImage(further) if per_example else Shared(further)

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
        except NotDifferentiable as error:
            raise RuntimeError(str(error)) from error

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradient of the target's score at each input.

        Most calls are one pass of an ordinary function of ordinary tensors, beside which a plan costs as much as a layer. It is
        made as a plan makes it, of the inputs as they are. Whatever is not found that way, or fails, is left to a plan.
        """
        if self._is_ordinary:
            with _otherwise_by_a_plan():
                return self._gradients_of_one_pass(None)
        return self.unpack(self.run(Plan.image_gradients))

    def ruled_gradients(self, rules: ReluRules) -> tuple[Tensor, ...] | None:
        """Return the gradients under rules of ReLUs, found in such a pass; None where they take a plan."""
        first = self.inputs[0]
        if len(self.inputs) == 1 and self._is_ordinary and not is_watched(first.device, first.nbytes):
            with _otherwise_by_a_plan():
                return self._gradients_of_one_pass(rules)
        return None

    def at_layer(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Return a layer's activation and the gradient there, found in such a pass; None where they take a plan."""
        if not layer.at_input and self._is_ordinary and not has_backward_hooks(self.forward):
            with _otherwise_by_a_plan():
                return self._layer_of_one_pass(layer)
        return None

    @property
    def _is_ordinary(self) -> bool:
        if self.prepared or self.together or self.keeps_graph or self.fixed is not None or is_reported():
            return False
        first = self.inputs[0]
        return all(
            type(one) is Tensor
            and one.dtype in FLOATING
            and one.layout is torch.strided
            and one.device == first.device
            and not torch._C._functorch.is_functorch_wrapped_tensor(one)
            for one in self.inputs
        ) and (isinstance(self.forward, nn.Module) or (callable(self.forward) and takes_inputs(self.forward)))

    def _further(self, rows: Tensor) -> tuple[Any, ...]:
        return of_rows([ordinary(one) if isinstance(one, Tensor) else one for one in self.further], rows, self.examples)

    @restoring
    def _gradients_of_one_pass(self, rules: ReluRules | None) -> tuple[Tensor, ...]:
        device = self.inputs[0].device
        PassModes("as set", device, backward=True, without_cudnn=False).set()
        rows = torch.arange(self.examples, device=device)
        leaves = tuple(ordinary(one).detach().requires_grad_() for one in self.inputs)
        # inside torch.compile no rule reaches an activation
        forward = self.forward if rules is None else getattr(self.forward, "_orig_mod", self.forward)
        # copies: a function that works in place must not change the caller's tensors
        output = forward(*[leaf.clone() for leaf in leaves], *(self._further(rows) if self.further else ()))
        scores = Score(self.where, self.target)(output, rows)
        if not scores.requires_grad or not scores.dtype.is_floating_point:
            raise PerBatch
        if rules is None:
            lay_out(scores, self.examples)
        else:
            nodes = nodes_behind(scores)
            if hides_relus(nodes):
                raise PerBatch
            if self.examples == 1:
                lay_out_at(nodes)
            rules.finish(scores, leaves[0])
        found = gradients(scores, leaves)
        if all(one is None for one in found):
            raise PerBatch
        layout = torch.preserve_format if self.as_is else torch.contiguous_format
        # copies: autograd may hand out one tensor for two inputs, or one that the function keeps
        return tuple(
            torch.zeros_like(leaf, memory_format=layout) if one is None else one.clone(memory_format=layout)
            for one, leaf in zip(found, leaves, strict=True)
        )

    @restoring
    def _layer_of_one_pass(self, layer: Layer) -> tuple[Tensor, Tensor]:
        device = self.inputs[0].device
        PassModes("as set", device, backward=True, without_cudnn=False).set()
        torch._C._set_grad_enabled(False)  # nothing below the layer is kept
        rows = torch.arange(self.examples, device=device)
        features = capture(self.where, layer, Hooks(), cut=True)
        # inside torch.compile no layer is reached
        forward = getattr(self.forward, "_orig_mod", self.forward)
        output = forward(
            *[ordinary(one).detach().clone() for one in self.inputs], *(self._further(rows) if self.further else ())
        )
        if not torch.is_grad_enabled():  # the layer did not run, or in a block of the model's own that sets it, and put it back
            raise PerBatch
        scores = Score(self.where, self.target)(output, rows)
        if not scores.requires_grad or not scores.dtype.is_floating_point:
            raise PerBatch
        lay_out(scores, self.examples)
        activation = features.captured()
        (gradient,) = gradients(scores, (activation,))
        if gradient is None:
            raise PerBatch
        return activation.detach(), gradient

    def found(self, find: Callable[[], Found]) -> Found:
        """Return what a function of this call finds, recorded by autograd where a graph is kept."""
        return recorded(find) if self.keeps_graph else find()

    def _independent(self, points: Callable[[Tensor, Tensor], Tensor]) -> bool:
        device = self.inputs[0].device
        return independent(
            self.forward,
            lambda rows, copies: self.unpack(points(rows, copies)),
            self.copies,
            self.examples,
            self.further,
            device,
        )

    def _may_split(self) -> bool:
        """Say whether rows of a batch may run in different passes, now that memory has run out."""
        if self._splits is None:
            images = self.pack(self.inputs)
            self._splits = self.examples > 1 and self._independent(lambda rows, _copies: images[rows])
        return self._splits

    def _model(self) -> Callable[..., Any]:
        forward = self.forward
        if self.prepared:
            return forward
        fixed = self.fixed

        def model_of(forward: Callable[..., Any]) -> Callable[..., Any]:
            asked = takes_inputs(forward)

            def model(images: Tensor, *further: Any) -> Any:
                if images.shape[0] % self.examples and fixed is None and not self._may_split():
                    raise RuntimeError(
                        f"{self.where}: {self.examples} examples of a model whose rows depend on each other must fit into "
                        f"memory together, and {self.copies} times as many do not: fewer may (internal_batch_size)"
                    )
                inputs = self.unpack(images)
                if not self.as_is and self.copies == 1 and len(images) == self.examples:
                    inputs = tuple(laid_out(one, given) for one, given in zip(inputs, self.inputs, strict=True))
                if not asked:
                    return forward()
                # the plan has set the arithmetic
                return forward(*(tuple(one[0] for one in inputs) if self.together else inputs), *further)

            model.__wrapped__ = forward  # type: ignore[attr-defined]  # as functools.wraps says it
            return model

        found = model_of(forward)
        eager = getattr(forward, "_orig_mod", None)
        if eager is not None:  # where hooks and rules of ReLUs reach its layers
            found._orig_mod = model_of(eager)  # type: ignore[attr-defined]
        return found


def _otherwise_by_a_plan() -> contextlib.suppress:
    """Return the context of a pass without a plan: where it fails, a plan finds what it does not, or says why."""
    return contextlib.suppress(PerBatch, NotApplicable, RuntimeError, MemoryError, OSError)


def is_differentiable(dtype: torch.dtype) -> bool:
    """Whether autograd differentiates with respect to tensors of this dtype."""
    return dtype.is_floating_point or dtype.is_complex


def laid_out(tensor: Tensor, given: Tensor) -> Tensor:
    """Return a tensor with its dimensions in memory in the order in which those of `given` are."""
    if given.is_contiguous():
        return tensor
    strides = given.stride()
    order = sorted(range(given.ndim), key=lambda dimension: -strides[dimension])
    return tensor.permute(order).contiguous().permute([order.index(dimension) for dimension in range(given.ndim)])


def floating(tensor: Tensor) -> Tensor:
    """Return a tensor of whole numbers as one of the default floating dtype."""
    return tensor if is_differentiable(tensor.dtype) else tensor.to(torch.get_default_dtype())


def compute_gradients(
    forward_fn: Callable[..., Any], inputs: Inputs, target_ind: Target = None, additional_forward_args: object = None
) -> tuple[Tensor, ...]:
    """Return the gradient of the selected output with respect to each input."""
    call = Call("pysal.captum.compute_gradients", forward_fn, inputs, target_ind, additional_forward_args)
    return call.gradients()
