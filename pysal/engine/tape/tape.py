"""One forward pass over a lowered graph, and any number of backward sweeps from its output to its input.

Autograd keeps the input of every convolution for the gradient of its weights. Here each node keeps what the gradient of its
input needs: a bit per element of a ReLU, the places of maxima, nothing for a convolution. A sweep overwrites the gradients it
no longer needs, and may carry several gradients per image (of several classes, say), which share the image's bits. A node of
no kind known here runs under autograd, on its own, so what nobody foresaw is slow at worst, not wrong.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pysal import ops
from pysal.engine.graph.fold import detached, module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.inverted_residual import InvertedResidual
from pysal.engine.graph.lowered import is_addition, relu_upper
from pysal.engine.layers.features import Layer
from pysal.engine.model.relu_rules import ReluRule, current_rules

_WITHOUT_GRADIENT = (detached, torch.detach, "detach")
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


class Gradients:
    """Gradients on their way down, by node and, where a node returns several tensors, by position.

    Attributes:
        gates: of ReLUs, by the node that returns their output, where whoever makes the last part of a gradient may let the sum
            through them, and takes them away.
        dtype: of gradients of real values; those of complex values have the values' own.
    """

    def __init__(self, needed: set[fx.Node], gates: "dict[fx.Node, _Gates]", dtype: torch.dtype) -> None:
        self._needed, self.gates, self.dtype = needed, gates, dtype
        self._held: dict[tuple[fx.Node, int], tuple[Tensor, bool]] = {}

    def add(self, node: fx.Node, grad: Tensor, *, owned: bool, position: int = 0) -> None:
        """Add to a node's gradient; `owned` says that nobody else needs the tensor, so that it may be overwritten."""
        if node not in self._needed:
            return
        before, before_owned = self._held.get((node, position), (None, False))
        if before is not None:
            if before_owned:
                grad = before.add_(grad)
            else:
                grad = grad.add_(before) if owned else before + grad
            owned = True
        self._held[node, position] = grad, owned

    def pop(self, node: fx.Node, position: int = 0) -> tuple[Tensor | None, bool]:
        """Return a node's gradient, None where nothing depends on the node, and whether it may be overwritten."""
        return self._held.pop((node, position), (None, False))

    def pop_owned(self, node: fx.Node) -> Tensor | None:
        """Return a node's gradient so far if there is one that may be overwritten."""
        grad, owned = self._held.get((node, 0), (None, False))
        return self.pop(node)[0] if owned and grad is not None else None

    def holds(self, node: fx.Node) -> bool:
        """Say whether something was added to a node's gradient."""
        return (node, 0) in self._held

    def needed(self, node: fx.Node) -> bool:
        """Say whether a node's gradient is of use."""
        return node in self._needed


@dataclass(frozen=True)
class Place:
    """A value of a pass: what a node returns, or what a fused convolution makes on the way to it.

    Attributes:
        node: the node.
        part: "output", or of a fused convolution "convolution" and "sum", what it adds the shortcut to and what that gives.
    """

    node: fx.Node
    part: str = "output"


