"""One forward pass over a lowered graph, and any number of backward sweeps from its output to its input.

Autograd keeps the input of every convolution for the gradient of its weights. Here each node keeps what the gradient of its
input needs (`engine.tape.operators`). A sweep overwrites the gradients it no longer needs, and may carry several gradients per
image (of several classes, say), which share the image's bits.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pysal._library import without_autocast
from pysal.engine.graph.fold import detached, module_of
from pysal.engine.graph.fused_attention import FusedAttention
from pysal.engine.graph.graph_module import writes
from pysal.engine.graph.inverted_residual import Block, InvertedResidual
from pysal.engine.layers.features import Layer
from pysal.engine.model.relu_rules import ReluRule, current_rules
from pysal.engine.tape.attention import AttentionOperator
from pysal.engine.tape.gradients import Gates, Gradients
from pysal.engine.tape.operators import AutogradOperator, BlockOperator, FusedOperator, Operator, operator_of
from pysal.engine.tape.smooth import SmoothBlockOperator, SqueezeOperator, smooth_block, smooth_operator, squeeze_operator
from pysal.engine.tape.views import is_about_shapes, view_operator

AnyBlock: TypeAlias = BlockOperator | SqueezeOperator | SmoothBlockOperator

_WITHOUT_GRADIENT = (detached, torch.detach, "detach")


@dataclass(frozen=True)
class Place:
    """A value of a pass: what a node returns, or what a fused convolution makes on the way to it.

    Attributes:
        node: the node.
        part: "output", or of a fused convolution "convolution" and "sum", what it adds the shortcut to and what that gives.
    """

    node: fx.Node
    part: str = "output"


class Program:
    """A lowered graph, ready to be recorded.

    Args:
        graph: made by `lower`, with one input and one output.
        backward_dtype: dtype of the gradients on their way; None = that of the input.
        dtype: of the graph's weights, which images are converted to; what is returned has the images' own. None = that of the
            images.
    """

    def __init__(
        self, graph: fx.GraphModule, backward_dtype: torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.backward_dtype, self.dtype = backward_dtype, dtype
        self.nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self.input = next(node for node in self.nodes if node.op == "placeholder")
        (self.output,) = next(node for node in graph.graph.nodes if node.op == "output").args
        self.needed = {self.input}
        for node in self.nodes:
            followed = node.target not in _WITHOUT_GRADIENT and not is_about_shapes(node)
            if followed and any(source in self.needed for source in node.all_input_nodes):
                self.needed.add(node)
        self._sharing = not any(map(writes, self.nodes))
        interpreter = fx.Interpreter(graph)  # one for all: to make one looks at every node
        self.operators: dict[fx.Node, Operator] = {
            node: smooth_operator(graph, interpreter, node)
            or _attention(graph, interpreter, node)
            or self._operator(graph, interpreter, node)
            for node in self.nodes
            if node.op != "placeholder"
        }
        met: set[fx.Node] = set()  # by nodes before: in a sweep those come later
        for node in self.nodes:
            operator = self.operators.get(node)
            if isinstance(operator, FusedOperator):
                operator.comes_last = operator.inputs[0] not in met and operator.inputs[0] not in operator.inputs[1:]
            met.update(source for source in node.all_input_nodes if node in self.needed)
        self.blocks: dict[fx.Node, AnyBlock] = {}
        if backward_dtype in (None, torch.float32):
            self.blocks |= _blocks(self)
            for position, node in enumerate(self.nodes):
                squeeze = squeeze_operator(graph, self.operators, self.nodes, position)
                if squeeze is not None and self.output not in squeeze.members[:-1]:
                    self.blocks[node] = squeeze
            taken = {self.output}
            for position, node in enumerate(self.nodes):
                smooth = smooth_block(self.operators, self.blocks, self.nodes, position, taken)
                if smooth is not None:
                    self.blocks[node] = smooth
                    taken.update(smooth.members)
        last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        self.spent: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last_use.items():
            if source is not self.output:
                self.spent.setdefault(node, []).append(source)
        self._layers: dict[str, dict[int, Place]] = {}
        for node in self.nodes:
            for name, run in node.meta.get("layers", ()):
                self._layers.setdefault(name, {})[run] = Place(node)
            for name, run, part in node.meta.get("inner_layers", ()):
                self._layers.setdefault(name, {}).setdefault(run, Place(node, part))
        self._runs = graph.meta.get("runs", {})

    def _operator(self, graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node) -> Operator:
        operator = operator_of(graph, interpreter, node)
        if type(operator) is not AutogradOperator:
            return operator
        return view_operator(graph, interpreter, node, self.needed, sharing=self._sharing) or operator

    def layer(self, layer: Layer) -> Place | None:
        """Return the value that a layer of the original model returned.

        None where the graph does not compute that value, because it was folded into another.
        """
        runs = self._runs.get(layer.name, 0)
        if (layer.run is None and runs != 1) or getattr(layer, "at_input", False) or getattr(layer, "index", 0):
            return None
        return self._layers.get(layer.name, {}).get(layer.run if isinstance(layer.run, int) else runs - 1)

    def blocks_around(self, layers: Sequence[Place]) -> dict[fx.Node, AnyBlock]:
        """Return the blocks whose inner values nobody asks for, by their last node.

        While rules are being recorded, what they do not define has to be met node by node.
        """
        single = (SqueezeOperator, SmoothBlockOperator) if current_rules() is not None else ()

        def hides(last: fx.Node, operator: AnyBlock) -> bool:
            inside = (place for place in layers if place.node in operator.members)
            return any(place.part != "output" or place.node is not last for place in inside)

        free = {
            last: operator
            for last, operator in self.blocks.items()
            if not hides(last, operator) and not isinstance(operator, single)
        }
        inner = {member for last, operator in free.items() for member in operator.members if member is not last}
        return {last: operator for last, operator in free.items() if last not in inner}  # but those inside of others

    def record(self, images: Tensor, layers: Sequence[Place] = ()) -> "Tape":
        """Run the graph and keep what sweeps need, and some values."""
        inner = {place.node for place in layers if place.part != "output"}
        asked: dict[Place, Tensor] = {}
        given = images.detach() if self.dtype is None else images.detach().to(self.dtype)
        values: dict[fx.Node, Any] = {self.input: given}
        saved: list[tuple[fx.Node, Operator, Any]] = []
        blocks = self.blocks_around(layers) if given.dtype == torch.float32 else {}
        inside = {member for operator in blocks.values() for member in operator.members}
        with torch.no_grad(), self._own_arithmetic(images):
            for node in self.nodes:
                if node.op == "placeholder":
                    values.setdefault(node, node.args[0] if node.args else None)
                    continue
                if node in inside and node not in blocks:
                    continue
                operator = blocks.get(node) or self.operators[node]
                if node in inner and isinstance(operator, FusedOperator):
                    parts, entry = operator.run_in_parts(*(values[source] for source in operator.inputs))
                    asked |= {Place(node, part): value for part, value in parts.items()}
                    values[node] = parts["output"]
                else:
                    values[node], entry = operator.run(values, self.needed)
                if node in self.needed:
                    saved.append((node, operator, entry))
                if Place(node) in layers:
                    asked[Place(node)] = values[node]
                for member in operator.members or (node,):
                    for source in self.spent.get(member, ()):
                        values.pop(source, None)  # what is inside a block never was there
        output, found = values[self.output], {place: asked[place] for place in layers}
        if self.dtype is not None:  # nobody outside is to meet it
            output, found = output.to(images.dtype), {place: value.to(images.dtype) for place, value in found.items()}
        return Tape(self, saved, output, found, images.dtype)

    def _own_arithmetic(self, images: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Return what keeps autocast away from a graph that is in its dtype already: each of its casts would be a pass."""
        return contextlib.nullcontext() if self.dtype is None else without_autocast(images.device.type)


