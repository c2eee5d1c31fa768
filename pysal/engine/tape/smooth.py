"""Smooth activations and squeeze-and-excitation on the tape.

While rules of ReLUs are being recorded the nodes run under autograd, where the rules meet them (`engine.model.relu_rules`).
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pysal.engine.graph.activations import Activation, activation_of, available, runs
from pysal.engine.graph.fold import module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.lowered import is_mean_of_map
from pysal.engine.graph.shapes import SHAPE
from pysal.engine.graph.smooth_residual import Entered, SmoothResidual
from pysal.engine.model.relu_rules import ReluRule, current_rules
from pysal.engine.tape.gradients import Gradients
from pysal.engine.tape.operators import AutogradOperator, FusedOperator, Operator

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
        gate, entries = self.gate(self.activation.sums(input), input.shape[2] * input.shape[3])
        return self.activation.run(input, gate), _Squeezed(input, gate, entries)

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        input, gate = saved.input, saved.gate
        sums = self.activation.sums(input, grad)
        added = self.pull_gate(sums, saved.entries, input.shape[2] * input.shape[3], rule, gradients.dtype)
        own_grad = grad if owned else grad.clone(memory_format=torch.channels_last)
        gradients.add(self.inputs[0], self.activation.pull_back(own_grad, input, gate, added), owned=True)

    def gate(self, sums: Tensor, pixels: int) -> tuple[Tensor, list[Any]]:
        """Return the gates (N, C) from the sums of maps (N, C), and what each node of their way keeps."""
        inner: dict[fx.Node, Any] = {self.mean: sums.div_(pixels)[:, :, None, None]}
        entries = []
        for node, step in self.way.items():
            inner[node], entry = step.run(inner, self._needed)
            entries.append(entry)
        return inner[node].reshape(sums.shape).contiguous(), entries

    def pull_gate(self, grad: Tensor, entries: Sequence[Any], pixels: int, rule: ReluRule, dtype: torch.dtype) -> Tensor | None:
        """Return the gradient of each pixel of the maps (T N, C) from that of the gates (T N, C); None where it is zero."""
        inner = Gradients(self._needed, {}, dtype)
        *_, last = self.way
        inner.add(last, grad[:, :, None, None], owned=True)
        for (node, step), entry in zip(reversed(self.way.items()), reversed(entries), strict=True):
            held, held_is_owned = inner.pop(node)
            own = step.gates(entry)
            if held is not None and own is not None:
                held, held_is_owned = own.mask(held, rule, owned=held_is_owned), True
            if held is not None:
                step.pull(inner, entry, held, rule, owned=held_is_owned)
        means, _ = inner.pop(self.mean)
        return None if means is None else means.reshape(grad.shape).div(pixels).contiguous()

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        inner = (step.parts(entry) for step, entry in zip(self.way.values(), saved.entries, strict=True))
        return (saved.input, saved.gate, *(part for parts in inner for part in parts))

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        for step, entry in zip(self.way.values(), saved.entries, strict=True):
            yield from step.graphs(entry)


@dataclass(frozen=True)
class _Block:
    """What a block keeps: its first half, its gates (N, K), and what each node of their way keeps."""

    shape: torch.Size
    entered: Entered
    gate: Tensor | None
    entries: Sequence[Any]


class SmoothBlockOperator(Operator):
    """An inverted residual block with smooth activations, and squeeze-and-excitation where it has it.

    Args:
        block: its kernels.
        inputs: the block's input, and the shortcut if there is one.
        members: the nodes in order.
        squeeze: what makes gates of the sums.
    """

    def __init__(
        self, block: SmoothResidual, inputs: Sequence[fx.Node], members: Sequence[fx.Node], squeeze: SqueezeOperator | None
    ) -> None:
        super().__init__(inputs)
        self.block, self.members, self.squeeze = block, members, squeeze

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        input, shortcut = inputs[0], inputs[1] if len(inputs) > 1 else None
        entered = self.block.enter(input, squeezes=self.squeeze is not None)
        gate: Tensor | None = None
        entries: list[Any] = []
        if self.squeeze is not None:
            gate, entries = self.squeeze.gate(entered.sums, entered.middle.shape[2] * entered.middle.shape[3])
        return self.block.leave(entered.middle, gate, shortcut), _Block(input.shape, entered, gate, entries)

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        passed = added = None
        if self.squeeze is not None:
            sums, passed = self.block.gate_gradient(grad, saved.entered.middle)
            pixels = grad.shape[2] * grad.shape[3]
            added = self.squeeze.pull_gate(sums, saved.entries, pixels, rule, gradients.dtype)
        source, *shortcuts = self.inputs
        onto = grad if source in shortcuts else gradients.pop_owned(source)
        given = {"passed": passed, "gate": saved.gate, "added": added, "onto": onto}
        gradients.add(source, self.block.input_gradient(grad, saved.entered, saved.shape, **given), owned=True)
        for shortcut in shortcuts:
            if shortcut is not source:
                gradients.add(shortcut, grad, owned=owned)

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        steps = () if self.squeeze is None else self.squeeze.way.values()
        inner = (part for step, entry in zip(steps, saved.entries, strict=True) for part in step.parts(entry))
        entered = saved.entered
        return (entered.middle, entered.slopes, saved.gate, *inner)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        if self.squeeze is not None:
            for step, entry in zip(self.squeeze.way.values(), saved.entries, strict=True):
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


def smooth_block(
    operators: dict[fx.Node, Operator],
    squeezes: Mapping[fx.Node, Operator],
    nodes: Sequence[fx.Node],
    position: int,
    taken: set[fx.Node],
) -> SmoothBlockOperator | None:
    """Return the inverted residual block that ends with a node; None where it does not, or where it would not gain.

    Args:
        operators: of the graph's nodes, by themselves.
        squeezes: squeeze-and-excitations, by their last nodes.
        nodes: of the graph in order.
        position: of the node.
        taken: those of blocks found before, which share no node; and the graph's output.
    """
    project = operators.get(nodes[position])
    if not isinstance(project, FusedOperator):
        return None
    last, squeeze = project.inputs[0], squeezes.get(project.inputs[0])
    second = squeeze if isinstance(squeeze, SqueezeOperator) else operators.get(last)
    if not isinstance(second, (SqueezeOperator, ActivationOperator)):
        return None
    middle = second.inputs[0]
    depthwise = operators.get(middle)
    if not isinstance(depthwise, FusedOperator) or len(depthwise.inputs) != 1:
        return None
    begun = depthwise.inputs[0]
    shorter = [middle, *(second.members or [last]), nodes[position]]
    ways: list[tuple[list[fx.Node], fx.Node, Activation, FusedConvolution | None]] = []
    first = operators.get(begun)
    expand = operators.get(first.inputs[0]) if isinstance(first, ActivationOperator) else None
    if isinstance(first, ActivationOperator) and isinstance(expand, FusedOperator) and len(expand.inputs) == 1:
        ways.append(([first.inputs[0], begun, *shorter], expand.inputs[0], first.activation, expand.module))
    ways.append((shorter, begun, Activation("identity"), None))
    for members, source, activation, module in ways:
        alone = _alone(members, nodes[: position + 1]) and not set(project.inputs[1:]) & set(members)
        if alone and taken.isdisjoint(members[:-1]) and SmoothResidual.suited(module, depthwise.module, project.module):
            block = SmoothResidual(module, activation, depthwise.module, second.activation, project.module)
            gates = second if isinstance(second, SqueezeOperator) else None
            return SmoothBlockOperator(block, [source, *project.inputs[1:]], members, gates)
    return None


def _alone(members: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> bool:
    """Say whether nodes are the last of a graph's so far, and nothing but they see any but the last."""
    inside = set(members)
    return list(nodes[-len(members) :]) == list(members) and all(inside.issuperset(node.users) for node in members[:-1])
