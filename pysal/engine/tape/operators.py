"""What each kind of node of a lowered graph does on the way forth and back.

Each keeps what the gradient of its input needs: a bit per element of a ReLU, the places of maxima, nothing for a convolution.
A node of no kind known here runs under autograd, on its own, so what nobody foresaw is slow at worst, not wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pysal import ops
from pysal.engine.graph.fold import NotTraceable, module_of
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.inverted_residual import Block
from pysal.engine.graph.lowered import is_addition, relu_upper
from pysal.engine.graph.shapes import SHAPE
from pysal.engine.model.relu_rules import ReluRule
from pysal.engine.tape.gradients import Gates, Gradients

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


class Operator:
    """What a kind of node does.

    Args:
        inputs: the nodes whose values it takes.

    Attributes:
        members: the nodes that it stands for, where these are several.
    """

    members: Sequence[fx.Node] = ()

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self.inputs = inputs

    def run(self, values: dict[fx.Node, Any], needed: set[fx.Node]) -> tuple[Any, Any]:
        """Return the node's value and what `pull` needs to send a gradient of it to its inputs.

        Args:
            values: of the nodes before.
            needed: the nodes whose gradients are of use.
        """
        return self.forward(*(values[source] for source in self.inputs))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """Return what `run` does, for a node that takes and returns tensors alone."""
        raise NotImplementedError

    def gates(self, saved: Any) -> Gates | None:
        """Return the gates that a gradient of the value goes through before anything else."""
        return None

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """Send a gradient of the value, of its first tensor if it has several, to the inputs.

        Args:
            gradients: where to add; holds those of further tensors.
            saved: what `run` returned beside the value.
            grad: the gradient, None where nothing depends on the first tensor.
            rule: of the ReLUs.
            owned: whether the gradient may be overwritten.
        """
        assert grad is not None
        self.backward(gradients, saved, grad, rule, owned=owned)

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """Do what `pull` does, for a node that returns one tensor."""
        raise NotImplementedError

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """Return what is saved, one by one, but for what autograd keeps."""
        return saved if type(saved) is tuple else (saved,)

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Return (output, input) of every autograd graph that is kept."""
        return iter(())


