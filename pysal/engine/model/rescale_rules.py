"""DeepLIFT's Rescale rule at the operator: whatever spelling, module or function a network uses.

A pass over the baselines notes what went into every nonlinear function and what came out. The pass over the inputs then meets
the same functions in the same order, and on the way back each has the slope between the two points in place of its derivative.
Nothing hangs on modules, so one that runs twice, and a function, are as any other; nor on where an activation keeps its batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pysal._checks import refuse, warn
from pysal._library import widest
from pysal.engine.model.gradients import gradients
from pysal.engine.running.states import FunctionMode

# Functions of one number each.
_POINTWISE = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.threshold),
    *(F.elu, F.elu_, F.selu, torch.selu, torch.selu_, F.celu, torch.celu, torch.celu_, F.leaky_relu, F.leaky_relu_),
    *(F.prelu, torch.prelu, Tensor.prelu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.logsigmoid, F.softplus),
    *(F.softsign, F.tanhshrink, F.hardshrink, torch.hardshrink, F.softshrink),
    *(F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, torch.special.expit),
    *(F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, torch.exp, Tensor.exp, torch.log, Tensor.log),
    *(torch.sqrt, Tensor.sqrt, torch.square, Tensor.square, torch.abs, Tensor.abs, torch.sin, Tensor.sin),
    *(torch.cos, Tensor.cos, torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min, torch.pow, Tensor.pow),
    *(Tensor.__pow__, Tensor.__rdiv__, torch.reciprocal, Tensor.reciprocal, torch.rsqrt, Tensor.rsqrt),
}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}
# Functions that pick one of several numbers.
_PICKING = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.amax, Tensor.amax),
}
_IN_PLACE = {one for one in _POINTWISE if (name := getattr(one, "__name__", "")).endswith("_") and not name.endswith("__")}
# What autograd calls a function of those above that no rule replaced, inside what torch runs in one piece.
_UNREACHED = {
    **{
        f"{name}Backward{number}": name
        for name in ("Relu", "Sigmoid", "Tanh", "Gelu", "Silu", "LeakyRelu")
        for number in (0, 1)
    },
    "CompiledFunctionBackward": "what torch.compile made",
    "torch::jit::(anonymous namespace)::DifferentiableGraphBackward": "TorchScript",
    "CheckpointFunctionBackward": "a reentrant checkpoint",
}


# Of the integral along which a softmax has its mean derivative.
LEAST_NODES, MOST_NODES, NODES_PER_UNIT = 32, 512, 3
_leggauss = functools.lru_cache(np.polynomial.legendre.leggauss)


class RescaleRules:
    """Runs a function at baselines, then at inputs, so that gradients of the second pass are DeepLIFT's multipliers.

    Args:
        where: the public name of the method, for errors.
        eps: the smallest difference of an activation from the baseline's that is divided by; below it, and at the
            baseline, the derivative stands.
    """

    def __init__(self, where: str, eps: float) -> None:
        self.where, self.eps = where, eps

    def run(self, function: Callable[..., Any], inputs: tuple[Any, ...], baselines: tuple[Any, ...]) -> Any:
        """Return `function(*inputs)`, whose backward pass follows the rule, in a `restoring` function.

        Raises:
            ValueError: inputs and baselines do not meet the same functions.
        """
        notes: list[_Note] = []
        with torch.no_grad(), _Noting(notes):
            function(*baselines)
        rules = _Rescaling(self, notes)
        with rules:
            output = function(*inputs)
        if rules.met != len(notes):
            rules.differ("fewer")
        if isinstance(output, Tensor):
            missed = _unreached(output)
            if missed:
                warn(f"{self.where}: the rule does not reach {', '.join(missed)}, where plain gradients stand in its place")
        return output


@dataclass(frozen=True)
class _Called:
    """A call of a function that has a rule.

    Attributes:
        func: the function.
        input: what it is given.
        rule: which rule it has.
        run: the function of that input alone, which leaves the input as it is.
        in_place: whether the model has the input overwritten.
        dim: of a softmax.
    """

    func: Any
    input: Tensor
    rule: Literal["slope", "choice", "softmax", "log_softmax"]
    run: Callable[[Tensor], Tensor]
    in_place: bool
    dim: int = -1


@dataclass(frozen=True)
class _Note:
    """The input and the output of a function at the baselines, with the graph between them where it makes a choice."""

    func: Any
    input: Tensor
    output: Tensor


class _Noting(FunctionMode):
    def __init__(self, notes: list[_Note]) -> None:
        super().__init__()
        self.notes = notes

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = _call_of(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        leaf, output = _apart(call, graph=call.rule == "choice")
        self.notes.append(_Note(func, leaf, output))
        return _handed_on(call, output.detach().clone())


class _Rescaling(FunctionMode):
    def __init__(self, rules: RescaleRules, notes: list[_Note]) -> None:
        super().__init__()
        self.rules, self.notes, self.met = rules, notes, 0

    def differ(self, what: str) -> NoReturn:
        requirement = "take the same way through the model as the inputs"
        refuse(self.rules.where, "baselines", requirement, f"{what} nonlinear functions on the way of the inputs")

    def replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = _call_of(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        if self.met == len(self.notes):
            self.differ("more")
        note = self.notes[self.met]
        self.met += 1
        if note.func is not func or note.input.shape != call.input.shape:
            self.differ("other")
        return _handed_on(call, _Rescaled.apply(call.input, call, note, self.rules.eps))  # type: ignore[no-untyped-call]


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, call: _Called, note: _Note, eps: float) -> Tensor:
        ctx.leaf, ctx.output = _apart(call, graph=call.rule == "choice")
        ctx.call, ctx.note, ctx.eps = call, note, eps
        return ctx.output.detach().clone()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), call, note, leaf, output = grads, ctx.call, ctx.note, ctx.leaf, ctx.output
        point, reference = leaf.detach(), note.input.detach()
        if call.rule in ("softmax", "log_softmax"):
            wide = widest(grad.device) if grad.dtype != torch.float64 else grad.dtype
            found = _softmax(grad.to(wide), point.to(wide), reference.to(wide), call.dim, log=call.rule == "log_softmax")
            return found.to(grad.dtype), None, None, None
        if call.rule == "slope":
            shares = grad * (output - note.output)
        else:  # what rises above the other's choice belongs to what was chosen here, the rest to what was chosen there
            here, there = output.detach(), note.output.detach()
            top = torch.maximum(here, there)
            shares = _back(output, leaf, grad * (top - there)) + _back(note.output, note.input, grad * (here - top))
        away = point - reference
        near = away.abs() < ctx.eps if ctx.eps > 0 else away == 0
        if near.device.type == "cpu" and not near.any():  # which a GPU would wait for
            return shares / away, None, None, None
        if call.rule == "slope":
            leaf, output = _apart(call, graph=True, at=leaf)
        return torch.where(near, _back(output, leaf, grad), shares / away), None, None, None


def _back(output: Tensor, leaf: Tensor, grad: Tensor) -> Tensor:
    (found,) = gradients(output, (leaf,), grad, keep_graph=True)
    assert found is not None  # the function is of that leaf
    return found


def _softmax(grad: Tensor, point: Tensor, reference: Tensor, dim: int, *, log: bool) -> Tensor:
    """Return the mean derivative of a softmax, or of its logarithm, on the straight way between two points.

    A function of one number has its slope for mean derivative; of several numbers it is what keeps the sum, and, unlike shares
    of each output for its own input alone, is not large where an input stays and others move. Gauss-Legendre nodes for each
    unit by which differences change: poles lie no nearer than pi over that.
    """
    away = point - reference
    spread = float((away.amax(dim) - away.amin(dim)).amax()) if away.numel() else 0.0
    number = MOST_NODES if not spread * NODES_PER_UNIT < MOST_NODES else max(LEAST_NODES, math.ceil(spread * NODES_PER_UNIT))
    total = torch.zeros_like(point)
    for node, weight in zip(*_leggauss(number), strict=True):
        share = torch.softmax(reference + (1 + node) / 2 * away, dim)
        total += weight / 2 * (share if log else share * (grad - (share * grad).sum(dim, keepdim=True)))
    return grad - total * grad.sum(dim, keepdim=True) if log else total


def _apart(call: _Called, *, graph: bool, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a copy of a call's input, as it is or as it was, and the function's output of that, with the graph if asked."""
    with torch.set_grad_enabled(graph):
        leaf = (call.input if at is None else at).detach().clone().requires_grad_(graph)
        return leaf, call.run(leaf)