class _Gates:
    """The gates of a ReLU's output, a bit each, in its memory order."""

    def __init__(self, bits: Tensor, rows: int, *, channels_last: bool) -> None:
        self.bits, self.rows, self.channels_last = bits, rows, channels_last

    @classmethod
    def of(cls, output: Tensor, bits: Tensor) -> "_Gates":
        return cls(bits, len(output), channels_last=output.ndim == 4 and not output.is_contiguous())

    def mask(self, grad: Tensor, rule: ReluRule, *, owned: bool) -> Tensor:
        """Return what the rule lets pass, in a tensor that may be overwritten."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        grad = grad.contiguous(memory_format=order) if owned else grad.clone(memory_format=order)
        for part in grad.split(self.rows) if len(grad) > self.rows else (grad,):
            ops.guided_relu_backward_(part, self.bits, rule, channels_last=self.channels_last)
        return grad


class _Step:
    """What a kind of node does; `run` returns its value and what `pull` needs to send a gradient of it to its inputs."""

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self.inputs = inputs

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def gates(self, kept: Any) -> _Gates | None:
        """Return the gates that a gradient of the value goes through before anything else."""
        return None

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        raise NotImplementedError


class _FusedStep(_Step):
    """A fused convolution.

    Attributes:
        comes_last: whether, of all nodes, it is the last to add to its input's gradient.
    """

    comes_last = False

    def __init__(self, inputs: Sequence[fx.Node], module: FusedConvolution) -> None:
        super().__init__(inputs)
        self.module = module

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        shortcut = inputs[1] if len(inputs) > 1 else None
        if self.module.upper is None:
            return self.module.run(inputs[0], shortcut), (inputs[0].shape, None)
        output, bits = self.module.run_with_gates(inputs[0], shortcut)
        return output, (inputs[0].shape, _Gates.of(output, bits))

    def run_in_parts(self, *inputs: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Return every part of the value instead of the last alone, and what `pull` needs."""
        parts, upper = self.module.parts(inputs[0], inputs[1] if len(inputs) > 1 else None), self.module.upper
        output = parts["output"]
        return parts, (inputs[0].shape, None if upper is None else _Gates.of(output, ops.guided_relu_gates(output, upper)))

    def gates(self, kept: Any) -> _Gates | None:
        gates: _Gates | None = kept[1]
        return gates

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        shape, _ = kept
        source = self.inputs[0]
        if gradients.needed(source):
            onto = gradients.pop_owned(source)
            complete = self.comes_last and self.module.masks_gradient and not gradients.holds(source)
            gates = gradients.gates.pop(source, None) if complete else None
            bits = (None, None) if gates is None else (gates.bits, rule)
            gradients.add(source, self.module.input_gradient(grad, (len(grad), *shape[1:]), onto, *bits), owned=True)
        for shortcut in self.inputs[1:]:  # after the convolution, which has read the gradient
            gradients.add(shortcut, grad, owned=owned)


class _BlockStep(_Step):
    """An inverted residual block: the steps of two or three nodes in one."""

    def __init__(self, block: InvertedResidual, inputs: Sequence[fx.Node], members: Sequence[fx.Node]) -> None:
        super().__init__(inputs)
        self.block, self.members = block, members

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        output, gates = self.block.run(inputs[0], inputs[1] if len(inputs) > 1 else None)
        return output, (inputs[0].shape, *(_Gates(bits, len(output), channels_last=True) for bits in gates))

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        shape, *gates = kept
        source, *shortcuts = self.inputs
        added = grad if source in shortcuts else gradients.pop_owned(source)
        result = self.block.input_gradient(grad, [one.bits for one in gates], shape, rule, added)
        gradients.add(source, result, owned=True)
        for shortcut in shortcuts:
            if shortcut is not source:
                gradients.add(shortcut, grad, owned=owned)


class _ReluStep(_Step):
    def __init__(self, inputs: Sequence[fx.Node], upper: float) -> None:
        super().__init__(inputs)
        self.upper = upper

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        output, bits = ops.guided_relu(inputs[0], self.upper)
        return output, _Gates.of(output, bits)

    def gates(self, kept: Any) -> _Gates | None:
        gates: _Gates | None = kept
        return gates

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        gradients.add(self.inputs[0], grad, owned=owned)


class _AddStep(_Step):
    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        return inputs[0] + inputs[1], None

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        for source in self.inputs:
            gradients.add(source, grad, owned=False)


class _NormStep(_Step):
    """A batch norm that no convolution stands before."""

    def __init__(self, inputs: Sequence[fx.Node], module: nn.BatchNorm2d) -> None:
        super().__init__(inputs)
        assert module.running_var is not None
        self.module = module
        scale = torch.rsqrt(module.running_var.detach() + module.eps)
        self.scale = (scale if module.weight is None else scale * module.weight.detach()).view(1, -1, 1, 1)

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        return self.module(inputs[0]), None

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        scale = self.scale.to(grad.dtype)
        gradients.add(self.inputs[0], grad.mul_(scale) if owned else grad * scale, owned=True)


