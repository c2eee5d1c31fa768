"""What moves numbers and changes none, sums and products with constants, and layer norms, without autograd.

Under autograd each such node would cost as much as a small layer, and the parts of one value a gradient of the whole each.
A gradient (T N, ...) holds T of them for a value (N, ...), one after the other, N being the value's first size.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal.engine.graph.fold import module_of
from pysal.engine.graph.shapes import SHAPE
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.tape.gradients import Gradients
from pysal.engine.tape.operators import AutogradOperator

_RESHAPES = (
    *(torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze),
    *("reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", torch.ops.aten.unflatten.int),
)
_COPIES = ("contiguous", "clone", torch.clone, torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)
_TRANSPOSITIONS = (torch.transpose, torch.swapaxes, "transpose", "swapaxes")
_PERMUTATIONS = (torch.permute, "permute")
_ROLLS = (torch.roll, "roll", torch.ops.aten.roll.default)
_PARTS = (operator.getitem, torch.select, torch.narrow, "select", "narrow")
_ATEN_PARTS = (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.narrow.default)
_SEVERAL = (torch.unbind, torch.chunk, torch.split, "unbind", "chunk", "split")
_ATEN_SEVERAL = (torch.ops.aten.unbind.int, torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)
_SUMS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_ABOUT_SHAPES = ("size", "dim", "ndimension", "numel", torch.ops.aten.sym_size.int)
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")

# What a node is called with, and the shape and strides of its first argument.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def is_about_shapes(node: fx.Node) -> bool:
    """Say whether a node asks for the shape of a value, or what else is no number in it."""
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.op != "get_attr" and node.target in _ABOUT_SHAPES


class PlainOperator(AutogradOperator):
    """A node through which no gradient goes: shapes, constants, and what is computed of them."""

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        return self.call(*self.given(values)), None

    def given(self, values: dict[fx.Node, Any]) -> Call:
        """Return the arguments and keywords that the node is called with."""
        args: Any
        kwargs: Any
        args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in (self.node.args, self.node.kwargs))
        return args, kwargs

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the node does."""
        return getattr(self._interpreter, self.node.op)(self.node.target, args, kwargs)


@dataclass(frozen=True)
class _Seen:
    """What a view keeps: no number."""

    call: Call
    rows: int  # the value's first size
    shape: torch.Size  # of the first argument, like its strides
    strides: tuple[int, ...]
    same: bool  # whether the value is the whole first argument, as it lies


class ViewOperator(PlainOperator):
    """A node that gives the numbers of its first argument, or some of them, in another shape or order."""

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        call, source = self.given(values), values[self.inputs[0]]
        if not isinstance(source, Tensor) or not self.fits(call, source):
            return AutogradOperator.run(self, values, needed)
        value = self.call(*call)
        shape, strides = source.shape, source.stride()
        if not isinstance(value, Tensor):
            return value, _Seen(call, 1, shape, strides, same=False)
        same = value.shape == shape and value.stride() == strides and value.data_ptr() == source.data_ptr()
        return value, _Seen(call, len(value), shape, strides, same)

    def fits(self, call: Call, source: Tensor) -> bool:
        """Say whether the node is as it is expected to be when it is called so."""
        return True

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Seen):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        times = len(grad) // max(saved.rows, 1)
        found = self.back(grad if times == 1 else grad.unflatten(0, (times, saved.rows)), saved, times > 1)
        found = found if times == 1 else found.flatten(0, 1)
        gradients.add(self.inputs[0], found, owned=owned or found.data_ptr() != grad.data_ptr())

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """Return the gradient of the first argument from that of the value, both with a dimension more if there are several."""
        raise NotImplementedError

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(()) if isinstance(saved, _Seen) else super().graphs(saved)


class ReshapeOperator(ViewOperator):
    """The same numbers in the same order."""

    def fits(self, call: Call, source: Tensor) -> bool:
        """See `ViewOperator`: a view may be of another dtype."""
        return not any(isinstance(each, torch.dtype) for each in (*call[0], *call[1].values()))

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """See `ViewOperator`."""
        return grad.reshape(*grad.shape[:several], *saved.shape)