def _handed_on(call: _Called, output: Tensor) -> Tensor:
    return call.input.copy_(output) if call.in_place else output


def _call_of(func: Any, args: Any, kwargs: Any) -> _Called | None:
    """Return a call of a function that has a rule, None for any other."""
    rule: Literal["slope", "choice", "softmax", "log_softmax"]
    if func in _POINTWISE:
        rule = "slope"
    elif func in _PICKING:
        rule = "choice"
    elif func in _SOFTMAX or func in _LOG_SOFTMAX:
        rule = "softmax" if func in _SOFTMAX else "log_softmax"
    else:
        return None
    named = dict(kwargs)
    input, *rest = args if args else (named.pop("input", None),)
    in_place = func in _IN_PLACE or bool(named.pop("inplace", False))
    if func in _WITH_INPLACE and len(rest) == _WITH_INPLACE[func]:
        in_place = bool(rest.pop()) or in_place
    others = [one for one in (*rest, *named.values()) if isinstance(one, Tensor)]
    if not isinstance(input, Tensor) or not input.is_floating_point() or named.get("return_indices"):
        return None
    if others and func not in _WITH_WEIGHT:  # which the model may have made of the inputs
        return None
    dim = named.get("dim", rest[0] if rest else None)
    if "softmax" in rule and not isinstance(dim, int):
        return None
    overwrites = func in _IN_PLACE

    def run(leaf: Tensor) -> Tensor:
        found: Tensor = func(leaf.clone() if overwrites else leaf, *rest, **named)
        return found

    return _Called(func, input, rule, run, in_place, dim if isinstance(dim, int) else -1)


_WITH_WEIGHT = {F.prelu, torch.prelu, Tensor.prelu}
# Functions that may be told by position to overwrite their input, the last of so many further arguments.
_WITH_INPLACE: dict[Any, int] = {F.relu: 1, F.relu6: 1, F.selu: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1}
_WITH_INPLACE |= {F.elu: 2, F.celu: 2, F.leaky_relu: 2, F.hardtanh: 3, F.threshold: 3}


def _unreached(output: Tensor) -> list[str]:
    """Return the names of nonlinear functions in the graph behind an output that run without the rule."""
    seen, left, found = set(), [output.grad_fn], dict[str, None]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _UNREACHED:
            found[_UNREACHED[node.name()]] = None
        left += [one for one, _ in node.next_functions]
    return list(found)