class _MaxPoolStep(_Step):
    def __init__(self, inputs: Sequence[fx.Node], geometry: tuple[Any, ...]) -> None:
        super().__init__(inputs)
        self.geometry = geometry

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        output, places = torch.ops.aten.max_pool2d_with_indices(inputs[0], *self.geometry)
        narrow = torch.int32 if inputs[0][0, 0].numel() < 2**31 else torch.int64
        return output, (inputs[0].shape, places.to(narrow))

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        shape, places = kept
        order = torch.contiguous_format if places.is_contiguous() else torch.channels_last
        places = places.long()
        if len(grad) > len(places):
            places = places.repeat(len(grad) // len(places), 1, 1, 1).contiguous(memory_format=order)
        like = torch.empty((len(grad), *shape[1:]), dtype=grad.dtype, device=grad.device, memory_format=order)
        grad = grad.contiguous(memory_format=order)
        result = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *self.geometry, places)
        gradients.add(self.inputs[0], result, owned=True)


class _MeanStep(_Step):
    """The mean of each map."""

    def run(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        return F.adaptive_avg_pool2d(inputs[0], 1), inputs[0].shape

    def pull(self, gradients: Gradients, kept: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        wide = (grad / (kept[2] * kept[3])).expand(-1, -1, *kept[2:])
        gradients.add(self.inputs[0], wide, owned=False)


class _OtherStep:
    """Any other node, under autograd."""

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node) -> None:
        self.node, self._interpreter = node, interpreter
        self._in_place = False

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """Return the node's value and, where a gradient can go through it, its outputs and inputs in its own graph."""
        try:
            return self._run(values, needed)
        except RuntimeError:
            if self._in_place:
                raise
            self._in_place = True  # autograd does not let it work on our values as they are
            return self._run(values, needed)

    def _run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        leaves: dict[tuple[fx.Node, int], Tensor] = {}

        def fetch(source: fx.Node) -> Any:
            if source not in needed:
                return values[source]
            position = -1

            def enter(value: Any) -> Any:
                nonlocal position
                position += 1
                if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                    return value
                leaf = leaves.setdefault((source, position), value.detach().requires_grad_())
                return leaf.clone() if self._in_place else leaf

            return tree_map(enter, values[source])

        with torch.enable_grad():
            args, kwargs = (fx.node.map_arg(part, fetch) for part in (self.node.args, self.node.kwargs))
            result = getattr(self._interpreter, self.node.op)(self.node.target, args, kwargs)
        outputs = [leaf if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in tree_leaves(result)]
        value = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        return value, (outputs, leaves) if any(output is not None for output in outputs) else None

    def pull(self, gradients: Gradients, kept: Any) -> None:
        """Send the gradients of the node's outputs to its inputs."""
        outputs, leaves = kept
        reached, grads = [], []
        for position, output in enumerate(outputs):
            grad, _ = gradients.pop(self.node, position)
            if grad is not None and output is not None:
                reached.append(output)
                grads.append(grad)
        if not reached:
            return
        parts = []
        for some in zip(*(grad.split(len(output)) for grad, output in zip(grads, reached, strict=True)), strict=True):
            cast = [_as_autograd_expects(grad, output) for grad, output in zip(some, reached, strict=True)]
            parts.append(torch.autograd.grad(reached, list(leaves.values()), cast, retain_graph=True, allow_unused=True))
        for (source, position), found in zip(leaves, zip(*parts, strict=True), strict=True):
            if found[0] is not None:
                whole = found[0] if len(found) == 1 else torch.cat(found)
                whole = whole if whole.is_complex() else whole.to(gradients.dtype)
                gradients.add(source, whole, owned=len(found) > 1, position=position)


def _as_autograd_expects(grad: Tensor, output: Tensor) -> Tensor:
    """Return a gradient in its output's dtype and, for a single image, in its order of memory: see engine.gradient_layouts."""
    single = output.shape[:1] == (1,) and output.is_contiguous()
    return grad.to(output.dtype, memory_format=torch.contiguous_format if single else torch.preserve_format)


class Program:
    """A lowered graph, ready to be recorded.

    Args:
        graph: made by `lower`, with one input and one output.
        backward_dtype: dtype of the gradients on their way; None = that of the input.
    """

    def __init__(self, graph: fx.GraphModule, backward_dtype: torch.dtype | None = None) -> None:
        self.backward_dtype = backward_dtype
        self.nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self.input = next(node for node in self.nodes if node.op == "placeholder")
        (self.output,) = next(node for node in graph.graph.nodes if node.op == "output").args
        self.needed = {self.input}
        for node in self.nodes:
            if any(source in self.needed for source in node.all_input_nodes) and node.target not in _WITHOUT_GRADIENT:
                self.needed.add(node)
        interpreter = fx.Interpreter(graph)  # one for all: to make one looks at every node
        self.steps = {node: _step(graph, interpreter, node) for node in self.nodes if node.op != "placeholder"}
        met: set[fx.Node] = set()  # by nodes before: in a sweep those come later
        for node in self.nodes:
            step = self.steps.get(node)
            if isinstance(step, _FusedStep):
                step.comes_last = step.inputs[0] not in met and step.inputs[0] not in step.inputs[1:]
            met.update(source for source in node.all_input_nodes if node in self.needed)
        self.blocks = _blocks(self) if backward_dtype in (None, torch.float32) else {}
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

    def layer(self, layer: Layer) -> Place | None:
        """Return the value that a layer of the original model returned.

        None where the graph does not compute that value, because it was folded into another.
        """
        runs = self._runs.get(layer.name, 0)
        if (layer.run is None and runs != 1) or getattr(layer, "at_input", False) or getattr(layer, "index", 0):
            return None
        return self._layers.get(layer.name, {}).get(layer.run if isinstance(layer.run, int) else runs - 1)

    def _blocks_around(self, layers: Sequence[Place]) -> dict[fx.Node, _BlockStep]:
        """Return the blocks whose inner values nobody asks for, by their last node."""
        asked = {place.node for place in layers if place.part != "output" or place.node not in self.blocks}
        return {last: step for last, step in self.blocks.items() if asked.isdisjoint(step.members)}

    def record(self, images: Tensor, layers: Sequence[Place] = ()) -> "Tape":
        """Run the graph and keep what sweeps need, and some values."""
        inner = {place.node for place in layers if place.part != "output"}
        asked: dict[Place, Tensor] = {}
        values: dict[fx.Node, Any] = {self.input: images.detach()}
        kept: list[tuple[fx.Node, _Step | _OtherStep, Any]] = []
        blocks = self._blocks_around(layers) if images.dtype == torch.float32 else {}
        inside = {member for step in blocks.values() for member in step.members}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "placeholder":
                    values.setdefault(node, node.args[0] if node.args else None)
                    continue
                if node in inside and node not in blocks:
                    continue
                step = blocks.get(node) or self.steps[node]
                if isinstance(step, _OtherStep):
                    values[node], entry = step.run(values, self.needed)
                elif node in inner and isinstance(step, _FusedStep):
                    parts, entry = step.run_in_parts(*(values[source] for source in step.inputs))
                    asked |= {Place(node, part): value for part, value in parts.items()}
                    values[node] = parts["output"]
                else:
                    values[node], entry = step.run(*(values[source] for source in step.inputs))
                if node in self.needed:
                    kept.append((node, step, entry))
                if Place(node) in layers:
                    asked[Place(node)] = values[node]
                for member in step.members if isinstance(step, _BlockStep) else (node,):
                    for source in self.spent.get(member, ()):
                        values.pop(source, None)  # what is inside a block never was there
        return Tape(self, kept, values[self.output], {place: asked[place] for place in layers}, images.dtype)


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
        kept: list[tuple[fx.Node, _Step | _OtherStep, Any]],
        output: Tensor,
        values: dict[Place, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self.program, self.output, self.values, self.dtype = program, output, values, dtype
        self._kept = kept

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
        program = self.program
        dtype = program.backward_dtype or self.dtype
        found: dict[Place, Tensor | None] = {}
        asked: dict[fx.Node, list[Place]] = {}
        for place in layers:
            asked.setdefault(place.node, []).append(place)
        steps = [(node, step, kept) for node, step, kept in self._kept if not isinstance(step, _OtherStep)]
        gates = {node: step.gates(kept) for node, step, kept in steps}
        gradients = Gradients(program.needed, {node: own for node, own in gates.items() if own and node not in asked}, dtype)
        gradients.add(program.output, grad.to(dtype), owned=False)

        def find(place: Place, value: Tensor | None) -> None:
            found[place] = None if value is None else value.to(self.values[place].dtype)

        for node, step, kept in reversed(self._kept):
            places = asked.get(node, ())
            if isinstance(step, _OtherStep) and not places:
                if kept is not None:
                    step.pull(gradients, kept)
                continue
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
            if isinstance(step, _OtherStep):
                if held is not None:
                    gradients.add(node, held, owned=owned)
                if kept is not None:
                    step.pull(gradients, kept)
            elif held is not None:
                step.pull(gradients, kept, held, rule, owned=owned)
        result, _ = gradients.pop(program.input)
        return None if result is None else result.to(self.dtype), found

    @property
    def relus(self) -> int:
        """How many ReLUs follow the rule of a sweep."""
        return sum(isinstance(part, _Gates) for part in self._parts())

    @property
    def bytes(self) -> int:
        """Memory kept for sweeps, but for what autograd keeps of the nodes that run under it."""
        tensors = [part.bits if isinstance(part, _Gates) else part for part in self._parts()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def others(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (output, input) of every autograd graph of a node that ran under autograd."""
        for _, step, kept in self._kept:
            if kept is not None and isinstance(step, _OtherStep):
                outputs, leaves = kept
                yield from ((output, leaf) for output in outputs if output is not None for leaf in leaves.values())

    def _parts(self) -> Iterator[Any]:
        for _, step, kept in self._kept:
            if not isinstance(step, _OtherStep):
                yield from kept if type(kept) is tuple else (kept,)


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


def _step(graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node) -> _Step | _OtherStep:
    module = module_of(graph, node)
    first: Any = node.args[0] if node.args else None
    if isinstance(module, FusedConvolution):
        return _FusedStep(node.args, module)  # type: ignore[arg-type]
    if isinstance(first, fx.Node):
        upper = relu_upper(graph, node)
        if upper is not None:
            return _ReluStep([first], upper)
        if isinstance(module, nn.BatchNorm2d) and type(module).forward is nn.BatchNorm2d.forward:
            if module.running_mean is not None and module.running_var is not None:
                return _NormStep([first], module)
        pool = _max_pool(module, node)
        if pool is not None:
            return _MaxPoolStep([first], pool)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return _MeanStep([first])
    if node.meta.get("same_shapes") and is_addition(node):
        return _AddStep(node.args)  # type: ignore[arg-type]
    return _OtherStep(interpreter, node)


def _blocks(program: Program) -> dict[fx.Node, _BlockStep]:
    """Return the inverted residual blocks of a graph, by their last node.

    Their nodes follow each other in the graph, so that nothing which runs between them is put off or brought forward.
    """
    found: dict[fx.Node, _BlockStep] = {}
    for position, node in enumerate(program.nodes):
        for count in (3, 2):
            members = program.nodes[max(position + 1 - count, 0) : position + 1]
            steps = [step for step in map(program.steps.get, members) if isinstance(step, _FusedStep)]
            chained = all(
                list(before.users) == [after] and after.args[0] is before for before, after in itertools.pairwise(members)
            )
            if len(steps) < count or not chained or program.output in members[:-1] or len(steps[-2].inputs) > 1:
                continue
            if count == 3 and len(steps[0].inputs) > 1:
                continue
            *first, depthwise, project = (step.module for step in steps)
            expand = first[0] if first else None
            if InvertedResidual.suited(expand, depthwise, project):
                inputs = [steps[0].inputs[0], *steps[-1].inputs[1:]]
                found[node] = _BlockStep(InvertedResidual(expand, depthwise, project), inputs, members)
                break
    return found


def _max_pool(module: nn.Module | None, node: fx.Node) -> tuple[Any, ...] | None:
    """Return (kernel, stride, padding, dilation, ceil) of a node that pools."""
    pair: Callable[[Any], list[int]] = lambda value: [value, value] if isinstance(value, int) else list(value)  # noqa: E731
    if isinstance(module, nn.MaxPool2d) and not module.return_indices:
        given: dict[str, Any] = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        given["ceil_mode"] = module.ceil_mode
    elif node.op == "call_function" and node.target in _MAX_POOLS:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        given |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        if given["return_indices"] or "kernel_size" not in given or "input" in given:
            return None
    else:
        return None
    stride = given["kernel_size"] if given["stride"] is None else given["stride"]
    return pair(given["kernel_size"]), pair(stride), pair(given["padding"]), pair(given["dilation"]), given["ceil_mode"]