class CopyOperator(ViewOperator):
    """The same numbers in the same shape; with a copy only where somebody may write into it.

    Args:
        sharing: whether the copy may be left out.
    """

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, sharing: bool) -> None:
        super().__init__(interpreter, node)
        self.sharing = sharing

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `PlainOperator`."""
        return args[0] if self.sharing and self.node.target in ("clone", torch.clone) else super().call(args, kwargs)

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """See `ViewOperator`."""
        return grad


class PermutationOperator(ViewOperator):
    """The same numbers with dimensions in another order.

    Args:
        order: of the dimensions.
    """

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, order: Sequence[int]) -> None:
        super().__init__(interpreter, node)
        self.inverse = [list(order).index(dim) for dim in range(len(order))]

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """See `ViewOperator`."""
        return grad.permute(0, *(dim + 1 for dim in self.inverse)) if several else grad.permute(self.inverse)


class RollOperator(ViewOperator):
    """Numbers moved around along some dimensions.

    Args:
        shifts: how far.
        dims: along which.
    """

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, shifts: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__(interpreter, node)
        self.shifts, self.dims = shifts, dims

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """See `ViewOperator`."""
        dims = [dim + several if dim >= 0 else dim for dim in self.dims]
        return torch.roll(grad, [-shift for shift in self.shifts], dims)


class PadOperator(ViewOperator):
    """A frame around a value; none where the network finds, in its pass, that none is needed.

    Args:
        sharing: whether the value itself may stand for a copy of it.
    """

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, sharing: bool) -> None:
        super().__init__(interpreter, node)
        self.sharing = sharing

    def fits(self, call: Call, source: Tensor) -> bool:
        """See `ViewOperator`."""
        return all(isinstance(side, int) and side >= 0 for side in call[0][1])

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `PlainOperator`."""
        return args[0] if self.sharing and not any(args[1]) else super().call(args, kwargs)

    def back(self, grad: Tensor, saved: _Seen, several: bool) -> Tensor:
        """See `ViewOperator`."""
        sides = saved.call[0][1]
        for number in range(len(sides) // 2):
            dim = len(saved.shape) - 1 - number
            grad = grad.narrow(dim + several, sides[2 * number], saved.shape[dim])
        return grad


class PartOperator(ViewOperator):
    """Some of the numbers, those of a slice or at an index, as a view."""

    def fits(self, call: Call, source: Tensor) -> bool:
        """See `ViewOperator`."""
        given = call[0][1:] if self.node.target is not operator.getitem else _as_tuple(call[0][1])
        return all(each is None or each is Ellipsis or type(each) in (int, slice) for each in given)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`: a part is added to what the other parts of its value have given so far."""
        if not isinstance(saved, _Seen):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        source = self.inputs[0]
        if saved.same:
            gradients.add(source, grad, owned=owned)
            return
        args, kwargs = saved.call
        times = len(grad) // max(saved.rows, 1)
        whole = gradients.pop_owned(source)
        first = whole is None
        if whole is None:
            whole = _like(saved, times, grad).zero_()
        whole = whole.unflatten(0, (times, saved.shape[0]))
        for one, part in zip(whole, grad.unflatten(0, (times, saved.rows)), strict=True):
            own = self.call((one, *args[1:]), kwargs)
            own.copy_(part) if first else own.add_(part)
        gradients.add(source, whole.flatten(0, 1), owned=True)


class SeveralOperator(ViewOperator):
    """Parts of a value, side by side along a dimension, as views."""

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Seen):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        args, kwargs = saved.call
        source = torch.empty_strided(saved.shape, saved.strides, device="meta")
        sizes = [len(part) for part in self.call((source, *args[1:]), kwargs)]
        parts = [grad, *(gradients.pop(self.node, position)[0] for position in range(1, len(sizes)))]
        known, rows = next((part, size) for part, size in zip(parts, sizes, strict=True) if part is not None)
        times = len(known) // max(rows, 1)
        whole = _like(saved, times, known)
        for number, one in enumerate(whole.unflatten(0, (times, saved.shape[0]))):
            for place, part, size in zip(self.call((one, *args[1:]), kwargs), parts, sizes, strict=True):
                place.zero_() if part is None else place.copy_(part[number * size : (number + 1) * size])
        gradients.add(self.inputs[0], whole, owned=True)


class OneOfSeveralOperator(PlainOperator):
    """One of the tensors that a node before returns."""

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        assert grad is not None
        gradients.add(self.inputs[0], grad, owned=owned, position=self.node.args[1])  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Other:
    """What a product keeps: its other factor."""

    factor: Any


class WithConstantOperator(PlainOperator):
    """The sum or the product of a value and what does not depend on the image.

    Args:
        source: the value.
        other: the other; a node or a number.
        product: whether it is a product.
    """

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, source: fx.Node, other: Any, product: bool) -> None:
        super().__init__(interpreter, node)
        self.source, self.other, self.product = source, other, product

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        other = values[self.other] if isinstance(self.other, fx.Node) else self.other
        value = self.call(*self.given(values))
        if value.shape != values[self.source].shape or value.dtype != values[self.source].dtype:
            return AutogradOperator.run(self, values, needed)
        return value, _Other(other if self.product else None)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Other):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        if saved.factor is not None:
            factor = saved.factor
            rows = len(factor) if isinstance(factor, Tensor) and factor.ndim == grad.ndim else 1
            if rows not in (1, len(grad)):
                factor = factor.repeat(len(grad) // rows, *[1] * (grad.ndim - 1))
            grad, owned = (grad.mul_(factor) if owned else (grad * factor).to(gradients.dtype)), True
        gradients.add(self.source, grad, owned=owned)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(()) if isinstance(saved, _Other) else super().graphs(saved)


@dataclass(frozen=True)
class _Normed:
    """What a layer norm keeps: its input, mean and one over the standard deviation of each row."""

    input: Tensor
    mean: Tensor
    scale: Tensor


class LayerNormOperator(PlainOperator):
    """A layer norm whose weights are constants.

    Args:
        shape: of what is normalised together.
        weight: a tensor or the node that fetches it, or None; like `bias`.
        bias: see `weight`.
        eps: added to the variance.
    """

    def __init__(
        self, interpreter: fx.Interpreter, node: fx.Node, shape: Sequence[int], weight: Any, bias: Any, eps: float
    ) -> None:
        super().__init__(interpreter, node)
        self.shape, self.weight, self.bias, self.eps = list(shape), weight, bias, eps

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        input = values[self.inputs[0]]
        weight, bias = (values[each] if isinstance(each, fx.Node) else each for each in (self.weight, self.bias))
        value, mean, scale = torch.native_layer_norm(input, self.shape, weight, bias, self.eps)
        return value, (_Normed(input, mean, scale), weight, bias)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        assert grad is not None
        kept, weight, bias = saved
        parts = []
        for part in grad.split(len(kept.input)):
            own = part.to(kept.input.dtype).contiguous()
            found, _, _ = torch.ops.aten.native_layer_norm_backward(
                own, kept.input, self.shape, kept.mean, kept.scale, weight, bias, [True, False, False]
            )
            parts.append(found.to(gradients.dtype))
        gradients.add(self.inputs[0], parts[0] if len(parts) == 1 else torch.cat(parts), owned=True)

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        kept, _, _ = saved
        return kept.input, kept.mean, kept.scale

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(())


def _like(saved: _Seen, times: int, grad: Tensor) -> Tensor:
    """Return memory for a gradient (T N, ...) that lies as the value itself does, where there is one for each image."""
    expected = 1
    for stride, size in sorted(zip(saved.strides, saved.shape, strict=True)):
        if size != 1 and stride != expected:
            break
        expected *= size
    else:
        if times == 1:
            return torch.empty_strided(saved.shape, saved.strides, dtype=grad.dtype, device=grad.device)
    return torch.empty((times * saved.shape[0], *saved.shape[1:]), dtype=grad.dtype, device=grad.device)


def _as_tuple(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def view_operator(
    graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node, needed: set[fx.Node], *, sharing: bool
) -> AutogradOperator | None:
    """Return what a node does that is one of the kinds here; None for another.

    Args:
        graph: whose node it is.
        interpreter: of the graph.
        node: the node.
        needed: the nodes whose gradients are of use.
        sharing: whether a value may stand for a copy of it, as no node writes into one.
    """
    if node not in needed:
        return PlainOperator(interpreter, node)
    module = module_of(graph, node)
    if type(module) is nn.LayerNorm and len(node.args) == 1 and not node.kwargs and not module._forward_hooks:
        shape = list(module.normalized_shape)
        return LayerNormOperator(interpreter, node, shape, module.weight, module.bias, module.eps)
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    first: Any = node.args[0]
    if node.target is operator.getitem and first.target in (*_SEVERAL, *_ATEN_SEVERAL) and isinstance(node.args[1], int):
        is_tensor = len(first.args[0].meta.get(SHAPE, ())) > 0
        return OneOfSeveralOperator(interpreter, node) if is_tensor and node.args[1] >= 0 else None
    if node.target in (*_SUMS, *_PRODUCTS) and len(node.args) == 2 and not node.kwargs and node.meta.get(SHAPE):
        for source, other in (node.args, node.args[::-1]):
            if source in needed and source.meta.get(SHAPE) and (other not in needed if isinstance(other, fx.Node) else True):  # type: ignore[union-attr]
                return WithConstantOperator(interpreter, node, source, other, node.target in _PRODUCTS)  # type: ignore[arg-type]
        return None
    if not isinstance(first, fx.Node) or first not in needed:
        return None
    rank = len(first.meta.get(SHAPE, ()))
    if not rank or any(each in needed for each in node.all_input_nodes if each is not first):
        return None
    if node.target in (*_SEVERAL, *_ATEN_SEVERAL):
        return SeveralOperator(interpreter, node)
    if not node.meta.get(SHAPE):
        return None
    if node.target in _RESHAPES:
        return ReshapeOperator(interpreter, node)
    if node.target in _COPIES:
        return CopyOperator(interpreter, node, sharing)
    if node.target in (*_PARTS, *_ATEN_PARTS):
        return None if node.kwargs else PartOperator(interpreter, node)
    if node.target is F.pad and len(node.args) >= 2 and isinstance(node.args[1], (tuple, list)):
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        return PadOperator(interpreter, node, sharing) if mode == "constant" else None
    if node.target is F.layer_norm:
        return _layer_norm(interpreter, node)
    return _moved(interpreter, node, rank)


def _layer_norm(interpreter: fx.Interpreter, node: fx.Node) -> LayerNormOperator | None:
    given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5}
    given |= dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args, strict=False)) | node.kwargs
    shape, eps = given.get("normalized_shape"), given["eps"]
    if not isinstance(shape, (tuple, list)) or not all(isinstance(side, int) for side in shape) or isinstance(eps, fx.Node):
        return None
    return LayerNormOperator(interpreter, node, shape, given["weight"], given["bias"], eps)


def _moved(interpreter: fx.Interpreter, node: fx.Node, rank: int) -> ViewOperator | None:
    """Return what a node does that changes the order of dimensions, or moves numbers along some."""
    rest: list[Any] = list(node.args[1:])
    names: tuple[str, ...] = ()
    if node.target in _TRANSPOSITIONS:
        names = ("dim0", "dim1")
    elif node.target in _PERMUTATIONS:
        names = ("dims",)
    elif node.target in _ROLLS:
        names = ("shifts", "dims")
    rest += [node.kwargs[name] for name in names[len(rest) :] if name in node.kwargs]
    if node.target in _PERMUTATIONS:
        dims: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        if len(dims) == rank and all(isinstance(dim, int) for dim in dims):
            return PermutationOperator(interpreter, node, [dim % rank for dim in dims])
    if node.target in _TRANSPOSITIONS and len(rest) == 2 and all(isinstance(dim, int) for dim in rest):
        order = list(range(rank))
        first, second = (dim % rank for dim in rest)
        order[first], order[second] = second, first
        return PermutationOperator(interpreter, node, order)
    if node.target in _ROLLS and len(rest) == 2:
        shifts: Any
        shifts, dims = (each if isinstance(each, (tuple, list)) else [each] for each in rest)
        if len(shifts) == len(dims) > 0 and all(isinstance(each, int) for each in (*shifts, *dims)):
            return RollOperator(interpreter, node, shifts, dims)
    return None