class FusedOperator(Operator):
    """A fused convolution.

    Attributes:
        comes_last: whether, of all nodes, it is the last to add to its input's gradient.
    """

    comes_last = False

    def __init__(self, inputs: Sequence[fx.Node], module: FusedConvolution) -> None:
        super().__init__(inputs)
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        shortcut = inputs[1] if len(inputs) > 1 else None
        if self.module.upper is None:
            return self.module.run(inputs[0], shortcut), (inputs[0].shape, None)
        output, bits = self.module.run_with_gates(inputs[0], shortcut)
        return output, (inputs[0].shape, Gates.of(output, bits))

    def run_in_parts(self, *inputs: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Return every part of the value instead of the last alone, and what `pull` needs."""
        parts, upper = self.module.parts(inputs[0], inputs[1] if len(inputs) > 1 else None), self.module.upper
        output = parts["output"]
        return parts, (inputs[0].shape, None if upper is None else Gates.of(output, ops.guided_relu_gates(output, upper)))

    def gates(self, saved: Any) -> Gates | None:
        """See `Operator`."""
        gates: Gates | None = saved[1]
        return gates

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        shape, _ = saved
        source = self.inputs[0]
        if gradients.needed(source):
            onto = gradients.pop_owned(source)
            complete = self.comes_last and self.module.masks_gradient and not gradients.holds(source)
            gates = gradients.gates.pop(source, None) if complete else None
            size = (len(grad), *shape[1:])
            if gates is None:
                result = self.module.input_gradient(grad, size, onto)
            else:
                result = self.module.input_gradient(
                    grad, size, onto, gates.bits, rule, images=gates.rows, channels_last=gates.channels_last
                )
            gradients.add(source, result, owned=True)
        for shortcut in self.inputs[1:]:  # after the convolution, which has read the gradient
            gradients.add(shortcut, grad, owned=owned)


class BlockOperator(Operator):
    """An inverted residual block: the operators of two or three nodes in one."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.inputs)
        self.block, self.members = block, block.members

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        output, gates = self.block.kernel.run(inputs[0], inputs[1] if len(inputs) > 1 else None)
        return output, (inputs[0].shape, *(Gates(bits, len(output), channels_last=True) for bits in gates))

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        shape, *gates = saved
        source, *shortcuts = self.inputs
        added = grad if source in shortcuts else gradients.pop_owned(source)
        result = self.block.kernel.input_gradient(grad, [one.bits for one in gates], shape, rule, added)
        gradients.add(source, result, owned=True)
        for shortcut in shortcuts:
            if shortcut is not source:
                gradients.add(shortcut, grad, owned=owned)


class LinearOperator(Operator):
    """A linear layer, which keeps nothing."""

    def __init__(self, inputs: Sequence[fx.Node], module: FusedLinear) -> None:
        super().__init__(inputs)
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        return self.module(inputs[0]), None

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        gradients.add(self.inputs[0], self.module.input_gradient(grad), owned=True)


class ReluOperator(Operator):
    """A ReLU that no convolution stands before.

    Args:
        inputs: its input.
        upper: where it saturates.
    """

    def __init__(self, inputs: Sequence[fx.Node], upper: float) -> None:
        super().__init__(inputs)
        self.upper = upper

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        output, bits = ops.guided_relu(inputs[0], self.upper)
        return output, Gates.of(output, bits)

    def gates(self, saved: Any) -> Gates | None:
        """See `Operator`."""
        gates: Gates | None = saved
        return gates

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        gradients.add(self.inputs[0], grad, owned=owned)


class AddOperator(Operator):
    """The sum of two values of one shape."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        return inputs[0] + inputs[1], None

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        for source in self.inputs:
            gradients.add(source, grad, owned=False)


class ConcatenationOperator(Operator):
    """Maps one after the other along an axis.

    Args:
        inputs: the maps.
        dim: the axis, not that of the images.
    """

    def __init__(self, inputs: Sequence[fx.Node], dim: int) -> None:
        super().__init__(inputs)
        self.dim = dim

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        return torch.cat(inputs, self.dim), [each.shape[self.dim] for each in inputs]

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        for source, part in zip(self.inputs, grad.split(saved, self.dim), strict=True):
            gradients.add(source, part, owned=False)  # of a map that comes twice, two parts

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`: sizes are no tensors."""
        return ()


class NormOperator(Operator):
    """A batch norm that no convolution stands before."""

    def __init__(self, inputs: Sequence[fx.Node], module: nn.BatchNorm2d) -> None:
        super().__init__(inputs)
        assert module.running_var is not None
        self.module = module
        scale = torch.rsqrt(module.running_var.detach() + module.eps)
        self.scale = (scale if module.weight is None else scale * module.weight.detach()).view(1, -1, 1, 1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        return self.module(inputs[0]), None

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        scale = self.scale.to(grad.dtype)
        gradients.add(self.inputs[0], grad.mul_(scale) if owned else grad * scale, owned=True)


class MaxPoolOperator(Operator):
    """The largest value of each window.

    Args:
        inputs: its input.
        geometry: (kernel, stride, padding, dilation, ceil).
    """

    def __init__(self, inputs: Sequence[fx.Node], geometry: tuple[Any, ...]) -> None:
        super().__init__(inputs)
        self.geometry = geometry

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        output, places = torch.ops.aten.max_pool2d_with_indices(inputs[0], *self.geometry)
        narrow = torch.int32 if inputs[0][0, 0].numel() < 2**31 else torch.int64
        return output, (inputs[0].shape, places.to(narrow))

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        shape, places = saved
        order = torch.contiguous_format if places.is_contiguous() else torch.channels_last
        places = places.long()
        if len(grad) > len(places):
            places = places.repeat(len(grad) // len(places), 1, 1, 1).contiguous(memory_format=order)
        like = torch.empty((len(grad), *shape[1:]), dtype=grad.dtype, device=grad.device, memory_format=order)
        grad = grad.contiguous(memory_format=order)
        result = torch.ops.aten.max_pool2d_with_indices_backward(grad, like, *self.geometry, places)
        gradients.add(self.inputs[0], result, owned=True)


class MeanOperator(Operator):
    """The mean of each map."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Any]:
        """See `Operator`."""
        return F.adaptive_avg_pool2d(inputs[0], 1), inputs[0].shape

    def backward(self, gradients: Gradients, saved: Any, grad: Tensor, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`."""
        wide = (grad / (saved[2] * saved[3])).expand(-1, -1, *saved[2:])
        gradients.add(self.inputs[0], wide, owned=False)


class AutogradOperator(Operator):
    """Any other node, under autograd."""

    def __init__(self, interpreter: fx.Interpreter, node: fx.Node) -> None:
        super().__init__(node.all_input_nodes)
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
        if any(output is not None and output.ndim == 0 for output in outputs):
            raise NotTraceable("it makes one number of a whole batch, by which its images depend on each other")
        value = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
        return value, (outputs, leaves) if any(output is not None for output in outputs) else None

    def pull(self, gradients: Gradients, saved: Any, grad: Tensor | None, rule: ReluRule, *, owned: bool) -> None:
        """See `Operator`; nothing is sent where no gradient can go through the node."""
        if saved is None:
            return
        outputs, leaves = saved
        reached, grads = [], []
        for position, output in enumerate(outputs):
            own = grad if position == 0 else gradients.pop(self.node, position)[0]
            if own is not None and output is not None:
                reached.append(output)
                grads.append(own)
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

    def parts(self, saved: Any) -> tuple[Any, ...]:
        """See `Operator`."""
        return ()

    def graphs(self, saved: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Operator`."""
        if saved is not None:
            outputs, leaves = saved
            yield from ((output, leaf) for output in outputs if output is not None for leaf in leaves.values())


def _as_autograd_expects(grad: Tensor, output: Tensor) -> Tensor:
    """Return a gradient in its output's dtype and, for a single image, in its order of memory: see engine.gradient_layouts."""
    single = output.shape[:1] == (1,) and output.is_contiguous()
    return grad.to(output.dtype, memory_format=torch.contiguous_format if single else torch.preserve_format)


def operator_of(graph: fx.GraphModule, interpreter: fx.Interpreter, node: fx.Node) -> Operator:
    """Return what a node of a graph does."""
    module = module_of(graph, node)
    first: Any = node.args[0] if node.args else None
    if isinstance(module, FusedConvolution):
        return FusedOperator(node.args, module)  # type: ignore[arg-type]
    if isinstance(module, FusedLinear):
        return LinearOperator(node.args, module)  # type: ignore[arg-type]
    if isinstance(first, fx.Node):
        upper = relu_upper(graph, node)
        if upper is not None:
            return ReluOperator([first], upper)
        if isinstance(module, nn.BatchNorm2d) and type(module).forward is nn.BatchNorm2d.forward:
            if module.running_mean is not None and module.running_var is not None:
                return NormOperator([first], module)
        pool = _max_pool(module, node)
        if pool is not None:
            return MaxPoolOperator([first], pool)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return MeanOperator([first])
    maps = _concatenated(node)
    if maps is not None:
        return ConcatenationOperator(*maps)
    if node.meta.get("same_shapes") and is_addition(node):
        return AddOperator(node.args)  # type: ignore[arg-type]
    return AutogradOperator(interpreter, node)


def _concatenated(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """Return the maps that a node concatenates and the axis, not that of the images."""
    if node.op != "call_function" or node.target not in _CONCATENATIONS or not 1 <= len(node.args) <= 2:
        return None
    if set(node.kwargs) - {"dim", "axis"}:
        return None
    dim = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), 0)
    maps, rank = node.args[0], len(node.meta.get(SHAPE, ()))
    if not isinstance(maps, (tuple, list)) or not isinstance(dim, int) or not rank or dim % rank == 0:
        return None
    if not all(isinstance(each, fx.Node) and len(each.meta.get(SHAPE, ())) == rank for each in maps):
        return None
    return list(maps), dim


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
