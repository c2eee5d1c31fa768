"""Smooth activations and squeeze-and-excitation on the tape.

While rules of ReLUs are being recorded the nodes run under autograd, where the rules meet them (`engine.model.relu_rules`).
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.graph.activations import Activation, activation_of, available, runs
from pysal.engine.graph.fold import module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.lowered import is_mean_of_map
from pysal.engine.graph.shapes import SHAPE
from pysal.engine.model.relu_rules import ReluRule, current_rules
from pysal.engine.tape.gradients import Gradients
from pysal.engine.tape.operators import AutogradOperator, Operator

# From the means to the gates: two convolutions, their activations, and what else a network may put between them.
MOST_STEPS = 8


@dataclass(frozen=True)
class _Input:
    """What an activation keeps."""

    value: Tensor


class ActivationOperator(AutogradOperator):
    """An activation of which the kernels know the derivative."""

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node, activation: Activation) -> None:
        super().__init__(interpreter, node)
        self.activation = activation

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        input = values[self.inputs[0]]
        if current_rules() is not None or not isinstance(input, Tensor) or not runs(input):
            return super().run(values, needed)
        return self.activation.run(input), _Input(input)

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        if not isinstance(saved, _Input):
            super().pull(gradients, saved, grad, rule, owned=owned)
            return
        assert grad is not None
        if grad.dtype != torch.float32:
            grad, owned = grad.float(), True
        own = grad if owned else grad.clone()
        gradients.add(self.inputs[0], self.activation.pull_back(own, saved.value).to(gradients.dtype), owned=True)

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        return (saved.value,) if isinstance(saved, _Input) else super().parts(saved)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        return iter(()) if isinstance(saved, _Input) else super().graphs(saved)


@dataclass(frozen=True)
class _Squeezed:
    """What a gated map keeps: its input before the activation, its gates (N, C), and what each node of the gates' way keeps."""

    input: Tensor
    gate: Tensor
    entries: Sequence[Any]


class SqueezeOperator(Operator):
    """Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507): an activation times gates that are made from its means.

    The map after the activation is never written down: it is made anew where it is read.

    Args:
        source: what the activation is of.
        activation: the identity where there is none.
        members: the nodes in order: the activation if there is one, the mean, what makes gates of it, the product.
        way: the operators of what makes gates, by their nodes, in order.
    """

    def __init__(
        self, source: fx.Node, activation: Activation, members: Sequence[fx.Node], way: dict[fx.Node, Operator]
    ) -> None:
        super().__init__([source])
        self.activation, self.members, self.way = activation, members, way
        self.mean = next(iter(way.values())).inputs[0]
        self._needed = {self.mean, *way}

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """See `Operator`."""
        input: Tensor = values[self.inputs[0]]
        images, channels, height, width = input.shape
        means = self.activation.sums(input).div_(height * width)
        inner: dict[fx.Node, Any] = {self.mean: means.view(images, channels, 1, 1)}
        entries = []
        for node, step in self.way.items():
            inner[node], entry = step.run(inner, self._needed)
            entries.append(entry)
        gate = inner[node].reshape(images, channels).contiguous()
        return self.activation.run(input, gate), _Squeezed(input, gate, entries)

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        input, gate = saved.input, saved.gate
        rows, channels, height, width = grad.shape
        inner = Gradients(self._needed, {}, gradients.dtype)
        *_, last = self.way
        inner.add(last, self.activation.sums(input, grad).view(rows, channels, 1, 1), owned=True)
        for (node, step), entry in zip(reversed(self.way.items()), reversed(saved.entries), strict=True):
            held, held_is_owned = inner.pop(node)
            own = step.gates(entry)
            if held is not None and own is not None:
                held, held_is_owned = own.mask(held, rule, owned=held_is_owned), True
            if held is not None:
                step.pull(inner, entry, held, rule, owned=held_is_owned)
        means, _ = inner.pop(self.mean)
        added = None if means is None else means.reshape(rows, channels).div(height * width).contiguous()
        own_grad = grad if owned else grad.clone(memory_format=torch.channels_last)
        gradients.add(self.inputs[0], self.activation.pull_back(own_grad, input, gate, added), owned=True)

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        inner = (step.parts(entry) for step, entry in zip(self.way.values(), saved.entries, strict=True))
        return (saved.input, saved.gate, *(part for parts in inner for part in parts))

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        for step, entry in zip(self.way.values(), saved.entries, strict=True):
            yield from step.graphs(entry)


def smooth_operator(graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node) -> ActivationOperator | None:
    """Return what a node does that is an activation of which the kernels know the derivative; None for another."""
    activation = activation_of(graph, node)
    return None if activation is None else ActivationOperator(interpreter, node, activation)


def squeeze_operator(
    graph: fx.GraphModule, operators: dict[fx.Node, Operator], nodes: Sequence[fx.Node], position: int
) -> SqueezeOperator | None:
    """Return squeeze-and-excitation that ends with a node; None where it does not, or where something else sees a part of it.

    Args:
        graph: whose nodes they are.
        operators: of its nodes, by themselves.
        nodes: of the graph in order.
        position: of the node.
    """
    product = nodes[position]
    if not available() or not _is_product(product):
        return None
    for source, gate in (product.args, product.args[::-1]):
        assert isinstance(source, fx.Node)
        assert isinstance(gate, fx.Node)
        shape, way = source.meta.get(SHAPE, ()), [gate]
        if len(shape) != 4 or gate.meta.get(SHAPE) != (*shape[:2], 1, 1):
            continue
        while len(way) <= MOST_STEPS and way[0] in operators and len(operators[way[0]].inputs) == 1:
            if way[0].meta.get(SHAPE, ())[2:] != (1, 1) or len(way[0].users) != 1:
                break
            if is_mean_of_map(graph, way[0]) and way[0].args[0] is source:
                return _squeezed(graph, operators, [*way, product], source, nodes[: position + 1])
            way.insert(0, operators[way[0]].inputs[0])
    return None


def _squeezed(
    graph: fx.GraphModule,
    operators: dict[fx.Node, Operator],
    members: list[fx.Node],
    source: fx.Node,
    nodes: Sequence[fx.Node],
) -> SqueezeOperator | None:
    mean, *way, product = members
    if not way or set(source.users) != {mean, product}:
        return None
    activation, own = Activation("identity"), operators.get(source)
    if isinstance(own, ActivationOperator):
        activation, members, source = own.activation, [source, *members], own.inputs[0]
    if list(nodes[-len(members) :]) != members or len(source.meta.get(SHAPE, ())) != 4:
        return None  # something runs between them, which would be put off
    modules = [module_of(graph, node) for node in way]
    weights = [module.convolution.weight for module in modules if isinstance(module, FusedConvolution)]
    if not all(runs(weight) for weight in weights):
        return None
    return SqueezeOperator(source, activation, members, {node: operators[node] for node in way})


def _is_product(node: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    if node.op == "call_method":
        return node.target == "mul"
    return node.op == "call_function" and node.target in (operator.mul, torch.mul)
