"""Runs a folded model with few passes over memory, and differentiates it with respect to its input only.

A convolution, the addition of a shortcut and the ReLU that follow it become one module. torch's own convolution keeps its input
for the gradient of the weights; here nothing is kept but one bit per element of each ReLU.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal import ops
from pysal.engine.fold import Convolution, module_of, replace_by_module
from pysal.engine.relu_rules import current_rules

_ADDITIONS = (operator.add, torch.add)
# Images per pass for which oneDNN arranges the weights; other numbers run too.
PACKED_FOR = 8


class FusedConvolution(nn.Module):
    """min(max(convolution(input) + shortcut, 0), upper), each part but the convolution optional.

    Args:
        convolution: the folded convolution.
        upper: where the ReLU saturates: infinity, 6 for ReLU6; None without ReLU.
        input_shape: (C, H, W) of the input, for which the weights are arranged.
        backward_dtype: dtype of the input gradient's convolution.
    """

    def __init__(
        self, convolution: Convolution, upper: float | None, input_shape: tuple[int, ...], backward_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.convolution, self.upper, self.backward_dtype = convolution, upper, backward_dtype
        self.onednn = _onednn(convolution.weight)
        self.forward_weight = convolution.weight
        if self.onednn:
            shape = [PACKED_FOR, *input_shape]
            left, right, top, bottom = convolution.padding
            if convolution.symmetric is None:
                shape[2], shape[3] = shape[2] + top + bottom, shape[3] + left + right
            self.forward_weight = _packed(convolution, convolution.weight, self._padding, convolution.stride, shape)
        self._make_backward(input_shape)

    @property
    def _padding(self) -> tuple[int, int]:
        return self.convolution.symmetric or (0, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns between the first and the last input a window sees."""
        height, width = self.convolution.weight.shape[2:]
        dilation = self.convolution.dilation
        return dilation[0] * (height - 1), dilation[1] * (width - 1)

    def _make_backward(self, input_shape: tuple[int, ...]) -> None:
        """Arrange the weights of the input gradient: for stride 1 a convolution with the flipped kernel."""
        convolution = self.convolution
        weight = convolution.weight.to(self.backward_dtype)
        reach = self.reach
        self.flipped_padding: tuple[int, int] | None = None
        self.backward_weight = weight.contiguous(memory_format=torch.channels_last)
        if self.onednn and convolution.stride == (1, 1) and convolution.symmetric is not None:
            padding = (reach[0] - self._padding[0], reach[1] - self._padding[1])
            if min(padding) >= 0:
                self.flipped_padding = padding
                groups = convolution.groups
                grouped = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
                height = input_shape[1] + 2 * self._padding[0] - reach[0]
                width = input_shape[2] + 2 * self._padding[1] - reach[1]
                shape = [PACKED_FOR, weight.shape[0], height, width]
                self.backward_weight = _packed(convolution, grouped, padding, (1, 1), shape)

    def run(self, input: Tensor, shortcut: Tensor | None) -> Tensor:
        """Return the result; nothing is kept for a backward pass."""
        convolution = self.convolution
        if convolution.symmetric is None:
            input = F.pad(input, convolution.padding)
        geometry = (self._padding, convolution.stride, convolution.dilation, convolution.groups)
        if not self.onednn:
            padding, stride, dilation, groups = geometry
            output = F.conv2d(input, convolution.weight, convolution.bias, stride, padding, dilation, groups)
            output = output if shortcut is None else output.add_(shortcut)
            return output if self.upper is None else output.clamp_(0, self.upper)
        input = input.contiguous(memory_format=torch.channels_last)
        name, limits = ("none", []) if self.upper is None else ("relu", [])
        if self.upper is not None and self.upper < float("inf"):
            name, limits = "hardtanh", [0.0, self.upper]
        mkldnn = torch.ops.mkldnn
        if shortcut is None:
            result: Tensor = mkldnn._convolution_pointwise(
                input, self.forward_weight, convolution.bias, *geometry, name, limits, None
            )
            return result
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        result = mkldnn._convolution_pointwise.binary(
            input,
            shortcut,
            self.forward_weight,
            convolution.bias,
            *geometry,
            "add",
            1.0,
            None if self.upper is None else "relu",
            [],
            None,
        )
        return result if name != "hardtanh" else result.clamp_(max=self.upper)

    def input_gradient(self, grad: Tensor, input_shape: torch.Size) -> Tensor:
        """Return the gradient of the convolution's input from that of its output."""
        convolution, dtype = self.convolution, grad.dtype
        grad = grad.to(self.backward_dtype)
        if self.flipped_padding is not None:
            result: Tensor = torch.ops.mkldnn._convolution_pointwise(
                grad.contiguous(memory_format=torch.channels_last),
                self.backward_weight,
                None,
                self.flipped_padding,
                (1, 1),
                convolution.dilation,
                convolution.groups,
                "none",
                [],
                None,
            )
            return result.to(dtype)
        left, right, top, bottom = (0, 0, 0, 0) if convolution.symmetric is not None else convolution.padding
        height, width = input_shape[2:]
        padded = (height + top + bottom, width + left + right)
        # what the last window of the convolution did not reach
        beyond = [
            padded[i] + 2 * self._padding[i] - (grad.shape[2 + i] - 1) * convolution.stride[i] - self.reach[i] - 1
            for i in range(2)
        ]
        result = F.conv_transpose2d(
            grad,
            self.backward_weight,
            None,
            convolution.stride,
            self._padding,
            beyond,
            convolution.groups,
            convolution.dilation,
        )
        if convolution.symmetric is None:
            result = result[:, :, top : top + height, left : left + width]
        return result.to(dtype)

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return the result; where gradients are wanted, under the ReLU rule in force."""
        wanted = input.requires_grad or (shortcut is not None and shortcut.requires_grad)
        if torch.is_grad_enabled() and wanted:
            result: Tensor = Fused.apply(input, shortcut, self)  # type: ignore[no-untyped-call]
            return result
        return self.run(input, shortcut)


class Fused(torch.autograd.Function):
    """The gradient of a FusedConvolution with respect to its inputs."""

    follows_relu_rules = True

    @staticmethod
    def forward(ctx: Any, input: Tensor, shortcut: Tensor | None, module: FusedConvolution) -> Tensor:
        """Run the module and keep its ReLU's gates."""
        output = module.run(input, shortcut)
        ctx.module, ctx.input_shape, ctx.has_shortcut = module, input.shape, shortcut is not None
        ctx.is_relu = module.upper is not None
        if module.upper is not None:
            ctx.rules = current_rules()
            ctx.channels_last = not output.is_contiguous()
            ctx.save_for_backward(ops.guided_relu(output, upper=module.upper)[1])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of the input and the shortcut."""
        grad = grads[0]
        if ctx.module.upper is not None:
            rule = "plain" if ctx.rules is None else ctx.rules.rule
            (gates,) = ctx.saved_tensors
            grad = ops.guided_relu_backward(grad, gates, rule, channels_last=ctx.channels_last)
        input_grad = ctx.module.input_gradient(grad, ctx.input_shape) if ctx.needs_input_grad[0] else None
        return input_grad, grad if ctx.has_shortcut else None, None


def _onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _packed(
    convolution: Convolution, weight: Tensor, padding: tuple[int, int], stride: tuple[int, int], input_shape: list[int]
) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=torch.channels_last),
        list(padding),
        list(stride),
        list(convolution.dilation),
        convolution.groups,
        input_shape,
    )
    return result


def lower(graph: fx.GraphModule, example: Tensor, backward_dtype: torch.dtype = torch.float32) -> int:
    """Replace the convolutions of a folded graph, with what can be fused into them, in place; return how many.

    Args:
        graph: a graph made by `fold`.
        example: (1, C, H, W), whose shapes the weights are arranged for.
        backward_dtype: dtype of the input gradients' convolutions.
    """
    shapes = _Shapes(graph)
    with torch.no_grad():
        shapes.run(example)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    lowered = 0
    for node in list(graph.graph.nodes):
        convolution = module_of(graph, node)
        if not isinstance(convolution, Convolution) or node.args[0] not in shapes.found:
            continue
        last, inputs = node, [node.args[0]]
        addition = _only_user(last)
        if addition is not None and _is_addition(addition, shapes) and addition.args[0] is not addition.args[1]:
            shortcut = addition.args[1] if addition.args[0] is node else addition.args[0]
            if order[shortcut] < order[node] and shapes.found.get(shortcut) == shapes.found[node]:
                last, inputs = addition, [node.args[0], shortcut]
        upper = None
        activation = _only_user(last)
        if activation is not None and (upper := relu_upper(graph, activation)) is not None:
            last = activation
        fused = FusedConvolution(convolution, upper, shapes.found[node.args[0]][1:], backward_dtype)
        new = replace_by_module(graph, last, fused, *inputs)
        order[new], shapes.found[new] = order[last], shapes.found[last]
        lowered += 1
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return lowered


class _Shapes(fx.Interpreter):
    """Runs a graph and remembers the shape of every tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Any, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_addition(node: fx.Node, shapes: _Shapes) -> bool:
    if node.kwargs or len(node.args) != 2 or not all(arg in shapes.found for arg in node.args):
        return False
    if node.target in (operator.iadd, "add_"):  # changes its first argument, which nobody else may be waiting for
        return isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1
    return (node.op == "call_function" and node.target in _ADDITIONS) or (node.op == "call_method" and node.target == "add")


def relu_upper(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """Return where a ReLU node saturates, infinity for a plain one, or None where the node is no ReLU."""
    module = module_of(graph, node)
    if isinstance(module, nn.ReLU6):
        return 6.0
    if isinstance(module, nn.ReLU):
        return float("inf")
    if isinstance(module, nn.Hardtanh):
        return float(module.max_val) if module.min_val == 0 and module.max_val > 0 else None
    if node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_):
        return float("inf")
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return float("inf")
    return None