class Tape:
    """A recorded forward pass.

    Attributes:
        output: what the graph returned, (N, ...).
        values: those that were asked for.
        dtype: of the input, and of its gradients.
    """

    def __init__(
        self,
        program: Program,
        saved: list[tuple[fx.Node, Operator, Any]],
        output: Tensor,
        values: dict[Place, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.program, self.output, self.values, self.dtype = program, output, values, dtype
        self._saved = saved

    def sweep(
        self, grad: Tensor, rule: ReluRule = "plain", *, layers: Sequence[Place] = (), to_input: bool = True
    ) -> tuple[Tensor | None, dict[Place, Tensor | None]]:
        """Return the gradient of the input, and those of some values, from that of the output.

        Args:
            grad: (T N, ...), gradients of the output: T of them for each of the N images, row t N + n being image n's.
            rule: of the ReLUs.
            layers: values that were asked for when the pass was recorded.
            to_input: whether the gradient of the input is wanted, too.
        """
        with self.program._own_arithmetic(grad):
            return self._sweep(grad, rule, layers, to_input)

    def _sweep(
        self, grad: Tensor, rule: ReluRule, layers: Sequence[Place], to_input: bool
    ) -> tuple[Tensor | None, dict[Place, Tensor | None]]:
        program = self.program
        dtype = program.backward_dtype or self.dtype
        found: dict[Place, Tensor | None] = {}
        asked: dict[fx.Node, list[Place]] = {}
        for place in layers:
            asked.setdefault(place.node, []).append(place)
        gates = {node: operator.gates(saved) for node, operator, saved in self._saved}
        gradients = Gradients(program.needed, {node: own for node, own in gates.items() if own and node not in asked}, dtype)
        gradients.add(program.output, grad.to(dtype), owned=False)

        def find(place: Place, value: Tensor | None) -> None:
            found[place] = None if value is None else value.to(self.values[place].dtype)

        for node, operator, saved in reversed(self._saved):
            places = asked.get(node, ())
            held, owned = gradients.pop(node)
            inner = [place for place in places if place.part != "output"]
            if len(inner) < len(places):
                find(Place(node), held)
                owned = False
            complete = not to_input and len(found) + len(inner) == len(layers)
            own = gates.get(node) if places else gradients.gates.pop(node, None)
            if held is not None and own is not None and (inner or not complete):
                held, owned = own.mask(held, rule, owned=owned), True
            for place in inner:
                find(place, held)
                owned = False
            if complete:
                return None, found
            if held is not None or gradients.reached(node):
                operator.pull(gradients, saved, held, rule, owned=owned)
        result, _ = gradients.pop(program.input)
        return None if result is None else result.to(self.dtype), found

    @property
    def relus(self) -> int:
        """How many ReLUs follow the rule of a sweep."""
        return sum(isinstance(part, Gates) for part in self._parts())

    @property
    def bytes(self) -> int:
        """Memory saved for sweeps, but for what autograd keeps of the nodes that run under it."""
        tensors = [part.bits if isinstance(part, Gates) else part for part in self._parts()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (output, input) of every autograd graph of a node that ran under autograd."""
        for _, operator, saved in self._saved:
            yield from operator.graphs(saved)

    def _parts(self) -> Iterator[Any]:
        for _, operator, saved in self._saved:
            yield from operator.parts(saved)


class Recorded(torch.autograd.Function):
    """A recorded pass as one node of autograd's graph."""

    follows_relu_rules = True

    @staticmethod
    def forward(ctx: Any, images: Tensor, program: Program) -> Tensor:
        """Record the program."""
        ctx.tape, ctx.rules = program.record(images), current_rules()
        ctx.is_relu = ctx.tape.relus
        output: Tensor = ctx.tape.output
        del ctx.tape.output  # breaks a cycle: the output's grad_fn is this node, which owns the tape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Sweep under the rule in force."""
        rule = "plain" if ctx.rules is None else ctx.rules.rule
        return ctx.tape.sweep(grads[0], rule)[0], None


def _attention(graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node) -> AttentionOperator | None:
    module = module_of(graph, node)
    return AttentionOperator(interpreter, node, module) if isinstance(module, FusedAttention) else None


def _blocks(program: Program) -> dict[fx.Node, BlockOperator]:
    """Return the inverted residual blocks of a graph, by their last node.

    Their nodes follow each other in the graph, so that nothing which runs between them is put off or brought forward.
    """
    found: dict[fx.Node, BlockOperator] = {}
    for position, node in enumerate(program.nodes):
        for count in (3, 2):
            members = program.nodes[max(position + 1 - count, 0) : position + 1]
            operators = [operator for operator in map(program.operators.get, members) if isinstance(operator, FusedOperator)]
            chained = all(
                list(before.users) == [after] and after.args[0] is before for before, after in itertools.pairwise(members)
            )
            if len(operators) < count or not chained or program.output in members[:-1] or len(operators[-2].inputs) > 1:
                continue
            if count == 3 and len(operators[0].inputs) > 1:
                continue
            *first, depthwise, project = (operator.module for operator in operators)
            expand = first[0] if first else None
            if InvertedResidual.suited(expand, depthwise, project):
                inputs = [operators[0].inputs[0], *operators[-1].inputs[1:]]
                found[node] = BlockOperator(Block(InvertedResidual(expand, depthwise, project), inputs, members))
                break
    return found
